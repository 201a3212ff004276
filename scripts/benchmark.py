"""Export, start-up and sampling: whole processes as a user runs them, and what the loop adds to the network."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffexport
from diffexport.backends.onnxruntime import OnnxRuntimeSession
from diffexport_cli.bench_models import random_model

BIN = Path(sys.executable).parent
MODEL = Path(__file__).parent.parent / "models" / "digits.pt"
REPEATS = 7
BY_HAND = "\n## Steps"


def spread(values: list[float], unit: str, scale: float = 1.0) -> str:
    low, middle, high = min(values) * scale, statistics.median(values) * scale, max(values) * scale
    return f"{middle:.3g} {unit} ({low:.3g} to {high:.3g})"


def process(words: list[str], folder: str, repeats: int) -> tuple[list[float], float]:
    """Wall times of a whole process in seconds, and its peak memory in GB."""
    seconds, peak = [], 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        child = subprocess.Popen([BIN / words[0], *words[1:]], cwd=folder, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds.append(time.perf_counter() - started)
        if child.returncode:
            raise SystemExit(f"{words} failed")
        peak = max(peak, usage.ru_maxrss / 1e6)
    return seconds, peak


def overhead(bundle: Path, repeats: int = REPEATS, **settings: object) -> tuple[list[float], list[float]]:
    """What ``sample`` takes beyond the runs of the network, as a part of these; and milliseconds of one run."""
    sampler = diffexport.load(bundle).sampler()
    session = sampler.session
    assert isinstance(session, OnnxRuntimeSession)
    spent = 0.0
    load = session._session  # the one place where every run of a graph passes

    def timed(name: str) -> object:
        real = load(name)

        class Timed:
            io_binding, get_inputs = real.io_binding, real.get_inputs

            def run_with_iobinding(self, binding: object) -> None:
                nonlocal spent
                started = time.perf_counter()
                real.run_with_iobinding(binding)
                spent += time.perf_counter() - started

        session._sessions[name] = Timed()  # type: ignore[assignment]
        return session._sessions[name]

    session._session = timed  # type: ignore[method-assign,assignment]
    sampler.sample(**settings)  # type: ignore[arg-type]
    parts, each = [], []
    for _ in range(repeats):
        spent, started = 0.0, time.perf_counter()
        sampler.sample(**settings)  # type: ignore[arg-type]
        whole = time.perf_counter() - started
        parts.append((whole - spent) / spent)
        each.append(spent / sampler.plan(steps=settings["steps"]).rows.shape[0])  # type: ignore[arg-type]
    return parts, each


def one_call(bundle: Path, **settings: object) -> list[float]:
    """Time of the loop inside the graph over that of the stepped loop, interleaved."""
    sampler = diffexport.load(bundle).sampler()
    ratios = []
    for repeat in range(REPEATS + 1):
        times = []
        for inside in (False, True):
            started = time.perf_counter()
            sampler.sample(one_call=inside, **settings)  # type: ignore[arg-type]
            times.append(time.perf_counter() - started)
        if repeat:
            ratios.append(times[1] / times[0])
    return ratios


def main(out: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, _ = random_model("DiT-S/2", lambda _what, _part: None)
        digits = Path(folder) / "digits.diffx"
        rows = []
        seconds, peak = process(["diffx", "export", str(checkpoint), "--out", "dit-s.diffx"], folder, 3)
        rows.append(
            (
                "`diffx export` of a DiT-S/2 (33 M parameters), checked against PyTorch",
                spread(seconds, "s"),
                f"{peak:.2f} GB",
            )
        )
        seconds, peak = process(["diffx", "export", str(MODEL)], folder, 3)
        rows.append(
            ("`diffx export models/digits.pt` (1.3 M parameters), checked", spread(seconds, "s"), f"{peak:.2f} GB")
        )
        seconds, _ = process(["diffx", "sample", "digits.diffx", "--num", "16", "--steps", "20"], folder, REPEATS)
        rows.append(("`diffx sample digits.diffx --num 16 --steps 20`, the whole process", spread(seconds, "s"), ""))
        seconds, _ = process(["diffx", "--help"], folder, REPEATS)
        rows.append(("`diffx --help`", spread(seconds, "s"), ""))
        sampling = []
        runs = {
            "digits, batch 16, guidance 2": (digits, dict(num=16, batch=16, steps=20, guidance_scale=2.0)),
            "digits, batch 1, no guidance": (digits, dict(num=1, batch=1, steps=20)),
            "DiT-S/2, batch 1, guidance 4": (
                Path(folder) / "dit-s.diffx",
                dict(num=1, batch=1, steps=10, guidance_scale=4.0),
            ),
        }
        for name, (bundle, settings) in runs.items():
            for sampler in ("ddim", "ddpm"):
                parts, each = overhead(bundle, sampler=sampler, **settings)
                ratios = one_call(bundle, sampler=sampler, **settings)
                sampling.append((name, sampler, spread(each, "ms", 1e3), spread(parts, "%", 100), spread(ratios, "x")))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "onnxruntime", "numpy"))
    (cpu,) = set(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()))
    text = [
        "# Benchmarks",
        "",
        f"Written by `scripts/benchmark` on {datetime.date.today()}: {len(os.sched_getaffinity(0))} cores of {cpu}, "
        f"{versions}. Medians, with the least and the largest in brackets; the machine is shared, so that ratios "
        "say more than times.",
        "",
        "What a GPU does is in [gpu.md](gpu.md), written by `scripts/gpu-check`. Steps of every backend beside",
        "PyTorch's are what `diffx bench` measures, below.",
        "",
        "## Whole processes",
        "",
        "| | wall time | peak memory |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "## The loop",
        "",
        "*Added* is what `Sampler.sample` takes beyond the network's own runs, noise included, as a part of them.",
        "*One call* is the time of the whole loop inside the graph (`--one-call`) over that of the stepped loop.",
        "",
        "| | sampler | one run of the network | added | one call |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in sampling),
        "",
    ]
    _, mark, kept = Path(out).read_text(encoding="utf-8").partition(BY_HAND)  # what this script does not measure
    Path(out).write_text("\n".join(text) + mark + kept, encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
