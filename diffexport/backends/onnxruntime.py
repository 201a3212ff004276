"""ONNX Runtime. Both step graphs read and write the same host buffers, so nothing is allocated or copied in the loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from diffexport.backends.session import Array
from diffexport.errors import BackendError
from diffexport.plan import COLUMNS, GUIDANCE, NOISE
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    from diffexport.bundle import Bundle

PROVIDER = "CPUExecutionProvider"


def open_session(bundle: Bundle, *, threads: int | None = None) -> OnnxRuntimeSession:
    """Open a bundle on the CPU.

    Args:
        threads: threads of one operator; every core that this process may use where not given.
    """
    return OnnxRuntimeSession(bundle.spec, bundle.path, threads=threads)


def load_graph(path: Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """An inference session of one graph, whose provider has been read back.

    Raises:
        BackendError: the graph cannot be loaded.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or _cores()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[PROVIDER])
    except Exception as error:  # ONNX Runtime's own exceptions share no base but this
        raise BackendError(f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from error
    if session.get_providers() != [PROVIDER]:
        raise BackendError(f"{path}: asked ONNX Runtime for {PROVIDER}, got {session.get_providers()}")
    return session


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _State:
    """Host buffers of one batch size, and the bindings of each graph that has run on them."""

    def __init__(self, spec: ModelSpec, batch: int) -> None:
        shape = (batch, *spec.shape)
        self.x = [np.zeros(shape, np.float32), np.zeros(shape, np.float32)]  # the current one and the next
        self.h = [np.zeros(shape, np.float32), np.zeros(shape, np.float32)]
        self.z = np.zeros(shape, np.float32)
        self.label = np.zeros(batch, np.int64)
        self.row = np.zeros(len(COLUMNS), np.float32)
        self.bindings: dict[str, list[onnxruntime.IOBinding]] = {}
        self.current = 0

    def bind(self, session: onnxruntime.InferenceSession) -> list[onnxruntime.IOBinding]:
        """Two bindings: from buffer 0 to 1, and from 1 to 0."""
        wanted = {node.name for node in session.get_inputs()}
        bindings = []
        for source in (0, 1):
            binding = session.io_binding()
            inputs: dict[str, NDArray[Any]] = {
                "x": self.x[source],
                "h": self.h[source],
                "z": self.z,
                "label": self.label,
                "row": self.row,
            }
            for name, array in inputs.items():
                if name in wanted:
                    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            for name, array in (("x_next", self.x[1 - source]), ("h_next", self.h[1 - source])):
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            bindings.append(binding)
        return bindings


class OnnxRuntimeSession:
    """The step graphs of a bundle in ONNX Runtime; see ``Session``."""

    backend = "ort"
    device = "CPU"

    def __init__(self, spec: ModelSpec, folder: Path, *, threads: int | None = None) -> None:
        self._spec = spec
        self._folder = folder
        self._threads = threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._state: _State | None = None

    def begin(self, x: Array, label: NDArray[np.int64] | None, h: Array | None = None) -> None:
        state = self._state
        if state is None or len(state.label) != len(x):
            state = self._state = _State(self._spec, len(x))
        state.current = 0
        state.x[0][:] = x
        state.h[0][:] = 0 if h is None else h
        if label is not None:
            state.label[:] = label

    def step(self, row: Array, z: Array | None = None) -> None:
        state = self._begun()
        name = "step_plain" if row[GUIDANCE] == 1 else "step"
        if name not in state.bindings:
            state.bindings[name] = state.bind(self._session(name))
        state.row[:] = row
        if row[NOISE] != 0:
            assert z is not None, "a row with noise needs z"
            state.z[:] = z
        self._sessions[name].run_with_iobinding(state.bindings[name][state.current])
        state.current = 1 - state.current

    def run(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> Array:
        feeds = {"x_init": x, "plan": rows, "noise": noise} | ({} if label is None else {"label": label})
        (result,) = self._session("sampler").run(["x"], feeds)
        return cast(Array, result)

    def run_decoded(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> tuple[Array, Array]:
        feeds = {"x_init": x, "plan": rows, "noise": noise} | ({} if label is None else {"label": label})
        latents, image = self._session("sampler_decoded").run(["x", "image"], feeds)
        return cast(Array, latents), cast(Array, image)

    def decode(self, x: Array) -> Array:
        (image,) = self._session("decoder").run(["image"], {"x": x})
        return cast(Array, image)

    def state(self) -> tuple[Array, Array]:
        state = self._begun()
        return state.x[state.current].copy(), state.h[state.current].copy()

    def close(self) -> None:
        self._state = None
        self._sessions.clear()

    def _begun(self) -> _State:
        assert self._state is not None, "begin() comes before step() and state()"
        return self._state

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        if name not in self._sessions:
            self._sessions[name] = load_graph(self._folder / f"{name}.onnx", self._threads)
        return self._sessions[name]


def run_graph(path: Path, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run a graph once on named arrays, without keeping anything: for checks, not for loops."""
    session = load_graph(path)
    names = [node.name for node in session.get_outputs()]
    wanted = {node.name for node in session.get_inputs()}
    results = session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    return dict(zip(names, cast(list[NDArray[Any]], results), strict=True))
