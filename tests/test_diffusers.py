"""Samplers and grids against the schedulers of diffusers, in float64.

diffusers rounds to float32 inside its schedulers wherever it writes ``torch.float32`` or ``np.float32``. Here its modules
are given these two libraries with float64 under that name, so that the same code computes in float64 throughout.
"""

import sys
from dataclasses import dataclass, field

import diffusers
import numpy as np
import pytest
import torch
from stepping import relative, run

from diffexport.plan import make_plan, noise_levels
from diffexport.schedules import DEFAULT_SCHEDULES, schedule_sigmas
from diffexport.spec import ModelSpec

# diffusers hands tensors to np.array, which PyTorch's tensors answer in NumPy 1's way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 20
PROCESS = dict(beta_start=1e-4, beta_end=0.02, num_train_timesteps=1000)  # DEFAULT_SCHEDULES["ddpm"]
SOLVER = "DPMSolverMultistepScheduler"
SECOND_ORDER = dict(solver_order=2, solver_type="midpoint", final_sigmas_type="zero")


class InDouble:
    """A library whose float32 is float64."""

    def __init__(self, library):
        self.library, self.float32 = library, library.float64

    def __getattr__(self, name):
        return getattr(self.library, name)


@dataclass(frozen=True)
class Twin:
    """A sampler of this package and the scheduler that should do the same.

    Attributes:
        scheduler: its name in diffusers.
        config: arguments of its constructor.
        options: the sampler's own numbers.
        step: arguments of ``scheduler.step``.
        preserving: its state is x/sqrt(1 + sigma^2).
        variance: the model's variance of DDPM.
    """

    sampler: str
    scheduler: str
    config: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    step: dict = field(default_factory=dict)
    preserving: bool = False
    variance: str = "small"


TWINS = {
    "ddpm": Twin("ddpm", "DDPMScheduler", {"variance_type": "fixed_small"}, preserving=True),
    "ddpm, large variance": Twin(
        "ddpm", "DDPMScheduler", {"variance_type": "fixed_large"}, preserving=True, variance="large"
    ),
    "ddpm, learned variance": Twin(
        "ddpm", "DDPMScheduler", {"variance_type": "learned_range"}, preserving=True, variance="learned"
    ),
    **{
        f"ddim, eta {eta:g}": Twin("ddim", "DDIMScheduler", {}, {"eta": eta}, {"eta": eta}, preserving=True)
        for eta in (0.0, 0.3, 1.0)
    },
    "euler": Twin("euler", "EulerDiscreteScheduler"),
    "euler-ancestral": Twin("euler-ancestral", "EulerAncestralDiscreteScheduler"),
    "heun": Twin("heun", "HeunDiscreteScheduler"),
    "dpmpp-2m": Twin("dpmpp-2m", SOLVER, {"algorithm_type": "dpmsolver++", **SECOND_ORDER}, preserving=True),
    "dpmpp-2m-sde": Twin(
        "dpmpp-2m-sde", SOLVER, {"algorithm_type": "sde-dpmsolver++", **SECOND_ORDER}, preserving=True
    ),
    "lms-2": Twin("lms-2", "LMSDiscreteScheduler", step={"order": 2}),
}  # fmt: skip

ON_OTHER_GRIDS = [
    (name, grid)
    for name in ("euler", "heun", "dpmpp-2m", "dpmpp-2m-sde", "lms-2")
    for grid in ("karras", "exponential")
]


def denoise(x, sigma):
    """Smooth, nonlinear, and other at every level."""
    return 0.9 * np.tanh((np.roll(x, 1, -1) - 0.3 * x) / np.sqrt(1 + sigma**2))


def log_variance(x, sigma):
    """Between -1 and 1."""
    return np.sin(x / (1 + sigma))


def spec_of(variance="small", prediction="eps", schedule="ddpm"):
    return ModelSpec(
        family="toy", shape=(8,), prediction=prediction, schedule=DEFAULT_SCHEDULES[schedule], variance=variance
    )


@pytest.fixture
def scheduler_in_double(monkeypatch):
    """``scheduler_in_double(name, **config)`` gives a scheduler and the list whose first array is its next noise."""

    def make(name, **config):
        cls = getattr(diffusers, name)
        module, draws = sys.modules[cls.__module__], []
        monkeypatch.setattr(module, "torch", InDouble(torch))
        monkeypatch.setattr(module, "np", InDouble(np))
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(draws[0]))
        return cls(**config), draws

    return make


def levels_of(scheduler):
    """The noise level of each evaluation."""
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas[: len(scheduler.timesteps)].numpy()
    return np.sqrt(1 / scheduler.alphas_cumprod.numpy()[scheduler.timesteps.numpy()] - 1)


def follow(scheduler, draws, x, noise, twin):
    """The last state of diffusers' loop, which starts from x in sigma space and ends at sigma 0."""
    levels = levels_of(scheduler)
    state = torch.from_numpy(x / np.hypot(1, levels[0]) if twin.preserving else x)
    for t, sigma, z in zip(scheduler.timesteps, levels, noise, strict=True):
        draws[:] = [z]
        scheduler.scale_model_input(state, t)
        now = state.numpy() * (np.hypot(1, sigma) if twin.preserving else 1)
        output = (now - denoise(now, sigma)) / sigma
        if twin.variance == "learned":
            output = np.concatenate([output, log_variance(now, sigma)], 1)
        state = scheduler.step(torch.from_numpy(output), t, state, **twin.step).prev_sample
    assert state.dtype == torch.float64
    return state.numpy()


def compare(scheduler, draws, twin, grid):
    """Relative L2 between a plan on ``grid`` and the scheduler."""
    plan = make_plan(spec_of(twin.variance), twin.sampler, STEPS, grid=grid, **twin.options)
    rng = np.random.default_rng(0)
    x, noise = plan.x_scale * rng.standard_normal((4, 8)), rng.standard_normal((len(plan), 4, 8))
    expected = follow(scheduler, draws, x, noise, twin)
    return relative(run(plan, denoise, x, noise, log_variance), expected)


@pytest.mark.parametrize("name", TWINS)
def test_samplers_agree_with_diffusers(scheduler_in_double, name):
    twin = TWINS[name]
    extra = {"clip_sample": False} if twin.scheduler.startswith("DD") else {}
    scheduler, draws = scheduler_in_double(twin.scheduler, **PROCESS, **extra, **twin.config)
    scheduler.set_timesteps(STEPS)
    levels = sorted(set(levels_of(scheduler)), reverse=True)
    assert compare(scheduler, draws, twin, [*levels, 0.0]) < 1e-12


@pytest.mark.parametrize(("name", "grid"), ON_OTHER_GRIDS)
def test_samplers_agree_with_diffusers_on_its_own_karras_and_exponential_levels(scheduler_in_double, name, grid):
    """Nothing of the levels is handed over: both sides make them from the betas."""
    twin = TWINS[name]
    scheduler, draws = scheduler_in_double(twin.scheduler, **PROCESS, **twin.config, **{f"use_{grid}_sigmas": True})
    scheduler.set_timesteps(STEPS)
    assert compare(scheduler, draws, twin, grid) < 1e-11


def test_the_levels_of_a_model_are_diffusers_trailing_ones(scheduler_in_double):
    scheduler, _ = scheduler_in_double(
        "EulerDiscreteScheduler", **PROCESS, timestep_spacing="trailing", final_sigmas_type="sigma_min"
    )
    for steps in (5, 20, 50):
        scheduler.set_timesteps(steps)
        np.testing.assert_allclose(noise_levels(spec_of(), steps), scheduler.sigmas.numpy(), rtol=1e-12)


@pytest.mark.parametrize(("name", "kind"), [("euler", "Euler"), ("heun", "Heun")])
def test_flow_models_agree_with_diffusers(scheduler_in_double, name, kind):
    scheduler, _ = scheduler_in_double(f"FlowMatch{kind}DiscreteScheduler", num_train_timesteps=1000)
    scheduler.set_timesteps(STEPS)
    levels = sorted(set(levels_of(scheduler)), reverse=True)
    plan = make_plan(spec_of(prediction="flow", schedule="flow"), name, grid=[*levels, 0.0])
    x = np.random.default_rng(0).standard_normal((4, 8))
    expected = torch.from_numpy(x)
    for t, sigma in zip(scheduler.timesteps, levels_of(scheduler), strict=True):
        velocity = (expected.numpy() - denoise(expected.numpy(), sigma)) / sigma
        expected = scheduler.step(torch.from_numpy(velocity), t, expected).prev_sample
    assert relative(run(plan, denoise, x), expected.numpy()) < 1e-12


@pytest.mark.parametrize("name", ["ddpm", "ldm", "cosine"])
def test_schedules_are_those_of_diffusers(scheduler_in_double, name):
    ends = {"ddpm": (1e-4, 0.02), "ldm": (0.00085, 0.012), "cosine": (1e-4, 0.02)}[name]
    kind = {"ddpm": "linear", "ldm": "scaled_linear", "cosine": "squaredcos_cap_v2"}[name]
    scheduler, _ = scheduler_in_double("DDPMScheduler", beta_start=ends[0], beta_end=ends[1], beta_schedule=kind)
    expected = np.sqrt(1 / scheduler.alphas_cumprod.numpy() - 1)
    np.testing.assert_allclose(schedule_sigmas(DEFAULT_SCHEDULES[name]), expected, rtol=1e-9)


def test_a_wrong_coefficient_would_be_seen(scheduler_in_double):
    twin = TWINS["lms-2"]
    scheduler, draws = scheduler_in_double(twin.scheduler, **PROCESS)
    scheduler.set_timesteps(STEPS)
    levels = [*scheduler.sigmas[:-1].numpy(), 0.0]
    levels[7] *= 1.001
    assert compare(scheduler, draws, twin, levels) > 1e-8
