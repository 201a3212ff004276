"""`diffx train`: the command itself, alone and under `accelerate launch`."""

import json
import os
import subprocess
import sys

import pytest
import torch

TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--steps", "12", "--batch-size", "16", "--threads", "1"]


def _run(*arguments, launch=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launch, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
    )


def _diffx(*arguments):
    return _run("-c", "from diffexport_cli.app import main; main()", *arguments)


def test_the_command_trains_and_keeps_what_was_typed(tmp_path):
    out = tmp_path / "a b.pt"
    done = _diffx("train", "digits", "--out", out, *TINY, "--half", "--log", tmp_path / "log", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["path"], result["steps"]) == (str(out), 12)
    command = json.loads((tmp_path / "log").read_text().splitlines()[0])["command"]
    assert command.startswith("diffx train digits --out '")
    assert torch.load(out, weights_only=True)["training"]["command"] == command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "gan"], "--model gan: expected one of dit, unet, mlp, ideal"),
        (["--schedule", "linear"], "--schedule linear: expected one of"),
        (["--channel-mult", "1,x"], "--channel-mult 1,x: expected whole numbers"),
        (["--schedule", "cosine", "--schedule-end", "3"], "has no start and end"),
        (["--schedule-start", "30"], "that rise from first to last"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, options, message):
    done = _diffx("train", "digits", "--out", tmp_path / "a.pt", *TINY, *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    script = tmp_path / "diffx.py"
    script.write_text("from diffexport_cli.app import main\nmain()\n")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    out = tmp_path / "two.pt"
    done = _run(script, "train", "digits", "--out", out, *TINY, "--log", tmp_path / "log", launch=launch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert json.loads((tmp_path / "log").read_text().splitlines()[0])["processes"] == 2
    assert all(v.isfinite().all() for v in torch.load(out, weights_only=True)["state_dict"].values())
