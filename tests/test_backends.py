"""One contract for every backend: a step is the definition of ``diffexport.plan``, written here in NumPy."""

import shutil

import numpy as np
import pytest
import simulated_gpu
import torch

from diffexport.backends import BACKENDS, open_session
from diffexport.backends.onnxruntime import run_graph
from diffexport.bundle import Bundle
from diffexport.errors import BackendError
from diffexport.parity import relative_l2
from diffexport.plan import COLUMNS, denoise_rows
from diffexport.probes import mixing_row, probe_labels

TOY_NAMES = ["plain", "variance", "flow", "unguided", "points"]


def definition(module, spec, row, x, h, z, label):
    """One row in float64 around the module's float32 output."""
    r = {name: float(value) for name, value in zip(COLUMNS, row, strict=True)}
    channels = spec.shape[0]

    def network(labels):
        args = [torch.from_numpy((r["c_in"] * x).astype(np.float32)), torch.full((len(x),), r["c_noise"])]
        with torch.no_grad():
            return module(*args, *([] if labels is None else [torch.from_numpy(labels)])).double().numpy()

    out = network(label)
    if r["w"] != 1:
        cond, uncond = out, network(np.full_like(label, spec.num_classes))
        g = spec.guided_channels or channels
        out = cond.copy()
        out[:, :g] = uncond[:, :g] + r["w"] * (cond[:, :g] - uncond[:, :g])
    denoised = r["c_skip"] * x + r["c_out"] * out[:, :channels]
    if spec.clip:
        unclipped, denoised = denoised, np.clip(denoised, -spec.clip, spec.clip)
        if spec.clip_keeps == "eps":
            x = denoised + (x - unclipped)  # the noise that was predicted, on the clamped estimate
    noise = z * np.exp(r["v_z"] * out[:, channels:]) if spec.learned_variance else z
    x_next = r["x_x"] * x + r["x_d"] * denoised + r["x_h"] * h + r["x_z"] * noise
    return x_next, r["h_x"] * x + r["h_d"] * denoised + r["h_h"] * h


@pytest.fixture(params=sorted(BACKENDS))
def open_backend(request, toy, toy_bundle, monkeypatch, tmp_path):
    """``open_backend(name)``: a session of a toy on each backend. What cannot run here runs as far as it can: engines on
    a simulated GPU, ONNX Runtime's device buffers in host memory."""

    def open_it(name):
        bundle, options = toy_bundle(name), {}
        if request.param == "torch":
            options = {"module": toy(name)[0]}
        if request.param.startswith("ort-"):
            options = {"allow_fallback": True}
        if request.param.startswith("trt"):
            bundle = Bundle.open(shutil.copytree(bundle.path, tmp_path / f"{name}.diffx"))
            simulated_gpu.install(monkeypatch, request.param, bundle)
        return open_session(bundle, request.param, **options)

    return open_it


@pytest.mark.parametrize(
    ("name", "weight"),
    [(name, w) for name in TOY_NAMES for w in ((1.0,) if name in ("unguided", "points") else (1.0, 2.5, 0.0))],
)
def test_a_step_is_the_definition(open_backend, toy, rng, name, weight):
    module, spec = toy(name)
    session = open_backend(name)
    for batch in (1, 2, 5):
        x, h, z = rng.standard_normal((3, batch, *spec.shape)).astype(np.float32)
        label = probe_labels(spec, range(batch))
        row = mixing_row(spec, 0.5, weight)
        session.begin(x, label, h)
        session.step(row, z)
        expected = definition(module, spec, row, x, h, z, label)
        for found, wanted in zip(session.state(), expected, strict=True):
            assert relative_l2(found, wanted) < 2e-6
    session.close()


def test_the_definition_would_see_swapped_guidance(open_backend, toy, rng):
    """The contract above fails when conditioned and unconditioned halves change places."""
    module, spec = toy("plain")
    x, h, z = rng.standard_normal((3, 2, *spec.shape)).astype(np.float32)
    row, label = mixing_row(spec, 0.5, 2.5), probe_labels(spec, range(2))
    session = open_backend("plain")
    session.begin(x, label, h)
    session.step(row, z)
    row[COLUMNS.index("w")] = 1 - 2.5  # c + w*(u - c) = u + (1 - w)*(c - u)
    assert relative_l2(session.state()[0], definition(module, spec, row, x, h, z, label)[0]) > 1e-2


def test_state_stays_between_steps_and_starts_anew(open_backend, toy, rng):
    module, spec = toy("plain")
    session = open_backend("plain")
    x, h, z = rng.standard_normal((3, 3, *spec.shape)).astype(np.float32)
    label = probe_labels(spec, range(3))
    rows = [mixing_row(spec, sigma, weight) for sigma, weight in ((5.0, 2.0), (2.0, 1.0), (0.7, 2.0))]
    session.begin(x, label, h)
    wanted = (x, h)
    for row in rows:
        session.step(row, z)
        wanted = definition(module, spec, row, *wanted, z, label)
    for found, expected in zip(session.state(), wanted, strict=True):
        assert relative_l2(found, expected) < 5e-6
    session.begin(x, label)
    assert np.array_equal(session.state()[0], x)
    assert not session.state()[1].any()


def test_results_do_not_share_memory_with_the_session(open_backend, toy, rng):
    _, spec = toy("plain")
    session = open_backend("plain")
    x = rng.standard_normal((2, *spec.shape)).astype(np.float32)
    session.begin(x, probe_labels(spec, range(2)))
    row = denoise_rows(spec, [1.0])[0].astype(np.float32)
    session.step(row)
    kept = session.state()[0]
    before = kept.copy()
    session.step(row)
    assert np.array_equal(kept, before)


@pytest.mark.parametrize("name", TOY_NAMES)
def test_the_denoiser_graph_takes_a_noise_level_for_each_sample(toy, toy_bundle, rng, name):
    module, spec = toy(name)
    bundle = toy_bundle(name)
    sigma = np.array([0.02, 0.3, 0.9, 1.0] if name == "flow" else [0.02, 0.5, 7.0, 150.0], np.float32)
    x = rng.standard_normal((4, *spec.shape)).astype(np.float32)
    guidance = np.array([1.0, 2.0, 0.0, 4.0], np.float32)
    label = probe_labels(spec, range(4))
    feeds = {"x": x, "sigma": sigma, "guidance": guidance} | ({} if label is None else {"label": label})
    found = run_graph(bundle.graph("denoiser"), feeds)["denoised"]
    for k in range(4):
        weight = float(guidance[k]) if spec.guidable else 1.0
        row = denoise_rows(spec, [float(sigma[k])], weight)[0]
        part = slice(k, k + 1)
        zero = np.zeros_like(x[part])
        expected = definition(module, spec, row, x[part], zero, zero, None if label is None else label[part])[0]
        assert relative_l2(found[part], expected) < 2e-5


def test_a_backend_that_does_not_exist_or_is_not_installed_is_an_error(toy_bundle, monkeypatch):
    with pytest.raises(BackendError, match=r"'troch'.*did you mean 'torch'"):
        open_session(toy_bundle("plain"), "troch")
    with pytest.raises(BackendError, match="--checkpoint"):
        open_session(toy_bundle("plain"), "torch")
    with pytest.raises(BackendError, match="no option 'speed'; it takes threads"):
        open_session(toy_bundle("plain"), "ort", speed=11)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        open_session(toy_bundle("plain"), "ort")
