"""The model that the repository ships: small, made by the command beside it, and good by judges that never saw it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from digits_quality import judge, make_judge

from diffexport.schedules import schedule_sigmas
from diffexport_reference.checkpoints import load_checkpoint
from diffexport_reference.diffusion import Schedule, samples
from diffexport_reference.dit import DiT
from diffexport_reference.model import CondEmbedderLabel, PredV, Scaled

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "digits.pt"
LABELS = torch.arange(10).repeat_interleave(100)


@pytest.fixture(scope="module")
def the_judge():
    return make_judge()


@pytest.fixture(scope="module")
def model():
    """The shipped network with smalldiffusion's face, and its noise levels."""
    network, spec = load_checkpoint(MODEL)
    embedder = CondEmbedderLabel(128, spec.num_classes)
    model = Scaled(PredV(DiT))(in_dim=8, channels=1, depth=4, head_dim=32, num_heads=4, cond_embed=embedder)
    model.load_state_dict(network.state_dict())
    return model.eval(), Schedule(torch.tensor(schedule_sigmas(spec.schedule)))


def _draw(model, schedule, cfg_scale, *, seed=0):
    """1,000 samples, 100 a class, by DDIM in 20 evaluations of the network, two a step with guidance, (1000, 64)."""
    sigmas = schedule.sample_sigmas(10 if cfg_scale else 20)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        *_, x = samples(model, sigmas, cfg_scale=cfg_scale, batchsize=1000, cond=LABELS)
    return x.reshape(1000, 64).numpy()


def test_the_file_is_small_and_was_made_by_the_command_beside_it():
    assert MODEL.stat().st_size <= 3_000_000
    training = torch.load(MODEL, weights_only=True)["training"]
    head = json.loads(MODEL.with_suffix(".log").read_text(encoding="utf-8").splitlines()[0])
    assert head["command"] == training["command"]
    script = (ROOT / "scripts" / "train-digits").read_text(encoding="utf-8").replace("\\\n    ", "")
    assert training["command"] in script
    assert training["command"] in (ROOT / "models" / "README.md").read_text(encoding="utf-8").replace("\\\n    ", "")


def test_the_judge_knows_real_digits_from_others(the_judge):
    assert the_judge.held_out_accuracy > 0.96
    noise = np.random.default_rng(0).uniform(-1, 1, (1000, 64))
    assert judge(noise, LABELS.numpy(), the_judge).accuracy < 0.2
    one_each = np.repeat(np.random.default_rng(0).uniform(-1, 1, (10, 64)), 100, axis=0)
    assert judge(one_each, LABELS.numpy(), the_judge).spread_ratio < 1e-6  # collapse is seen


@pytest.mark.slow
def test_samples_are_recognised_and_as_various_as_real_digits(model, the_judge):
    quality = judge(_draw(*model, cfg_scale=0), LABELS.numpy(), the_judge)
    assert quality.accuracy >= 0.95, quality
    assert abs(quality.spread_ratio - 1) <= 0.15, quality


@pytest.mark.slow
def test_guided_samples_are_recognised_even_better(model, the_judge):
    quality = judge(_draw(*model, cfg_scale=1), LABELS.numpy(), the_judge)  # weight 2 in diffexport's words
    assert quality.accuracy >= 0.99, quality
