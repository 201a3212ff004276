"""A plan: the table of scalars that turns one graph into any sampler.

One row for each evaluation of the network, float64 when made and float32 when run. With x the state, h a history
tensor that starts at zero, z standard normal noise, w the guidance weight:

    F  = network(c_in*[x; x], c_noise, [label; null])      batch doubled; not doubled where w = 1
    G  = F_u + w*(F_c - F_u)                               on the guided channels; F_c on the others
    D  = c_skip*x + c_out*G[:, :C]                         clamped to [-clip, clip] where the model asks for it; where
                                                           it keeps eps then, x below is D + (x - D before the clamp)
    x' = x_x*x + x_d*D + x_h*h + x_z*exp(v_z*V)*z          V = G[:, C:], the learned variance; factor 1 without it
    h' = h_x*x + h_d*D + h_h*h

The state starts as x_scale*z. Guidance follows Ho & Salimans 2022 in the convention of diffusers: w = 1 is off.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffexport.errors import PlanError
from diffexport.samplers import SAMPLERS, Update, ddpm_large, ddpm_learned
from diffexport.schedules import schedule_sigmas
from diffexport.spec import ModelSpec

Array = NDArray[np.float64]

_EVALUATION = ("c_in", "c_noise", "c_skip", "c_out", "w")
_UPDATE = ("x_x", "x_d", "x_h", "x_z", "v_z", "h_x", "h_d", "h_h")
COLUMNS = _EVALUATION + _UPDATE
"""The columns of a plan, in order."""

GUIDANCE = COLUMNS.index("w")
NOISE = COLUMNS.index("x_z")

MAX_STEPS = 100_000

GRIDS = ("model", "karras", "exponential")
"""How the noise levels of a run are chosen: as the model's own code does, or by a formula between the same ends."""


@dataclass(frozen=True)
class Plan:
    """A sampler, ready to run.

    Attributes:
        rows: (rows, 13) float64, columns as ``COLUMNS``.
        x_scale: what the first noise is multiplied by.
        sigmas: (rows,) noise level of each evaluation, for people; the rows alone decide the result.
    """

    rows: Array
    x_scale: float
    sigmas: Array

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.shape[1] != len(COLUMNS) or not len(self.rows):
            raise PlanError(f"plan: got a table of shape {self.rows.shape}, expected (rows, {len(COLUMNS)})")
        bad = np.argwhere(~np.isfinite(self.rows))
        if len(bad):
            row, column = bad[0]
            raise PlanError(
                f"plan: row {row} has {self.rows[row, column]} in column {COLUMNS[column]}, expected a number"
            )
        if not np.isfinite(self.x_scale):
            raise PlanError(f"plan: x_scale is {self.x_scale}, expected a number")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def evaluations(self) -> int:
        """Network evaluations for one sample, a guided row counting twice."""
        return int(len(self.rows) + np.count_nonzero(self.rows[:, GUIDANCE] != 1))

    @property
    def saved(self) -> int:
        """Evaluations that a run with guidance does without, since some of its rows have none."""
        guided = int(np.count_nonzero(self.rows[:, GUIDANCE] != 1))
        return len(self.rows) - guided if guided else 0

    @property
    def stochastic(self) -> bool:
        """Whether any row adds noise."""
        return bool(np.any(self.rows[:, NOISE] != 0))


def denoise_rows(spec: ModelSpec, sigmas: Sequence[float] | Array, guidance_scale: float = 1.0) -> Array:
    """Rows that return the denoised estimate itself: x' = D, h' = h. (len(sigmas), 13)."""
    return _table(spec, [Update(sigma=float(s), x_d=1.0, h_h=1.0) for s in sigmas], guidance_scale, None)


def default_sampler(spec: ModelSpec) -> str:
    """The sampler of a bundle whose maker named none.

    DPM-Solver++(2M), which is near the best in docs/samplers.md from 5 steps to 50; for a flow model, for which it is not
    derived, euler; for a model whose own code chooses the steps, the ddim of that code.
    """
    if spec.prediction == "flow":
        return "euler"
    return "dpmpp-2m" if spec.spacing == "trailing" else "ddim"


def denoising(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """The row that evaluates the network as ``row`` does but returns the denoised estimate: x' = D."""
    changed = row.copy()
    changed[len(_EVALUATION) :] = 0
    changed[COLUMNS.index("x_d")] = 1
    return changed


def make_plan(
    spec: ModelSpec,
    sampler: str = "ddim",
    steps: int = 20,
    guidance_scale: float = 1.0,
    *,
    grid: str | Sequence[float] = "model",
    guidance_interval: tuple[float, float] | None = None,
    **options: float,
) -> Plan:
    """The table for a sampler on a model.

    Args:
        spec: the model.
        sampler: a name in ``SAMPLERS``.
        steps: number of steps; a step of ``heun`` evaluates the network twice.
        guidance_scale: w of the convention above; 1 is off and halves the work.
        grid: a name in ``GRIDS``, or the noise levels themselves, falling, the last one the end (0 for clean data).
        guidance_interval: guide only where low <= sigma <= high (Kynkäänniemi et al. 2024).
        options: the sampler's own numbers, such as ``eta``, ``gam``, ``mu``.

    Raises:
        PlanError: no such sampler, option or grid; a number of steps that the schedule does not allow; levels that
            do not fall; guidance on a model without labels.
    """
    if sampler not in SAMPLERS:
        raise PlanError(f"sampler {sampler!r}: there is none of this name; {_nearest(sampler, SAMPLERS)}")
    entry = SAMPLERS[sampler]
    unknown = sorted(set(options) - set(entry.options))
    if unknown:
        takes = ", ".join(entry.options) or "no options"
        raise PlanError(f"sampler {sampler!r} has no option {unknown[0]!r}; it takes {takes}")
    if spec.prediction == "flow" and not entry.flow:
        fits = ", ".join(name for name, known in SAMPLERS.items() if known.flow)
        raise PlanError(f"sampler {sampler!r} is not defined for a flow model; use one of {fits}")
    if not np.isfinite(guidance_scale):
        raise PlanError(f"guidance_scale {guidance_scale}: expected a finite number")
    if guidance_scale != 1 and not spec.guidable:
        lacks = "null label" if spec.conditional else "labels"
        raise PlanError(f"guidance_scale {guidance_scale:g}: this model has no {lacks}, so only 1 (off) is possible")

    levels = noise_levels(spec, steps, grid, strided=sampler == "ddim")
    settings = {**entry.options, **entry.fixed, **options}
    if settings.get("eta", 0.0) < 0:
        raise PlanError(f"eta {settings['eta']:g}: expected 0 or more")
    if spec.prediction == "flow" and (settings.get("eta") or settings.get("mu")):
        raise PlanError(f"sampler {sampler!r} with added noise is not defined for a flow model; leave eta and mu at 0")
    if sampler == "ddpm" and spec.variance != "small":
        updates = {"large": ddpm_large, "learned": ddpm_learned}[spec.variance](levels.tolist())
    else:
        updates = entry.rows(levels.tolist(), **settings)
    x_scale = float(np.hypot(1.0, levels[0]) if spec.unit_start else levels[0])
    rows = _table(spec, updates, guidance_scale, guidance_interval)
    return Plan(rows, x_scale, np.array([update.sigma for update in updates]))


READY_STEPS = (5, 10, 20, 50)
"""Steps of the ready-made plans, for every sampler that the model allows."""


def ready_plans(spec: ModelSpec, more: Iterable[str] = ()) -> dict[str, NDArray[np.float32]]:
    """Ready-made plans: ``NAME.STEPS`` (rows, 13) and ``NAME.STEPS.x_scale`` (1,), float32, without guidance.

    Every sampler that the model allows, at ``READY_STEPS``, and those asked for as ``NAME:STEPS``, which must be allowed.
    """
    wanted = [(name, steps, False) for name in SAMPLERS for steps in READY_STEPS]
    for text in more:
        name, _, steps_text = text.partition(":")
        if not steps_text.isdigit():
            raise PlanError(f"plan {text!r}: expected NAME:STEPS, such as ddim:20")
        wanted.append((name, int(steps_text), True))
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, steps, asked in wanted:
        try:
            plan = make_plan(spec, name, steps)
        except PlanError:
            if asked:
                raise
            continue  # a sampler that this model does not allow, such as ddpm for a flow model
        tensors[f"{name}.{steps}"] = plan.rows.astype(np.float32)
        tensors[f"{name}.{steps}.x_scale"] = np.array([plan.x_scale], np.float32)
    return tensors


def noise_levels(spec: ModelSpec, steps: int, grid: str | Sequence[float] = "model", *, strided: bool = False) -> Array:
    """The falling noise levels of a run, (steps + 1,).

    Args:
        strided: for models whose steps are respaced, take every k-th step, as the original's "ddim50" does, in place
            of evenly spread ones with rounding, as its "250" does (Nichol & Dhariwal 2021, section 4).
    """
    if not isinstance(grid, str):
        levels = np.asarray(grid, np.float64)
        if levels.ndim != 1 or len(levels) < 2:
            raise PlanError("sigmas: expected at least two falling numbers")
    else:
        if steps < 1:
            raise PlanError(f"steps {steps}: expected at least 1")
        if steps > MAX_STEPS:
            raise PlanError(f"steps {steps}: expected at most {MAX_STEPS}")
        if grid not in GRIDS:
            raise PlanError(f"grid {grid!r}: there is none of this name; {_nearest(grid, GRIDS)}")
        trained = schedule_sigmas(spec.schedule)
        if grid == "karras":
            levels = _karras(trained[0], trained[-1], steps)
        elif grid == "exponential":
            levels = np.append(np.geomspace(trained[-1], trained[0], steps), 0.0)
        elif spec.spacing == "respaced":
            visited = _strided(len(trained), steps) if strided else _evenly(len(trained), steps)
            levels = np.append(trained[visited[::-1]], 0.0)
        elif spec.schedule.kind == "flow":
            levels = np.append(np.linspace(trained[-1], trained[0], steps), 0.0)
        elif spec.spacing == "trailing":
            levels = trained[_trailing(len(trained), steps)]
        else:
            levels = np.append(trained[_visited_by_diffusers(spec.spacing, len(trained), steps)[::-1]], 0.0)
    if not (np.isfinite(levels).all() and (np.diff(levels) < 0).all() and levels[-1] >= 0):
        raise PlanError("sigmas: expected finite numbers that fall strictly and end at 0 or above")
    return levels


def _karras(low: float, high: float, steps: int, rho: float = 7.0) -> Array:
    """Karras et al. 2022, Eq. 5."""
    ramp = np.linspace(high ** (1 / rho), low ** (1 / rho), steps)
    return np.append(ramp**rho, 0.0)


def _trailing(N: int, steps: int) -> NDArray[np.int64]:
    """smalldiffusion's choice: round(N*(1 - i/steps)) - 1 for each step, then index 0.

    Where so many steps are asked for that the last one is at index 0 already, that step changes nothing and is left out.
    """
    _check_steps(N, steps)
    indices = np.round(N * (1 - np.arange(steps) / steps)).astype(np.int64) - 1
    return indices if indices[-1] == 0 and steps > 1 else np.append(indices, 0)


def _evenly(N: int, steps: int) -> NDArray[np.int64]:
    """improved-diffusion's respacing "S": S steps from first to last, each rounded."""
    _check_steps(N, steps)
    stride = (N - 1) / (steps - 1) if steps > 1 else 1.0
    return np.array([round(i * stride) for i in range(steps)], np.int64)


def _strided(N: int, steps: int) -> NDArray[np.int64]:
    """improved-diffusion's respacing "ddimS": the smallest integer stride that visits exactly S steps."""
    for stride in range(1, N):
        if len(range(0, N, stride)) == steps:
            return np.arange(0, N, stride)
    fits = sorted({len(range(0, N, stride)) for stride in range(1, N)}, key=lambda count: abs(count - steps))[:4]
    raise PlanError(
        f"steps {steps}: no integer stride through {N} levels visits exactly so many; the nearest are "
        + ", ".join(map(str, sorted(fits)))
    )


def _visited_by_diffusers(spacing: str, N: int, steps: int) -> NDArray[np.int64]:
    """``timestep_spacing`` of diffusers' DDPMScheduler and DDIMScheduler, ascending: Lin et al. 2023, Table 2."""
    _check_steps(N, steps)
    if spacing == "linspace":
        return np.linspace(0, N - 1, steps).round().astype(np.int64)
    if spacing == "leading":
        return np.arange(steps) * (N // steps)
    if N % steps:  # diffusers' DDIM then takes steps of another size than those it visits
        fits = sorted((n for n in range(1, N + 1) if N % n == 0), key=lambda n: abs(n - steps))[:4]
        raise PlanError(
            f"steps {steps}: the model's scheduler visits every N/S-th of {N} levels, so S must divide {N}; the nearest "
            f"are {', '.join(map(str, sorted(fits)))}"
        )
    return np.arange(1, steps + 1) * (N // steps) - 1


def _check_steps(N: int, steps: int) -> None:
    if steps > N:
        raise PlanError(f"steps {steps}: the model's schedule has {N} levels, so at most {N} steps are possible")


def _table(
    spec: ModelSpec, updates: list[Update], guidance_scale: float, interval: tuple[float, float] | None
) -> Array:
    """Updates with the model's preconditioning in front: one row each."""
    sigma = np.array([update.sigma for update in updates])
    c_in, c_noise, c_skip, c_out = preconditioning(spec, sigma)
    w = np.full_like(sigma, guidance_scale)
    if interval is not None:
        low, high = interval
        trained = schedule_sigmas(spec.schedule)
        if not (low < high and high >= trained[0] and low <= trained[-1]):
            raise PlanError(
                f"guidance_interval {low:g}:{high:g}: expected low < high, overlapping the model's noise levels "
                f"{trained[0]:.4g}:{trained[-1]:.4g}"
            )
        w[(sigma < low) | (sigma > high)] = 1.0
    tail = [[getattr(update, name) for name in _UPDATE] for update in updates]
    return np.column_stack([c_in, c_noise, c_skip, c_out, w, np.array(tail, np.float64)])


def preconditioning(spec: ModelSpec, sigma: Array) -> tuple[Array, Array, Array, Array]:
    """c_in, c_noise, c_skip, c_out of Karras et al. 2022, Eq. 7, for the model's prediction at each sigma."""
    alpha_bar = 1 / (1 + sigma**2)
    c_in = np.sqrt(alpha_bar) if spec.scaled else np.ones_like(sigma)
    c_noise = timesteps(spec, sigma) if spec.noise_input == "timestep" else sigma
    if spec.prediction == "x0":
        return c_in, c_noise, np.zeros_like(sigma), np.ones_like(sigma)
    if spec.prediction == "v":
        return c_in, c_noise, 1 - sigma * np.sqrt(alpha_bar * (1 - alpha_bar)), -sigma * np.sqrt(alpha_bar)
    return c_in, c_noise, np.ones_like(sigma), -sigma


def timesteps(spec: ModelSpec, sigma: Array) -> Array:
    """The schedule's step that each sigma stands for, linear in log sigma between steps and exact on them."""
    trained = schedule_sigmas(spec.schedule)
    return np.asarray(np.interp(np.log(sigma), np.log(trained), np.arange(len(trained), dtype=np.float64)))


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(names)
