"""The C++ backends trt and trt-rtx on a simulated GPU: cpp/tests/simulated/gpu.cpp."""

import json
import re
import shutil

import numpy as np
import pytest
import simulated_gpu
from mending import shift_golden

from diffexport.bundle import GOLDEN, Bundle, read_tensors
from diffexport.engines.profiles import Profile
from diffexport.plan import GUIDANCE

VERSIONS = {"trt": "11.4.0.1", "trt-rtx": "1.7.1.116"}
PROFILES = ((1, 1), (3, 3), (2, 8))


class Gpu:
    """A bundle with engines, and what ``diffx-sample`` does with them."""

    def __init__(self, cpp, backend, path):
        self.cpp, self.backend, self.path = cpp, backend, path

    def build(self, *graphs, batches=PROFILES, **how):
        """Put engines of some graphs into the bundle, of all that the runtime runs where none is named."""
        bundle = Bundle.open(self.path)
        decoder = ["decoder"] if bundle.manifest.decoder else []
        for graph in graphs or ["step", "step_plain", *decoder]:
            profiles = tuple(Profile(low, high, high) for low, high in batches)
            how = {"version": VERSIONS[self.backend], **how}
            simulated_gpu.put_engine(bundle, self.backend, graph, profiles, **how)

    def run(self, *words, check=True, version=None):
        shim = str(self.cpp.folder / "tests" / "libdiffx-simulated-gpu.so")
        environment = {
            "DIFFX_CUDART_LIBRARY": shim,
            "DIFFX_TENSORRT_LIBRARY": shim,
            "DIFFX_TENSORRT_RTX_LIBRARY": shim,
            "SIMULATED_GPU_BUNDLE": str(self.path),
            "SIMULATED_GPU_VERSION": version or VERSIONS[self.backend],
        }
        words = [self.path, "--backend", self.backend, "--threads", 1, *words]
        return self.cpp.run("diffx-sample", *words, check=check, environment=environment)

    def sample(self, *words):
        """The images, and what the simulated GPU counted."""
        out = self.path.parent / "gpu.npy"
        report = self.run(*words, "--npy", out).stderr.split()
        counts = dict(zip(report[::2], map(int, report[1::2]), strict=True))
        left = [counts.pop(name) for name in ("device", "pinned", "streams", "events", "graphs", "contexts")]
        assert left == [0, 0, 0, 0, 0, 0]
        return np.load(out), counts

    def refused(self, *words, **how):
        """What it says in its one line where it draws nothing."""
        done = self.run(*words, check=False, **how)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("device ")]
        return line


@pytest.fixture(params=list(VERSIONS))
def gpu(request, cpp, toy_bundle, tmp_path):
    """``gpu(name)``: a toy's bundle, without engines at first."""

    def make(name="plain"):
        return Gpu(cpp, request.param, shutil.copytree(toy_bundle(name).path, tmp_path / f"{name}.diffx"))

    return make


@pytest.mark.parametrize("name", ["plain", "variance", "points", "decoded"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_images_are_those_of_onnx_runtime(gpu, tmp_path, name, batch):
    """Batches that fill a profile and batches that do not, with guidance and without, with history and noise."""
    gpu = gpu(name)
    gpu.build()
    for sampler, guidance in (("dpmpp-2m-sde", 1), ("ddpm", 1 if name == "points" else 2.5), ("heun", 1)):
        words = ["--num", 7, "--batch", batch, "--steps", 5, "--sampler", sampler, "--guidance-scale", guidance]
        found, _ = gpu.sample(*words, "--seed", 3)
        gpu.cpp.run("diffx-sample", gpu.path, *words, "--seed", 3, "--npy", tmp_path / "cpu.npy")
        np.testing.assert_allclose(found, np.load(tmp_path / "cpu.npy"), atol=1e-5)


def test_steps_are_launched_as_graphs_and_allocate_nothing(gpu):
    gpu = gpu()
    gpu.build()
    words = ["--num", 4, "--batch", 4, "--sampler", "ddpm", "--guidance-scale", 2]
    _, few = gpu.sample(*words, "--steps", 10)
    many, counts = gpu.sample(*words, "--steps", 50)
    assert counts["allocations"] == few["allocations"]
    # Golden cases take states of their own; of each direction of the run, the first step is not recorded yet.
    assert counts["launched"] - few["launched"] == (40 if gpu.backend == "trt" else 0)
    assert counts["enqueued"] - few["enqueued"] == (0 if gpu.backend == "trt" else 40)
    plain, counts = gpu.sample(*words, "--steps", 50, "--no-cuda-graph")
    assert counts["launched"] == 0
    np.testing.assert_array_equal(plain, many)


def test_a_small_engine_takes_the_default_batch_and_the_selftest_in_parts(gpu):
    gpu = gpu()
    gpu.build(batches=((1, 1),))
    _, counts = gpu.sample("--num", 3, "--steps", 5)
    assert counts["enqueued"] > 0
    text = gpu.run("--selftest").stdout
    assert re.search(r"^ok     run ", text, re.M)
    assert "all golden cases agree on " + gpu.backend in text
    assert gpu.refused("--num", 3, "--batch", 2).endswith(
        "the engine of step_plain takes up to 1; sample with --batch 1"
    )


def test_only_graphs_that_run_need_engines(gpu):
    gpu = gpu()
    gpu.build("step")
    gpu.sample("--num", 1, "--steps", 5, "--guidance-scale", 2)
    assert "there is no engine of step_plain; build it again" in gpu.refused("--guidance-scale", 1, "--steps", 5)


def test_an_engine_that_differs_is_refused_before_its_first_sample(gpu):
    gpu = gpu()
    gpu.build()
    cases = read_tensors(gpu.path / GOLDEN)
    guided = next(name[:-4] for name in cases if re.fullmatch(r"step\.\d\.row", name) and cases[name][GUIDANCE] != 1)
    shift_golden(gpu.path, f"{guided}.x_next")
    words = ["--num", 1, "--steps", 5]
    message = rf"golden cases differ from the recorded results on CUDA device 0 \(sm86\).* most of all {guided}.x_next"
    assert re.search(message, gpu.refused(*words, "--guidance-scale", 2))
    assert re.search(message, gpu.run("--selftest", check=False).stderr)
    gpu.sample(*words, "--guidance-scale", 1)  # its graph is another one
    gpu.sample(*words, "--guidance-scale", 2, "--no-selftest")


@pytest.mark.parametrize(("how", "message"), [
    ({}, "has no engine for {backend}; run `diffx build "),
    ({"version": "11.3.0.1"}, "built for {product} 11.3.0.1, found {version}; run `diffx build "),
    ({"targets": ("sm89",)}, 'built for ["sm89"], found sm86; run `diffx build '),
])  # fmt: skip
def test_engines_that_do_not_fit_are_not_loaded(gpu, how, message):
    gpu = gpu()
    if how:
        gpu.build(**how)
    product = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}[gpu.backend]
    expected = message.format(backend=gpu.backend, product=product, version=VERSIONS[gpu.backend])
    assert expected in gpu.refused()


@pytest.mark.parametrize(("kind", "message"), [
    ("cut off", "model.engine: "),
    ("no record", "engine.json: not a valid record"),
    ("other graph", "built from another graph"),
])  # fmt: skip
def test_damaged_engines_are_not_loaded(gpu, kind, message):
    gpu = gpu()
    gpu.build()
    for folder in (gpu.path / "engines").iterdir():
        record = json.loads((folder / "engine.json").read_text())
        if kind == "cut off":
            (folder / "model.engine").write_bytes((folder / "model.engine").read_bytes()[:-1])
        elif kind == "no record":
            (folder / "engine.json").write_text('{"schema": 1}')
        else:
            record["key"]["graph_sha256"] = "00"
            (folder / "engine.json").write_text(json.dumps(record))
    assert message in gpu.refused()


@pytest.mark.parametrize(("backend", "version", "interface"), [
    ("trt", "10.3.0.26", 10), ("trt", "12.0.0.1", 12), ("trt-rtx", "1.4.0.76", 10),
])  # fmt: skip
def test_a_library_of_another_interface_is_refused(cpp, toy_bundle, backend, version, interface):
    gpu = Gpu(cpp, backend, toy_bundle("plain").path)
    message = gpu.refused(version=version)
    assert f"is version {version}, which has the interface of TensorRT {interface}; this library was built" in message
    assert message.endswith(f"build it again with those of {interface}")
