"""Samplers against k-diffusion's recorded results, closed forms, and their order of convergence."""

from pathlib import Path

import numpy as np
import pytest

from diffexport.plan import COLUMNS, Plan, make_plan, noise_levels
from diffexport.samplers import SAMPLERS
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport.spec import ModelSpec

ORACLE = dict(np.load(Path(__file__).parent / "oracles" / "kdiffusion_samplers.npz"))


def spec_of(prediction="x0", schedule="ddpm", **facts):
    return ModelSpec(
        family="toy", shape=(8,), prediction=prediction, schedule=DEFAULT_SCHEDULES[schedule], **facts
    )  # fmt: skip


def run(plan: Plan, denoise, x, noise=None):
    """Apply a plan in float64 to a denoiser D(x, sigma)."""
    h = np.zeros_like(x)
    for index, (row, sigma) in enumerate(zip(plan.rows, plan.sigmas, strict=True)):
        r = dict(zip(COLUMNS, row, strict=True))
        d = denoise(x, sigma)
        z = noise[index] if noise is not None else 0.0
        x, h = (
            r["x_x"] * x + r["x_d"] * d + r["x_h"] * h + r["x_z"] * z,
            r["h_x"] * x + r["h_d"] * d + r["h_h"] * h,
        )
    return x


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp-2m", "lms-2", "euler-ancestral", "dpmpp-2m-sde"])
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


@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp-2m", 2), ("lms-2", 2), ("accelerated", 1)]
)
def test_order_of_convergence_on_the_probability_flow(name, order):
    """Halving the step divides the error by 2^order; the levels end above 0, where the flow is smooth."""
    x = np.linspace(-3, 3, 8)[None] + 10.0
    errors = []
    for steps in (32, 64, 128):
        levels = np.geomspace(10.0, 0.1, steps + 1)
        plan = make_plan(spec_of(), name, grid=levels.tolist())
        errors.append(np.abs(run(plan, gaussian_denoiser, x) - exact_flow(x, 10.0, 0.1)).max())
    found = np.log2(errors[0] / errors[1]), np.log2(errors[1] / errors[2])
    assert min(found) > order - 0.25, (found, errors)
    assert errors[-1] < 0.1


def moments(plan, mean, variance):
    """Mean and variance of x after a plan, without drawing: D is linear for normal data, so both follow exactly."""
    m, cov = np.array([mean, 0.0]), np.diag([variance, 0.0])  # of (x, h)
    for row, sigma in zip(plan.rows, plan.sigmas, strict=True):
        r = dict(zip(COLUMNS, row, strict=True))
        slope = SPREAD**2 / (SPREAD**2 + sigma**2)
        step = np.array([[r["x_x"] + r["x_d"] * slope, r["x_h"]], [r["h_x"] + r["h_d"] * slope, r["h_h"]]])
        m = step @ m + np.array([r["x_d"], r["h_d"]]) * (1 - slope) * MEAN
        cov = step @ cov @ step.T + np.diag([r["x_z"] ** 2, 0.0])
    return m[0], cov[0, 0]


@pytest.mark.parametrize(
    ("name", "order", "options"),
    [
        ("ddim", 1, {}),
        ("ddim", 1, {"eta": 0.5}),
        ("ddpm", 1, {}),
        ("euler-ancestral", 1, {}),
        ("dpmpp-2m-sde", 2, {}),
        ("heun", 2, {}),
        ("dpmpp-2m", 2, {}),
        ("lms-2", 2, {}),
        ("accelerated", 1, {}),
        ("accelerated", 1, {"gam": 1.5, "mu": 0.5}),
    ],
)
def test_the_distribution_of_normal_data_is_reached_with_the_samplers_order(name, order, options):
    """Variance and mean at the last level against the forward process, whose variance is SPREAD^2 + sigma^2."""
    errors = []
    for steps in (64, 128, 256):
        levels = np.geomspace(10.0, 0.1, steps + 1)
        plan = make_plan(spec_of(), name, grid=levels.tolist(), **options)
        mean, variance = moments(plan, MEAN, SPREAD**2 + 10.0**2)
        assert mean == pytest.approx(MEAN, abs=1e-9)
        errors.append(abs(variance / (SPREAD**2 + 0.1**2) - 1))
    assert np.log2(errors[0] / errors[1]) > order - 0.35, errors
    assert np.log2(errors[1] / errors[2]) > order - 0.25, errors
    assert errors[-1] < 0.06


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
