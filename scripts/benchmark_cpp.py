"""diffx-sample as a user runs it: start to first image, what lies between the runs of the network, sizes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime

REPEATS = 15
LIBRARY = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))


def spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):.3g} {unit} ({min(values):.3g} to {max(values):.3g})"


def main(build: str, bundle: str) -> None:
    program, shim = Path(build) / "diffx-sample", Path(build).resolve() / "tests" / "libdiffx-raw-runs.so"
    plain = os.environ | {"DIFFX_ONNXRUNTIME_LIBRARY": str(LIBRARY)}
    timed = plain | {"DIFFX_ONNXRUNTIME_LIBRARY": str(shim), "RAW_RUNS_LIBRARY": str(LIBRARY), "LD_PRELOAD": str(shim)}
    with tempfile.TemporaryDirectory() as folder:
        npy = f"{folder}/a.npy"
        first = []
        for _ in range(REPEATS + 2):
            started = time.perf_counter()
            subprocess.run(
                [program, bundle, "--num", "1", "--steps", "20", "--npy", npy], check=True, env=plain, stdout=-3
            )
            first.append(1e3 * (time.perf_counter() - started))
        print(f"| start to first image, 20 steps, the whole process | {spread(first[2:], 'ms')} |")
        for words in (["--num", "64", "--batch", "16", "--guidance-scale", "2"], ["--num", "64", "--batch", "1"]):
            for sampler in ("ddim", "ddpm"):
                added, each, allocations = [], [], 0.0
                for _ in range(REPEATS // 3):
                    command = [program, bundle, *words, "--sampler", sampler, "--steps", "20", "--npy", npy]
                    report = subprocess.run(
                        command, check=True, env=timed, stdout=-3, stderr=-1, text=True
                    ).stderr.split()
                    found = dict(zip(report[::2], map(float, report[1::2]), strict=True))
                    added.append(100 * (found["seconds_in_all"] / found["seconds_of_runs"] - 1))
                    each.append(1e3 * found["seconds_of_runs"] / found["runs"])
                    allocations = max(allocations, found["allocations"])
                what = f"batch {words[3]}, {'guidance 2' if len(words) > 4 else 'no guidance'}, {sampler}"
                print(
                    f"| {what}: one run; added by the loop; allocations | {spread(each, 'ms')}; {spread(added, '%')}; "
                    f"{allocations:.0f} |"
                )
        for name in ("libdiffx-runtime.so", "diffx-sample"):
            subprocess.run(["strip", "-o", f"{folder}/{name}", Path(build) / name], check=True)
            print(f"| {name}, stripped | {Path(folder, name).stat().st_size / 1e3:.0f} kB |")


if __name__ == "__main__":
    main(*sys.argv[1:])
