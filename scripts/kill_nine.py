"""kill -9 at random moments of export, build, train, verify and sample: what is left is the old state or the new one.

Each command runs in a child forked off this process, which has loaded everything already, so that moments fall into the
command's own work and not into imports. After every kill the state is looked at; at the end the command runs once more,
undisturbed, and the folder must hold what it holds after a run that was never killed, and nothing else.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import diffexport
import diffexport.exporter.write
import diffexport.sample_folder
from diffexport.bundle import Bundle
from diffexport.engines.record import engines_of
from diffexport.exporter.trace import trace_network
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport_cli.app import main as diffx
from diffexport_reference.checkpoints import load_checkpoint, save_checkpoint
from diffexport_reference.dit import DiT
from diffexport_reference.model import CondEmbedderLabel

TRAINING = (
    "--width",
    "16",
    "--depth",
    "1",
    "--heads",
    "2",
    "--steps",
    "600",
    "--batch-size",
    "16",
    "--save-every",
    "20",
)
ENDED_BY_US = -signal.SIGKILL


@dataclass(frozen=True)
class Command:
    """A command, what makes its folder ready, and what has to hold after every kill and at the end."""

    words: tuple[str, ...]
    prepare: Callable[[Path], None]
    sound: Callable[[Path], None]
    finished: Callable[[Path, Path], None]
    """Called with the folder of killed runs and that of one run that was left alone."""


def run(words: tuple[str, ...], folder: Path) -> int:
    """Start a command in a child; its process number."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    os.environ["DIFFX_CACHE"] = str(folder / "cache")
    sys.argv = ["diffx", *words]
    status = 1
    try:
        with open(os.devnull, "w") as nothing, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sys.stdout = nothing
            diffx()
            status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


def whole(words: tuple[str, ...], folder: Path) -> float:
    """Run a command to its end; its seconds."""
    started = time.monotonic()
    _, status = os.waitpid(run(words, folder), 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"{words} ended with {status}"
    return time.monotonic() - started


def tiny(path: Path, seed: int) -> None:
    """A checkpoint of a small DiT with random weights."""
    torch.manual_seed(seed)
    module = DiT(8, 1, patch_size=2, depth=1, head_dim=8, num_heads=2, cond_embed=CondEmbedderLabel(16, 3))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ddpm = DEFAULT_SCHEDULES["ddpm"]
    spec = diffexport.ModelSpec(family="DiT", shape=(1, 8, 8), prediction="v", schedule=ddpm, num_classes=3)
    args = {"num_heads": 2, "in_dim": 8}
    save_checkpoint(path, model_class="DiT", args=args, spec=spec, state_dict=module.state_dict(), training={})


def bundle(folder: Path, seed: int = 0) -> None:
    tiny(folder / "a.pt", seed)
    whole(("export", "a.pt", "--max-batch", "2"), folder)


def old_bundle_new_checkpoint(folder: Path) -> None:
    bundle(folder)
    (folder / "old.txt").write_text(Bundle.open(folder / "a.diffx").digest)
    tiny(folder / "a.pt", 1)


def same_files(a: Path, b: Path) -> None:
    """Two folders hold the same, but for caches, and nothing temporary."""
    held = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file() and "cache" not in p.parts} for f in (a, b)]
    assert held[0] == held[1], held[0] ^ held[1]
    temporary = list(a.rglob(".*"))
    assert not temporary, temporary
    differing = [name for name in held[0] if name.endswith((".diffx", ".onnx", ".bin", ".png", ".safetensors"))]
    assert all(filecmp.cmp(a / name, b / name, shallow=False) for name in differing)


def sound_bundle(folder: Path) -> None:
    Bundle.open(folder / "a.diffx").certificate()
    visible = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert visible <= {"a.pt", "a.diffx", "old.txt", "cache", "samples"}, visible


def sound_engines(folder: Path) -> None:
    sound_bundle(folder)
    engines, problems = engines_of(Bundle.open(folder / "a.diffx"))
    assert not problems, problems
    for engine in engines:
        engine.check_file()


def same_engines(a: Path, b: Path) -> None:
    sound_engines(a)
    found = [sorted(p.name for p in (f / "a.diffx" / "engines").iterdir()) for f in (a, b)]
    assert found[0] == found[1], found


def sound_training(folder: Path) -> None:
    if (folder / "t.pt").exists():
        load_checkpoint(folder / "t.pt")
    if (folder / "t.pt.state").exists():
        torch.load(folder / "t.pt.state", weights_only=True)


def same_training(a: Path, b: Path) -> None:
    same_files(a, b)
    weights = [torch.load(folder / "t.pt", weights_only=True)["state_dict"] for folder in (a, b)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    curves = [[json.loads(line) for line in (f / "t.log").read_text().splitlines()] for f in (a, b)]
    assert [line for line in curves[0] if "loss" in line] == [line for line in curves[1] if "loss" in line]


def sound_samples(folder: Path) -> None:
    from PIL import Image

    for path in (folder / "samples").glob("[!.]*.png"):
        with Image.open(path) as picture:
            assert picture.size == (8, 8)


COMMANDS = {
    "export": Command(("export", "a.pt", "--max-batch", "2"), old_bundle_new_checkpoint, sound_bundle, same_files),
    "build": Command(
        ("build", "a.diffx", "--backend", "trt-rtx", "--target", "sm86", "--batch", "1", "--force"), bundle, sound_engines,
        same_engines,
    ),
    "train": Command(
        ("train", "digits", "--out", "t.pt", "--log", "t.log", "--threads", "1", *TRAINING), lambda _: None,
        sound_training, same_training,
    ),
    "verify": Command(("verify", "a.diffx"), bundle, sound_bundle, same_files),
    "sample": Command(
        ("sample", "a.diffx", "--num", "300", "--steps", "10", "--out", "samples/"), bundle, sound_samples, same_files
    ),
}  # fmt: skip


def load_everything() -> None:
    """Import what the commands import, so that no kill is spent on that; nothing here starts a thread."""
    for module in ("onnx", "onnxscript", "onnxruntime", "sklearn.datasets", "accelerate", "PIL.Image", "rich.progress"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        tiny(Path(folder) / "a.pt", 0)
        trace_network(*load_checkpoint(Path(folder) / "a.pt"))


def kill(name: str, count: int, seed: int) -> str:
    """Kill a command so many times; a row of the table."""
    command, moment = COMMANDS[name], random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="diffx-kill-") as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        for place in (alone, killed):
            place.mkdir()
            command.prepare(place)
        seconds = whole(command.words, alone)
        by_us, left = 0, 0
        for _ in range(count):
            child = run(command.words, killed)
            time.sleep(moment.uniform(0, seconds if name != "train" else seconds / 20))
            os.kill(child, signal.SIGKILL)
            by_us += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ENDED_BY_US
            left += any(killed.rglob(".*"))
            command.sound(killed)
            if name == "train" and (killed / "t.pt").exists():
                for path in killed.glob("t.*"):
                    path.unlink()
        whole(command.words, killed)
        command.finished(killed, alone)
    return f"| {name} | {count} | {by_us} | {left} | {seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10, help="kills of each command")
    parser.add_argument("--command", action="append", choices=COMMANDS, help="only this one; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    load_everything()
    print("| command | kills | before its end | left temporary files | s, undisturbed |\n|---|---|---|---|---|")
    for name in given.command or COMMANDS:
        print(kill(name, given.count, given.seed), flush=True)


if __name__ == "__main__":
    main()
