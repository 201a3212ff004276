"""kill -9 at random moments of export, build, train, verify and sample: what is left is the old state or the new one.

Each command runs in a child forked off this process, which has loaded everything already, so that moments fall into the
command's own work and not into imports. It is run once undisturbed, which says what the new state is and how long the
command takes. Each kill then has a fresh copy of the old state and a moment drawn from that time; one that comes after the
command's end is not counted, and drawn again. After the kill everything that is there has to be as in the old state or as
in the new one. The command then runs again, undisturbed, and the folder must hold what it holds after a run that was never
killed: the same bytes, the same weights, the same loss curve, and nothing temporary.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

import diffexport
import diffexport.exporter.write
import diffexport.sample_folder
from diffexport.bundle import Bundle, sha256_of
from diffexport.engines.record import engines_of
from diffexport.exporter.trace import trace_network
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport_cli.app import main as diffx
from diffexport_reference.checkpoints import load_checkpoint, save_checkpoint
from diffexport_reference.dit import DiT
from diffexport_reference.model import CondEmbedderLabel

TRAINING = (
    "--width", "16", "--depth", "1", "--heads", "2", "--steps", "600", "--batch-size", "16", "--save-every", "20",
    "--threads", "1",
)  # fmt: skip


Content = dict[str, object]
"""What a folder holds: names, and what has to be equal where two are the same."""


@dataclass(frozen=True)
class Command:
    """A command, what makes its folder ready, and what it leaves.

    Attributes:
        units: of a folder, what has to be old or new, each by itself.
        check: that the rest of a folder can be used; raises where it cannot.
        results: of a folder, what does not depend on kills, beside the units.
        ended: whether a folder is one that the command refuses to do again.
    """

    words: tuple[str, ...]
    prepare: Callable[[Path], None]
    units: Callable[[Path], Content]
    check: Callable[[Path], None] = lambda _: None
    results: Callable[[Path], Content] = lambda _: {}
    ended: Callable[[Path], bool] = lambda _: False


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
        with open(folder.with_suffix(".said"), "w") as said, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sys.stdout = sys.stderr = said
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
    assert status == 0, f"{words} ended with {status}: {folder.with_suffix('.said').read_text()}"
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
    tiny(folder / "a.pt", 1)


def digests(folder: Path) -> Content:
    """Every file under a folder that is not a temporary one."""
    return {str(p.relative_to(folder)): sha256_of(p) for p in folder.rglob("[!.]*") if p.is_file()}


def bundle_as_one(folder: Path) -> Content:
    Bundle.open(folder / "a.diffx").certificate()
    return {"a.diffx": digests(folder / "a.diffx")}


def engines(folder: Path) -> Content:
    """Each engine with its record, but for the figures of one build, beside the bundle."""
    opened = Bundle.open(folder / "a.diffx")
    found, problems = engines_of(opened)
    assert not problems, problems
    for engine in found:
        engine.check_file()
    records = [msgspec.structs.replace(e.record, build_seconds=0.0, peak_memory=0) for e in found]
    return {"a.diffx": opened.digest} | {record.key.folder: record for record in records}


def trained(folder: Path) -> Content:
    if not (folder / "t.pt").exists():
        return {}
    load_checkpoint(folder / "t.pt")
    weights = torch.load(folder / "t.pt", weights_only=True)["state_dict"]
    return {"t.pt": {name: value.numpy().tobytes() for name, value in weights.items()}}


def check_state(folder: Path) -> None:
    if (folder / "t.pt.state").exists():
        torch.load(folder / "t.pt.state", weights_only=True)


def training_ended(folder: Path) -> bool:
    return (folder / "t.pt").exists() and not (folder / "t.pt.state").exists()


def loss_curve(folder: Path) -> Content:
    lines = [json.loads(line) for line in (folder / "t.log").read_text().splitlines()]
    assert not (folder / "t.pt.state").exists()
    return {"t.log": [line for line in lines if "loss" in line]}


def pictures(folder: Path) -> Content:
    return digests(folder / "samples")


COMMANDS = {
    "export": Command(("export", "a.pt", "--max-batch", "2"), old_bundle_new_checkpoint, bundle_as_one),
    "build": Command(("build", "a.diffx", "--backend", "trt-rtx", "--target", "sm86", "--batch", "1"), bundle, engines),
    "train": Command(
        ("train", "digits", "--out", "t.pt", "--log", "t.log", *TRAINING),
        lambda _: None, trained, check_state, loss_curve, training_ended,
    ),
    "verify": Command(("verify", "a.diffx"), bundle, bundle_as_one),
    "sample": Command(("sample", "a.diffx", "--num", "300", "--steps", "10", "--out", "samples/"), bundle, pictures),
}  # fmt: skip


def load_everything() -> None:
    """Import what the commands import, so that no kill is spent on that; nothing here starts a thread."""
    for module in ("onnx", "onnxscript", "onnxruntime", "sklearn.datasets", "accelerate", "PIL.Image", "rich.progress"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        tiny(Path(folder) / "a.pt", 0)
        trace_network(*load_checkpoint(Path(folder) / "a.pt"))


@dataclass
class Tally:
    """Kills of a command, and what they left."""

    counted: int = 0
    after_the_end: int = 0
    """Not counted."""
    old: int = 0
    new: int = 0
    between: int = 0
    """Some units old and some new."""
    temporary: int = 0


def kill(name: str, count: int, seed: int) -> str:
    """Kill a command so many times; a row of the table."""
    command, moment, tally = COMMANDS[name], random.Random(seed), Tally()
    with tempfile.TemporaryDirectory(prefix="diffx-kill-") as place:
        before, alone, killed = (Path(place) / name for name in ("before", "alone", "killed"))
        before.mkdir()
        command.prepare(before)
        shutil.copytree(before, alone)
        seconds = whole(command.words, alone)
        old, new, results = command.units(before), command.units(alone), command.results(alone)
        while tally.counted < count:
            shutil.copytree(before, killed)
            child = run(command.words, killed)
            time.sleep(moment.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
                look(command, killed, old, new, tally)
                if not command.ended(killed):
                    whole(command.words, killed)
                assert command.units(killed) == new
                assert command.results(killed) == results
                temporary = list(killed.rglob(".*"))
                assert not temporary, temporary
                assert {p.name for p in killed.iterdir()} == {p.name for p in alone.iterdir()}
            else:
                tally.after_the_end += 1
                assert tally.after_the_end < 10 + 2 * count, "the command takes less time than when it was measured"
            shutil.rmtree(killed)
    return f"| {name} | {seconds:.1f} | " + " | ".join(str(number) for number in vars(tally).values()) + " |"


def look(command: Command, folder: Path, old: Content, new: Content, tally: Tally) -> None:
    """See that a kill left what it may leave, and count it."""
    found = command.units(folder)
    for unit in found.keys() | old.keys() | new.keys():
        assert found.get(unit) in (old.get(unit), new.get(unit)), f"{unit} is neither as it was nor as it should be"
    command.check(folder)
    tally.counted += 1
    if found == old:
        tally.old += 1
    elif found == new:
        tally.new += 1
    else:
        tally.between += 1
    tally.temporary += any(folder.rglob(".*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="kills of each command")
    parser.add_argument("--command", action="append", choices=COMMANDS, help="only this one; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    load_everything()
    print(
        "| command | s, undisturbed | kills | after its end, not counted | old state | new state | part of it | temporary |"
    )
    print("|---" * 8 + "|")
    for name in given.command or COMMANDS:
        print(kill(name, given.count, given.seed), flush=True)


if __name__ == "__main__":
    main()
