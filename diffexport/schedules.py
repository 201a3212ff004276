"""Noise schedules: pure functions from a few numbers to the noise levels of a process, in float64.

N is the number of levels a model was trained on. ``sigma`` is the standard deviation of the noise on unscaled data,
sigma = sqrt(1/alpha_bar - 1); a flow schedule holds t in its place, x_t = (1 - t)*x0 + t*eps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from diffexport.errors import SpecError

Array = NDArray[np.float64]
MAX_LEVELS = 1_000_000
MIN_SIGMA, MAX_SIGMA = 1e-9, 1e9

Kind = Literal["ddpm", "ldm", "sigmoid", "cosine", "loglinear", "flow", "levels"]


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A schedule as data: its kind and the numbers that define it."""

    kind: Kind
    N: int = 1000
    """Number of levels."""
    start: float = 0.0
    """First beta, smallest sigma or smallest t, by kind; of no meaning for ``cosine`` and ``levels``."""
    end: float = 0.0
    """Last beta, largest sigma or largest t."""
    levels: tuple[float, ...] = ()
    """For ``levels`` alone: the sigmas themselves, ascending."""

    def __post_init__(self) -> None:
        if self.kind == "levels":
            if len(self.levels) != self.N:
                raise SpecError(f"schedule levels: got {len(self.levels)} sigmas for N {self.N}")
        elif self.levels:
            raise SpecError(f"schedule {self.kind}: got {len(self.levels)} explicit sigmas, expected none")
        if not 1 <= self.N <= MAX_LEVELS:
            raise SpecError(f"schedule {self.kind}: N is {self.N}, expected 1..{MAX_LEVELS}")
        values = schedule_sigmas(self)
        if not (values[0] >= MIN_SIGMA and values[-1] <= MAX_SIGMA and (np.diff(values) > 0).all()):  # nor NaN
            raise SpecError(
                f"schedule {self.kind} ({self.start:g} to {self.end:g}, N {self.N}): "
                f"expected sigmas of {MIN_SIGMA:g} to {MAX_SIGMA:g} that rise from first to last"
            )


DEFAULT_SCHEDULES: dict[str, Schedule] = {}
"""The schedules by name, with the numbers their papers and smalldiffusion use. Filled below, once the maker exists."""


def _sigmas_from_betas(betas: Array) -> Array:
    """sqrt(1/alpha_bar - 1), written so that small betas keep their digits."""
    log_alpha_bar = np.cumsum(np.log1p(-betas))  # (N,)
    return np.asarray(np.sqrt(np.expm1(-log_alpha_bar)))


def _ddpm(s: Schedule) -> Array:
    """Betas linear in the step: Ho et al. 2020, section 4."""
    return _sigmas_from_betas(np.linspace(s.start, s.end, s.N))


def _ldm(s: Schedule) -> Array:
    """Betas linear in their square root: Rombach et al. 2022, the schedule of Stable Diffusion."""
    return _sigmas_from_betas(np.linspace(s.start**0.5, s.end**0.5, s.N) ** 2)


def _sigmoid(s: Schedule) -> Array:
    """Betas along a sigmoid from -6 to 6: Xu et al. 2022 (GeoDiff)."""
    return _sigmas_from_betas(s.start + (s.end - s.start) / (1 + np.exp(-np.linspace(-6, 6, s.N))))


def _cosine(s: Schedule) -> Array:
    """alpha_bar along a squared cosine with offset 0.008, betas at most 0.999: Nichol & Dhariwal 2021, Eq. 17."""
    t = np.arange(s.N + 1) / s.N
    alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return _sigmas_from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))


def _loglinear(s: Schedule) -> Array:
    """Sigmas evenly spaced in their logarithm."""
    return np.logspace(np.log10(s.start), np.log10(s.end), s.N)


def _flow(s: Schedule) -> Array:
    """t evenly spaced: Liu et al. 2022 (rectified flow), Lipman et al. 2023 (flow matching)."""
    return np.linspace(s.start, s.end, s.N)


def _levels(s: Schedule) -> Array:
    return np.asarray(s.levels, np.float64)


_MAKERS: dict[str, Callable[[Schedule], Array]] = {
    "ddpm": _ddpm,
    "ldm": _ldm,
    "sigmoid": _sigmoid,
    "cosine": _cosine,
    "loglinear": _loglinear,
    "flow": _flow,
    "levels": _levels,
}


@functools.lru_cache(maxsize=64)
def schedule_sigmas(schedule: Schedule) -> Array:
    """The N noise levels of a schedule, (N,) float64, smallest first; computed once and not to be written to."""
    with np.errstate(all="ignore"):
        sigmas = _MAKERS[schedule.kind](schedule)
    sigmas.flags.writeable = False
    return sigmas


DEFAULT_SCHEDULES.update(
    ddpm=Schedule(kind="ddpm", start=1e-4, end=0.02),
    ldm=Schedule(kind="ldm", start=0.00085, end=0.012),
    sigmoid=Schedule(kind="sigmoid", start=1e-4, end=0.02),
    cosine=Schedule(kind="cosine"),
    loglinear=Schedule(kind="loglinear", start=0.02, end=10.0),
    flow=Schedule(kind="flow", start=0.001, end=1.0),
)
