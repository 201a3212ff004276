"""The one interface between a sampler and whatever runs the network."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Session(Protocol):
    """A model on a device, with room for the state (x, h) of one run of a batch.

    B is the user's batch; guidance doubles it inside. State stays on the device between steps.
    """

    backend: str
    """The backend's name, "ort"."""
    device: str
    """What it really runs on, read back from the runtime."""
    max_batch: int | None
    """The largest batch that it takes, or None where any will do."""

    def begin(
        self, x: Array, label: NDArray[np.int64] | None, h: Array | None = None, rows: Array | None = None
    ) -> None:
        """Start a run: x (B, *shape), label (B,) or None for a model without labels, h zero where not given.

        Args:
            rows: those that will be applied, (rows, 13) float32, where they are known: what depends on them and on the
                labels alone may then be computed for all at once.
        """
        ...

    def step(self, row: Array, z: Array | None = None) -> None:
        """Apply one row, (13,) float32; z (B, *shape) where the row adds noise, and else not looked at."""
        ...

    def run(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> Array:
        """A whole plan in one call, (B, *shape); the state of ``begin`` and ``step`` is left alone.

        Args:
            x: (B, *shape) start of the state.
            rows: (rows, 13) float32.
            noise: (rows, B, *shape), or (1, 1, *shape) where no row adds noise.
        """
        ...

    def run_decoded(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> tuple[Array, Array]:
        """As ``run``, of a bundle with a decoder: the samples and their images, all in one call."""
        ...

    def decode(self, x: Array) -> Array:
        """Latents (B, C, h, w) of any sides to images (B, channels, H, W), of a bundle with a decoder, in one call."""
        ...

    def state(self) -> tuple[Array, Array]:
        """Copies of x and h on the host."""
        ...

    def close(self) -> None:
        """Free what the session holds; it cannot be used afterwards."""
        ...
