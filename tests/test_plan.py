"""Plans: preconditioning against the definitions of each prediction, grids, guidance, and bad input."""

import numpy as np
import pytest

from diffexport.errors import DiffexportError, PlanError, ShapeError, SpecError
from diffexport.plan import COLUMNS, GUIDANCE, Plan, make_plan, noise_levels, preconditioning, ready_plans, timesteps
from diffexport.samplers import SAMPLERS
from diffexport.schedules import DEFAULT_SCHEDULES, Schedule, schedule_sigmas
from diffexport.spec import ModelSpec


def spec_of(prediction="eps", schedule="ddpm", **facts):
    facts = {"num_classes": 10, **facts}
    return ModelSpec(
        family="toy", shape=(1, 4, 4), prediction=prediction, schedule=DEFAULT_SCHEDULES[schedule], **facts
    )  # fmt: skip


def column(plan, name):
    return plan.rows[:, COLUMNS.index(name)]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_preconditioning_recovers_clean_data_from_the_target(prediction):
    """A network that predicts its training target without error denoises without error."""
    rng = np.random.default_rng(0)
    sigma = np.geomspace(0.01, 100, 9)
    x0, eps = rng.standard_normal((2, 9))
    alpha_bar = 1 / (1 + sigma**2)
    target = {"eps": eps, "x0": x0, "v": np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * x0}[prediction]
    _, _, c_skip, c_out = preconditioning(spec_of(prediction), sigma)
    np.testing.assert_allclose(c_skip * (x0 + sigma * eps) + c_out * target, x0, atol=1e-10)


def test_preconditioning_of_a_flow_model():
    rng = np.random.default_rng(0)
    t = np.linspace(0.01, 1, 9)
    x0, eps = rng.standard_normal((2, 9))
    _, _, c_skip, c_out = preconditioning(spec_of("flow", "flow"), t)
    np.testing.assert_allclose(c_skip * ((1 - t) * x0 + t * eps) + c_out * (eps - x0), x0, atol=1e-12)


def test_scaled_input_has_the_variance_of_the_process():
    plan = make_plan(spec_of(scaled=True), steps=5)
    np.testing.assert_allclose(column(plan, "c_in"), 1 / np.sqrt(1 + plan.sigmas**2))
    assert np.all(column(make_plan(spec_of(), steps=5), "c_in") == 1)


def test_timesteps_are_exact_on_the_schedule_and_between():
    spec = spec_of(noise_input="timestep")
    levels = schedule_sigmas(spec.schedule)
    np.testing.assert_allclose(timesteps(spec, levels), np.arange(1000), atol=1e-9)
    assert timesteps(spec, np.sqrt(levels[3:4] * levels[4:5]))[0] == pytest.approx(3.5)


@pytest.mark.parametrize(("sampler", "steps", "expected"), [
    ("ddim", 4, [750, 500, 250, 0]),  # "ddim4" of improved-diffusion: stride 250
    ("ddpm", 4, [999, 666, 333, 0]),  # "4": evenly, rounded
    ("ddpm", 8, [999, 856, 714, 571, 428, 285, 143, 0]),
    ("ddim", 8, [875, 750, 625, 500, 375, 250, 125, 0]),
])  # fmt: skip
def test_respacing_visits_the_steps_of_improved_diffusion(sampler, steps, expected):
    spec = spec_of(noise_input="timestep", unit_start=True, spacing="respaced")
    plan = make_plan(spec, sampler, steps)
    np.testing.assert_allclose(column(plan, "c_noise"), expected, atol=1e-9)
    assert plan.x_scale == pytest.approx(np.sqrt(1 + plan.sigmas[0] ** 2))


def test_an_impossible_stride_is_refused_and_the_nearest_are_named():
    spec = spec_of(spacing="respaced")
    with pytest.raises(PlanError, match=r"steps 60: no integer stride .* 56, 59, 63"):
        make_plan(spec, "ddim", 60)


def test_trailing_steps_that_end_clean_divide_the_schedule():
    spec = spec_of(noise_input="timestep", spacing="trailing-to-0")
    np.testing.assert_allclose(column(make_plan(spec, "ddim", 5), "c_noise"), [999, 799, 599, 399, 199], atol=1e-9)
    with pytest.raises(PlanError, match=r"steps 30: .* S must divide 1000; the nearest are 10, 20, 25, 40"):
        make_plan(spec, "ddim", 30)


def test_labels_without_a_null_label_cannot_be_guided():
    spec = spec_of(has_null=False)
    assert make_plan(spec, "ddim", 5).evaluations == 5
    with pytest.raises(PlanError, match=r"guidance_scale 2: this model has no null label"):
        make_plan(spec, "ddim", 5, 2.0)


def test_exponential_levels_are_even_in_their_logarithm():
    levels = noise_levels(spec_of(), 10, "exponential")
    trained = schedule_sigmas(DEFAULT_SCHEDULES["ddpm"])
    np.testing.assert_allclose(levels[:10], np.exp(np.linspace(np.log(trained[-1]), np.log(trained[0]), 10)))
    assert levels[10] == 0


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 666])
def test_trailing_levels_are_those_of_smalldiffusion(steps):
    trained = schedule_sigmas(DEFAULT_SCHEDULES["ddpm"])
    expected = [trained[round(1000 * (1 - i / steps)) - 1] for i in range(steps)] + [trained[0]]
    np.testing.assert_array_equal(noise_levels(spec_of(), steps), expected)


def test_the_most_steps_visit_every_level_once():
    """smalldiffusion would end with a step from index 0 to index 0, which does nothing."""
    trained = schedule_sigmas(DEFAULT_SCHEDULES["ddpm"])
    np.testing.assert_array_equal(noise_levels(spec_of(), 1000), trained[::-1])
    assert len(noise_levels(spec_of(), 999)) == 999


def test_karras_levels_follow_equation_5():
    levels = noise_levels(spec_of(), 10, "karras")
    trained = schedule_sigmas(DEFAULT_SCHEDULES["ddpm"])
    assert (levels[0], levels[9], levels[10]) == pytest.approx((trained[-1], trained[0], 0.0))
    steps = np.diff(levels[:10] ** (1 / 7))
    np.testing.assert_allclose(steps, steps[0])


def test_guidance_interval_turns_guidance_off_outside_and_counts_evaluations():
    plan = make_plan(spec_of(), "ddim", 20, 3.0, guidance_interval=(0.3, 5.0))
    inside = (plan.sigmas >= 0.3) & (plan.sigmas <= 5.0)
    assert np.array_equal(plan.rows[:, GUIDANCE], np.where(inside, 3.0, 1.0))
    assert 0 < inside.sum() < 20
    assert plan.evaluations == 20 + inside.sum()
    assert plan.saved == 20 - inside.sum()
    assert make_plan(spec_of(), "ddim", 20, 3.0).evaluations == 40
    assert make_plan(spec_of(), "ddim", 20).evaluations == 20
    assert make_plan(spec_of(), "ddim", 20).saved == make_plan(spec_of(), "ddim", 20, 3.0).saved == 0


def test_heun_evaluates_twice_a_step_but_once_in_a_last_step_to_zero():
    assert len(make_plan(spec_of(), "heun", 10)) == 20
    assert len(make_plan(spec_of(), "heun", 10, grid="karras")) == 19


@pytest.mark.parametrize(("settings", "message"), [
    ({"sampler": "dimm"}, "did you mean 'ddim'"),
    ({"steps": 0}, "steps 0: expected at least 1"),
    ({"steps": -3}, "steps -3: expected at least 1"),
    ({"steps": 1001}, "at most 1000"),
    ({"grid": "karas"}, "did you mean 'karras'"),
    ({"grid": [1.0, 2.0]}, "fall strictly"),
    ({"grid": [1.0, float("nan"), 0.0]}, "fall strictly"),
    ({"grid": [1.0]}, "at least two"),
    ({"grid": [1.0, -0.5]}, "0 or above"),
    ({"guidance_scale": float("nan")}, "finite"),
    ({"guidance_interval": (300.0, 400.0)}, "overlapping"),
    ({"guidance_interval": (5.0, 1.0)}, "low < high"),
    ({"eta": -1.0}, "eta -1"),
    ({"gam": 2.0}, "no option 'gam'"),
    ({"sampler": "accelerated", "mu": 1.0}, "0 <= mu < 1"),
])  # fmt: skip
def test_bad_plans_are_one_clear_line(settings, message):
    with pytest.raises(PlanError, match=message) as caught:
        make_plan(spec_of(), **settings)
    assert "\n" not in str(caught.value)


def test_guidance_without_labels_and_noise_in_a_flow_are_refused():
    with pytest.raises(PlanError, match="no labels"):
        make_plan(spec_of(num_classes=0), guidance_scale=2.0)
    for settings in ({"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.5}, {"sampler": "accelerated", "mu": 0.5}):
        with pytest.raises(PlanError, match="not defined for a flow model"):
            make_plan(spec_of("flow", "flow"), **settings)


def test_a_plan_with_nan_names_the_row_and_the_column():
    rows = make_plan(spec_of(), steps=3).rows.copy()
    rows[1, COLUMNS.index("x_d")] = np.nan
    with pytest.raises(PlanError, match="row 1 has nan in column x_d"):
        Plan(rows, 1.0, np.ones(3))


def test_ready_plans_hold_every_sampler_a_model_allows_and_what_was_asked_for():
    ready = ready_plans(spec_of(), ["ddim:33"])
    assert {name.rpartition(".")[0] for name in ready if not name.endswith("x_scale")} == set(SAMPLERS)
    assert ready["ddim.33"].shape == (33, 13)
    assert ready["ddim.33"].dtype == np.float32
    flow = {name.rpartition(".")[0] for name in ready_plans(spec_of("flow", "flow")) if not name.endswith("x_scale")}
    assert flow == {name for name, sampler in SAMPLERS.items() if sampler.flow}
    for text in ("ddim", "ddim:x", "ddim:0", "nothing:5"):
        with pytest.raises(DiffexportError):
            ready_plans(spec_of(), [text])


@pytest.mark.parametrize("facts", [
    {"shape": (1, 2)},
    {"shape": (0, 4, 4)},
    {"prediction": "flow"},
    {"label_names": ("a",)},
    {"guided_channels": 2},
    {"clip": 0.0},
])  # fmt: skip
def test_impossible_specs_are_refused(facts):
    good = {
        "family": "toy",
        "shape": (1, 4, 4),
        "prediction": "eps",
        "schedule": DEFAULT_SCHEDULES["ddpm"],
        "num_classes": 2,
    }
    with pytest.raises(SpecError):
        ModelSpec(**{**good, **facts})


def test_labels_by_index_and_by_name():
    spec = spec_of(num_classes=3, label_names=("cat", "dog", "7"))
    assert [spec.label_index(label) for label in (0, "dog", "1", "7")] == [0, 1, 1, 2]
    for bad in (3, -1, "bird"):
        with pytest.raises(ShapeError):
            spec.label_index(bad)


@pytest.mark.parametrize("kind", ["ddpm", "ldm", "sigmoid", "cosine"])
def test_schedules_follow_their_betas(kind):
    """sigma^2 = 1/alpha_bar - 1 with alpha_bar a running product, computed here the long way."""
    s = DEFAULT_SCHEDULES[kind]
    betas = {
        "ddpm": lambda: np.linspace(1e-4, 0.02, 1000),
        "ldm": lambda: np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2,
        "sigmoid": lambda: 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.02 - 1e-4) + 1e-4,
        "cosine": lambda: np.array([
            min(0.999, 1 - np.cos(((i + 1) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
                / np.cos((i / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2)
            for i in range(1000)
        ]),
    }[kind]()  # fmt: skip
    np.testing.assert_allclose(schedule_sigmas(s), np.sqrt(1 / np.cumprod(1 - betas) - 1), rtol=1e-8)


def test_impossible_schedules_are_refused():
    for facts in ({"kind": "ddpm", "start": 0.02, "end": -1.0}, {"kind": "loglinear", "start": 0.0, "end": 1.0},
                  {"kind": "levels", "N": 2, "levels": (2.0, 1.0)}, {"kind": "ddpm", "N": 0}):  # fmt: skip
        with pytest.raises(SpecError):
            Schedule(**facts)
