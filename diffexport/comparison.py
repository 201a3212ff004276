"""The comparison of a backend with PyTorch, over single steps, the loop in one call, the denoiser and whole runs.

``reference`` is a session of the PyTorch module (``diffexport.backends.torch``), ``candidate`` any other. Both apply the
same rows to the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from diffexport.backends.session import Session
from diffexport.bundle import HALF, Defaults, Measurement, Precision
from diffexport.parity import amplification, measure_run, measure_step, typical_amplification
from diffexport.plan import GUIDANCE, Plan, denoise_rows
from diffexport.probes import (
    LEVELS,
    default_plan,
    mixing_row,
    probe_denoiser,
    probe_guidance,
    probe_levels,
    probe_loop,
    probe_state,
    run_plan,
)
from diffexport.spec import ModelSpec

Array = NDArray[np.float32]
Progress = Callable[[str, float], None]
"""Called with what is being done and the part done so far, 0 .. 1."""

DISTINCT = 4
"""Different samples in a narrowed comparison."""

HEAVY_PARAMETERS = 10_000_000
"""Above this many parameters a comparison is narrowed unless all of it is asked for; see ``Scope``."""

VAST_PARAMETERS = 200_000_000
"""Above this many it is brief."""

BRIEF_STEPS = 4


@dataclass(frozen=True)
class Scope:
    """What a comparison covers: batches, smallest first, and how much of it at each.

    The whole comparison, every step and a run with guidance at every batch, takes minutes for a DiT of 33 M parameters on
    two cores. A narrowed one covers a guided step at every noise level and the bundle's default run at the smallest batch,
    and one guided step at the larger ones, which repeat four samples, so that PyTorch computes only these. A brief one, of
    models whose every evaluation takes seconds, has batches of 1 and 2, a run of four steps, and leaves every second noise
    level to the denoiser graph, which has them all.
    """

    batches: tuple[int, ...]
    whole: bool
    steps: int | None = None
    """Of the run that is compared, at most; None for those of the bundle's default run."""

    @property
    def brief(self) -> bool:
        return self.steps is not None

    def batches_of_steps(self, level: int, *, guided: bool) -> tuple[int, ...]:
        middle = level == LEVELS // 2
        if self.whole or (guided and middle):
            return self.batches
        left_out = self.brief and level % 2
        return self.batches[:1] if (guided and not left_out) or middle else ()

    @property
    def batches_of_runs(self) -> tuple[int, ...]:
        return self.batches if self.whole else self.batches[:1]

    def samples(self, batch: int, first: int) -> list[int]:
        """Indices of the samples in a batch."""
        return [first + (index if self.whole else index % DISTINCT) for index in range(batch)]


def scope_of(parameters: int, default_batch: int, max_batch: int, whole: bool | None = None) -> Scope:
    """The smallest, the default and the largest batch; less for heavy models unless ``whole`` says otherwise."""
    if whole is None and parameters > VAST_PARAMETERS:
        return Scope(tuple(range(1, min(2, max_batch) + 1)), whole=False, steps=BRIEF_STEPS)
    batches = tuple(sorted({1, min(default_batch, max_batch), max_batch}))
    return Scope(batches, parameters <= HEAVY_PARAMETERS if whole is None else whole)


@dataclass
class Comparison:
    """What a comparison found, and what PyTorch gave on the way.

    Attributes:
        plan: of the run that was compared.
        final: PyTorch's final images of it, (batch, *shape).
        denoised: PyTorch's D of sample K with guidance at the K-th level, LEVELS of (1, *shape).
    """

    plan: Plan
    measurements: list[Measurement] = field(default_factory=list)
    final: Array = field(default_factory=lambda: np.empty(0, np.float32))
    denoised: list[Array] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """One check: what to do with a session and some samples, at which batches, and what it yields."""

    name: str
    kind: str
    batches: tuple[int, ...]
    run: Callable[[Session, list[int]], tuple[Array, ...]]
    rows: Array
    """The rows that it runs, (n, 13)."""
    first: int = 0
    """Index of the first sample; see ``probe_state``."""

    @property
    def evaluations(self) -> int:
        return len(self.rows)

    def measure(self, name: str, part: int, found: Array, expected: Array, precision: Precision) -> Measurement:
        if self.kind == "run":
            return measure_run(name, found, expected, precision)
        return measure_step(name, found, expected, precision, sum(amplification(row)[part] for row in self.rows))


def compare(
    reference: Session,
    candidate: Session,
    spec: ModelSpec,
    precision: Precision,
    scope: Scope,
    defaults: Defaults,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two sessions; see ``Scope``.

    Single steps return the denoised estimate, with guidance and without, at each noise level; one more, at the middle
    level, has every coefficient at work, and three rows run inside the loop graph. Samples are independent, so PyTorch
    computes each distinct one once, for all batches.
    """
    if scope.steps is not None and scope.steps < defaults.steps:
        defaults = msgspec.structs.replace(defaults, steps=scope.steps)
    result = Comparison(default_plan(spec, defaults, guided=scope.whole))
    jobs = list(_jobs(spec, scope, defaults, result.plan))
    costs = [sum(job.batches) * job.evaluations for job in jobs]
    for index, job in enumerate(jobs):
        if progress is not None:
            progress(f"comparing with PyTorch: {job.name}", sum(costs[:index]) / sum(costs))
        distinct = sorted({job.first, *(sample for batch in job.batches for sample in scope.samples(batch, job.first))})
        expected = job.run(reference, distinct)
        if job.kind == "guided":
            result.denoised.append(expected[0][:1])
        if job.kind == "run":
            result.final = expected[0]
        for batch in job.batches:
            samples = scope.samples(batch, job.first)
            places = [distinct.index(sample) for sample in samples]
            for part, (a, b) in enumerate(zip(job.run(candidate, samples), expected, strict=True)):
                name = job.name + (", history" if part else "")
                result.measurements.append(job.measure(name, part, a, b[places], precision))
    return result


def _jobs(spec: ModelSpec, scope: Scope, defaults: Defaults, plan: Plan) -> Iterator[_Job]:
    levels, w = probe_levels(spec), probe_guidance(spec)
    for k, sigma in enumerate(map(float, levels)):
        for kind, weight in (("guided", w), ("plain", 1.0)):
            batches = scope.batches_of_steps(k, guided=kind == "guided")
            if kind == "plain" and not (spec.guidable and batches):
                continue
            row = denoise_rows(spec, [sigma], weight)[0].astype(np.float32)
            name = f"D at sigma {sigma:.4g}" + (f", guidance {weight:g}" if spec.guidable else "")
            yield _Job(name, kind, batches, _denoising(spec, row, sigma, k), row[None], first=k)
    middle, small = float(levels[LEVELS // 2]), scope.batches[:1]
    mixing = mixing_row(spec, middle, w)
    update = _updating(spec, mixing, middle)
    yield _Job(f"full update at sigma {middle:.4g}", "update", small, update, mixing[None], first=LEVELS // 2)
    ahead = _updating(spec, mixing, middle, ahead=True)
    yield _Job("the same, its condition computed ahead", "update", small, ahead, mixing[None], first=LEVELS // 2)
    yield _Job("two rows in one call", "loop", small, _looping(spec), probe_loop(spec, [0]).rows, first=1)

    def whole(session: Session, samples: list[int]) -> tuple[Array, ...]:
        return (run_plan(session, spec, plan, range(len(samples))),)

    rows = plan.rows.astype(np.float32)
    guided = f", guidance {plan.rows[0, GUIDANCE]:g}" if spec.guidable else ""
    yield _Job(f"{defaults.sampler}, {defaults.steps} steps{guided}", "run", scope.batches_of_runs, whole, rows)


def _denoising(spec: ModelSpec, row: Array, sigma: float, draw: int) -> Callable[[Session, list[int]], tuple[Array]]:
    """One row that returns D."""

    def run(session: Session, samples: list[int]) -> tuple[Array]:
        start = probe_state(spec, sigma, draw, samples)
        session.begin(start.x, start.label)
        session.step(row)
        return (session.state()[0],)

    return run


def _updating(
    spec: ModelSpec, row: Array, sigma: float, *, ahead: bool = False
) -> Callable[[Session, list[int]], tuple[Array, Array]]:
    """One row with history and noise, both results; ``ahead``: the session is told of the row when it begins."""

    def run(session: Session, samples: list[int]) -> tuple[Array, Array]:
        start = probe_state(spec, sigma, LEVELS // 2, samples)
        session.begin(start.x, start.label, start.h, row[None] if ahead else None)
        session.step(row, start.z)
        return session.state()

    return run


def _looping(spec: ModelSpec) -> Callable[[Session, list[int]], tuple[Array]]:
    """Some rows by the loop inside the graph."""

    def run(session: Session, samples: list[int]) -> tuple[Array]:
        start = probe_loop(spec, samples)
        return (session.run(start.x, start.label, start.rows, start.noise),)

    return run


def check_decoder(
    reference: Session, candidate: Session, spec: ModelSpec, comparison: Comparison, precision: Precision
) -> list[Measurement]:
    """The decoder on final samples of the run that was compared, alone and at the end of a run of one row in one call."""
    results = []
    expected = reference.decode(comparison.final[:2])
    for batch in range(1, len(expected) + 1):
        found = candidate.decode(comparison.final[:batch])
        results.append(measure_step("decoder", found, expected[:batch], precision))
    level = float(probe_levels(spec)[-1])
    start = probe_state(spec, level, LEVELS - 1, [LEVELS - 1])
    feeds = start.x, start.label, mixing_row(spec, level, probe_guidance(spec))[None], start.z[None]
    for name, found, wanted in zip(
        ("latents", "image"), candidate.run_decoded(*feeds), reference.run_decoded(*feeds), strict=True
    ):
        results.append(measure_step(f"one row and the decoder in one call, {name}", found, wanted, precision))
    return results


def check_denoiser(graph: Path, spec: ModelSpec, comparison: Comparison, precision: Precision) -> Measurement:
    """The denoiser graph on one batch whose samples have all noise levels, beside PyTorch's D of each."""
    from diffexport.backends.onnxruntime import run_graph

    found = run_graph(graph, probe_denoiser(spec), rounded=precision in HALF)["denoised"]
    amplified = typical_amplification(denoise_rows(spec, probe_levels(spec)))
    expected = np.concatenate(comparison.denoised)
    return measure_step("denoiser graph at every level", found, expected, precision, amplified)
