"""Parity: what a backend is measured on against PyTorch, the limits it is held to, and the golden cases.

``reference`` is a session of the PyTorch module (``diffexport.backends.torch``), ``candidate`` any other. Both apply the
same rows to the same noise. Errors are relative L2, ||a - b|| / ||b||, and the largest absolute difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffexport.backends.session import Session
from diffexport.bundle import Defaults, Measurement, Precision, Tensors
from diffexport.errors import ParityError
from diffexport.noise import normal
from diffexport.plan import COLUMNS, Plan, denoise_rows, make_plan
from diffexport.schedules import schedule_sigmas
from diffexport.spec import ModelSpec

Array = NDArray[np.float32]
Progress = Callable[[str, float], None]
"""Called with what is being done and the part done so far, 0 .. 1."""

SEED = 0
MAX_GOLDEN_BATCH = 10
SIGMAS = 5
"""How many noise levels single steps are compared at, from the largest to the smallest of the schedule."""


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


def relative_l2(found: Array, expected: Array) -> float:
    """||found - expected|| / ||expected||, NaN where anything is not finite."""
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    error = float(np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64)))
    return error / scale if scale else error


def psnr(found: Array, expected: Array) -> float:
    """Peak signal-to-noise ratio in dB, the peak being the range of ``expected``."""
    peak = float(expected.max() - expected.min())
    mse = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    if not math.isfinite(mse):
        return math.nan
    return math.inf if mse == 0 else 10 * math.log10(peak * peak / mse) if peak else -math.inf


def measure_step(check: str, found: Array, expected: Array, precision: Precision) -> Measurement:
    """One step's result beside PyTorch's."""
    limit = LIMITS[precision].step
    error = relative_l2(found, expected)
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


def _max_abs(found: Array, expected: Array) -> float:
    return float(np.max(np.abs(found.astype(np.float64) - expected)))


def severity(m: Measurement) -> float:
    """How much of its limit a measurement uses, above 1 where it failed."""
    if math.isnan(m.relative_l2):
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


# ---- comparison of two sessions ----


def check_levels(spec: ModelSpec) -> NDArray[np.float64]:
    """The noise levels at which single steps are compared, (SIGMAS,), largest first."""
    trained = schedule_sigmas(spec.schedule)
    return np.geomspace(trained[-1], trained[0], SIGMAS)


def check_labels(spec: ModelSpec, batch: int) -> NDArray[np.int64] | None:
    """Labels spread over all of the model's, (batch,)."""
    if not spec.conditional:
        return None
    return (np.arange(batch) * max(1, spec.num_classes // batch) % spec.num_classes).astype(np.int64)


def guidance_of(spec: ModelSpec) -> float:
    """The guidance weight that checks use: none without labels, else one that makes both halves count."""
    return 2.0 if spec.conditional else 1.0


def mixing_row(spec: ModelSpec, sigma: float, w: float) -> Array:
    """A row whose every coefficient counts, so that an error in any of them is seen."""
    row = denoise_rows(spec, [sigma], w)[0]
    mixing = {
        "x_x": 0.7 / max(sigma, 1.0),
        "x_d": 0.9,
        "x_h": -0.4,
        "x_z": 0.3,
        "v_z": 0.2,
        "h_x": 0.5 / max(sigma, 1.0),
        "h_d": -0.6,
        "h_h": 0.8,
    }
    for name, value in mixing.items():
        row[COLUMNS.index(name)] = value
    return np.asarray(row, np.float32)


def default_plan(spec: ModelSpec, defaults: Defaults) -> Plan:
    """The run that is compared: the bundle's default one, with guidance where the model can have it."""
    guided = guidance_of(spec) if defaults.guidance_scale == 1 else defaults.guidance_scale
    return make_plan(spec, defaults.sampler, defaults.steps, guided)


def run_plan(session: Session, spec: ModelSpec, plan: Plan, labels: NDArray[np.int64] | None, batch: int) -> Array:
    """A whole run with the seed's noise, (batch, *shape)."""
    draws = normal(SEED, range(batch), range(1 + len(plan)), spec.shape)
    session.begin(np.float32(plan.x_scale) * draws[0], labels)
    for row, z in zip(plan.rows.astype(np.float32), draws[1:], strict=True):
        session.step(row, z)
    return session.state()[0]


HEAVY_PARAMETERS = 10_000_000
"""Above this many parameters a comparison is narrowed unless all of it is asked for; see ``Scope``."""


@dataclass(frozen=True)
class Scope:
    """What a comparison covers: batches, and how much of it at each.

    The whole comparison of a 33 M-parameter DiT takes minutes on two cores. A narrowed one covers every noise level and a
    whole run at the smallest batch, and one guided step at the middle noise level at the larger ones.
    """

    batches: tuple[int, ...]
    whole: bool

    def batches_of_steps(self, level: int, *, guided: bool) -> tuple[int, ...]:
        return self.batches if self.whole or (level == SIGMAS // 2 and guided) else self.batches[:1]

    @property
    def batches_of_runs(self) -> tuple[int, ...]:
        return self.batches if self.whole else self.batches[:1]


def scope_of(parameters: int, default_batch: int, max_batch: int, whole: bool | None = None) -> Scope:
    """The smallest, the default and the largest batch; narrowed for heavy models unless ``whole`` says otherwise."""
    batches = tuple(sorted({1, min(default_batch, max_batch), max_batch}))
    return Scope(batches, parameters <= HEAVY_PARAMETERS if whole is None else whole)


@dataclass(frozen=True)
class Comparison:
    """What a comparison found, and PyTorch's final images of the default run, for the golden cases."""

    measurements: list[Measurement]
    final: Array


def compare(
    reference: Session,
    candidate: Session,
    spec: ModelSpec,
    precision: Precision,
    scope: Scope,
    defaults: Defaults,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two sessions over single steps and whole runs; see ``Scope``.

    Single steps return the denoised estimate, with guidance and without, at each noise level; one more, at the middle
    level, has every coefficient at work, and three rows run inside the loop graph. Samples are independent, so PyTorch's
    results of the largest batch also serve the smaller ones.
    """
    results: list[Measurement] = []
    jobs = list(_jobs(spec, scope, defaults))
    done = 0
    total = sum(job.cost for job in jobs)
    expected: tuple[Array, ...] = (np.empty(0, np.float32),)
    for job in jobs:
        if progress is not None:
            progress(f"comparing with PyTorch: {job.name}", done / total)
        expected = job.run(reference, max(job.batches))
        for batch in job.batches:
            found = job.run(candidate, batch)
            for part, (a, b) in enumerate(zip(found, expected, strict=True)):
                measure = measure_run if job.whole_run else measure_step
                results.append(measure(job.name + (", history" if part else ""), a, b[:batch], precision))
        done += job.cost
    return Comparison(results, expected[0])  # the last job is the default run


@dataclass(frozen=True)
class _Job:
    """One check: rows to apply at some batches."""

    name: str
    batches: tuple[int, ...]
    cost: int
    run: Callable[[Session, int], tuple[Array, ...]]
    whole_run: bool = False


def _jobs(spec: ModelSpec, scope: Scope, defaults: Defaults) -> Iterator[_Job]:
    w = guidance_of(spec)
    levels = check_levels(spec)
    for k, sigma in enumerate(levels):
        for weight in sorted({w, 1.0}, reverse=True):
            batches = scope.batches_of_steps(k, guided=weight == w)
            guided = f", guidance {weight:g}" if spec.conditional else ""
            row = denoise_rows(spec, [sigma], weight)[0].astype(np.float32)
            yield _Job(f"D at sigma {sigma:.4g}{guided}", batches, sum(batches), _single(spec, row, float(sigma), k))
    middle = float(levels[len(levels) // 2])
    row = mixing_row(spec, middle, w)
    small = scope.batches[0]
    yield _Job(f"full update at sigma {middle:.4g}", (small,), small, _single(spec, row, middle, 7, mixed=True))
    plan = default_plan(spec, defaults)
    batches = scope.batches_of_runs

    def whole(session: Session, batch: int) -> tuple[Array, ...]:
        return (run_plan(session, spec, plan, _prefix(spec, batch), batch),)

    yield _Job(f"{defaults.sampler}, {defaults.steps} steps", batches, sum(batches) * len(plan), whole, whole_run=True)


def _single(
    spec: ModelSpec, row: Array, sigma: float, draw: int, *, mixed: bool = False
) -> Callable[[Session, int], tuple[Array, ...]]:
    """One row applied to the noise that belongs to its level; the state after it, with the history where mixed."""

    def run(session: Session, batch: int) -> tuple[Array, ...]:
        x, h, z = normal(SEED, range(batch), [draw, draw + 100, draw + 200], spec.shape)
        session.begin(np.float32(math.hypot(1.0, sigma)) * x, _prefix(spec, batch), h if mixed else None)
        session.step(row, z)
        state = session.state()
        return state if mixed else state[:1]

    return run


def _one_call(spec: ModelSpec, rows: Array) -> Callable[[Session, int], tuple[Array, ...]]:
    """Some rows applied by the loop inside the graph."""

    def run(session: Session, batch: int) -> tuple[Array, ...]:
        draws = normal(SEED, range(batch), range(1 + len(rows)), spec.shape)
        return (session.run(draws[0], _prefix(spec, batch), rows, draws[1:]),)

    return run


def _prefix(spec: ModelSpec, batch: int) -> NDArray[np.int64] | None:
    """Labels of a batch such that a smaller batch has a larger one's first."""
    labels = check_labels(spec, 16)
    return None if labels is None else np.resize(labels, batch)


def check_denoiser(reference: Session, graph: Path, spec: ModelSpec, precision: Precision) -> Measurement:
    """The denoiser graph with a noise level and a guidance weight of its own for every sample of one batch."""
    from diffexport.backends.onnxruntime import run_graph

    levels, w = check_levels(spec), guidance_of(spec)
    (z,) = normal(SEED, range(len(levels)), [0], spec.shape)
    x = z * np.hypot(1.0, levels).astype(np.float32).reshape(-1, *[1] * len(spec.shape))
    weights = np.where(np.arange(len(levels)) % 2 == 0, w, 1.0).astype(np.float32)
    labels = _prefix(spec, len(levels))
    feeds: Tensors = {"x": x, "sigma": levels.astype(np.float32), "guidance": weights}
    if labels is not None:
        feeds["label"] = labels
    found = run_graph(graph, feeds)["denoised"]
    expected = np.empty_like(x)
    for k, sigma in enumerate(levels):
        part = slice(k, k + 1)
        reference.begin(x[part], None if labels is None else labels[part])
        reference.step(denoise_rows(spec, [sigma], float(weights[k]))[0].astype(np.float32))
        expected[part] = reference.state()[0]
    return measure_step("denoiser graph at every level", found, expected, precision)


# ---- golden cases ----


def golden_cases(reference: Session, spec: ModelSpec, defaults: Defaults, final: Array) -> Tensors:
    """Recorded inputs and PyTorch's outputs, small enough to travel with the bundle.

    ``step.K.{x,h,z,row,label}`` -> ``step.K.{x_next,h_next}``: one row at the K-th noise level, guided and plain in turn.
    ``run.{rows,x_scale,label}`` -> ``run.x``: the default run, its noise drawn from seed 0, samples 0, 1, ....

    Args:
        final: PyTorch's final images of that run, of which the first two are kept; see ``Comparison``.
    """
    size = math.prod(spec.shape)
    batch = max(2, min(MAX_GOLDEN_BATCH, (1 << 13) // size))
    labels = check_labels(spec, batch)
    cases: Tensors = {}
    for k, sigma in enumerate(check_levels(spec)):
        row = mixing_row(spec, float(sigma), guidance_of(spec) if k % 2 == 0 else 1.0)
        x, h, z = normal(SEED, range(batch), [k, k + 100, k + 200], spec.shape)
        x = np.float32(math.hypot(1.0, sigma)) * x
        reference.begin(x, labels, h)
        reference.step(row, z)
        x_next, h_next = reference.state()
        case = {"x": x, "h": h, "z": z, "row": row, "x_next": x_next, "h_next": h_next}
        cases.update({f"step.{k}.{name}": array for name, array in case.items()})
        if labels is not None:
            cases[f"step.{k}.label"] = labels
    plan = default_plan(spec, defaults)
    cases["run.x"] = final[:2]
    cases["run.rows"] = plan.rows.astype(np.float32)
    cases["run.x_scale"] = np.array([plan.x_scale], np.float32)
    kept = _prefix(spec, len(cases["run.x"]))
    if kept is not None:
        cases["run.label"] = kept
    return cases


def check_golden(session: Session, spec: ModelSpec, cases: Tensors, precision: Precision) -> list[Measurement]:
    """Run the golden cases on a session and compare with what PyTorch gave."""
    results = []
    names = sorted({name.split(".")[1] for name in cases if name.startswith("step.")}, key=int)
    for k in names:
        case = {
            name.removeprefix(f"step.{k}."): array for name, array in cases.items() if name.startswith(f"step.{k}.")
        }
        session.begin(case["x"], case.get("label"), case["h"])
        session.step(case["row"], case["z"])
        for name, found in zip(("x_next", "h_next"), session.state(), strict=True):
            results.append(measure_step(f"golden step {k}, {name}", found, case[name], precision))
    rows, x = cases["run.rows"].astype(np.float64), cases["run.x"]
    plan = Plan(rows, float(cases["run.x_scale"][0]), rows[:, COLUMNS.index("c_noise")])
    found = run_plan(session, spec, plan, cases.get("run.label"), len(x))
    results.append(measure_run("golden run", found, x, precision))
    return results
