"""What the sessions of runtimes that work on host memory share.

The state lies in two buffers each of x and h, which a runtime reads and writes in turn by itself, so that nothing is
allocated or copied in the loop. A large batch is stepped in parts, so that what lies between a network's layers stays in a
processor's caches: 16 samples of a DiT-S/2 at once take up to a quarter longer each.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffexport.backends.conditions import Conditions
from diffexport.backends.session import Array
from diffexport.errors import BackendError, DiffexportError
from diffexport.plan import COLUMNS, GUIDANCE, NOISE
from diffexport.spec import ModelSpec

Arrays = dict[str, NDArray[Any]]
Call = Callable[[], object]
"""One run of a graph on the arrays it was prepared for."""

CACHED = 1 << 20
"""Numbers that the largest value inside a network may have in a part of a batch, where one sample has not more."""


class _State:
    """Buffers of one batch size, its parts, and the calls of each graph that has run on them."""

    def __init__(self, spec: ModelSpec, parts: Sequence[slice]) -> None:
        batch = parts[-1].stop
        shape = (batch, *spec.shape)
        self.parts = parts
        self.x = [np.zeros(shape, np.float32), np.zeros(shape, np.float32)]  # the current one and the next
        self.h = [np.zeros(shape, np.float32), np.zeros(shape, np.float32)]
        self.z = np.zeros(shape, np.float32)
        self.label = np.zeros(batch, np.int64)
        self.row = np.zeros(len(COLUMNS), np.float32)
        self.conditions: dict[str, list[tuple[slice, Array]]] = {}  # of a graph, for each part
        self.calls: dict[str, tuple[Call, Call]] = {}
        self.current = 0

    def arrays(self, graph: str, source: int) -> list[tuple[Arrays, Arrays]]:
        """What a step graph reads and writes for each part, by name, from buffer ``source`` to the other."""
        found = []
        for index, part in enumerate(self.parts):
            read: Arrays = {
                name: array[part]
                for name, array in {"x": self.x[source], "h": self.h[source], "z": self.z, "label": self.label}.items()
            }
            read["row"] = self.row
            if graph in self.conditions:
                read["condition"] = self.conditions[graph][index][1]
            found.append((read, {"x_next": self.x[1 - source][part], "h_next": self.h[1 - source][part]}))
        return found


class HostSession(ABC):
    """The graphs of a bundle on host memory; see ``Session``. A runtime says how it prepares a call and runs one.

    Where the bundle has conditioned graphs and the rows of a run are known, these are what steps run.

    Args:
        widest: see ``diffexport.bundle.Manifest``; no batch is cut where it is None.
        streams: parts of a batch that run at the same time.
    """

    backend: str
    device = "CPU"
    max_batch: int | None = None

    def __init__(self, spec: ModelSpec, folder: Path, widest: int | None = None, streams: int = 1) -> None:
        self._spec = spec
        self._folder = folder
        self._most = max(1, CACHED // widest) if widest is not None else None
        self._streams = streams
        self._conditions: Conditions | None = None
        self._computes_ahead = (folder / "conditioning.onnx").is_file()
        self._state: _State | None = None

    @abstractmethod
    def _prepare(self, graph: str, parts: Sequence[tuple[Arrays, Arrays]]) -> Call:
        """A call of a graph that reads and writes the arrays of each part in place; it need not have all of the inputs."""

    @abstractmethod
    def _run(self, graph: str, feeds: Arrays, wanted: Sequence[str]) -> list[Array]:
        """One run of a graph on any arrays, with results of their own."""

    def begin(
        self, x: Array, label: NDArray[np.int64] | None, h: Array | None = None, rows: Array | None = None
    ) -> None:
        state = self._state
        if state is None or len(state.label) != len(x):
            state = self._state = _State(self._spec, self._parts(len(x)))
        state.current = 0
        state.x[0][:] = x
        state.h[0][:] = 0 if h is None else h
        if label is not None:
            state.label[:] = label
        if rows is None or not self._computes_ahead:
            self._conditions = None
        elif self._conditions is None or not self._conditions.serve(rows, state.label):
            self._conditions = Conditions(self._checked_run, self._spec, rows, state.label)

    def step(self, row: Array, z: Array | None = None) -> None:
        state = self._begun()
        graph = "step_plain" if row[GUIDANCE] == 1 else "step"
        if self._conditions is not None:
            graph += "_conditioned"
            if graph not in state.conditions:
                halves, width = 1 if row[GUIDANCE] == 1 else 2, self._conditions.width
                state.conditions[graph] = [
                    (part, np.zeros((halves * (part.stop - part.start), width), np.float32)) for part in state.parts
                ]
            self._conditions.fill(row, state.conditions[graph])
        state.row[:] = row
        if row[NOISE] != 0:
            assert z is not None, "a row with noise needs z"
            state.z[:] = z
        try:
            if graph not in state.calls:
                there, back = (self._prepare(graph, state.arrays(graph, source)) for source in (0, 1))
                state.calls[graph] = there, back
            state.calls[graph][state.current]()
        except Exception as error:
            raise self._failure(graph, error) from error
        state.current = 1 - state.current

    def run(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> Array:
        (result,) = self._checked_run("sampler", loop_feeds(x, label, rows, noise), ["x"])
        return result

    def run_decoded(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> tuple[Array, Array]:
        latents, image = self._checked_run("sampler_decoded", loop_feeds(x, label, rows, noise), ["x", "image"])
        return latents, image

    def decode(self, x: Array) -> Array:
        (image,) = self._checked_run("decoder", {"x": x}, ["image"])
        return image

    def state(self) -> tuple[Array, Array]:
        state = self._begun()
        return state.x[state.current].copy(), state.h[state.current].copy()

    def close(self) -> None:
        self._state = None

    def _parts(self, batch: int) -> list[slice]:
        """A batch in nearly equal parts: one a stream, or as many times that as let a part fit the caches."""
        streams = min(batch, self._streams)
        count = min(batch, streams * -(-batch // (streams * (self._most or batch))))
        bounds = [batch * k // count for k in range(count + 1)]
        return [slice(low, high) for low, high in itertools.pairwise(bounds)]

    def _forget_calls(self) -> None:
        """Let go of every prepared call, and so of the graphs that they run."""
        if self._state is not None:
            self._state.calls.clear()

    def _checked_run(self, graph: str, feeds: Arrays, wanted: Sequence[str]) -> list[Array]:
        try:
            return self._run(graph, feeds, wanted)
        except Exception as error:
            raise self._failure(graph, error) from error

    def _failure(self, graph: str, error: Exception) -> DiffexportError:
        """What a runtime raised, each with exceptions of its own, as an error that a user understands."""
        if isinstance(error, DiffexportError):
            return error
        first = (str(error).strip().splitlines() or [""])[0]
        return BackendError(f"backend {self.backend!r}: {graph} failed ({type(error).__name__}: {first})")

    def _begun(self) -> _State:
        assert self._state is not None, "begin() comes before step() and state()"
        return self._state


def loop_feeds(x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> Arrays:
    """The inputs of the loop graph, by name."""
    return {"x_init": x, "plan": rows, "noise": noise} | ({} if label is None else {"label": label})
