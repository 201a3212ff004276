"""Sampling: what decides a sample and what does not, and what is refused."""

import numpy as np
import pytest

from diffexport.errors import BackendError, PlanError, ShapeError
from diffexport.noise import normal
from diffexport.sampler import Sampler
from diffexport.samplers import SAMPLERS


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_sample_depends_on_seed_and_index_alone(toy_bundle, sampler):
    """Batches of 1, 3 and 16 give the same 16 samples, and so does drawing the last five alone."""
    s = toy_bundle("plain").sampler()
    labels = [k % 5 for k in range(16)]
    settings = dict(steps=6, sampler=sampler, guidance_scale=2.0, seed=11)
    whole = s.sample(labels, batch=16, **settings)
    for batch in (1, 3):
        np.testing.assert_allclose(s.sample(labels, batch=batch, **settings), whole, atol=1e-5)
    np.testing.assert_allclose(s.sample(labels[11:], first=11, **settings), whole[11:], atol=1e-5)
    assert np.abs(s.sample(labels, **{**settings, "seed": 12}) - whole).max() > 0.1


@pytest.mark.parametrize("name", ["plain", "variance", "flow", "unguided", "points"])
def test_backends_agree_over_a_whole_run(toy, toy_bundle, name):
    bundle, (module, _) = toy_bundle(name), toy(name)
    samplers = [n for n, s in SAMPLERS.items() if s.flow or name != "flow"]
    for sampler in samplers:
        runs = [
            bundle.sampler(backend, **options).sample(num=4, steps=10, sampler=sampler, seed=5)
            for backend, options in (("ort", {}), ("torch", {"module": module}))
        ]
        np.testing.assert_allclose(*runs, rtol=1e-4, atol=1e-4 * np.abs(runs[0]).max())


@pytest.mark.parametrize("name", ["plain", "variance", "flow", "unguided", "points"])
@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_the_loop_in_one_call_agrees_with_the_steps(toy, toy_bundle, name, backend):
    """Deterministic and stochastic samplers, with guidance, without, and on an interval; batches that do not divide."""
    s = toy_bundle(name).sampler(backend, **({"module": toy(name)[0]} if backend == "torch" else {}))
    guided = {"guidance_scale": 2.5} if s.spec.guidable else {}
    interval = {"guidance_interval": (0.1, 0.8) if name == "flow" else (0.3, 5.0)} if s.spec.guidable else {}
    for sampler in ("ddim", "heun") if name == "flow" else ("ddim", "ddpm", "dpmpp-2m-sde"):
        for more in ({}, guided, guided | interval):
            settings = dict(num=5, steps=10, sampler=sampler, batch=2, seed=3, **more)
            expected = s.sample(**settings)
            np.testing.assert_allclose(
                s.sample(**settings, one_call=True), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
            )


def test_given_noise_replaces_the_seed(toy_bundle):
    s = toy_bundle("plain").sampler()
    spec = s.spec
    drawn = normal(7, range(4), range(11), spec.shape)
    settings = dict(labels=[0, 1, 2, 3], steps=10, sampler="ddpm")
    expected = s.sample(**settings, seed=7)
    assert np.array_equal(s.sample(**settings, x_init=drawn[0], noise=drawn[1:], seed=99), expected)


def test_the_bundle_decides_what_the_call_does_not_say(toy_bundle):
    bundle = toy_bundle("plain")
    s = bundle.sampler()
    d = bundle.manifest.defaults
    explicit = s.sample([1, 2], sampler=d.sampler, steps=d.steps, guidance_scale=d.guidance_scale)
    assert np.array_equal(s.sample([1, 2]), explicit)
    assert np.array_equal(s.sample([1, 2], plan=bundle.plan()), explicit)


def test_labels_may_be_names_one_for_all_or_in_turn(toy_bundle):
    s = toy_bundle("variance").sampler()
    assert s.labels(["bee", 3, "4"], None).tolist() == [1, 3, 4]
    assert s.labels("dog", 3).tolist() == [3, 3, 3]
    assert s.labels(None, 7).tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert toy_bundle("points").sampler().sample(num=6, steps=3).shape == (6, 2)


def test_on_step_counts_every_row_of_every_batch(toy_bundle):
    calls = []
    toy_bundle("plain").sampler().sample([0] * 5, steps=4, batch=2, on_step=lambda *call: calls.append(call))
    assert calls == [(k, 12) for k in range(1, 13)]


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"labels": [5]}, ShapeError, "labels 0..4"),
    ({"labels": [-1]}, ShapeError, "label -1"),
    ({"labels": ["horse"]}, ShapeError, "no label has this name"),
    ({"labels": []}, ShapeError, "at least one"),
    ({"labels": [1], "num": 2}, ShapeError, "give one of the two"),
    ({"num": 0}, ShapeError, "num 0"),
    ({"batch": 0}, ShapeError, "batch 0"),
    ({"seed": -1}, ShapeError, "seed -1"),
    ({"seed": 2**64}, ShapeError, "seed"),
    ({"first": -1}, ShapeError, "first -1"),
    ({"steps": 0}, PlanError, "steps 0"),
    ({"labels": [1], "x_init": np.zeros((2, 2, 6, 6), np.float32)}, ShapeError, r"x_init: got shape \(2, 2, 6, 6\)"),
    ({"labels": [1], "noise": np.zeros((1, 1, 2, 6, 6), np.float32)}, ShapeError, r"expected \(20, 1, 2, 6, 6\)"),
])  # fmt: skip
def test_bad_calls_are_refused_in_one_line(toy_bundle, settings, error, message):
    with pytest.raises(error, match=message) as caught:
        toy_bundle("plain").sampler().sample(**settings)
    assert "\n" not in str(caught.value)


def test_a_plan_and_its_parts_are_not_both_taken(toy_bundle):
    s = toy_bundle("plain").sampler()
    with pytest.raises(PlanError, match="not both"):
        s.sample([1], plan=s.plan(), steps=5)


def test_the_loop_in_one_call_shows_no_states(toy_bundle):
    with pytest.raises(PlanError, match="leave one_call out"):
        toy_bundle("plain").sampler().sample([1], steps=2, one_call=True, on_state=lambda *_: None)


def test_numbers_that_are_not_finite_are_an_error(toy_bundle):
    session = toy_bundle("plain").sampler().session

    class Broken:
        backend, device, max_batch = "broken", "CPU", None
        begin, close = session.begin, session.close
        step = session.step

        def state(self):
            x, h = session.state()
            x[1, 0, 0, 0] = np.nan
            return x, h

    with pytest.raises(BackendError, match="sample 8: broken returned numbers that are not finite"):
        Sampler(toy_bundle("plain").spec, Broken()).sample([0, 1], first=7, steps=2)
