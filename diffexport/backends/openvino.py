"""OpenVINO on the CPU: fp32 exactly so, bf16 where the processor has it, and compiled graphs kept in the cache."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import openvino
from numpy.typing import NDArray

from diffexport.backends.host import Arrays, Call, HostSession
from diffexport.backends.session import Array
from diffexport.cache import cached, key_of, put
from diffexport.errors import BackendError
from diffexport.machine import processor, usable_cores
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    from diffexport.bundle import Bundle, Precision

DEVICE = "CPU"
Tensors = dict[str, openvino.Tensor]
Mode = Literal["latency", "throughput"]
_HINTS: dict[str, str] = {"fp32": "f32", "bf16": "bf16"}
_BLOB = "compiled.blob"


def open_session(
    bundle: Bundle,
    *,
    threads: int | None = None,
    precision: Precision | None = None,
    mode: Mode = "latency",
    cache: bool = True,
) -> OpenVinoSession:
    """Open a bundle on the CPU.

    Args:
        threads: threads in all; every core that this process may use where not given.
        precision: what the network's layers compute in, "fp32" or "bf16". Where not given, bf16 for a bf16 bundle on a
            processor that has it, and else fp32; the int8 layers of an int8 bundle are int8 in either.
        mode: "latency" gives all threads to one call, or half of them to each half of guidance; "throughput" runs parts of
            a batch side by side, one on each thread. Large batches are cut into parts that fit the caches in either.
        cache: keep compiled graphs in the cache (``diffexport.cache``), from where they are mapped, not read.

    Raises:
        BackendError: this processor has no bf16, or an option is not one of those above.
    """
    core = openvino.Core()
    if precision is None:
        precision = "bf16" if bundle.manifest.precision == "bf16" and _has_bf16(core) else "fp32"
    if precision not in _HINTS:
        raise BackendError(f"backend 'openvino': precision {precision!r}: it computes in {' or '.join(_HINTS)}")
    if precision == "bf16" and not _has_bf16(core):
        raise BackendError(
            f"backend 'openvino': this processor ({_processor(core)}) has no bf16 arithmetic; leave out --precision bf16"
        )
    if mode not in ("latency", "throughput"):
        raise BackendError(f"backend 'openvino': mode {mode!r}: expected latency or throughput")
    threads = threads or usable_cores()
    settings = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": threads if mode == "throughput" else 1,
    }
    digest = bundle.digest if cache else None
    return OpenVinoSession(bundle.spec, bundle.path, core, settings, digest, bundle.manifest.widest)


def _has_bf16(core: openvino.Core) -> bool:
    return "BF16" in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


def _processor(core: openvino.Core) -> str:
    return str(core.get_property(DEVICE, "FULL_DEVICE_NAME")).strip()


class OpenVinoSession(HostSession):
    """The graphs of a bundle in OpenVINO; see ``Session``.

    Args:
        settings: of every compiled graph.
        digest: of the bundle, under which compiled graphs are cached; None for no cache.
        widest: see ``HostSession``.
    """

    backend = "openvino"

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        core: openvino.Core,
        settings: dict[str, Any],
        digest: str | None = None,
        widest: int | None = None,
    ) -> None:
        super().__init__(spec, folder, widest, settings["NUM_STREAMS"])
        self._core = core
        self._settings = settings
        self._digest = digest
        self._takes_branches = (
            settings["NUM_STREAMS"] == 1
            and settings["INFERENCE_NUM_THREADS"] > 1
            and (folder / "branch.onnx").is_file()
        )
        self._compiled: dict[str, openvino.CompiledModel] = {}
        self._mapped: list[NDArray[np.uint8]] = []  # what imported graphs read their weights from

    def _prepare(self, graph: str, parts: Sequence[tuple[Arrays, Arrays]]) -> Call:
        if graph == "step_conditioned" and self._takes_branches:
            return self._prepare_branches(parts)
        requests = [self._request(graph, _in_place(read), _in_place(written)) for read, written in parts]
        return functools.partial(_run_side_by_side, requests)

    def _prepare_branches(self, parts: Sequence[tuple[Arrays, Arrays]]) -> Call:
        """A guided step whose two halves run side by side, so that cores share no operator and wait for each other once.

        Parts follow each other, so that both cores read the same weights at a time.
        """
        pairs: list[list[openvino.InferRequest]] = []
        updates: list[openvino.InferRequest] = []
        for read, written in parts:
            shape = openvino.Shape([len(read["x"]), *self._spec.output_shape])
            outs = {name: openvino.Tensor(openvino.Type.f32, shape) for name in ("cond", "uncond")}
            halves = zip(outs.values(), np.split(read["condition"], 2), strict=True)
            tensors = _in_place(read)
            pairs.append(
                [
                    self._request("branch", tensors | _in_place({"condition": half}), {"out": out})
                    for out, half in halves
                ]
            )
            updates.append(self._request("update", tensors | outs, _in_place(written)))

        def call() -> None:
            for pair in pairs:
                _run_side_by_side(pair)
            _run_side_by_side(updates)

        return call

    def _request(self, graph: str, read: Tensors, written: Tensors) -> openvino.InferRequest:
        """A request of a graph on these tensors; it need not have all of the inputs."""
        compiled = self._graph(graph)
        request = compiled.create_infer_request()
        for ports, tensors in ((compiled.inputs, read), (compiled.outputs, written)):
            for port in ports:
                request.set_tensor(port, tensors[_name(port, tensors)])
        return request

    def _run(self, graph: str, feeds: Arrays, wanted: Sequence[str]) -> list[Array]:
        compiled = self._graph(graph)
        found = compiled({port: np.ascontiguousarray(feeds[_name(port, feeds)]) for port in compiled.inputs})
        results = {_name(port, wanted): found[port] for port in compiled.outputs}
        return [results[name] for name in wanted]

    def close(self) -> None:
        super().close()
        self._compiled.clear()
        self._mapped.clear()

    def _graph(self, name: str) -> openvino.CompiledModel:
        if name not in self._compiled:
            self._compiled[name] = self._load(name)
        return self._compiled[name]

    def _load(self, name: str) -> openvino.CompiledModel:
        """A graph from the cache, or compiled and put there."""
        path = self._folder / f"{name}.onnx"
        settings = self._settings | ({"NUM_STREAMS": 2} if name == "branch" else {})
        key = key_of(self._digest, name, openvino.__version__, processor(), sorted(settings.items()))
        entry = cached("openvino", key) if self._digest is not None else None
        try:
            if entry is not None:
                blob = np.memmap(entry / _BLOB, np.uint8, "c")  # copy on write, since OpenVINO asks for a writable one
                compiled = self._core.import_model(openvino.Tensor(blob, shared_memory=True), DEVICE, settings)
                self._mapped.append(blob)
                return compiled
        except (OSError, RuntimeError):
            pass  # a damaged entry is compiled anew, below, and replaced
        try:
            compiled = self._core.compile_model(path, DEVICE, settings)
        except RuntimeError as error:
            raise BackendError(f"{path}: OpenVINO cannot load it ({_reason(error)})") from error
        if self._digest is not None:
            put("openvino", key, lambda work: _write_blob(compiled, work / _BLOB))
        return compiled


def _write_blob(compiled: openvino.CompiledModel, path: Path) -> None:
    path.write_bytes(compiled.export_model().getbuffer())


def _in_place(arrays: Arrays) -> Tensors:
    """Tensors on the memory of arrays, which must outlive them."""
    return {name: openvino.Tensor(array, shared_memory=True) for name, array in arrays.items()}


def _run_side_by_side(requests: Sequence[openvino.InferRequest]) -> None:
    for request in requests:
        request.start_async()
    for request in requests:
        request.wait()


def _name(port: Any, known: Iterable[str]) -> str:
    """The name of a port among those known; a port also carries the names of values inside that are the same."""
    (name,) = port.get_names() & set(known)
    return str(name)


def _reason(error: RuntimeError) -> str:
    """The last line of an OpenVINO error: those before it say where in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
