"""A session that is checked before it is believed: each graph runs its golden cases before its first real use.

A compiled engine can be wrong and still give plausible noise; past versions of compilers are known to have done so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffexport.backends.session import Array, Session
from diffexport.errors import BackendError
from diffexport.golden import golden_checks
from diffexport.parity import describe, severity
from diffexport.plan import GUIDANCE

if TYPE_CHECKING:
    from diffexport.bundle import Bundle


class SelfTested:
    """A session around another one; see ``Session``.

    A graph's cases run when it is first asked for. A case that needs several graphs runs with the last of them.
    """

    def __init__(self, session: Session, bundle: Bundle) -> None:
        self.backend, self.device, self.max_batch = session.backend, session.device, session.max_batch
        self.session = session
        self._bundle = bundle
        self._waiting = golden_checks(bundle.spec, bundle.golden(), bundle.manifest.precision, bundle.manifest.decoder)
        self._tested: set[str] = set()
        self._label: NDArray[np.int64] | None = None

    def begin(
        self, x: Array, label: NDArray[np.int64] | None, h: Array | None = None, rows: Array | None = None
    ) -> None:
        self._label = label
        # not told its rows, the session runs the graphs that are tested, and none in their place
        self.session.begin(x, label, h)

    def step(self, row: Array, z: Array | None = None) -> None:
        graph = "step_plain" if row[GUIDANCE] == 1 else "step"
        if graph not in self._tested:
            x, h = self.session.state()
            self._test(graph)
            self.session.begin(x, self._label, h)
        self.session.step(row, z)

    def run(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> Array:
        self._test("sampler")
        return self.session.run(x, label, rows, noise)

    def run_decoded(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> tuple[Array, Array]:
        self._test("sampler_decoded")
        return self.session.run_decoded(x, label, rows, noise)

    def decode(self, x: Array) -> Array:
        self._test("decoder")
        return self.session.decode(x)

    def state(self) -> tuple[Array, Array]:
        return self.session.state()

    def close(self) -> None:
        self.session.close()

    def _test(self, graph: str) -> None:
        """Run the cases that ``graph`` completes.

        Raises:
            BackendError: one differs from PyTorch by more than the precision allows.
        """
        if graph in self._tested:
            return
        self._tested.add(graph)
        ready = [check for check in self._waiting if check.graphs <= self._tested]
        self._waiting = [check for check in self._waiting if check not in ready]
        failed = [m for check in ready for m in check.measure(self.session) if not m.passed]
        if failed:
            self._tested.discard(graph)
            self._waiting += ready
            raise BackendError(
                f"{self.backend} on {self.device} does not give PyTorch's results: "
                f"{describe(max(failed, key=severity))}. Nothing was sampled; build again or take another backend "
                "(--no-selftest samples all the same)"
            )
