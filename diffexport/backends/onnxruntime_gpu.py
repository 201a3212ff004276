"""ONNX Runtime on an NVIDIA GPU, by its CUDA provider or its TensorRT provider.

The state lies in device memory in two buffers each of x and h, which a graph reads and writes in turn through IO binding;
with CUDA, each direction is captured as a graph. ONNX Runtime goes to the CPU in silence where a provider cannot be
loaded, so the providers of every session are read back.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from diffexport.backends.cuda import driver_installed
from diffexport.backends.host import Arrays, Call, loop_feeds
from diffexport.backends.session import Array
from diffexport.bundle import Precision
from diffexport.cache import cache_folder, key_of
from diffexport.engines.profiles import Profile, input_ranges
from diffexport.errors import BackendError
from diffexport.plan import COLUMNS, GUIDANCE, NOISE
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    from diffexport.bundle import Bundle

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_NAMES = {"cuda": "ort-cuda", "tensorrt": "ort-trt"}
_CPU = "CPUExecutionProvider"
_NEEDS = {
    "cuda": "an NVIDIA driver, CUDA and cuDNN; pip install 'onnxruntime-gpu[cuda,cudnn]'",
    "tensorrt": "an NVIDIA driver, CUDA, cuDNN and TensorRT's libraries (libnvinfer)",
}
_STEPS = ("step", "step_plain")


def unavailable(provider: str) -> str | None:
    """Why a provider cannot be had here, or None; only a session shows whether it really loads."""
    return _missing(provider) or (None if driver_installed() else f"no NVIDIA driver; it needs {_NEEDS[provider]}")


def _missing(provider: str) -> str | None:
    """Why this ONNX Runtime has no such provider, or None."""
    if PROVIDERS[provider] in onnxruntime.get_available_providers():
        return None
    return (
        f"this onnxruntime has no {PROVIDERS[provider]}; "
        "pip uninstall onnxruntime, then pip install onnxruntime-gpu in its place"
    )


def open_session(
    bundle: Bundle, *, provider: str, allow_fallback: bool = False, cuda_graph: bool = True
) -> OnnxRuntimeGpuSession:
    """Open a bundle on the GPU.

    Args:
        provider: cuda or tensorrt.
        allow_fallback: run on the CPU where the provider cannot be had; otherwise that is an error.
        cuda_graph: of cuda, launch a step as one captured graph.
    """
    return OnnxRuntimeGpuSession(bundle, provider, allow_fallback=allow_fallback, cuda_graph=cuda_graph)


def provider_options(
    provider: str, graph: str, spec: ModelSpec, precision: Precision, profile: Profile, cache: Path, *, cuda_graph: bool
) -> list[tuple[str, dict[str, str]]]:
    """The providers of a graph's session in order, with their options.

    Args:
        profile: batches that TensorRT builds for.
        cache: folder of TensorRT's engines.
    """
    capture = "1" if cuda_graph and graph in _STEPS and provider == "cuda" else "0"
    cuda = (PROVIDERS["cuda"], {"use_tf32": "0", "enable_cuda_graph": capture})  # TF32 is on by default: fp32 is fp32
    if provider == "cuda":
        return [cuda]
    shapes: dict[str, list[str]] = {"min": [], "opt": [], "max": []}
    for name, shape in _inputs(graph, spec).items():
        for kind, sides in zip(shapes, input_ranges(name, shape, profile, {}), strict=True):
            shapes[kind].append(f"{name}:{'x'.join(map(str, sides))}")
    tensorrt = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
        "trt_fp16_enable": str(int(precision == "fp16")),
        "trt_bf16_enable": str(int(precision == "bf16")),
        **{f"trt_profile_{kind}_shapes": ",".join(each) for kind, each in shapes.items()},
    }
    return [(PROVIDERS["tensorrt"], tensorrt), cuda]


def _inputs(graph: str, spec: ModelSpec) -> dict[str, tuple[int | str, ...]]:
    """The inputs of a graph with free dimensions; none for a graph whose shapes TensorRT is left to find when it runs."""
    sample: tuple[int | str, ...] = ("batch", *spec.shape)
    label: dict[str, tuple[int | str, ...]] = {"label": ("batch",)} if spec.conditional else {}
    if graph in _STEPS:
        return {"x": sample, "h": sample, "z": sample} | label
    if graph in ("sampler", "sampler_decoded"):
        noise: tuple[int | str, ...] = ("noise_rows", "noise_batch", *spec.shape)
        return {"x_init": sample, "plan": ("rows", len(COLUMNS)), "noise": noise} | label
    return {}


class _State:
    """Buffers of one batch size on a device, and the calls of each graph that has run on them."""

    def __init__(self, spec: ModelSpec, batch: int, device: str) -> None:
        def room(shape: tuple[int, ...], dtype: Any) -> Any:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device, 0)

        shape = (batch, *spec.shape)
        self.x = [room(shape, np.float32), room(shape, np.float32)]  # the current one and the next
        self.h = [room(shape, np.float32), room(shape, np.float32)]
        self.z = room(shape, np.float32)
        self.z.update_inplace(np.zeros(shape, np.float32))  # rows without noise multiply it by zero
        self.label = room((batch,), np.int64)
        self.row = room((len(COLUMNS),), np.float32)
        self.calls: dict[str, tuple[Call, Call]] = {}
        self.current = 0


class OnnxRuntimeGpuSession:
    """The graphs of a bundle in ONNX Runtime on a GPU; see ``Session``."""

    max_batch: int | None = None

    def __init__(self, bundle: Bundle, provider: str, *, allow_fallback: bool, cuda_graph: bool) -> None:
        self.backend = _NAMES[provider]
        self._bundle = bundle
        self._provider = provider
        self._cuda_graph = cuda_graph
        missing = _missing(provider)
        if missing and not allow_fallback:
            raise BackendError(f"backend {self.backend!r}: {missing}")
        self._fell_back = missing is not None
        self._allow_fallback = allow_fallback
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._states: dict[int, _State] = {}
        self._state: _State | None = None
        self._captures = itertools.count(1)
        if not self._fell_back:
            self._session("step_plain")  # shows whether the provider loads

    @property
    def device(self) -> str:
        """What it runs on, as its sessions say."""
        return "CPU, since the GPU cannot be had" if self._fell_back else f"GPU 0 by {PROVIDERS[self._provider]}"

    def begin(
        self, x: Array, label: NDArray[np.int64] | None, h: Array | None = None, rows: Array | None = None
    ) -> None:
        state = self._states.get(len(x))
        if state is None:
            state = _State(self._bundle.spec, len(x), "cpu" if self._fell_back else "cuda")
            self._states[len(x)] = state
        self._state = state
        state.current = 0
        state.x[0].update_inplace(np.ascontiguousarray(x, np.float32))
        state.h[0].update_inplace(np.zeros_like(x) if h is None else np.ascontiguousarray(h, np.float32))
        if label is not None:
            state.label.update_inplace(np.ascontiguousarray(label, np.int64))

    def step(self, row: Array, z: Array | None = None) -> None:
        state = self._begun()
        graph = "step_plain" if row[GUIDANCE] == 1 else "step"
        if graph not in state.calls:
            state.calls[graph] = self._bound(graph, state, 0), self._bound(graph, state, 1)
        state.row.update_inplace(np.ascontiguousarray(row, np.float32))
        if row[NOISE] != 0:
            assert z is not None, "a row with noise needs z"
            state.z.update_inplace(np.ascontiguousarray(z, np.float32))
        state.calls[graph][state.current]()
        state.current = 1 - state.current

    def run(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> Array:
        return self._run("sampler", loop_feeds(x, label, rows, noise), ["x"])[0]

    def run_decoded(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> tuple[Array, Array]:
        latents, image = self._run("sampler_decoded", loop_feeds(x, label, rows, noise), ["x", "image"])
        return latents, image

    def decode(self, x: Array) -> Array:
        return self._run("decoder", {"x": x}, ["image"])[0]

    def state(self) -> tuple[Array, Array]:
        state = self._begun()
        return state.x[state.current].numpy().copy(), state.h[state.current].numpy().copy()

    def close(self) -> None:
        self._state = None
        self._states.clear()
        self._sessions.clear()

    def _begun(self) -> _State:
        assert self._state is not None, "begin() comes before step() and state()"
        return self._state

    def _bound(self, graph: str, state: _State, source: int) -> Call:
        """A call of a step graph from buffer ``source`` to the other."""
        session = self._session(graph)
        binding = session.io_binding()
        read = {"x": state.x[source], "h": state.h[source], "z": state.z, "label": state.label, "row": state.row}
        for node in session.get_inputs():
            binding.bind_ortvalue_input(node.name, read[node.name])
        for name, value in {"x_next": state.x[1 - source], "h_next": state.h[1 - source]}.items():
            binding.bind_ortvalue_output(name, value)
        options = onnxruntime.RunOptions()
        if self._cuda_graph and self._provider == "cuda":
            options.add_run_config_entry("gpu_graph_id", str(next(self._captures)))
        return functools.partial(session.run_with_iobinding, binding, options)

    def _run(self, graph: str, feeds: Arrays, wanted: list[str]) -> list[Array]:
        return cast(list[Array], self._session(graph).run(wanted, feeds))

    def _session(self, graph: str) -> onnxruntime.InferenceSession:
        if graph not in self._sessions:
            self._sessions[graph] = self._load(graph)
        return self._sessions[graph]

    def _load(self, graph: str) -> onnxruntime.InferenceSession:
        """A session of a graph, whose providers have been read back.

        Raises:
            BackendError: the graph cannot be loaded, or not on the GPU.
        """
        path, asked = self._bundle.graph(graph), PROVIDERS[self._provider]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        providers: list[Any] = [_CPU] if self._fell_back else self._providers(graph)
        try:
            with _quiet():
                session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's own exceptions share no base but this
            raise BackendError(f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from error
        found = session.get_providers()
        if asked not in found and not self._fell_back:
            if not self._allow_fallback:
                raise BackendError(
                    f"backend {self.backend!r}: asked ONNX Runtime for {asked}, got {', '.join(found)}; it needs "
                    f"{_NEEDS[self._provider]}. --allow-fallback runs on the CPU"
                )
            self._fell_back = True
        return session

    def _providers(self, graph: str) -> list[tuple[str, dict[str, str]]]:
        manifest = self._bundle.manifest
        profile = Profile(1, min(manifest.defaults.batch, manifest.max_batch), manifest.max_batch)
        key = key_of(self._bundle.digest, graph, onnxruntime.__version__, profile)
        cache = cache_folder() / self.backend / key
        if self._provider == "tensorrt":
            cache.mkdir(parents=True, exist_ok=True)
        return provider_options(
            self._provider, graph, manifest.model, manifest.precision, profile, cache, cuda_graph=self._cuda_graph
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What ONNX Runtime prints of a provider that fails, we say in our own words once it has been read back."""
    onnxruntime.set_default_logger_severity(4)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            onnxruntime.preload_dlls()  # CUDA and cuDNN from their Python packages, where these are installed
            yield
    finally:
        onnxruntime.set_default_logger_severity(2)
