"""What a network makes of noise level and label alone, for many rows at once.

N pairs of a noise level and a label, K numbers of the condition, B user batch. See ``diffexport.exporter.parts``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffexport.backends.session import Array
from diffexport.plan import COLUMNS
from diffexport.spec import ModelSpec

Arrays = dict[str, NDArray[Any]]
Run = Callable[[str, Arrays, Sequence[str]], list[Array]]

_C_NOISE = COLUMNS.index("c_noise")
_AT_ONCE = 1 << 26
"""Bytes of conditions that are computed at once and kept."""


class Conditions:
    """The conditions of a run's rows, computed some rows ahead with the graph ``conditioning``.

    Args:
        run: runs a graph of the bundle; see ``HostSession``.
        rows: (rows, 13) that will be applied.
        label: (B,); zeros for a model without labels.

    Attributes:
        width: K.
    """

    def __init__(self, run: Run, spec: ModelSpec, rows: Array, label: NDArray[np.int64]) -> None:
        self._run = run
        self._spec = spec
        self._noises = _noises(rows)
        self._labels = np.unique(self._both(label))
        self._places = self._places_of(label)
        first = self._noises[0]
        self._known = {first: self._computed([first])[0]}
        self.width = self._known[first].shape[1]

    def serve(self, rows: Array, label: NDArray[np.int64]) -> bool:
        """Take another batch, if these are the conditions of its run too; whether they are."""
        both = self._both(label)
        if _noises(rows) != self._noises or not np.isin(both, self._labels).all():
            return False
        self._places = self._places_of(label)
        return True

    def fill(self, row: Array, parts: Sequence[tuple[slice, Array]]) -> None:
        """Write the conditions of one of the rows: for each part of b samples of the batch, (2b, K) with guidance, the
        conditioned half first, (b, K) without."""
        noise = float(row[_C_NOISE])
        if noise not in self._known:
            self._compute_from(noise)
        for part, out in parts:
            halves = len(out) // (part.stop - part.start)
            np.take(self._known[noise], self._places[:halves, part].ravel(), axis=0, out=out)

    def _compute_from(self, noise: float) -> None:
        """Compute the condition of a noise level and of as many after it as may be kept at once."""
        start = self._noises.index(noise)
        count = max(1, _AT_ONCE // (4 * self.width * len(self._labels)))
        if count < len(self._noises):
            self._known.clear()
        noises = self._noises[start : start + count]
        self._known.update(zip(noises, self._computed(noises), strict=True))

    def _computed(self, noises: Sequence[float]) -> Array:
        """(noises, labels, K)."""
        feeds: Arrays = {"c_noise": np.repeat(np.array(noises, np.float32), len(self._labels))}
        if self._spec.conditional:
            feeds["label"] = np.tile(self._labels, len(noises))
        (found,) = self._run("conditioning", feeds, ["condition"])
        return found.reshape(len(noises), len(self._labels), -1)

    def _places_of(self, label: NDArray[np.int64]) -> NDArray[np.intp]:
        """Where the labels of either half are among those known, (2, B) or (1, B)."""
        return np.searchsorted(self._labels, self._both(label)).reshape(-1, len(label))

    def _both(self, label: NDArray[np.int64]) -> NDArray[np.int64]:
        """The labels of what the network sees: those of the batch, and where it can be guided as many null labels."""
        return np.concatenate([label, np.full_like(label, self._spec.null_label)]) if self._spec.guidable else label


def _noises(rows: Array) -> list[float]:
    """The noise levels of some rows, each once, in order."""
    return list(dict.fromkeys(rows[:, _C_NOISE].tolist()))
