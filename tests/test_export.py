"""``diffx export`` as its user meets it: bad input leaves one line and nothing else, and large weights work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from refusals import assert_refused
from safetensors.torch import save_file

import diffexport
from diffexport import comparison
from diffexport.backends import onnxruntime as onnxruntime_backend
from diffexport.errors import ExportError
from diffexport.exporter.forecast import forecast
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport.spec import ModelSpec
from diffexport.verification import verify
from diffexport_reference.official_dit import OfficialDiT

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "models" / "digits.pt"
MLP = ROOT / "tests" / "oracles" / "sd_mlp.safetensors"


class Evil:
    """A pickle that would make a file when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def make_bad(kind, path):
    if kind == "truncated":
        path.write_bytes(DIGITS.read_bytes()[:100_000])
    elif kind == "text":
        path.write_text("no weights here")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "evil":
        torch.save({"state_dict": Evil()}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "unknown":
        torch.save({"layer.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)}, path)
    elif kind == "nan":
        content = torch.load(DIGITS, weights_only=True)
        content["state_dict"]["x_embed.proj.weight"][0] = float("nan")
        torch.save(content, path)


@pytest.mark.parametrize(("kind", "message"), [
    ("missing", "bad.pt"),
    ("truncated", "bad.pt"),
    ("text", "bad.pt"),
    ("empty", "bad.pt"),
    ("folder", "bad.pt"),
    ("evil", "code"),
    ("unknown", "layer.weight"),
    ("nan", "x_embed.proj.weight"),
])  # fmt: skip
def test_bad_checkpoints_are_one_line_and_leave_nothing(diffx, tmp_path, kind, message):
    make_bad(kind, tmp_path / "bad.pt")
    before = sorted(tmp_path.iterdir())
    assert_refused(diffx("export", "bad.pt"), message)
    assert sorted(tmp_path.iterdir()) == before


def test_facts_that_weights_do_not_tell_are_asked_for_by_flag(diffx, tmp_path):
    shutil.copy(MLP, tmp_path / "mlp.safetensors")
    result = diffx("export", "mlp.safetensors")
    assert_refused(result, "--prediction")
    assert "--schedule" in result[2]
    assert "--scaled" in result[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlp.safetensors"]
    status, out, _ = diffx(
        "export", "mlp.safetensors", "--prediction", "eps", "--no-scaled", "--schedule", "ddpm", "--max-batch", "2"
    )
    assert (status, "wrote mlp.diffx" in out) == (0, True)
    (tmp_path / "mlp.json").write_text(json.dumps({"prediction": "eps", "scaled": False, "schedule": "ddpm"}))
    assert diffx("export", "mlp.safetensors", "--out", "again.diffx", "--max-batch", "2")[0] == 0
    for name in ("weights.bin", "step.onnx", "golden.safetensors"):
        assert (tmp_path / "again.diffx" / name).read_bytes() == (tmp_path / "mlp.diffx" / name).read_bytes()
    assert diffx("verify", "mlp.diffx", "--against", "mlp.safetensors")[0] == 0


@pytest.mark.parametrize(("words", "message"), [
    (("--prediction", "noise"), "--prediction noise"),
    (("--heads", "3"), "--heads 3"),
    (("--max-batch", "0"), "max_batch 0"),
    (("--plan", "ddim"), "NAME:STEPS"),
    (("--sampler", "dimm"), "did you mean 'ddim'"),
    (("--steps", "0"), "steps 0"),
    (("--out", "/dev/null/x.diffx"), "/dev/null"),
])  # fmt: skip
def test_bad_options_are_one_line_and_leave_nothing(diffx, tmp_path, words, message):
    assert_refused(diffx("export", DIGITS, *words), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("hidden", "lines", "message"), [
    (False, 1, "digits.diffx: needs about 9 MB of disk, {} has 2 MB free; free some, or choose another --out"),
    (True, 2, "digits.diffx: cannot be written (No space left on device)"),
])  # fmt: skip
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, hidden, lines, message):
    """A real one: a file system of 2 MB, mounted for this process alone; also where it fills only while writing."""
    start = "import sys; sys.argv[0] = 'diffx'; "
    if hidden:
        start += "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1e9, 0, 1e9); "
    script = (
        f"mount -t tmpfs -o size=2m tmpfs {tmp_path} && cd {tmp_path} && "
        f'{sys.executable} -c "{start}from diffexport_cli.app import main; main()" export {DIGITS}; '
        f"status=$?; ls -A {tmp_path}; exit $status"
    )
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.count("\n") == lines
    assert message.format(tmp_path) in done.stderr


def test_what_an_export_takes_is_said_before_it_begins(toy, toy_decoder, tmp_path):
    """Disk within a factor of what is then written; of large weights memory for them twice."""
    said = []
    network, spec = toy("variance")
    bundle = diffexport.export(
        network, spec, tmp_path / "a.diffx", decoder=toy_decoder(), max_batch=2, on_forecast=said.append
    )
    written = sum(path.stat().st_size for path in bundle.path.iterdir())
    (needed,) = said
    assert written < needed.disk < written + 5e6
    with torch.device("meta"):
        large = forecast(Large(), spec, None, "fp32")
        assert forecast(Large(), spec, None, "fp16").disk < 0.51 * large.disk
    assert 2.2e9 < large.disk < 2.3e9
    assert 4.9e9 < large.memory < 5.1e9
    assert str(large) == "about 5.0 GB of memory and 2.2 GB of disk"


def test_int8_of_more_than_the_quantizer_holds_is_refused_beforehand(tmp_path):
    spec = ModelSpec(family="large", shape=(8,), prediction="x0", schedule=DEFAULT_SCHEDULES["ddpm"])
    with torch.device("meta"):
        large = Large()
    with pytest.raises(ExportError, match=r"int8: 2\.2 GB of fp32 weights.*at most 2\.1 GB; export in fp16"):
        diffexport.export(large, spec, tmp_path / "a.diffx", precision="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "precision", "measured"), [
    ((8, 8, 1), "fp32", (0.56, 5.4)),  # models/digits.pt, 1.3 M
    ((8, 8, 1), "int8", (0.78, 1.9)),
    ((32, 32, 4), "fp32", (1.09, 133.3)),  # DiT-S/2
])  # fmt: skip
def test_the_forecast_is_near_what_was_measured(size, precision, measured):
    """Peak memory in GB and size of the bundle in MB."""
    digits = size[2] == 1
    with torch.device("meta"):
        module = OfficialDiT(
            input_size=size[0], in_channels=size[2], hidden_size=128 if digits else 384, depth=4 if digits else 12,
            num_heads=4 if digits else 6, num_classes=10 if digits else 1000,
        )  # fmt: skip
    spec = ModelSpec(family="dit", shape=(size[2], *size[:2]), prediction="eps", schedule=DEFAULT_SCHEDULES["ddpm"])
    needed = forecast(module, spec, None, precision)
    memory, disk = measured
    assert 0.85 * memory < needed.memory / 1e9 < 1.25 * memory
    assert disk < needed.disk / 1e6 < disk + 6


def test_the_data_itself_is_a_model_whose_answer_is_known(diffx, tmp_path):
    """``--model ideal`` stores the data set; samples of its graph are its data."""
    data = np.random.default_rng(0).choice([-1.0, 1.0], (6, 1, 4, 4)).astype(np.float32)
    np.savez("data.npz", x=data)
    assert diffx("train", "data.npz", "--model", "ideal", "--layout", "nchw", "--out", "ideal.pt")[0] == 0
    assert diffx("export", "ideal.pt", "--max-batch", "4")[0] == 0
    assert (
        diffx("sample", "ideal.diffx", "--num", "12", "--sampler", "dpmpp-2m", "--grid", "karras", "--npz", "x.npz")[0]
        == 0
    )
    x = np.load("x.npz")["x"]
    distances = np.abs(x[:, None] - data[None]).max((2, 3, 4)).min(1)
    assert distances.max() < 1e-2


class Counting(torch.nn.Module):
    """Another module, noting how many samples it was asked for."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.samples = []

    def forward(self, x, c_noise, label):
        if not torch.compiler.is_compiling():
            self.samples += [x[k].numpy().tobytes() for k in range(len(x))]
        return self.module(x, c_noise, label)


def test_of_a_slow_model_pytorch_computes_little_and_nothing_twice(toy, tmp_path, monkeypatch):
    """Guided D at five levels, one more sample, a plain row of the loop, and four steps; golden cases cost nothing more."""
    network, spec = toy("plain")
    monkeypatch.setattr(comparison, "VAST_PARAMETERS", 0)
    monkeypatch.setattr(onnxruntime_backend, "SMALL", 0)  # graphs take turns
    counting = Counting(network).eval()
    bundle = diffexport.export(counting, spec, tmp_path / "a.diffx", max_batch=2)
    assert len(counting.samples) == 5 * 2 + 2 + 1 + 4
    assert {len(bundle.golden()[name]) for name in ("step.0.x", "loop.x", "run.x")} == {1}
    assert all(finding.passed for finding in verify(bundle.path, ["ort", "openvino"]))
    batches = {m.check: m.batch for m in bundle.certificate().measurements}
    assert {name: batches[name] for name in batches if "4 steps" in name} == {"dpmpp-2m, 4 steps, guidance 1": 1}
    assert max(batches.values()) == 5


class Large(torch.nn.Module):
    """2.2 GB of weights, of which a step reads all."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 23_500)
        self.middle = torch.nn.Linear(23_500, 23_500)
        self.last = torch.nn.Linear(23_500, 8)

    def forward(self, x, c_noise):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x / (1 + c_noise[:, None]))))))


@pytest.mark.slow
def test_weights_over_two_gigabytes_work(tmp_path):
    """Past the limit of one protobuf message, through all graphs of the bundle."""
    torch.manual_seed(0)
    module = Large().eval().requires_grad_(False)
    spec = ModelSpec(family="large", shape=(8,), prediction="x0", schedule=DEFAULT_SCHEDULES["ddpm"])
    bundle = diffexport.export(module, spec, tmp_path / "large.diffx", max_batch=2)
    assert (bundle.path / "weights.bin").stat().st_size > 2**31
    assert bundle.certificate().passed
    shutil.rmtree(bundle.path)


def test_safetensors_with_prefixes_are_read(diffx, tmp_path):
    """Wrappers of training leave their names before every key; they are taken off and said."""
    content = torch.load(DIGITS, weights_only=True)
    state = {f"module.{name}": value.float() for name, value in content["state_dict"].items()}
    save_file(state, tmp_path / "dit.safetensors")
    spec = content["spec"]["schedule"]
    facts = {"heads": 4, "prediction": "v", "scaled": True, "schedule": spec, "label_names": list("0123456789")}
    (tmp_path / "dit.json").write_text(json.dumps(facts))
    status, out, _ = diffx("export", "dit.safetensors", "--max-batch", "2")
    assert status == 0
    assert "module." in out
    assert diffx("verify", "dit.diffx", "--against", DIGITS)[0] == 0


@pytest.mark.parametrize("name", ["plain", "points"])
def test_large_weights_belong_to_the_outermost_graph_of_the_loop(toy, toy_bundle, tmp_path, monkeypatch, name):
    """Where they are held once; the loop gives what it gives with the weights in its branches."""
    from diffexport.exporter import compose

    small = toy_bundle(name)
    monkeypatch.setattr(compose, "LARGE", 1)
    large = diffexport.export(*toy(name), tmp_path / "large.diffx", max_batch=4)
    held = []
    for bundle in (large, small):
        graph = onnx.load(bundle.graph("sampler"), load_external_data=False).graph
        held.append({weight.name for weight in graph.initializer if weight.name.startswith("net.")})
    assert held[0]
    assert not held[1]
    found, expected = (
        bundle.sampler("ort").sample(num=3, steps=4, sampler="ddpm", one_call=True) for bundle in (large, small)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
