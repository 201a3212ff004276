"""What the backends trt and trt-rtx do around an engine, on a simulated GPU; and what they say where there is none."""

import shutil

import msgspec
import numpy as np
import pytest
import simulated_gpu
from refusals import assert_refused

from diffexport.backends import open_session
from diffexport.backends.cuda import Staging
from diffexport.bundle import Bundle
from diffexport.engines.profiles import Profile
from diffexport.engines.record import engines_of
from diffexport.errors import BackendError, EngineError, ShapeError
from diffexport.verification import golden_finding

BACKENDS = ["trt", "trt-rtx"]


@pytest.fixture(params=BACKENDS)
def on_gpu(request, toy_bundle, monkeypatch, tmp_path):
    """``on_gpu(name, **how)``: a toy's bundle with simulated engines, the backend, and the simulated CUDA and TensorRT."""

    def make(name="plain", **how):
        bundle = Bundle.open(shutil.copytree(toy_bundle(name).path, tmp_path / f"{name}.diffx"))
        return bundle, request.param, *simulated_gpu.install(monkeypatch, request.param, bundle, **how)

    return make


@pytest.mark.parametrize("name", ["plain", "variance", "points"])
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_samples_are_those_of_onnx_runtime(on_gpu, name, batch):
    """Batches that fill a profile and batches that do not, of steps with noise and without, and in one call."""
    bundle, backend, cuda, _ = on_gpu(name)
    for settings in (
        {"sampler": "ddpm", "steps": 4, "guidance_scale": 2.0 if bundle.spec.guidable else 1.0},
        {"sampler": "dpmpp-2m", "steps": 3, "guidance_scale": 1.0, "one_call": True},
        {"sampler": "ddpm", "steps": 3, "one_call": True},
    ):
        wanted = bundle.sampler("ort").sample(num=7, seed=3, batch=batch, **settings)
        with bundle.sampler(backend) as sampler:
            assert np.abs(sampler.sample(num=7, seed=3, batch=batch, **settings) - wanted).max() < 1e-4
    assert cuda.left == (0, 0, 0, 0)


def test_images_are_those_of_onnx_runtime(on_gpu):
    bundle, backend, _, _ = on_gpu("decoded")
    expected, found = [], []
    settings = {"sampler": "ddpm", "steps": 3, "seed": 1, "batch": 2, "one_call": True}
    with bundle.sampler("ort") as sampler:
        x = sampler.sample([1, 2, 3], on_images=expected.append, **settings)
        decoded = sampler.decode(x)
    with bundle.sampler(backend) as sampler:
        sampler.sample([1, 2, 3], on_images=found.append, **settings)
        np.testing.assert_allclose(sampler.decode(x), decoded, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-4)


def test_nothing_is_allocated_in_the_loop(on_gpu):
    bundle, backend, cuda, _ = on_gpu()
    with bundle.sampler(backend) as sampler:
        first = sampler.sample(num=4, sampler="ddpm", steps=3, guidance_scale=2.0, batch=4)
        before, launched = cuda.allocations, cuda.launched
        again = sampler.sample(num=4, sampler="ddpm", steps=30, guidance_scale=2.0, batch=4)
        assert cuda.allocations == before
        assert cuda.launched - launched == (30 if backend == "trt" else 0)  # RTX captures inside the engine
        assert not np.array_equal(first, again)
    assert cuda.left == (0, 0, 0, 0)


def test_without_a_cuda_graph_the_results_are_the_same(on_gpu):
    bundle, backend, cuda, _ = on_gpu()
    settings = {"num": 3, "sampler": "ddpm", "steps": 4, "batch": 3}
    with bundle.sampler(backend) as sampler:
        captured = sampler.sample(**settings)
    launched = cuda.launched
    with bundle.sampler(backend, cuda_graph=False) as sampler:
        assert np.array_equal(sampler.sample(**settings), captured)
    assert cuda.launched == launched


def test_the_simulation_sees_pinned_memory_that_is_written_too_early(on_gpu, monkeypatch):
    bundle, backend, _, _ = on_gpu()
    settings = {"num": 3, "sampler": "ddpm", "steps": 4, "batch": 3}
    with bundle.sampler(backend, selftest=False) as sampler:
        wanted = sampler.sample(**settings)

    def without_waiting(self, array):
        self._array[: len(array)] = array

    monkeypatch.setattr(Staging, "fill", without_waiting)
    with bundle.sampler(backend, selftest=False) as sampler:
        assert np.abs(sampler.sample(**settings) - wanted).max() > 1e-3


def test_an_engine_that_computes_something_else_is_refused_before_the_first_sample(on_gpu, toy_bundle):
    bundle, backend, _, trt = on_gpu()
    for digest, (record, graph) in trt.engines.items():
        if record.key.graph == "step":  # guidance the other way round, plausible and wrong
            trt.engines[digest] = record, _swapped(graph)
    with bundle.sampler(backend) as sampler:
        sampler.sample(num=2, steps=2, guidance_scale=1.0)  # step_plain is right
        with pytest.raises(
            BackendError, match=r"does not give PyTorch's results: golden step .* relative L2.*no-selftest"
        ):
            sampler.sample(num=2, steps=2, guidance_scale=2.0)
        with pytest.raises(BackendError, match="does not give PyTorch's results"):  # and not only the first time
            sampler.sample(num=2, steps=2, guidance_scale=2.0)
    with bundle.sampler(backend, selftest=False) as sampler:
        assert np.isfinite(sampler.sample(num=2, steps=2, guidance_scale=2.0)).all()
    assert not golden_finding(bundle, backend).passed


def _swapped(graph):
    """The graph with the null label in place of each label."""
    import onnx

    model = onnx.load_model(graph, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Concat" and "label" in node.input:
            node.input[:] = reversed(node.input)
    path = graph.with_name("swapped.onnx")
    path.write_bytes(model.SerializeToString())
    return path


def test_the_loop_engine_is_tested_too_and_its_state_is_kept(on_gpu):
    bundle, backend, _, _ = on_gpu()
    session = open_session(bundle, backend)
    x = np.ones((2, *bundle.spec.shape), np.float32)
    label = np.array([1, 2], np.int64)
    session.begin(x, label, 2 * x)
    plan = bundle.plan(steps=2)
    session.run(x, label, plan.rows.astype(np.float32), np.zeros((1, 1, *bundle.spec.shape), np.float32))
    assert np.array_equal(session.state()[0], x)
    assert np.array_equal(session.state()[1], 2 * x)
    session.close()


def test_golden_cases_run_in_parts_on_an_engine_of_batch_1(on_gpu):
    bundle, backend, _, _ = on_gpu(batches=((1, 1),))
    assert golden_finding(bundle, backend).passed
    with bundle.sampler(backend) as sampler:
        assert sampler.session.max_batch == 1
        assert sampler.sample(num=3, steps=2, guidance_scale=2.0).shape == (3, *bundle.spec.shape)
        with pytest.raises(
            ShapeError, match=r"batch 2: the engine of step takes up to 1; sample with --batch 1, or run"
        ):
            sampler.sample(num=3, steps=2, guidance_scale=2.0, batch=2)


@pytest.mark.parametrize(("how", "message"), [
    ({"capability": (8, 9)}, r"engines/.*: built for sm86, found sm89; run `diffx build .* --backend "),
    ({"version": "1.8.0.1"}, r"built for tensorrt\w* 1\.7\.1\.116, found 1\.8\.0\.1; run `diffx build"),
])  # fmt: skip
def test_an_engine_for_something_else_is_named_with_what_to_run(on_gpu, how, message):
    bundle, backend, _, _ = on_gpu(**how)
    with pytest.raises(BackendError, match=message):
        bundle.sampler(backend)


def test_stale_damaged_and_missing_engines_are_refused(on_gpu):
    bundle, backend, _, _ = on_gpu()
    for engine in engines_of(bundle)[0]:
        if engine.record.key.graph == "step":
            engine.file.write_bytes(engine.file.read_bytes() + b"x")
        if engine.record.key.graph == "sampler":
            shutil.rmtree(engine.path)
    with bundle.sampler(backend) as sampler:
        with pytest.raises(EngineError, match="is not the engine that its record describes"):
            sampler.sample(num=1, steps=2, guidance_scale=2.0)
        with pytest.raises(BackendError, match=r"has no engine of sampler; run `diffx build .* --graph sampler`"):
            sampler.sample(num=1, steps=2, one_call=True)
    files = dict(bundle.manifest.files)
    files["weights.bin"] = msgspec.structs.replace(files["weights.bin"], sha256="0" * 64)
    changed = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, files=files))
    with pytest.raises(BackendError, match=r"built from other weights: .*, the bundle has 000000000000\.\.\.; run"):
        open_session(changed, backend)
    shutil.rmtree(bundle.path / "engines")
    with pytest.raises(BackendError, match=f"has no engine for {backend}; run `diffx build"):
        bundle.sampler(backend)


def test_step_graphs_of_different_profiles_run_on_one_state(on_gpu):
    bundle, backend, _, trt = on_gpu()
    for engine in engines_of(bundle)[0]:
        if engine.record.key.graph == "step":
            shutil.rmtree(engine.path)
    simulated_gpu.put_engine(bundle, backend, "step", (Profile(6, 6, 6),))
    trt.show(bundle)
    settings = {"num": 2, "steps": 5, "sampler": "ddpm", "guidance_scale": 2.0, "guidance_interval": (0.5, 5.0)}
    wanted = bundle.sampler("ort").sample(**settings)
    with bundle.sampler(backend) as sampler:
        np.testing.assert_allclose(sampler.sample(**settings), wanted, atol=1e-4)


def test_a_failing_call_of_cuda_is_an_error(on_gpu, monkeypatch):
    bundle, backend, cuda, _ = on_gpu()
    monkeypatch.setattr(cuda, "cudaMalloc", lambda size: (simulated_gpu.INVALID, None))
    with (
        bundle.sampler(backend) as sampler,
        pytest.raises(BackendError, match="CUDA: cudaMalloc: cudaErrorInvalidValue"),
    ):
        sampler.sample(num=1, steps=1)


def test_without_a_driver_it_is_one_line_that_says_what_still_works(diffx, toy_bundle):
    result = diffx("sample", toy_bundle("plain").path, "--backend", "trt-rtx")
    assert_refused(result, "has no NVIDIA driver, so that no engine can run here; building for other machines works")
