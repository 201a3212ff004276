"""Scheduler configurations of diffusers as facts of a model: the process that it was trained on and is sampled by.

Ho et al. 2020 and Song et al. 2021 as diffusers' DDPMScheduler and DDIMScheduler have them. What a plan cannot repeat
number for number is refused by its name in the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from diffexport.errors import CheckpointError, SpecError
from diffexport.schedules import Kind, Schedule
from diffexport.spec import Prediction, Spacing, Variance
from diffexport_reference.facts import Facts

PROCESS: Facts = {"scaled": True, "noise_input": "timestep", "unit_start": True}
"""What all networks of these schedulers have in common: variance-preserving input, told the step, begun at unit noise."""

_BETAS: dict[str, Kind] = {
    "linear": "ddpm",
    "scaled_linear": "ldm",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES: dict[str, Variance] = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "learned_range": "learned",
}
_SPACINGS: dict[str, Spacing] = {"leading": "leading", "linspace": "linspace", "trailing": "trailing-to-0"}


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, rename={"class_name": "_class_name"}):
    """The fields of ``scheduler_config.json`` that decide a run, with the defaults of both classes."""

    class_name: str
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    prediction_type: str = "epsilon"
    thresholding: bool = False
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False


def scheduler_facts(content: Mapping[str, Any]) -> Facts:
    """Fields of the spec that a scheduler's configuration decides; ``variance`` only where it is a DDPMScheduler's.

    Raises:
        CheckpointError: a field of another type than diffusers writes.
        SpecError: a scheduler, or a setting of it, that cannot be repeated exactly.
    """
    try:
        config = msgspec.convert(content, SchedulerConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"scheduler_config.json: {error}") from error
    _expect("_class_name", config.class_name, "DDPMScheduler", "DDIMScheduler")
    ddpm = config.class_name == "DDPMScheduler"
    _expect("prediction_type", config.prediction_type, *_PREDICTIONS)
    _expect("thresholding", config.thresholding, False)
    _expect("rescale_betas_zero_snr", config.rescale_betas_zero_snr, False)
    # a DDIMScheduler's steps are of another size than those that its linspace visits
    _expect("timestep_spacing", config.timestep_spacing, *(_SPACINGS if ddpm else ("leading", "trailing")))
    if config.timestep_spacing == "leading":
        _expect("steps_offset", config.steps_offset, 0)
    facts: Facts = {
        "prediction": _PREDICTIONS[config.prediction_type],
        "schedule": _schedule(config, ddpm=ddpm),
        "clip": config.clip_sample_range if config.clip_sample else None,
        "clip_keeps": "x" if ddpm else "eps",
        "spacing": _SPACINGS[config.timestep_spacing],
        **PROCESS,
    }
    if ddpm:
        _expect("variance_type", config.variance_type, *_VARIANCES)
        facts["variance"] = _VARIANCES[config.variance_type]
        if config.timestep_spacing == "trailing" and facts["variance"] != "small":
            raise SpecError(
                f"scheduler: variance_type {config.variance_type!r} with timestep_spacing 'trailing' adds noise in the "
                "last step, which is not supported; supported with it are 'fixed_small' and 'fixed_small_log'"
            )
    else:
        _expect("set_alpha_to_one", config.set_alpha_to_one, True)
    return facts


def _schedule(config: SchedulerConfig, *, ddpm: bool) -> Schedule:
    if config.trained_betas is None:
        _expect("beta_schedule", config.beta_schedule, *(name for name in _BETAS if ddpm or name != "sigmoid"))
        kind = _BETAS[config.beta_schedule]
        start, end = (0.0, 0.0) if kind == "cosine" else (config.beta_start, config.beta_end)
        return Schedule(kind=kind, N=config.num_train_timesteps, start=start, end=end)
    betas = np.asarray(config.trained_betas, np.float64)
    if len(betas) != config.num_train_timesteps:
        raise SpecError(
            f"scheduler: trained_betas holds {len(betas)} numbers, num_train_timesteps says {config.num_train_timesteps}"
        )
    if not ((betas > 0) & (betas < 1)).all():
        raise SpecError("scheduler: trained_betas holds a number outside 0..1")
    sigmas = np.sqrt(np.expm1(-np.cumsum(np.log1p(-betas))))
    return Schedule(kind="levels", N=len(betas), levels=tuple(sigmas.tolist()))


def _expect(name: str, found: object, *supported: object) -> None:
    if found not in supported:
        raise SpecError(f"scheduler: {name} {found!r} is not supported; supported: {', '.join(map(repr, supported))}")
