"""Schedules, sampling and training against recorded runs of smalldiffusion."""

import re
from types import SimpleNamespace

import pytest
import torch
from recorded import Recorded, close, names
from torch.utils.data import DataLoader

from diffexport.schedules import DEFAULT_SCHEDULES, schedule_sigmas
from diffexport_reference import (
    ConditionalMLP,
    IdealDenoiser,
    Schedule,
    ScheduleCosine,
    ScheduleDDPM,
    ScheduleFlow,
    ScheduleLDM,
    ScheduleLogLinear,
    ScheduleLogNormalFlow,
    ScheduleSigmoid,
    Swissroll,
    TimeInputMLP,
    TreeDataset,
    generate_train_sample,
    samples,
    training_loop,
)

SCHEDULES = {
    "ddpm": ScheduleDDPM(),
    "ldm": ScheduleLDM(),
    "cosine": ScheduleCosine(),
    "sigmoid": ScheduleSigmoid(),
    "loglinear": ScheduleLogLinear(N=200, sigma_min=0.005, sigma_max=10),
    "flow": ScheduleFlow(),
}
RUNS = [name for arch in ("DiT", "Unet", "TimeInputMLP", "ConditionalMLP") for name in names(arch)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_as_recorded(name):
    recorded = Recorded("sd_schedules")
    schedule = SCHEDULES[name]
    assert close(schedule.sigmas, recorded[f"{name}.sigmas"])
    for steps in (1, 7, 20, 50):
        expected = recorded[f"{name}.sample_sigmas.{steps}"]
        got = schedule.sample_sigmas(steps)
        assert got.dtype == expected.dtype
        assert close(got, expected)


@pytest.mark.parametrize("name", ["ddpm", "ldm", "cosine", "sigmoid", "flow"])
def test_schedules_are_those_of_the_library(name):
    expected = torch.tensor(schedule_sigmas(DEFAULT_SCHEDULES[name]), dtype=torch.float32)
    assert close(SCHEDULES[name].sigmas, expected, 1e-7)


def test_cosine_schedule_keeps_its_largest_beta():
    assert ScheduleCosine(max_beta=0.5).sigmas[-1] < ScheduleCosine().sigmas[-1]


def test_sample_batch_draws_levels_of_the_schedule():
    x0 = torch.zeros(500, 2)
    drawn = Schedule(torch.tensor([1.0, 2.0, 4.0])).sample_batch(x0)
    assert drawn.shape == (500,)
    assert set(drawn.tolist()) == {1.0, 2.0, 4.0}
    times = ScheduleLogNormalFlow(t_min=0.3, t_max=0.6).sample_batch(x0)
    assert times.min() >= 0.3
    assert times.max() <= 0.6


@pytest.mark.parametrize("name", RUNS)
def test_samples_as_recorded(name):
    recorded = Recorded(name)
    network = recorded.network()
    runs = [key.removesuffix(".traj") for key in recorded.arrays if key.endswith(".traj")]
    assert runs
    for run in runs:
        gam, mu, cfg = map(float, re.fullmatch(r"samples\.gam(.+)\.mu(.+)\.cfg(.+)", run).groups())
        noise = iter(recorded[f"{run}.noise"])
        network.rand_input = lambda batchsize, noise=noise: next(noise)
        xs = samples(
            network,
            recorded["sample_sigmas"],
            gam=gam,
            mu=mu,
            cfg_scale=cfg,
            batchsize=3,
            xt=recorded[f"{run}.xt"],
            cond=recorded.get("cond"),
        )
        for x, expected in zip(xs, recorded[f"{run}.traj"], strict=True):
            assert close(x, expected)
        assert not list(noise)


def test_accelerated_samples_of_the_ideal_denoiser_as_recorded():
    recorded = Recorded("sd_ideal")
    model, sigmas, traj = IdealDenoiser(recorded["data"]), recorded["sigmas"], recorded["traj"]
    start = traj[0]
    for _ in range(100):  # where the run began was not recorded; its first step, solved for that, contracts
        start = traj[0] - (sigmas[1] - sigmas[0]) * model(start, sigmas[0])
    for x, expected in zip(samples(model, sigmas, gam=2.0, xt=start), traj, strict=True):
        assert close(x, expected)


def test_samples_start_from_the_largest_sigma_and_draw_every_step():
    model = IdealDenoiser(torch.zeros(1, 3))
    drawn = []
    model.rand_input = lambda batchsize: drawn.append(batchsize) or torch.ones(batchsize, 3)
    xs = list(samples(model, torch.tensor([4.0, 2.0, 1.0]), batchsize=2))
    assert drawn == [2, 2, 2]
    assert torch.allclose(torch.stack(xs), torch.tensor([2.0, 1.0])[:, None, None].expand(2, 2, 3))
    assert not xs[0].requires_grad


def test_samples_run_where_the_accelerator_says():
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    model = TimeInputMLP(hidden_dims=(4,)).train()
    *_, x = samples(model, ScheduleFlow().sample_sigmas(3), batchsize=2, accelerator=accelerator)
    assert x.dtype == torch.float32
    assert not model.training


def test_generate_train_sample_without_and_with_labels():
    schedule = SCHEDULES["ddpm"]
    images, labels = torch.zeros(4, 1, 2, 2), torch.arange(4)
    x0, sigma, eps, cond = generate_train_sample(images, schedule)
    assert x0 is images
    assert sigma.shape == (4, 1, 1, 1)
    assert eps.shape == images.shape
    assert cond is None
    x0, _, _, cond = generate_train_sample([images, labels], schedule, conditional=True)
    assert x0 is images
    assert cond is labels


def test_training_loop_lowers_the_loss_on_a_swissroll():
    torch.manual_seed(0)
    loader = DataLoader(Swissroll(1.5, 15.0, 64), batch_size=64)
    model = TimeInputMLP(hidden_dims=(32, 32))
    losses = []
    for step in training_loop(loader, model, ScheduleLogLinear(N=50, sigma_min=0.1), epochs=60, lr=5e-3):
        step.pbar.set_description(f"loss {step.loss.item():.3f}")
        losses.append(step.loss.item())
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert set(vars(step)) >= {"loss", "pbar", "x0", "sigma", "eps", "model", "optimizer"}


def test_training_loop_with_labels():
    loader = DataLoader(TreeDataset(2, 2, 4), batch_size=8)
    model = ConditionalMLP(hidden_dims=(8,), num_classes=4)
    steps = list(training_loop(loader, model, SCHEDULES["ddpm"], epochs=1, conditional=True))
    assert len(steps) == 2
    assert steps[0].cond.shape == (8,)
