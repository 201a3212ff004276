"""Samplers, each held three ways: an independent implementation, normal data, and their order of convergence.

The independent implementations are recorded runs of k-diffusion here, of smalldiffusion and the official DiT in
``reference/test_upstream_runs.py``, and diffusers' schedulers in ``test_diffusers.py``.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from stepping import relative, run
from test_diffusers import TWINS

from diffexport.plan import COLUMNS, make_plan, noise_levels
from diffexport.samplers import SAMPLERS
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport.spec import ModelSpec

ORACLES = Path(__file__).parent / "oracles"
ORACLE = dict(np.load(ORACLES / "kdiffusion_samplers.npz"))
IN_K_DIFFUSION = ["euler", "heun", "dpmpp-2m", "lms-2", "euler-ancestral", "dpmpp-2m-sde"]


def spec_of(prediction="x0", schedule="ddpm", **facts):
    return ModelSpec(
        family="toy", shape=(8,), prediction=prediction, schedule=DEFAULT_SCHEDULES[schedule], **facts
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A sampler with its order: of x where it adds no noise, else of the variance that it reaches."""

    sampler: str
    order: int
    options: dict = field(default_factory=dict)
    variance: str = "small"

    def __str__(self):
        return ", ".join([self.sampler, self.variance, *(f"{name} {value:g}" for name, value in self.options.items())])

    def plan(self, levels):
        return make_plan(spec_of(variance=self.variance), self.sampler, grid=levels.tolist(), **self.options)


CASES = [
    Case("ddim", 1),
    Case("ddim", 1, {"eta": 0.5}),
    Case("ddpm", 1),
    Case("ddpm", 1, variance="large"),
    Case("ddpm", 1, variance="learned"),
    Case("euler", 1),
    Case("euler-ancestral", 1),
    Case("heun", 2),
    Case("dpmpp-2m", 2),
    Case("dpmpp-2m-sde", 2),
    Case("lms-2", 2),
    Case("accelerated", 1),
    Case("accelerated", 1, {"gam": 1.5, "mu": 0.5}),
]
QUIET = [case for case in CASES if not case.plan(np.array([2.0, 1.0, 0.5])).stochastic]


def test_every_sampler_is_held_three_ways():
    recorded = np.load(ORACLES / "sd_dit_cond_scaled.npz")
    assert any(name.startswith("samples.gam2.0") for name in recorded), "the accelerated sampler of smalldiffusion"
    independent = {*IN_K_DIFFUSION, *(twin.sampler for twin in TWINS.values()), "accelerated"}
    assert independent == {case.sampler for case in CASES} == set(SAMPLERS)
    variances = {"small", "large", "learned"}
    assert {case.variance for case in CASES} == {twin.variance for twin in TWINS.values()} == variances


@pytest.mark.parametrize("name", IN_K_DIFFUSION)
def test_samplers_agree_with_k_diffusion_on_its_toy_denoiser(name):
    plan = make_plan(spec_of(), name, grid=ORACLE["sigmas"].tolist())
    noise = ORACLE["noise"]
    if name == "heun":
        noise = np.zeros((len(plan), *noise.shape[1:]))

    def denoise(x, sigma):
        return 0.9 * np.tanh(x @ ORACLE["W"] / np.sqrt(1 + sigma**2))

    result = run(plan, denoise, ORACLE["x0"], noise)
    assert relative(result, ORACLE[name]) < 1e-14


def test_a_wrong_coefficient_is_seen():
    plan = make_plan(spec_of(), "dpmpp-2m", grid=ORACLE["sigmas"].tolist())
    plan.rows[3, COLUMNS.index("x_h")] *= 1.01

    def denoise(x, sigma):
        return 0.9 * np.tanh(x @ ORACLE["W"] / np.sqrt(1 + sigma**2))

    assert relative(run(plan, denoise, ORACLE["x0"], ORACLE["noise"]), ORACLE["dpmpp-2m"]) > 1e-6


SPREAD, MEAN = 0.7, 1.3


def gaussian_denoiser(x, sigma):
    """The exact D of data that is normal with mean MEAN and standard deviation SPREAD."""
    return (SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def exact_flow(x, start, end):
    """Where the probability flow of that data takes x from one noise level to another."""
    return MEAN + (x - MEAN) * np.sqrt((SPREAD**2 + end**2) / (SPREAD**2 + start**2))


def moments(plan, mean, variance, log_variance=0.0):
    """Mean and variance of x after a plan, without drawing: D is linear for normal data, so both follow exactly."""
    m, cov = np.array([mean, 0.0]), np.diag([variance, 0.0])  # of (x, h)
    for row, sigma in zip(plan.rows, plan.sigmas, strict=True):
        r = dict(zip(COLUMNS, row, strict=True))
        slope = SPREAD**2 / (SPREAD**2 + sigma**2)
        step = np.array([[r["x_x"] + r["x_d"] * slope, r["x_h"]], [r["h_x"] + r["h_d"] * slope, r["h_h"]]])
        m = step @ m + np.array([r["x_d"], r["h_d"]]) * (1 - slope) * MEAN
        cov = step @ cov @ step.T + np.diag([(r["x_z"] * np.exp(r["v_z"] * log_variance)) ** 2, 0.0])
    return m[0], cov[0, 0]


def variance_error(case, steps):
    """What is reached at sigma 0.1 beside the forward process, whose variance is SPREAD^2 + sigma^2."""
    plan = case.plan(np.geomspace(10.0, 0.1, steps + 1))
    mean, variance = moments(plan, MEAN, SPREAD**2 + 10.0**2, log_variance=0.3)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    return abs(variance / (SPREAD**2 + 0.1**2) - 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_distribution_of_normal_data_is_reached(case):
    assert variance_error(case, 1000) < (0.02 if case.order == 1 else 1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_of_convergence_of_the_variance(case):
    """Halving the step divides the error by 2^order."""
    errors = [variance_error(case, steps) for steps in (64, 128, 256)]
    assert np.log2(errors[0] / errors[1]) > case.order - 0.35, errors
    assert np.log2(errors[1] / errors[2]) > case.order - 0.25, errors


@pytest.mark.parametrize("case", QUIET, ids=str)
def test_order_of_convergence_on_the_probability_flow(case):
    """The same for each x; the levels end above 0, where the flow is smooth."""
    x = np.linspace(-3, 3, 8)[None] + 10.0
    errors = []
    for steps in (32, 64, 128):
        plan = case.plan(np.geomspace(10.0, 0.1, steps + 1))
        errors.append(np.abs(run(plan, gaussian_denoiser, x) - exact_flow(x, 10.0, 0.1)).max())
    found = np.log2(errors[0] / errors[1]), np.log2(errors[1] / errors[2])
    assert min(found) > case.order - 0.25, (found, errors)
    assert errors[-1] < 0.1


def test_ddim_eta_reaches_from_ddim_to_ddpm():
    assert np.array_equal(make_plan(spec_of(), "ddim", eta=1.0).rows, make_plan(spec_of(), "ddpm").rows)
    assert np.array_equal(make_plan(spec_of(), "ddim", eta=0.0).rows, make_plan(spec_of(), "euler").rows)


@pytest.mark.parametrize(("gam", "mu", "twin"), [(1.0, 0.0, "ddim"), (1.0, 0.5, "ddpm")])
def test_accelerated_contains_ddim_and_ddpm(gam, mu, twin):
    """Permenter & Yuan 2024, table 1. The history column differs, but nothing reads it at gam = 1."""
    found = make_plan(spec_of(schedule="loglinear"), "accelerated", 10, gam=gam, mu=mu).rows
    expected = make_plan(spec_of(schedule="loglinear"), twin, 10).rows
    acting = [COLUMNS.index(name) for name in ("x_x", "x_d", "x_h", "x_z")]
    np.testing.assert_allclose(found[:, acting], expected[:, acting], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_sampler_is_finite_and_exact_for_data_at_one_point(name, steps):
    """D is a constant for such data, and a run that ends at sigma 0 must end there."""
    plan = make_plan(spec_of(schedule="cosine"), name, steps, grid="exponential")
    noise = np.random.default_rng(1).standard_normal((len(plan), 1, 8))
    result = run(plan, lambda x, _sigma: np.full_like(x, 0.25), np.ones((1, 8)) * plan.x_scale, noise)
    np.testing.assert_allclose(result, 0.25, atol=1e-9)


def test_learned_variance_lies_between_the_two_it_interpolates():
    """V = -1 gives DDPM's posterior variance, V = +1 that of beta (Nichol & Dhariwal 2021, Eq. 15)."""
    spec = spec_of("eps", variance="learned", unit_start=True, spacing="respaced")
    rows = make_plan(spec, "ddpm", 10).rows
    smaller = make_plan(spec_of("eps", unit_start=True, spacing="respaced"), "ddpm", 10).rows
    x_z, v_z = (rows[:, COLUMNS.index(name)] for name in ("x_z", "v_z"))
    np.testing.assert_allclose(x_z[:-1] * np.exp(-v_z[:-1]), smaller[:-1, COLUMNS.index("x_z")], rtol=1e-9)
    levels = noise_levels(spec, 10)
    s, n = levels[:-2], levels[1:-1]
    beta = 1 - (1 + n**2) / (1 + s**2)
    np.testing.assert_allclose(x_z[:-1] * np.exp(v_z[:-1]), np.sqrt(beta * (1 + n**2)), rtol=1e-9)
    assert x_z[-1] == 0
    large = make_plan(spec_of("eps", variance="large", unit_start=True, spacing="respaced"), "ddpm", 10).rows
    np.testing.assert_allclose(large[:-1, COLUMNS.index("x_z")], np.sqrt(beta * (1 + n**2)), rtol=1e-9)
