"""Files from strangers: a short run of every reader on altered files, and the files that somebody would think of."""

import json
import os
import shutil
import struct
import zipfile

import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mending import edit_json, rehash
from refusals import assert_refused
from strangers import FACTS, altered, outcome, readers

from diffexport.backends.onnxruntime import load_graph
from diffexport.bundle import CERTIFICATE, GOLDEN, MANIFEST, PLANS, WEIGHTS, Bundle, read_tensors, write_tensors
from diffexport.errors import BackendError, BundleError, CheckpointError
from diffexport_reference.checkpoints import load_checkpoint
from diffexport_reference.model import TimeInputMLP

NAMES = (
    "manifest", "certificate", "plans", "golden cases", "graph", "graph with a loop", "settings of samples",
    "engine record", "engine header", "checkpoint", "pickle of a checkpoint", "old checkpoint", "own checkpoint",
    "safetensors", "facts", "config of a decoder", "weights of a decoder",
)  # fmt: skip

EDITS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1 << 20), st.integers(0, 1 << 12)), min_size=1, max_size=6)
NUMBERS = st.sampled_from([0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1])


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    made = readers(tmp_path_factory.mktemp("strangers"))
    assert tuple(made) == NAMES
    return made


@pytest.mark.parametrize("name", NAMES)
def test_whole_files_are_read(every, name):
    if name not in ("settings of samples", "engine record"):  # of another run; without its engine
        assert [outcome(every[name], seed) for seed in every[name].seeds[:1]] == [None]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(edits=EDITS, number=NUMBERS, seed=st.integers(0, 1))
def test_altered_files_are_taken_or_refused_in_one_line(every, name, edits, number, seed):
    seeds = every[name].seeds
    outcome(every[name], altered(seeds[seed % len(seeds)], edits, number))


# --- bundles


@pytest.fixture
def copy(toy_bundle, tmp_path):
    return shutil.copytree(toy_bundle("plain").path, tmp_path / "copy.diffx")


@pytest.mark.parametrize("name", ["../step", "..", ".", "", "/tmp/step", "a/b", "a\x1b[2J", "a\nb"])
def test_the_name_of_a_bundle_is_no_path(copy, diffx, tmp_path, name):
    """It names the picture that ``diffx sample`` writes where it is told nothing else."""
    edit_json(copy / MANIFEST, lambda m: m.update(name=name))
    rehash(copy)
    assert_refused(diffx("sample", copy, "--num", 1, "--steps", 1), "expected a plain file name")
    assert [path.name for path in tmp_path.iterdir()] == ["copy.diffx"]


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m["model"].update(shape=[1 << 20, 1 << 20, 1 << 20]), "numbers in a sample"),
    (lambda m: m["model"].update(num_classes=1 << 62), "num_classes"),
    (lambda m: m["model"]["schedule"].update(N=1 << 40), "N is 1099511627776"),
    (lambda m: m["model"].update(family="\x1b]0;owned\x07"), "can be printed"),
    (lambda m: m["defaults"].update(batch=1 << 40), "batch 1099511627776"),
    (lambda m: m.update(max_batch=0), "max_batch 0"),
    (lambda m: m["tools"].update(torch="2\x9b31m"), "can be printed"),
    (lambda m: m["files"].update({"a\nb": {"size": 1, "sha256": ""}}), "can be printed"),
])  # fmt: skip
def test_absurd_manifests_are_refused_before_anything_is_made(copy, diffx, change, message):
    edit_json(copy / MANIFEST, change)
    rehash(copy)
    for command in ("sample", "inspect"):
        assert_refused(diffx(command, copy), message)


@pytest.mark.parametrize("name", [MANIFEST, CERTIFICATE, WEIGHTS, "step.onnx", GOLDEN])
@pytest.mark.parametrize("kind", ["link", "pipe", "device", "folder"])
def test_only_regular_files_are_opened(copy, diffx, name, kind):
    """A pipe would hang, /dev/zero never end, and a link read something else."""
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if kind == "link":
        (copy.parent / "elsewhere").write_bytes(content)
        (copy / name).symlink_to(copy.parent / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(copy / name)
    elif kind == "folder":
        (copy / name).mkdir()
    else:
        (copy / name).symlink_to("/dev/zero")
    assert_refused(diffx("inspect", copy), name)


def test_a_manifest_of_a_gigabyte_is_not_read(copy):
    with (copy / MANIFEST).open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(BundleError, match="1073741824 bytes, at most"):
        Bundle.open(copy)


def _tensors(graph):
    """The tensors of a graph and of the graphs inside it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)


def _external(**entries):
    def change(model, tensor):
        del tensor.external_data[:]
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    return change


def _domain(model, tensor):
    model.graph.node[0].domain = "com.somebody"
    model.opset_import.add(domain="com.somebody", version=1)


def _domain_in_a_subgraph(model, tensor):
    body = next(a.g for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    body.node[0].domain = "com.somebody"


def _function(model, tensor):
    model.functions.add(name="f", domain="")


def _absurd_shape(model, tensor):
    small = next(t for t in _tensors(model.graph) if t.raw_data)
    del small.dims[:]
    small.dims.extend([1 << 40, 1 << 20])


PART = {"offset": "0", "length": "64"}


@pytest.mark.parametrize("graph", ["step", "sampler"])
@pytest.mark.parametrize(("change", "message"), [
    (_external(location="../../etc/passwd", **PART), "'../../etc/passwd', expected 'weights.bin'"),
    (_external(location="/etc/passwd", **PART), "'/etc/passwd'"),
    (_external(location="golden.safetensors", **PART), "expected 'weights.bin'"),
    (_external(**PART), "None, expected 'weights.bin'"),
    (_external(location=WEIGHTS, offset=str(1 << 60), length="64"), "ends at byte"),
    (_external(location=WEIGHTS, offset="0", length=str(1 << 60)), "ends at byte"),
    (_external(location=WEIGHTS, offset="-4", length="64"), "expected numbers"),
    (_external(location=WEIGHTS, offset="0"), "expected numbers"),
    (_external(location=WEIGHTS, script="rm", **PART), "'script', which is not known"),
    (_domain, "domain 'com.somebody'"),
    (_function, "functions"),
    (_absurd_shape, "a tensor of shape (1099511627776, 1048576)"),
])  # fmt: skip
def test_graphs_that_ask_for_more_are_refused(copy, diffx, graph, change, message):
    model = onnx.load(copy / f"{graph}.onnx", load_external_data=False)
    change(model, next(t for t in _tensors(model.graph) if t.external_data))
    (copy / f"{graph}.onnx").write_bytes(model.SerializeToString())
    rehash(copy, f"{graph}.onnx")
    assert_refused(diffx("sample", copy, "--num", 1), f"{graph}.onnx: refused, ")
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert message in str(caught.value)


def test_domains_inside_a_loop_are_seen(copy):
    model = onnx.load(copy / "sampler.onnx", load_external_data=False)
    _domain_in_a_subgraph(model, None)
    (copy / "sampler.onnx").write_bytes(model.SerializeToString())
    rehash(copy, "sampler.onnx")
    with pytest.raises(BundleError, match=r"domain 'com\.somebody'"):
        Bundle.open(copy)


def test_a_field_that_others_read_as_another_is_refused(copy):
    """A tag of five bytes, of which protobuf drops the upper bits: it reads a domain where others see no known field."""
    model = onnx.load(copy / "step.onnx", load_external_data=False)
    hidden = bytes([7 << 3 | 2 | 0x80, 0x80, 0x80, 0x80, 0x10]) + _sized(b"com.somebody")
    node = model.graph.node[0].SerializeToString() + hidden
    del model.graph.node[:1]
    graph = b"\x0a" + _sized(node) + model.graph.SerializeToString()
    model.ClearField("graph")
    (copy / "step.onnx").write_bytes(model.SerializeToString() + b"\x3a" + _sized(graph))
    rehash(copy, "step.onnx")
    with pytest.raises(BackendError, match=r"com\.somebody"):
        load_graph(copy / "step.onnx")
    with pytest.raises(BundleError, match="refused, it is no ONNX model"):
        Bundle.open(copy)


def _sized(data):
    """A length as protobuf writes it, and the bytes."""
    size, length = len(data), b""
    while size >= 128:
        size, length = size >> 7, length + bytes([size & 127 | 128])
    return length + bytes([size]) + data


ESCAPE = "\x1b]0;owned\x07"


@pytest.mark.parametrize("plant", [
    lambda path: edit_json(path / CERTIFICATE, lambda c: c["measurements"][0].update(check=ESCAPE)),
    lambda path: (edit_json(path / MANIFEST, lambda m: m.update(keep_fp32=[ESCAPE])), rehash(path)),
    lambda path: ((path / ESCAPE).write_bytes(b"file"), rehash(path, ESCAPE)),
], ids=["certificate", "manifest", "name of a file"])  # fmt: skip
def test_no_text_of_a_bundle_controls_the_terminal(copy, diffx, plant):
    plant(copy)
    for command in ("inspect", "verify"):
        _, out, err = diffx(command, copy)
        assert "expected text that can be printed" in out + err
        assert (out + err).replace("\n", "").isprintable()


def test_no_name_of_a_plan_controls_the_terminal(copy, diffx):
    plans = read_tensors(copy / PLANS)
    write_tensors(
        copy / PLANS, plans | {f"{ESCAPE}.20": plans["ddim.20"], f"{ESCAPE}.20.x_scale": plans["ddim.20.x_scale"]}
    )
    rehash(copy, PLANS)
    for command in ("inspect", "verify"):
        _, out, err = diffx(command, copy)
        assert "names a tensor with more than text that can be printed" in out + err
        assert (out + err).replace("\n", "").isprintable()


def test_numbers_of_a_thousand_digits_are_refused(copy, diffx):
    edit_json(copy / MANIFEST, lambda m: m.update(parameters=10**400))
    rehash(copy)
    assert_refused(diffx("inspect", copy), "a number takes more than 64 bits")


def test_schedules_beyond_all_numbers_are_refused(copy, diffx):
    beyond = {"kind": "loglinear", "start": 5e-324, "end": 1e308, "N": 1000}
    edit_json(copy / MANIFEST, lambda m: m["model"].update(schedule=beyond))
    rehash(copy)
    assert_refused(diffx("sample", copy, "--sampler", "lms-2"), "expected sigmas of 1e-09 to 1e+09")


@pytest.mark.parametrize("name", ["engines", "engines/step"])
def test_engines_are_not_looked_for_elsewhere(copy, diffx, tmp_path, name):
    """A build would write there, and remove what it takes for its own."""
    others = tmp_path / "others" / ".step.999999.abc"
    others.mkdir(parents=True)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).symlink_to(others.parent)
    status, out, _ = diffx("verify", copy)
    assert status == 1
    assert f"FAIL  engines: {copy / name}: a link, expected a folder in the bundle" in out
    if name == "engines":
        assert_refused(diffx("build", copy, "--target", "sm86"), "engines: a link")
    assert list(others.parent.iterdir()) == [others]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_settings_of_samples_are_a_regular_file(copy, diffx, tmp_path, kind):
    path = tmp_path / "out" / "settings.json"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert_refused(diffx("sample", copy, "--num", 1, "--steps", 1, "--out", "out/"), "settings.json: cannot be read (")


def test_a_graph_that_cannot_run_is_one_line(copy, diffx):
    """Sound as a file, but of other inputs than a step has."""
    others = [path.name for path in copy.glob("*.onnx") if path.name != "denoiser.onnx"]
    for name in others:
        shutil.copy(copy / "denoiser.onnx", copy / name)
    rehash(copy, *others)
    for more in ((), ("--one-call",)):
        assert_refused(diffx("sample", copy, "--num", 1, *more), "failed (")


@pytest.mark.parametrize("groups", [0, -1, 1 << 40])
def test_a_decoder_of_no_groups_is_refused(every, groups):
    """Found by scripts/fuzz: nothing divides by it, and no runtime sees it."""
    config = json.loads(every["config of a decoder"].seeds[0])
    refusal = outcome(every["config of a decoder"], json.dumps(config | {"norm_num_groups": groups}).encode())
    assert "num_groups" in refusal


def _safetensors(header, data=b"\0" * 64):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize("content", [
    _safetensors({"a": F32, "b": F32 | {"data_offsets": [8, 24]}}),
    _safetensors({"a": F32 | {"data_offsets": [0, 1 << 60]}}),
    _safetensors({"a": F32 | {"data_offsets": [1 << 63, 1 << 63]}}),
    _safetensors({"a": F32 | {"shape": [1 << 62, 1 << 62]}}),
    _safetensors({"a": F32 | {"shape": [1 << 32, 1 << 32, 0]}}),
    _safetensors({"a": F32 | {"dtype": "EXEC"}}),
    _safetensors({"a": F32 | {"data_offsets": [16, 0]}}),
    struct.pack("<Q", 1 << 62) + b"{}",
    struct.pack("<Q", 100) + b"{}",
    _safetensors({"a": {"dtype": "BF16", "shape": [32], "data_offsets": [0, 64]}}),
], ids=["overlapping", "beyond the end", "overflowing", "absurd shape", "shape that overflows", "unknown type",
        "backwards", "absurd header", "header cut short", "a type that NumPy has not"])  # fmt: skip
def test_safetensors_that_lie_are_refused(copy, tmp_path, diffx, content):
    for name in (PLANS, GOLDEN):
        (copy / name).write_bytes(content)
        rehash(copy, name)
    status, out, err = diffx("verify", copy)
    assert (status, err) == (1, "")
    assert "FAIL  plans" in out
    assert "FAIL  golden cases on ort" in out
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "model.safetensors", **FACTS)
    assert str(caught.value).isprintable()


# --- checkpoints: what runs code, unsound tensors and other damage is in tests/reference/test_reference_checkpoints.py


def test_archives_that_unfold_are_refused(tmp_path):
    torch.save(TimeInputMLP(2, hidden_dims=(8,)).state_dict(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as held,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in held.namelist():
            bomb.writestr(name, held.read(name) + b"\0" * (50 << 20 if name.endswith("data.pkl") else 0))
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="is compressed, which"):
        load_checkpoint(tmp_path / "bomb.pt", **FACTS)


def test_an_archive_that_claims_more_than_it_holds_is_refused(tmp_path):
    torch.save(TimeInputMLP(2, hidden_dims=(8,)).state_dict(), tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    entry = data.find(b"PK\x01\x02")  # the first entry of the directory: its two sizes are at 20
    data[entry + 20 : entry + 28] = struct.pack("<II", 1 << 31, 1 << 31)
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="its archive claims 21474"):
        load_checkpoint(tmp_path / "a.pt", **FACTS)


def test_tensors_that_share_a_storage_do_not_multiply_memory(tmp_path):
    """A file of 4 MB whose tensors would take 8 GB in float32."""
    shared = torch.zeros(1 << 21, dtype=torch.float16)
    state = {f"net.{k}.weight": shared.reshape(1 << 10, -1) for k in range(1000)}
    torch.save(state, tmp_path / "many.pt")
    assert (tmp_path / "many.pt").stat().st_size < 5 << 20
    with pytest.raises(CheckpointError, match="its tensors would take 8388608000 bytes, and are stored in 4194304"):
        load_checkpoint(tmp_path / "many.pt", **FACTS)


def test_pipes_and_devices_are_no_checkpoints(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", "/dev/zero"):
        with pytest.raises(CheckpointError, match="is a pipe or a device"):
            load_checkpoint(path)
