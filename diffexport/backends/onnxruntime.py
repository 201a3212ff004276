"""ONNX Runtime on the CPU. Optimized graphs with packed weights are kept in the cache and mapped from there.

Weights of ``LARGE`` bytes and more are neither packed nor cached but mapped from the bundle, and one graph is open at a
time: a process never holds them twice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import onnxruntime
from numpy.typing import NDArray

from diffexport.backends.host import Arrays, Call, HostSession
from diffexport.backends.session import Array
from diffexport.bundle import WEIGHTS
from diffexport.cache import cached, key_of, put
from diffexport.errors import BackendError
from diffexport.machine import processor, usable_cores
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    import onnx

    from diffexport.bundle import Bundle

PROVIDER = "CPUExecutionProvider"
LARGE = 1 << 29
SMALL = 1 << 26
"""Bytes of weights below which graphs are open side by side whatever their number."""

_OPTIMIZED = "optimized.onnx"
_DECODING = ("decoder", "sampler_decoded")
_ALIGN = 64
"""Bytes; ONNX Runtime's kernels read packed weights with instructions that fault elsewhere."""


def open_session(bundle: Bundle, *, threads: int | None = None, cache: bool = True) -> OnnxRuntimeSession:
    """Open a bundle on the CPU. bfloat16, for which a CPU's ONNX Runtime has no kernels, is computed rounded; see
    ``diffexport.backends.rounding``.

    Args:
        threads: threads of one operator; every core that this process may use where not given.
        cache: keep optimized graphs in the cache; see ``diffexport.cache``.
    """
    rounded = bundle.manifest.precision == "bf16"
    digest = bundle.digest if cache else None
    widest = bundle.manifest.widest
    return OnnxRuntimeSession(bundle.spec, bundle.path, threads=threads, digest=digest, rounded=rounded, widest=widest)


def load_graph(path: Path, threads: int | None = None, *, rounded: bool = False) -> onnxruntime.InferenceSession:
    """An inference session of one graph, whose provider has been read back.

    Args:
        rounded: compute half precision in fp32 and round every value; see ``diffexport.backends.rounding``.

    Raises:
        BackendError: the graph cannot be loaded.
    """
    return _create(_rounded(path) if rounded else str(path), path, _options(path, threads))


def load_model(model: onnx.ModelProto, path: Path) -> onnxruntime.InferenceSession:
    """A session of a model in memory, whose weights lie in the folder of ``path``. Raises BackendError as above."""
    return _create(model.SerializeToString(), path, _options(path, None))


def _options(path: Path, threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = 3
    options.enable_mem_pattern = path.stem not in _DECODING  # planned ahead, large images take half as much again
    if _is_large(path.parent):
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _is_large(folder: Path, size: int = LARGE) -> bool:
    """Whether the weights that lie beside a graph have so many bytes."""
    weights = folder / WEIGHTS
    return weights.is_file() and weights.stat().st_size >= size


def _create(source: str | bytes, path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = onnxruntime.InferenceSession(source, options, providers=[PROVIDER])
    except Exception as error:  # ONNX Runtime's own exceptions share no base but this
        raise BackendError(f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from error
    if session.get_providers() != [PROVIDER]:
        raise BackendError(f"{path}: asked ONNX Runtime for {PROVIDER}, got {session.get_providers()}")
    return session


def _rounded(path: Path) -> bytes:
    """The graph of a file, rounding every half value, its weights left where they are."""
    if importlib.util.find_spec("onnx") is None:
        raise BackendError(
            "backend 'ort': computing bfloat16 on a CPU needs the package onnx; pip install 'diffexport[export]', or take "
            "--backend openvino"
        )
    import onnx

    from diffexport.backends.rounding import rounded

    model = rounded(onnx.load_model(path, load_external_data=False))
    return bytes(model.SerializeToString())


def _load_as_is(path: Path, threads: int | None) -> onnxruntime.InferenceSession:
    """A session of a graph that is optimized: done a second time, fp16 results would not be those of the graph itself."""
    options = _options(path, threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _create(str(path), path, options)


def _load_optimized(path: Path, threads: int | None, rounded: bool, key: str) -> onnxruntime.InferenceSession:
    """A session of the graph as ONNX Runtime optimized it, from the cache, with its weights packed for this processor.

    They are mapped into memory, so that they cost neither time to read nor memory of their own. Where the cache cannot be
    used, the graph itself; ONNX Runtime 1.31 also writes some with convolutions in branches, as the loop of a U-Net has,
    that it does not read, since two values got the same name.
    """

    def kept() -> Path | None:
        return cached("ort", key)

    def made() -> Path | None:
        return put("ort", key, lambda work: _optimize_safely(path, threads, rounded, work))

    for find in (kept, made):  # a damaged entry is made anew
        with contextlib.suppress(BackendError):  # which ONNX Runtime also raises where it cannot write
            entry = find()
            if entry is not None:
                return _load_as_is(entry / _OPTIMIZED, threads)
    return load_graph(path, threads, rounded=rounded)


def _optimize_safely(path: Path, threads: int | None, rounded: bool, folder: Path) -> None:
    """Write what ONNX Runtime makes of a graph, with packed weights where all of them lie so that it can read them.

    ONNX Runtime 1.31 aligns weights in the file but not their packed forms, each noted as ``offset;length;``, and the
    process ends in a segmentation fault where it runs one that is not aligned.
    """
    _optimize(path, threads, rounded, folder, packed=True)
    offsets = re.findall(rb"[+]\d+[|](\d+);\d+;", (folder / _OPTIMIZED).read_bytes())
    if any(int(offset) % _ALIGN for offset in offsets):
        for file in folder.iterdir():
            file.unlink()
        _optimize(path, threads, rounded, folder, packed=False)


def _optimize(path: Path, threads: int | None, rounded: bool, folder: Path, *, packed: bool) -> None:
    """Write what ONNX Runtime makes of a graph."""
    options = _options(path, threads)
    options.optimized_model_filepath = str(folder / _OPTIMIZED)
    for name, value in {
        "session.optimized_model_external_initializers_file_name": "weights.bin",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.save_external_prepacked_constant_initializers": str(int(packed)),
    }.items():
        options.add_session_config_entry(name, value)
    _create(_rounded(path) if rounded else str(path), path, options)


class OnnxRuntimeSession(HostSession):
    """The graphs of a bundle in ONNX Runtime; see ``Session``.

    Args:
        digest: of the bundle, under which optimized graphs are cached; None for no cache.
        widest: see ``HostSession``.
        takes_turns: open one graph at a time of smaller weights too, and compute conditions ahead of any: slow in a loop.
    """

    backend = "ort"

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        *,
        threads: int | None = None,
        digest: str | None = None,
        rounded: bool = False,
        takes_turns: bool = False,
        widest: int | None = None,
    ) -> None:
        super().__init__(spec, folder, widest)
        self._computes_ahead &= takes_turns or not _is_large(folder)
        self._one_at_a_time = _is_large(folder, SMALL if takes_turns else LARGE)
        self._threads = threads
        self._digest = digest
        self._rounded = rounded
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def _prepare(self, graph: str, parts: Sequence[tuple[Arrays, Arrays]]) -> Call:
        session = self._session(graph)
        bindings = [_bound(session, read, written) for read, written in parts]

        def call() -> None:
            for binding in bindings:
                session.run_with_iobinding(binding)

        return call

    def _run(self, graph: str, feeds: Arrays, wanted: Sequence[str]) -> list[Array]:
        return cast(list[Array], self._session(graph).run(wanted, feeds))

    def close(self) -> None:
        super().close()
        self._sessions.clear()

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        if name not in self._sessions:
            path = self._folder / f"{name}.onnx"
            if self._one_at_a_time:
                self._forget_calls()
                self._sessions.clear()
            if self._digest is None or _is_large(self._folder):
                self._sessions[name] = load_graph(path, self._threads, rounded=self._rounded)
            else:
                key = key_of(self._digest, name, onnxruntime.__version__, processor(), f"align {_ALIGN}")
                self._sessions[name] = _load_optimized(path, self._threads, self._rounded, key)
        return self._sessions[name]


def _bound(session: onnxruntime.InferenceSession, read: Arrays, written: Arrays) -> onnxruntime.IOBinding:
    binding = session.io_binding()
    for node in session.get_inputs():
        array = read[node.name]
        binding.bind_input(node.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for name, array in written.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    return binding


def run_graph(path: Path, feeds: dict[str, NDArray[Any]], *, rounded: bool = False) -> dict[str, NDArray[Any]]:
    """Run a graph once on named arrays, without keeping anything: for checks, not for loops."""
    session = load_graph(path, rounded=rounded)
    names = [node.name for node in session.get_outputs()]
    wanted = {node.name for node in session.get_inputs()}
    results = session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    return dict(zip(names, cast(list[NDArray[Any]], results), strict=True))
