"""Real engines, built by TensorRT for RTX on a machine without a GPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch
from interrupts import hear_interrupts
from refusals import assert_refused
from small_disk import run_on_small_disk
from torch.utils.flop_counter import FlopCounterMode

from diffexport.bundle import CPU_GRAPHS, Bundle
from diffexport.engines.build import build
from diffexport.engines.header import read_header
from diffexport.engines.network import share
from diffexport.engines.profiles import Profile
from diffexport.engines.record import engines_of
from diffexport.errors import EngineError
from diffexport.verification import verify

NAMES = ["plain", "flow", "points", "decoded"]


@pytest.fixture(scope="session")
def engines(toy_bundle, tmp_path_factory):
    """``engines(name)``: a copy of a toy's bundle with an engine of every graph, for two targets and two profiles."""
    made = {}

    def make(name):
        if name not in made:
            path = tmp_path_factory.mktemp("engines") / f"{name}.diffx"
            bundle = Bundle.open(shutil.copytree(toy_bundle(name).path, path))
            graphs = [graph for graph in bundle.manifest.graphs if graph not in CPU_GRAPHS]
            built = build(bundle, "trt-rtx", targets=["sm120", "sm86"], batches="1-4,1", graphs=graphs)
            made[name] = bundle, {b.engine.record.key.graph: b for b in built}
        return made[name]

    return make


@pytest.fixture
def copy(engines, tmp_path):
    """A bundle with engines, to be changed."""
    bundle, _ = engines("plain")
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy.diffx"))


@pytest.mark.parametrize("name", NAMES)
def test_every_graph_becomes_an_engine_that_says_what_it_is(engines, toy, name):
    bundle, built = engines(name)
    assert set(built) == set(bundle.manifest.graphs) - set(CPU_GRAPHS)
    files = bundle.manifest.files
    for graph, b in built.items():
        record, key = b.engine.record, b.engine.record.key
        assert key.graph == graph
        assert not b.hit
        assert b.engine.path.parent == bundle.path / "engines"
        assert key.graph_sha256 == files[f"{key.graph}.onnx"].sha256
        assert key.weights_sha256 == files["weights.bin"].sha256
        assert (key.precision, key.tf32, key.level) == ("fp32", False, None)
        assert key.targets == ("sm86", "sm120")
        fixed = (Profile(1, 1, 1),)
        assert key.profiles == (fixed if graph == "decoder" else (*fixed, Profile(1, 4, 4)))
        header = read_header(b.engine.file)
        assert (header.version, header.targets) == (key.version, key.targets)
        assert header.size == record.engine.size == b.engine.file.stat().st_size
        assert share(record.network, "fp32") == 1
        assert record.build_seconds > 0
        assert record.peak_memory > record.engine.size
    step = built["step"].engine.record.network
    assert [t.name for t in step.inputs] == ["x", "h", "z", *(["label"] if bundle.spec.conditional else []), "row"]
    assert step.inputs[0].shape == ("batch", *bundle.spec.shape)
    assert [t.name for t in step.outputs] == ["x_next", "h_next"]


@pytest.mark.parametrize("name", NAMES)
def test_work_is_what_pytorch_counts(engines, toy, name):
    module, spec = toy("variance" if name == "decoded" else name)
    label = [torch.zeros(1, dtype=torch.int64)] if spec.conditional else []
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, *spec.shape), torch.ones(1), *label)
    plain = engines(name)[1]["step_plain"].engine.record.network
    assert 2 * sum(plain.multiply_adds.values()) == counter.get_total_flops()


def test_the_same_engine_is_built_from_another_folder_in_the_same_bytes(engines, tmp_path):
    bundle, built = engines("plain")
    folder = tmp_path / "a place with a name that is longer" / "elsewhere.diffx"
    moved = Bundle.open(shutil.copytree(bundle.path, folder, ignore=lambda *_: ["engines"]))
    (again,) = build(moved, "trt-rtx", targets=["sm86", "sm120"], batches="1,1-4", graphs=["step"])
    assert again.engine.file.read_bytes() == built["step"].engine.file.read_bytes()
    assert again.engine.path.name == built["step"].engine.path.name
    figures = dict(build_seconds=0.0, peak_memory=0)
    records = [msgspec.structs.replace(b.engine.record, **figures) for b in (again, built["step"])]
    assert records[0] == records[1]


def test_a_hit_is_used_and_anything_else_is_built_and_said(copy, diffx):
    words = "build", copy.path, "--target", "sm86,sm120", "--graph", "step_plain"
    status, out, _ = diffx(*words, "--batch", "1,1-4")
    assert (status, "up to date" in out) == (0, True)
    status, out, _ = diffx(*words, "--batch", "1")
    assert status == 0
    assert "built in" in out
    assert "the one that was there: batches 1,1-4, not 1" in out
    status, out, _ = diffx(*words, "--batch", "1", "--json")
    (result,) = json.loads(out)
    assert result["hit"]
    assert result["record"]["key"]["profiles"] == [{"least": 1, "best": 1, "most": 1}]
    status, out, _ = diffx(*words, "--batch", "1", "--tf32", "--workspace", "64")
    assert "tf32 False, not True; workspace the default, not 64000000" in out


def test_engines_of_other_weights_go_when_new_ones_come(copy):
    before = {engine.path for engine in engines_of(copy)[0]}
    files = dict(copy.manifest.files)
    (copy.path / "weights.bin").write_bytes((copy.path / "weights.bin").read_bytes() + b"\0")
    files["weights.bin"] = msgspec.structs.replace(files["weights.bin"], sha256="0" * 64)
    changed = Bundle(copy.path, msgspec.structs.replace(copy.manifest, files=files))
    (built,) = build(changed, "trt-rtx", targets=["sm89"], batches="1", graphs=["step_plain"])
    assert any("other weights" in words for words in built.instead_of)
    assert {engine.path for engine in engines_of(changed)[0]} == {built.engine.path}
    assert built.engine.path not in before


def test_a_graph_that_is_not_in_its_precision_is_refused(copy):
    half = Bundle(copy.path, msgspec.structs.replace(copy.manifest, precision="fp16"))
    before = sorted((copy.path / "engines").iterdir())
    with pytest.raises(EngineError, match=r"step_plain.onnx: asked for fp16, but .* are 100% FLOAT.*--fp16"):
        build(half, "trt-rtx", targets=["sm86"], graphs=["step_plain"])
    assert sorted((copy.path / "engines").iterdir()) == before


def test_what_the_parser_refuses_is_said_and_leaves_nothing(copy):
    (copy.path / "step.onnx").write_bytes(b"no graph")
    before = sorted((copy.path / "engines").iterdir())
    with pytest.raises(EngineError, match=r"step\.onnx: TensorRT's parser refuses it \(.+\)"):
        build(copy, "trt-rtx", targets=["sm86"], graphs=["step"])
    assert sorted((copy.path / "engines").iterdir()) == before


def test_a_changed_engine_is_seen(copy, diffx):
    first = engines_of(copy)[0][0]
    assert [f.passed for f in verify(copy.path, ["ort"]) if f.name == "engines"] == [True]
    data = bytearray(first.file.read_bytes())
    data[0x20] ^= 8  # a target that it has no code for
    first.file.write_bytes(data)
    assert [f.passed for f in verify(copy.path, ["ort"]) if f.name == "engines"] == [False]
    assert_refused(diffx("inspect", first.path), "is not the engine that its record describes")
    record = first.record
    altered = msgspec.structs.replace(record, key=msgspec.structs.replace(record.key, weights_sha256="0" * 64))
    shutil.copytree(first.path, first.path.with_name("stale"))
    (first.path.with_name("stale") / "engine.json").write_bytes(msgspec.json.encode(altered))
    shutil.rmtree(first.path)
    (finding,) = [f for f in verify(copy.path, ["ort"]) if f.name == "engines"]
    assert not finding.passed


def test_inspect_reads_an_engine_without_a_gpu(engines, diffx):
    bundle, built = engines("decoded")
    engine = built["step"].engine
    for path in (engine.path, engine.file):
        status, out, _ = diffx("inspect", path)
        assert status == 0
        for words in (
            "fp32: 100.0%",
            "1, 1-4",
            "header       version",
            "sm86, sm120",
            "label (batch) INT64",
            "CONVOLUTION",
        ):
            assert words in out
    assert json.loads(diffx("inspect", engine.path, "--json")[1])["record"]["key"]["graph"] == "step"
    assert str(engine.path) in diffx("inspect", bundle.path)[1]


@pytest.mark.parametrize(("words", "message"), [
    (("--target", "sm90"), "data-centre GPUs such as sm90 and sm100 need --backend trt"),
    (("--target", "sm98"), "did you mean 'sm89'"),
    (("--batch", "0"), "--batch 0: expected numbers such as 1,4,16 or a range"),
    (("--batch", "4-2"), "ends below its start"),
    (("--graph", "stepp"), "--graph stepp"),
    (("--level", "6"), "--level 6"),
    (("--backend", "ort"), "engines are built for trt and trt-rtx"),
    (("--backend", "trt"), "tensorrt is not installed; pip install 'diffexport[trt]'"),
])  # fmt: skip
def test_bad_calls_of_build_are_one_line(copy, diffx, words, message):
    assert_refused(diffx("build", copy.path, "--target", "sm86", *words), message)


def test_without_a_gpu_the_targets_have_to_be_named(copy, diffx):
    assert_refused(diffx("build", copy.path), "name the GPUs of the machines that will run it, such as --target sm89")


def test_bf16_needs_a_gpu_that_has_it(copy):
    bundle = Bundle(copy.path, msgspec.structs.replace(copy.manifest, precision="bf16"))
    with pytest.raises(EngineError, match="sm75: this GPU has no bf16"):
        build(bundle, "trt-rtx", targets=["sm75", "sm89"])


def _started(copy, **options):
    """A build of the command line, and its worker, which has just begun."""
    command = [Path(sys.executable).with_name("diffx"), "build", copy.path, "--target", "sm80", "--graph", "sampler"]
    process = subprocess.Popen(command, **options)
    deadline = time.monotonic() + 60
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while time.monotonic() < deadline:
        workers = [int(child) for child in children.read_text().split()]
        if workers:
            return process, workers
        time.sleep(0.01)
    raise AssertionError("no worker was started")


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.5])
def test_a_killed_build_leaves_nothing(copy, seconds):
    """Neither an engine, nor a process, nor a temporary folder after the next build."""
    folder = copy.path / "engines"
    before = sorted(folder.iterdir())
    process, workers = _started(copy)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")] == before
    build(copy, "trt-rtx", targets=["sm86", "sm120"], batches="1,1-4", graphs=["step"])
    assert sorted(folder.iterdir()) == before


def test_an_interrupt_ends_the_build_at_once(copy):
    before = sorted((copy.path / "engines").iterdir())
    process, _ = _started(copy, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_interrupts)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert sorted((copy.path / "engines").iterdir()) == before


def test_a_full_disk_leaves_the_engines_that_are_whole(toy_bundle, tmp_path):
    """None, or the first of two; the next build makes what is missing."""
    shutil.copytree(toy_bundle("plain").path, tmp_path / "before" / "a.diffx")
    words = "build", "a.diffx", "--target", "sm86", "--batch", "1", "--graph", "step", "--graph", "step_plain"
    for free, count, what in ((100_000, 0, "step"), (600_000, 1, "step_plain")):
        done = run_on_small_disk(tmp_path / str(count), words, free=free, before=tmp_path / "before")
        message = f"engine of {what}.onnx: cannot be written (No space left on device)"
        assert_refused((done.status, done.out, done.err), message)
        bundle = Bundle.open(done.folder / "a.diffx")
        assert len(engines_of(bundle)[0]) == len(os.listdir(bundle.path / "engines")) == count
        built = build(bundle, "trt-rtx", targets=["sm86"], batches="1", graphs=["step", "step_plain"])
        assert [b.hit for b in built] == [k < count for k in range(2)]
        assert all(finding.passed for finding in verify(bundle.path))


@pytest.mark.slow
def test_of_two_builds_of_one_bundle_both_end_well(toy_bundle, tmp_path):
    """Real commands at once; what is there then is what one alone makes."""
    places = [shutil.copytree(toy_bundle("plain").path, tmp_path / f"{name}.diffx") for name in ("both", "alone")]
    both, alone = places
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    diffx = sys.executable, "-c", "from diffexport_cli.app import main; main()"
    words = "--target", "sm86", "--batch", "1", "--force"
    processes = [
        subprocess.Popen(
            [*diffx, "build", path, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for path in (both, both, alone)
    ]
    ends = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    assert [(err, status) for _, err, status in ends] == [(b"", 0)] * 3
    engines = [
        {path.parent.name: path.read_bytes() for path in bundle.glob("engines/*/model.engine")} for bundle in places
    ]
    assert len(engines[0]) == 3
    assert engines[0] == engines[1]
    assert sorted(os.listdir(both / "engines")) == sorted(engines[0])
    assert all(finding.passed for finding in verify(both))
