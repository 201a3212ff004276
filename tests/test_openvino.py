"""What OpenVINO has beyond the contract of all backends: precision, modes. And the cache, which ONNX Runtime shares."""

import gc
import tracemalloc

import numpy as np
import openvino
import pytest
from refusals import assert_refused

import diffexport.cache
from diffexport.backends import host, open_session
from diffexport.errors import BackendError
from diffexport.golden import check_golden
from diffexport.noise import normal
from diffexport.parity import relative_l2
from diffexport.plan import make_plan
from diffexport.probes import mixing_row, probe_guidance, probe_labels
from diffexport.verification import golden_finding

HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
HOST = ["ort", "openvino"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def one_step(session, spec, batch=3):
    x, h, z = normal(0, range(batch), range(3), spec.shape)
    session.begin(x, probe_labels(spec, range(batch)), h)
    session.step(mixing_row(spec, 0.5, 2.0), z)
    return session.state()


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.skipif(not HAS_BF16, reason="this processor has no bf16 arithmetic")
def test_bf16_holds_its_limits_and_is_bf16(toy_bundle):
    bundle = toy_bundle("plain")
    assert golden_finding(bundle, "openvino", precision="bf16").passed
    session = open_session(bundle, "openvino", precision="bf16")
    as_fp32 = check_golden(session, bundle.spec, bundle.golden(), "fp32")
    assert not all(m.passed for m in as_fp32)


def test_a_processor_without_bf16_is_named(toy_bundle, monkeypatch, diffx):
    real = openvino.Core.get_property
    monkeypatch.setattr(
        openvino.Core,
        "get_property",
        lambda core, device, name: ["FP32"] if name == "OPTIMIZATION_CAPABILITIES" else real(core, device, name),
    )
    path = toy_bundle("plain").path
    refused = diffx("sample", path, "--backend", "openvino", "--precision", "bf16")
    assert_refused(refused, "has no bf16 arithmetic; leave out --precision bf16")
    assert diffx("sample", path, "--backend", "openvino", "--num", "1")[0] == 0


def test_options_that_cannot_be_are_refused(toy_bundle, diffx):
    bundle = toy_bundle("plain")
    for options, message in [
        ({"precision": "fp16"}, "precision 'fp16': it computes in fp32 or bf16"),
        ({"mode": "fast"}, "mode 'fast': expected latency or throughput"),
    ]:
        with pytest.raises(BackendError, match=message):
            open_session(bundle, "openvino", **options)
    assert_refused(diffx("sample", bundle.path, "--backend", "ort", "--precision", "bf16"), "no option 'precision'")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_parts_of_a_batch_side_by_side_are_the_batch(toy_bundle, batch):
    bundle = toy_bundle("variance")
    together = one_step(open_session(bundle, "openvino", threads=1), bundle.spec, batch)
    in_parts = one_step(open_session(bundle, "openvino", threads=2, mode="throughput"), bundle.spec, batch)
    for found, expected in zip(in_parts, together, strict=True):
        assert relative_l2(found, expected) < 1e-6


def end_of_run(bundle, batch, guidance, backend="openvino", **options):
    """The last state of a run of six rows whose conditions are computed ahead, and the session."""
    plan = make_plan(bundle.spec, "ddpm", 6, guidance)
    rows = plan.rows.astype(np.float32)
    x, *z = normal(0, range(batch), range(len(rows) + 1), bundle.spec.shape)
    session = open_session(bundle, backend, **options)
    session.begin(x, probe_labels(bundle.spec, range(batch)), rows=rows)
    for row, noise in zip(rows, z, strict=True):
        session.step(row, noise)
    gc.collect()  # of the tensors that only OpenVINO still needs
    return session.state()[0], session


@pytest.mark.parametrize("batch", [1, 3])
def test_the_halves_of_guidance_side_by_side_are_the_guided_step(toy_bundle, batch):
    bundle, ends = toy_bundle("variance"), []
    for threads in (1, 2):  # one thread takes the guided step whole
        end, session = end_of_run(bundle, batch, probe_guidance(bundle.spec), threads=threads)
        ends.append(end)
        assert (("branch" in session._compiled), ("step_conditioned" in session._compiled)) == (
            threads == 2,
            threads == 1,
        )
    assert relative_l2(*ends) < 1e-5


@pytest.mark.parametrize(("fits", "backend", "options", "parts"), [
    (0.5, "openvino", {"threads": 2}, [1, 1, 1, 1, 1]),
    (2, "openvino", {"threads": 1}, [1, 2, 2]),
    (2, "openvino", {"threads": 2}, [1, 2, 2]),
    (2, "openvino", {"threads": 2, "mode": "throughput"}, [1, 1, 1, 2]),
    (2, "ort", {}, [1, 2, 2]),
    (5, "openvino", {"threads": 2}, [5]),
    (5, "openvino", {"threads": 2, "mode": "throughput"}, [2, 3]),
    (5, "ort", {}, [5]),
])  # fmt: skip
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_batch_in_parts_that_fit_the_caches_is_the_batch(
    toy_bundle, monkeypatch, fits, backend, options, parts, guidance
):
    bundle = toy_bundle("variance")
    monkeypatch.setattr(host, "CACHED", int(fits * bundle.manifest.widest))
    in_parts, session = end_of_run(bundle, 5, guidance, backend, **options)
    assert [read["x"].shape[0] for read, _ in session._state.arrays("step", 0)] == parts
    monkeypatch.setattr(host, "CACHED", 1 << 20)
    together, session = end_of_run(bundle, 5, guidance, "ort")
    assert len(session._state.parts) == 1
    assert relative_l2(in_parts, together) < 1e-5


def test_the_widest_value_of_a_network_is_in_the_manifest(toy_bundle):
    """16 channels of 6x6, after the first convolution of the toy."""
    assert toy_bundle("variance").manifest.widest == 16 * 6 * 6


@pytest.mark.parametrize("backend", HOST)
def test_the_loop_allocates_nothing(toy_bundle, backend):
    """After its first step a session makes no array, not even one as large as half of x."""
    bundle, batch = toy_bundle("plain"), 512
    session = open_session(bundle, backend)
    x, z = normal(0, range(batch), range(2), bundle.spec.shape)
    row = mixing_row(bundle.spec, 0.5, 2.0)
    session.begin(x, probe_labels(bundle.spec, range(batch)))
    for _ in range(2):
        session.step(row, z)
    tracemalloc.start()
    for _ in range(10):
        session.step(row, z)
    peak = tracemalloc.get_traced_memory()[1]
    session.state()
    seen = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 2
    assert seen > x.nbytes, "the measurement sees arrays"


@pytest.mark.parametrize("backend", HOST)
def test_a_second_session_takes_what_the_first_cached(toy_bundle, backend, cache):
    bundle = toy_bundle("plain")
    first = one_step(open_session(bundle, backend), bundle.spec)
    kept = {path: path.stat().st_mtime_ns for path in files(cache)}
    assert kept
    second = one_step(open_session(bundle, backend), bundle.spec)
    assert {path: path.stat().st_mtime_ns for path in files(cache)} == kept
    for found, expected in zip(second, first, strict=True):
        assert np.array_equal(found, expected)
    assert diffexport.cache.cache_size() == sum(path.stat().st_size for path in kept)


def test_a_cached_graph_is_not_compiled_again(toy_bundle, cache, monkeypatch):
    bundle = toy_bundle("plain")
    one_step(open_session(bundle, "openvino"), bundle.spec)

    def compiled_again(*_):
        raise AssertionError("compiled, not taken from the cache")

    monkeypatch.setattr(openvino.Core, "compile_model", compiled_again)
    one_step(open_session(bundle, "openvino"), bundle.spec)
    with pytest.raises(BackendError, match="compiled, not taken"):
        one_step(open_session(bundle, "openvino", threads=1), bundle.spec)


@pytest.mark.parametrize("backend", HOST)
def test_a_damaged_cache_is_made_anew(toy_bundle, backend, cache):
    bundle = toy_bundle("plain")
    expected = one_step(open_session(bundle, backend), bundle.spec)
    for path in files(cache):
        path.write_bytes(path.read_bytes()[:40])
    for _ in range(2):
        found = one_step(open_session(bundle, backend), bundle.spec)
        assert np.array_equal(found[0], expected[0])
    assert all(path.stat().st_size > 40 for path in files(cache) if path.suffix != ".bin")


@pytest.mark.parametrize("backend", HOST)
def test_a_cache_that_cannot_be_written_is_done_without(toy_bundle, backend, cache):
    cache.write_text("a file where the folder should be")
    bundle = toy_bundle("plain")
    assert np.isfinite(one_step(open_session(bundle, backend), bundle.spec)[0]).all()


@pytest.mark.parametrize("backend", HOST)
def test_no_cache_where_none_is_wanted(toy_bundle, backend, cache):
    bundle = toy_bundle("plain")
    one_step(open_session(bundle, backend, cache=False), bundle.spec)
    assert not cache.exists()


def test_the_least_recently_used_goes_first(cache, monkeypatch):
    monkeypatch.setattr(diffexport.cache, "LIMIT", 250)
    for key in "abc":
        assert diffexport.cache.put("kind", key, lambda work: (work / "x").write_bytes(bytes(100)))
        if key == "b":
            assert diffexport.cache.cached("kind", "a")  # used again, so that b is the oldest
    assert [path.name for path in sorted((cache / "kind").iterdir())] == ["a", "c"]
    assert diffexport.cache.cached("kind", "b") is None
