"""The shipped model, from its checkpoint to samples by the command line: the main job, held to the judge of digits."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from digits_quality import judge, make_judge

import diffexport
from diffexport.samplers import SAMPLERS

MODEL = Path(__file__).parent.parent / "models" / "digits.pt"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The bundle that ``diffx export models/digits.pt`` writes."""
    out = tmp_path_factory.mktemp("digits") / "digits.diffx"
    diffx = Path(sys.executable).with_name("diffx")
    done = subprocess.run([diffx, "export", MODEL, "--out", out, "--json"], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["certificate"]["passed"]
    return diffexport.load(out)


@pytest.mark.parametrize(("guidance_scale", "steps", "recognised"), [(1.0, 20, 0.95), (2.0, 10, 0.99)])
def test_the_bundle_draws_digits_that_are_recognised_and_various(bundle, guidance_scale, steps, recognised):
    """1,000 samples, 100 a class, in 20 network evaluations each, of which a step with guidance takes two."""
    labels = np.repeat(np.arange(10), 100)
    assert bundle.plan(steps=steps, guidance_scale=guidance_scale).evaluations == 20
    x = bundle.sampler().sample(labels.tolist(), guidance_scale=guidance_scale, steps=steps, batch=100)
    quality = judge(x, labels, make_judge())
    assert quality.accuracy >= recognised, quality
    if guidance_scale == 1:
        assert abs(quality.spread_ratio - 1) <= 0.15, quality


def test_the_bundle_agrees_with_the_checkpoint_on_every_sampler(bundle):
    from diffexport_reference.checkpoints import load_checkpoint

    module, _ = load_checkpoint(MODEL)
    for name in SAMPLERS:
        settings = {"sampler": name, "steps": 20, "guidance_scale": 2.0, "seed": 3}
        found = bundle.sampler().sample([3, 1, 4], **settings)
        expected = bundle.sampler("torch", module=module).sample([3, 1, 4], **settings)
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-4, name


def test_verify_and_sample_take_the_checkpoint(bundle, diffx):
    for words in (
        ["verify", bundle.path, "--against", MODEL, "--backend", "all"],
        ["sample", bundle.path, "--backend", "torch", "--checkpoint", MODEL, "--labels", "3", "--npz", "t.npz"],
        ["sample", bundle.path, "--labels", "3", "--npz", "o.npz"],
    ):
        assert diffx(*words)[0] == 0
    np.testing.assert_allclose(np.load("t.npz")["x"], np.load("o.npz")["x"], atol=1e-4)
