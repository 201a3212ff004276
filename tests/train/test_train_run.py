"""Training: what a run writes, that a killed one continues to the same weights, and what it says to bad input."""

import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
import torch

from diffexport.errors import CheckpointError, DiffexportError
from diffexport.schedules import DEFAULT_SCHEDULES, Schedule, schedule_sigmas
from diffexport_reference.checkpoints import load_checkpoint
from diffexport_reference.data import load_data
from diffexport_reference.recipe import TrainConfig, build_network, level_weights
from diffexport_reference.train import train

TINY = TrainConfig(data="digits", width=16, depth=1, heads=2, steps=12, batch_size=16, warmup=2)
POINTS = TrainConfig(data="tree", model="mlp", width=16, depth=2, steps=12, batch_size=16)


def _weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def _same(a, b, limit=0.0):
    a, b = _weights(a), _weights(b)
    assert a.keys() == b.keys()
    return all((a[k] - b[k]).abs().max() <= limit for k in a)


class Killed(Exception):
    pass


def _kill_at(step):
    def progress(now):
        if now.step >= step:
            raise Killed

    return progress


def test_a_run_writes_a_checkpoint_that_says_what_it_is(tmp_path):
    seen = []
    result = train(TINY, tmp_path / "a.pt", log=tmp_path / "a.log", command="diffx train digits", progress=seen.append)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.log", "a.pt"]  # no state is left
    assert [now.step for now in seen] == [10, 12]
    assert result.steps == 12
    assert result.resumed_from == 0
    module, spec = load_checkpoint(tmp_path / "a.pt")
    assert msgspec.structs.replace(spec, architecture={}) == result.spec
    assert (spec.shape, spec.num_classes, spec.prediction, spec.scaled) == ((1, 8, 8), 10, "v", True)
    assert spec.schedule == DEFAULT_SCHEDULES["loglinear"]
    assert module(torch.zeros(2, 1, 8, 8), torch.ones(2), torch.tensor([0, 10])).shape == (2, 1, 8, 8)
    training = torch.load(tmp_path / "a.pt", weights_only=True)["training"]
    assert training["command"] == "diffx train digits"
    assert training["config"]["steps"] == 12
    assert training["config"]["seed"] == 0
    head, *lines = [json.loads(line) for line in (tmp_path / "a.log").read_text().splitlines()]
    assert head["versions"]["torch"] == importlib.metadata.version("torch")
    assert head["command"] == "diffx train digits"
    assert lines[-1]["step"] == 12
    assert lines[-1]["loss"] == pytest.approx(result.loss, abs=1e-6)


def test_the_seed_decides_the_weights_and_nothing_else_does(tmp_path):
    train(TINY, tmp_path / "a.pt")
    before = torch.random.get_rng_state()
    torch.manual_seed(17)
    train(TINY, tmp_path / "b.pt", save_every=5)
    assert _same(tmp_path / "a.pt", tmp_path / "b.pt")
    train(dataclasses.replace(TINY, seed=1), tmp_path / "c.pt")
    assert not _same(tmp_path / "a.pt", tmp_path / "c.pt", limit=1e-3)
    torch.manual_seed(17)
    after = torch.random.get_rng_state()
    train(TINY, tmp_path / "d.pt")
    assert torch.equal(torch.random.get_rng_state(), after)  # the caller's generator is left alone
    torch.random.set_rng_state(before)


@pytest.mark.parametrize("config", [TINY, POINTS], ids=["dit", "mlp"])
def test_an_interrupted_run_continues_to_the_same_weights_and_log(tmp_path, config):
    config = dataclasses.replace(config, steps=120)
    train(config, tmp_path / "whole.pt", log=tmp_path / "whole.log")
    with pytest.raises(Killed):
        train(config, tmp_path / "a.pt", log=tmp_path / "a.log", save_every=40, progress=_kill_at(110))
    assert not (tmp_path / "a.pt").exists()
    with (tmp_path / "a.log").open("a") as log:
        log.write('{"step": 110, "lo')  # as a full disk leaves it
    result = train(config, tmp_path / "a.pt", log=tmp_path / "a.log", save_every=40)
    assert result.resumed_from == 80
    assert _same(tmp_path / "whole.pt", tmp_path / "a.pt")
    whole, lines = ((tmp_path / name).read_text().splitlines() for name in ("whole.log", "a.log"))
    assert json.loads(lines[2]) == {"continued_from": 80}
    assert [*lines[:2], *lines[3:]] == whole
    assert not (tmp_path / "a.pt.state").exists()


def test_kill_minus_nine_leaves_a_state_that_continues_to_the_same_weights(tmp_path):
    out = tmp_path / "a.pt"
    options = "--width 16 --depth 1 --heads 2 --steps 200 --batch-size 16 --threads 1 --save-every 20"
    command = [sys.executable, "-c", "from diffexport_cli.app import main; main()", "train", "digits", *options.split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([*command, "--out", str(out)], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "a.pt.state").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    again = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "continued from step" in again.stdout
    whole = subprocess.run([*command, "--out", str(tmp_path / "b.pt")], env=environment, capture_output=True)
    assert whole.returncode == 0
    assert _same(out, tmp_path / "b.pt")


def test_another_configuration_does_not_continue_a_run(tmp_path):
    with pytest.raises(Killed):
        train(TINY, tmp_path / "a.pt", save_every=5, progress=_kill_at(10))
    with pytest.raises(CheckpointError, match=r"lr 0\.002 there, 0\.003 now; seed 0 there, 4 now") as caught:
        train(dataclasses.replace(TINY, lr=0.003, seed=4), tmp_path / "a.pt")
    assert "--restart" in str(caught.value)
    train(dataclasses.replace(TINY, lr=0.003), tmp_path / "a.pt", restart=True)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["training"]["config"]["lr"] == 0.003


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / "a.pt.state").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"a\.pt\.state: not a state of training"):
        train(TINY, tmp_path / "a.pt")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffexportError, match=r"a\.pt: cannot be written"):
        train(TINY, tmp_path / "file" / "a.pt")
    with pytest.raises(DiffexportError, match="is a folder"):
        train(TINY, tmp_path)
    with pytest.raises(DiffexportError, match=r"a\.log: cannot be written"):
        train(TINY, tmp_path / "a.pt", log=tmp_path / "file" / "a.log")


def test_a_finished_checkpoint_is_not_replaced_unasked(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"precious")
    with pytest.raises(DiffexportError, match="--restart"):
        train(TINY, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == b"precious"


def test_the_kept_weights_are_the_average(tmp_path):
    """Decay 0 keeps the last weights themselves; another decay follows the recurrence over those of every step."""
    path = {}
    for steps in (1, 2, 3):
        path[steps] = tmp_path / f"{steps}.pt"
        config = dataclasses.replace(POINTS, steps=3, ema=0.0)

        def stop(now):
            raise Killed

        if steps == 3:
            train(config, path[steps])
            last = _weights(path[steps])
        else:
            with pytest.raises(Killed):
                _run_until_saved(config, path[steps], steps, stop)
    states = [torch.load(f"{path[s]}.state", weights_only=True)["model"] for s in (1, 2)] + [last]
    train(dataclasses.replace(POINTS, steps=3, ema=0.5), tmp_path / "ema.pt")
    _, network = _fresh(POINTS)
    want = {k: v.clone() for k, v in network.items()}
    for step, state in enumerate(states):
        decay = min(0.5, (1 + step) / (10 + step))
        want = {k: decay * want[k] + (1 - decay) * state[k] for k in want}
    for k, value in _weights(tmp_path / "ema.pt").items():
        torch.testing.assert_close(value, want[k], rtol=1e-5, atol=1e-6)


def _run_until_saved(config, path, steps, stop):
    """A run that dies right after the state of step ``steps`` was written."""
    calls = []

    def progress(now):
        calls.append(now.step)
        if now.step > steps:
            stop(now)

    train(config, path, save_every=steps, progress=progress)
    raise Killed


def _fresh(config):
    """The weights that a run of this configuration begins with."""
    from diffexport_reference.train import _key

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_key(config.seed))
        config, network = build_network(config, load_data(config.data))
    return config, network.module.state_dict()


def test_a_longer_run_has_a_smaller_loss(tmp_path):
    short = train(dataclasses.replace(TINY, width=32, steps=20), tmp_path / "a.pt")
    long = train(dataclasses.replace(TINY, width=32, steps=200), tmp_path / "b.pt")
    assert long.loss < 0.85 * short.loss


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_every_prediction_trains(tmp_path, prediction):
    flow = prediction == "flow"
    schedule = DEFAULT_SCHEDULES["flow" if flow else "cosine"]
    config = dataclasses.replace(TINY, prediction=prediction, scaled=not flow, schedule=schedule)
    train(config, tmp_path / "a.pt")
    module, spec = load_checkpoint(tmp_path / "a.pt")
    assert (spec.prediction, spec.scaled, spec.schedule) == (prediction, not flow, schedule)
    assert torch.isfinite(module(torch.randn(1, 1, 8, 8), torch.tensor([0.5]), torch.tensor([3]))).all()


def test_unet_mlp_and_ideal(tmp_path):
    images = np.linspace(-1, 1, 6 * 3 * 8 * 8).reshape(6, 3, 8, 8)
    np.save(tmp_path / "x.npy", images)
    unet = TrainConfig(data=str(tmp_path / "x.npy"), model="unet", width=32, depth=1, steps=2, batch_size=2)
    roll = dataclasses.replace(POINTS, data="swissroll")
    for config, shape, classes in ((unet, (3, 8, 8), 0), (POINTS, (2,), 64), (roll, (2,), 0)):
        result = train(config, tmp_path / "a.pt", restart=True)
        module, spec = load_checkpoint(tmp_path / "a.pt")
        assert (spec.shape, spec.num_classes) == (shape, classes)
        labels = (torch.tensor([0, classes]),) if classes else ()
        assert module(torch.zeros(2, *shape), torch.ones(2), *labels).shape == (2, *shape)
        assert result.parameters > 0
    result = train(TrainConfig(data=str(tmp_path / "x.npy"), model="ideal"), tmp_path / "a.pt", restart=True)
    assert result.loss is None
    module, spec = load_checkpoint(tmp_path / "a.pt")
    x0 = torch.tensor(images[2:3], dtype=torch.float32)
    sigma = torch.tensor([0.01])
    eps = module(x0 + 0.01, sigma)  # so near to one sample that the posterior mean is that sample
    torch.testing.assert_close(x0 + 0.01 - 0.01 * eps, x0, rtol=0, atol=1e-5)


def test_half_stores_parameters_as_float16(tmp_path):
    train(TINY, tmp_path / "a.pt")
    train(dataclasses.replace(TINY, half=True), tmp_path / "b.pt")
    whole, half = _weights(tmp_path / "a.pt"), _weights(tmp_path / "b.pt")
    kinds = {v.dtype for v in half.values()}
    assert torch.float16 in kinds
    assert all((whole[k] - half[k].float()).abs().max() < 2e-3 for k in whole)
    assert (tmp_path / "b.pt").stat().st_size < 0.75 * (tmp_path / "a.pt").stat().st_size
    assert all(p.dtype == torch.float32 for p in load_checkpoint(tmp_path / "b.pt")[0].parameters())


def test_epochs_count_passes_over_the_data():
    config, _ = build_network(dataclasses.replace(TINY, steps=None, epochs=2), load_data("digits"))
    assert (config.steps, config.epochs) == (225, None)  # 2 * 1797 / 16, rounded up


def test_the_cosine_density_is_that_of_the_cosine_schedule():
    """Levels of a loglinear schedule, drawn by the weights, have the cosine schedule's own distribution."""
    levels = schedule_sigmas(Schedule(kind="loglinear", N=2000, start=0.01, end=100.0))
    cumulative = np.cumsum(level_weights(levels, "cosine"))
    for t in (0.1, 0.5, 0.9):
        below = cumulative[np.searchsorted(levels, np.tan(np.pi * t / 2)) - 1]
        assert below == pytest.approx(t, abs=0.01)
    assert level_weights(levels, "schedule") == pytest.approx(np.full(2000, 1 / 2000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0: expected at least 1"),
        ({"epochs": 3}, "give one of the two"),
        ({"lr": 0.0}, "lr 0.0: expected a number above 0"),
        ({"lr": float("nan")}, "lr nan"),
        ({"ema": 1.0}, "ema 1.0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"label_dropout": 1.0}, "label dropout 1.0"),
        ({"seed": -1}, "seed -1"),
        ({"prediction": "flow"}, "scaled: a flow model"),
        ({"heads": 3}, "width 16: not a multiple of 3 heads"),
        ({"patch_size": 3}, "patch size 3"),
        ({"model": "mlp"}, "model mlp: is for points"),
        ({"data": "swissroll"}, "model dit: is for images"),
        ({"model": "unet", "width": 16}, "width 16: .* 32"),
        ({"data": "nothing"}, "no such file or folder"),
    ],
)
def test_configurations_that_cannot_be_trained(tmp_path, change, message):
    with pytest.raises(DiffexportError, match=message):
        train(dataclasses.replace(TINY, **change), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_a_loss_of_nan_stops_the_run_and_writes_nothing(tmp_path):
    with pytest.raises(DiffexportError, match=r"loss became nan before step .* smaller --lr"):
        train(dataclasses.replace(TINY, lr=1e30, steps=40, warmup=0), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
