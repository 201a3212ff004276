"""TensorRT, both products: engines built by ``diffx build``, run through cuda-python.

The state, the noise, the label and the row lie in device memory from ``begin`` on. A step sends the row and its noise from
pinned memory and launches one captured graph: the engine, then the new state over the old. B is the user's batch; where the
engine's profile is fixed at a larger one, the rest is computed and dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffexport.backends.cuda import DeviceArray, Staging, Stream, device
from diffexport.backends.host import Arrays, loop_feeds
from diffexport.backends.session import Array
from diffexport.engines.header import check_header
from diffexport.engines.lookup import Lookup
from diffexport.engines.messages import error_log
from diffexport.engines.products import PRODUCTS, Product
from diffexport.engines.record import Engine
from diffexport.errors import BackendError, EngineError
from diffexport.plan import COLUMNS, GUIDANCE, NOISE
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    from diffexport.bundle import Bundle


def unavailable(product: str) -> str | None:
    """Why no engine of a product can run here, or None."""
    try:
        PRODUCTS[product].load()
        device()
    except (BackendError, EngineError) as error:
        return str(error)
    return None


def open_session(bundle: Bundle, *, product: str, cuda_graph: bool = True) -> TensorRtSession:
    """Open a bundle's engines on the GPU.

    Args:
        product: trt or trt-rtx.
        cuda_graph: launch a step as one captured graph.
    """
    return TensorRtSession(bundle, PRODUCTS[product], cuda_graph=cuda_graph)


class _Executable:
    """An engine on the device, and a context to run it in."""

    def __init__(self, trt: Any, log: Any, runtime: Any, engine: Engine, *, cuda_graph: bool) -> None:
        engine.check_file()
        check_header(engine)
        self._file, self._log = engine.file, log
        self.inputs = {given.name: given.shape for given in engine.record.network.inputs}
        self._context: Any = None
        self._engine: Any = runtime.deserialize_cuda_engine(engine.file.read_bytes())
        if self._engine is None:
            raise BackendError(f"{self._file}: cannot be loaded ({log.why()})")
        if captures_itself(trt):
            runtime_config = self._engine.create_runtime_config()
            whole, none = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE, trt.CudaGraphStrategy.DISABLED
            runtime_config.cuda_graph_strategy = whole if cuda_graph else none
            self._context = self._engine.create_execution_context(runtime_config)
        else:
            self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendError(f"{self._file}: has no room on the GPU to run ({log.why()})")

    def use(self, profile: int, stream: Stream) -> None:
        """Take one of its profiles, before anything is bound."""
        self._must(self._context.set_optimization_profile_async(profile, int(stream.handle)), f"profile {profile}")
        stream.synchronize()

    def bind(self, name: str, array: DeviceArray, shape: tuple[int, ...]) -> None:
        """Say where an input lies, and how much of it to take."""
        self._must(self._context.set_input_shape(name, shape), f"shape {shape} of {name}")
        self._must(self._context.set_tensor_address(name, array.address), f"the place of {name}")

    def bind_output(self, name: str, array: DeviceArray) -> None:
        """Say where a result goes."""
        self._must(self._context.set_tensor_address(name, array.address), f"the place of {name}")

    def shape_of(self, output: str) -> tuple[int, ...]:
        """The shape of a result, once the inputs are bound."""
        return tuple(self._context.get_tensor_shape(output))

    def enqueue(self, stream: Stream) -> None:
        """Run after what the stream holds already."""
        self._must(self._context.execute_async_v3(int(stream.handle)), "to run")

    def close(self) -> None:
        """Free what it holds on the device, the context before its engine."""
        self._context = None
        self._engine = None

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"{self._file}: refuses {what} ({self._log.why()})")


def captures_itself(trt: Any) -> bool:
    """Whether a context can be told to capture its own work as a graph, as TensorRT for RTX can."""
    return hasattr(trt, "CudaGraphStrategy")


class _State:
    """Device memory for a batch, room for more where an engine is fixed at more, and each graph's captured step."""

    def __init__(self, spec: ModelSpec, batch: int, room: int) -> None:
        shape = (room, *spec.shape)
        self.batch = batch
        self.arrays = {name: DeviceArray(shape, np.float32) for name in ("x", "h", "z", "x_next", "h_next")}
        self.arrays["label"] = DeviceArray((room,), np.int64)
        self.arrays["row"] = DeviceArray((len(COLUMNS),), np.float32)
        self.staging = {name: Staging(self.arrays[name]) for name in ("x", "h", "z", "label", "row")}
        self.steps: dict[str, tuple[_Executable, Any]] = {}

    def close(self) -> None:
        for staging in self.staging.values():
            staging.close()
        for array in self.arrays.values():
            array.close()


class TensorRtSession:
    """The engines of a bundle on a GPU; see ``Session``."""

    def __init__(self, bundle: Bundle, product: Product, *, cuda_graph: bool = True) -> None:
        self.backend = product.backend
        self._spec = bundle.spec
        self._trt = product.load()
        self._cuda_graph = cuda_graph
        gpu, version = device(), str(self._trt.__version__)
        self._engines = Lookup(bundle, product, version, gpu.capability)
        self.device = f"{gpu.name} ({gpu.capability}), {product.module} {version}"
        self.max_batch: int | None = self._engines.max_batch
        self._log = error_log(self._trt)
        self._runtime = self._trt.Runtime(self._log)
        self._stream = Stream()
        self._loaded: dict[Path, _Executable] = {}
        self._state: _State | None = None

    def begin(
        self, x: Array, label: NDArray[np.int64] | None, h: Array | None = None, rows: Array | None = None
    ) -> None:
        state = self._state
        if state is None or state.batch != len(x):
            self._forget_state()
            state = self._state = _State(self._spec, len(x), self._engines.room(len(x)))
            for array in state.arrays.values():  # what no one sends is finite, and its label one that there is
                self._stream.clear(array)
        self._send("x", x)
        self._send("h", np.zeros_like(x) if h is None else h)
        if label is not None:
            self._send("label", label)

    def step(self, row: Array, z: Array | None = None) -> None:
        state = self._begun()
        graph = "step_plain" if row[GUIDANCE] == 1 else "step"
        if graph not in state.steps:
            state.steps[graph] = self._prepared(graph, state)
        self._send("row", row)
        if row[NOISE] != 0:
            assert z is not None, "a row with noise needs z"
            self._send("z", z)
        executable, captured = state.steps[graph]
        if captured is None:
            self._enqueue_step(executable, state)
        else:
            self._stream.launch(captured)

    def run(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> Array:
        return self._call("sampler", len(x), loop_feeds(x, label, rows, noise), ["x"])[0]

    def run_decoded(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> tuple[Array, Array]:
        latents, image = self._call("sampler_decoded", len(x), loop_feeds(x, label, rows, noise), ["x", "image"])
        return latents, image

    def decode(self, x: Array) -> Array:
        return self._call("decoder", len(x), {"x": x}, ["image"])[0]

    def state(self) -> tuple[Array, Array]:
        state = self._begun()
        x, h = (self._stream.download(state.arrays[name])[: state.batch] for name in ("x", "h"))
        return x, h

    def close(self) -> None:
        self._forget_state()
        for executable in self._loaded.values():
            executable.close()
        self._loaded.clear()
        if self._runtime is not None:
            self._runtime = None
            self._stream.close()

    def _begun(self) -> _State:
        assert self._state is not None, "begin() comes before step() and state()"
        return self._state

    def _forget_state(self) -> None:
        if self._state is not None:
            self._stream.synchronize()
            for _, captured in self._state.steps.values():
                if captured is not None:
                    self._stream.forget(captured)
            self._state.close()
            self._state = None

    def _send(self, name: str, array: NDArray[Any]) -> None:
        state = self._begun()
        self._stream.send(state.arrays[name], state.staging[name], array)

    def _prepared(self, graph: str, state: _State) -> tuple[_Executable, Any]:
        """A step graph bound to the state, and its step as one captured graph, or None where it is run call by call."""
        executable, size = self._executable(graph, state.batch)
        for name, shape in executable.inputs.items():
            executable.bind(name, state.arrays[name], tuple(size if side == "batch" else int(side) for side in shape))
        for name in ("x_next", "h_next"):
            executable.bind_output(name, state.arrays[name])
        if not self._cuda_graph or captures_itself(self._trt):
            return executable, None
        executable.enqueue(self._stream)  # the first run allocates what it needs, which a capture must not
        with self._stream.capturing() as captured:
            self._enqueue_step(executable, state)
        return executable, captured[0]

    def _enqueue_step(self, executable: _Executable, state: _State) -> None:
        executable.enqueue(self._stream)
        for name in ("x", "h"):
            self._stream.copy(state.arrays[name], state.arrays[f"{name}_next"])

    def _call(self, graph: str, batch: int, feeds: Arrays, wanted: Sequence[str]) -> list[Array]:
        """One run of a graph on any arrays; the state is left alone."""
        executable, size = self._executable(graph, batch)
        memory: list[DeviceArray] = []
        try:
            for name, shape in executable.inputs.items():
                given = _filled_up(feeds[name], shape, batch, size)
                memory.append(DeviceArray(given.shape, given.dtype))
                self._stream.upload(memory[-1], given)
                executable.bind(name, memory[-1], given.shape)
            results = [DeviceArray(executable.shape_of(name), np.float32) for name in wanted]
            memory += results
            for name, array in zip(wanted, results, strict=True):
                executable.bind_output(name, array)
            executable.enqueue(self._stream)
            return [self._stream.download(array)[:batch] for array in results]
        finally:
            for array in memory:
                array.close()

    def _executable(self, graph: str, batch: int) -> tuple[_Executable, int]:
        """The engine of a graph for a batch, at the profile for it, and the batch that it is run at."""
        choice = self._engines.choose(graph, batch)
        executable = self._loaded.get(choice.engine.path)
        if executable is None:
            executable = _Executable(self._trt, self._log, self._runtime, choice.engine, cuda_graph=self._cuda_graph)
            self._loaded[choice.engine.path] = executable
        executable.use(choice.profile, self._stream)
        return executable, choice.batch


def _filled_up(array: NDArray[Any], shape: Sequence[int | str], batch: int, size: int) -> NDArray[Any]:
    """An input with zeros where the engine's batch is larger than the user's."""
    missing = [
        size - batch if side == "batch" or (side == "noise_batch" and given == batch > 1) else 0
        for side, given in zip(shape, array.shape, strict=True)
    ]
    return np.pad(array, [(0, count) for count in missing]) if any(missing) else np.ascontiguousarray(array)
