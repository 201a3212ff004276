"""Parity: how results are measured against PyTorch's, and the limits that each precision is held to.

Errors are relative L2, ||found - expected|| / ||expected||, and the largest absolute difference.

A network's output G carries an error relative to itself, and a step multiplies it: D = c_skip*x + c_out*G, with c_out as
large as sigma for a network that predicts eps. At large sigma D is then a small difference of two large terms, which the
sampler damps again by 1 - n/s. There a step's error is taken relative to what an output of unit RMS puts into the result,
where that is larger than the result itself; see ``amplification``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffexport.bundle import Measurement, Precision
from diffexport.errors import ParityError
from diffexport.plan import COLUMNS

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Limits:
    """What a precision is held to.

    Attributes:
        step: relative L2 of one step.
        trajectory: relative L2 of the final image of a whole run, or None where its PSNR is held instead.
        psnr: dB of the final image, over the range of PyTorch's.
    """

    step: float
    trajectory: float | None = None
    psnr: float | None = None


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(step=1e-5, trajectory=1e-4),
    "fp16": Limits(step=3e-3, psnr=40.0),
    "bf16": Limits(step=2e-2, psnr=30.0),
    "int8": Limits(step=1e-1, psnr=25.0),
}


def coarsest(*precisions: Precision) -> Precision:
    """The one with the widest limits: what a graph of one precision, computed in another, is held to."""
    return max(precisions, key=lambda precision: LIMITS[precision].step)


def relative_l2(found: Array, expected: Array, at_least: float = 0.0) -> float:
    """||found - expected|| / ||expected||, NaN where anything is not finite; the divisor is ``at_least`` this."""
    scale = max(float(np.linalg.norm(expected.astype(np.float64))), at_least)
    error = float(np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64)))
    return error / scale if scale else error


def psnr(found: Array, expected: Array) -> float:
    """Peak signal-to-noise ratio in dB, the peak being the range of ``expected``."""
    peak = float(expected.max() - expected.min())
    mse = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    if not math.isfinite(mse):
        return math.nan
    return math.inf if mse == 0 else 10 * math.log10(peak * peak / mse) if peak else -math.inf


def amplification(row: Array) -> tuple[float, float]:
    """What a row multiplies the network's output by on its way into x' and h'."""
    r = dict(zip(COLUMNS, map(float, row), strict=True))
    return abs(r["x_d"] * r["c_out"]), abs(r["h_d"] * r["c_out"])


def typical_amplification(rows: NDArray[np.float64]) -> float:
    """Root mean square over rows that go to different samples of a batch, each returning x'."""
    return math.sqrt(sum(amplification(row)[0] ** 2 for row in rows) / len(rows))


def measure_step(
    check: str, found: Array, expected: Array, precision: Precision, amplified: float = 0.0
) -> Measurement:
    """One step's result beside PyTorch's.

    Args:
        amplified: what the network's output is multiplied by in it.
    """
    limit = LIMITS[precision].step
    error = relative_l2(found, expected, amplified * math.sqrt(expected.size))
    return Measurement(
        check=check,
        batch=len(expected),
        relative_l2=error,
        max_abs=_max_abs(found, expected),
        limit=limit,
        passed=error <= limit,
    )


def measure_run(check: str, found: Array, expected: Array, precision: Precision) -> Measurement:
    """A whole run's final images beside PyTorch's."""
    limits = LIMITS[precision]
    error, decibel = relative_l2(found, expected), psnr(found, expected)
    held_by_psnr = limits.psnr is not None
    limit = limits.psnr if limits.psnr is not None else limits.trajectory
    assert limit is not None
    return Measurement(
        check=check,
        batch=len(expected),
        relative_l2=error,
        max_abs=_max_abs(found, expected),
        limit=limit,
        psnr=decibel if math.isfinite(decibel) else None,
        passed=decibel >= limit if held_by_psnr else error <= limit,
    )


def holds(m: Measurement, precision: Precision) -> bool:
    """Whether a measurement that was kept is within its precision's limits, whatever it says of itself."""
    limits = LIMITS[precision]
    if m.limit == limits.psnr:
        return m.psnr is None or m.psnr >= m.limit
    return m.limit in (limits.step, limits.trajectory) and m.relative_l2 <= m.limit


def _max_abs(found: Array, expected: Array) -> float:
    return float(np.max(np.abs(found.astype(np.float64) - expected)))


def severity(m: Measurement) -> float:
    """How much of its limit a measurement uses, above 1 where it failed."""
    if math.isnan(m.relative_l2) or m.limit <= 0:
        return math.inf
    if _held_by_psnr(m):
        return m.limit / m.psnr if m.psnr else 0.0
    return m.relative_l2 / m.limit


def _held_by_psnr(m: Measurement) -> bool:
    """Limits of relative L2 lie below 1, limits in dB above."""
    return m.limit > 1


def describe(m: Measurement) -> str:
    """A measurement in one line."""
    shown = f"relative L2 {m.relative_l2:.1e}, largest difference {m.max_abs:.1e}"
    if _held_by_psnr(m) and m.psnr is not None:
        return f"{m.check}, batch {m.batch}: PSNR {m.psnr:.1f} dB (limit {m.limit:g}), {shown}"
    return f"{m.check}, batch {m.batch}: {shown} (limit {m.limit:g})"


def check(measurements: Sequence[Measurement]) -> None:
    """Raise for the worst of those that failed.

    Raises:
        ParityError: names the check, the batch, and how far.
    """
    failed = [m for m in measurements if not m.passed]
    if failed:
        worst = max(failed, key=severity)
        raise ParityError(f"{len(failed)} of {len(measurements)} parity checks failed; the worst is {describe(worst)}")
