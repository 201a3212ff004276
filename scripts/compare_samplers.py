"""Quality at a fixed cost, on the digits model: every sampler at 5, 10, 20 and 50 steps, and guidance on an interval."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from digits_quality import Judge, judge, make_judge
from numpy.typing import NDArray
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import diffexport
from diffexport.plan import make_plan
from diffexport.sampler import Sampler
from diffexport.samplers import SAMPLERS
from diffexport.schedules import DEFAULT_SCHEDULES

PER_CLASS, STEPS, BATCH = 100, (5, 10, 20, 50), 100
LABELS = np.repeat(np.arange(10), PER_CLASS)
TOY = diffexport.ModelSpec(family="any", shape=(1,), prediction="eps", schedule=DEFAULT_SCHEDULES["ddpm"])
Features = NDArray[np.float64]


class Statistics:
    """Frechet distance (Heusel et al. 2017, Eq. 6) between normal fits to 32 principal components of real and drawn."""

    def __init__(self) -> None:
        real = load_digits().data / 8 - 1
        self.pca = PCA(32, random_state=0).fit(real)
        self.real = self.pca.transform(real)

    def distance(self, samples: Features) -> float:
        return frechet(self.pca.transform(np.clip(samples.reshape(len(samples), 64), -1, 1)), self.real)

    def floor(self) -> float:
        """Between 1,000 real digits and the others: what no sampler can be expected to beat."""
        order = np.random.default_rng(0).permutation(len(self.real))
        return frechet(self.real[order[:1000]], self.real[order[1000:]])


def frechet(a: Features, b: Features) -> float:
    means, covariances = [f.mean(0) for f in (a, b)], [np.cov(f.T) for f in (a, b)]
    values = np.linalg.eigvals(covariances[0] @ covariances[1])
    cross = np.sqrt(np.maximum(values.real, 0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross)


def row(on: Sampler, by: Judge, statistics: Statistics, **settings: object) -> tuple[list[str], float, float]:
    """The cells of one run's row, its accuracy and its distance."""
    plan = on.plan(**settings)  # type: ignore[arg-type]
    started = time.perf_counter()
    x = on.sample(LABELS.tolist(), plan=plan, batch=BATCH, seed=0)
    seconds = time.perf_counter() - started
    quality, distance = judge(x, LABELS, by), statistics.distance(x)
    cells = [
        str(plan.evaluations),
        f"{100 * quality.accuracy:.1f} %",
        f"{quality.spread_ratio:.3f}",
        f"{distance:.3f}",
        f"{seconds:.1f} s",
    ]
    return cells, quality.accuracy, distance


def gap(quality: list[tuple[list[str], float, float]], chosen: str = "dpmpp-2m") -> float:
    """How much farther than the nearest the chosen sampler is, at worst, among samplers without noise."""
    quiet = [name for name in SAMPLERS if not make_plan(TOY, name, 5).stochastic]
    gaps = []
    for evaluations in STEPS:
        found = {
            name: distance
            for (grid, name, _, count, *_), _, distance in quality
            if grid == "model" and name in quiet and int(count) == evaluations
        }
        gaps.append(found[chosen] - min(found.values()))
    return max(gaps)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def main(bundle: str, out: str) -> None:
    on, by, statistics = diffexport.load(bundle).sampler(), make_judge(), Statistics()
    measured = ["evaluations", "recognised", "spread", "distance", "time"]
    runs = [(name, steps, grid) for grid in ("model", "karras") for name in SAMPLERS for steps in STEPS]
    quality = []
    for name, steps, grid in track(runs, "samplers"):
        if name == "euler":
            continue  # the same rows as ddim
        cells, accuracy, distance = row(on, by, statistics, sampler=name, steps=steps, grid=grid)
        quality.append(([grid, name, str(steps), *cells], accuracy, distance))
    full = {"sampler": "dpmpp-2m", "steps": 20, "guidance_scale": 2.0}
    guided = []
    for low, high in track([(None, None), (0.05, 0.3), (0.3, 1.0), (0.3, 5.0), (1.0, 5.0), (0.3, 20.0)], "guidance"):
        interval = {} if low is None else {"guidance_interval": (low, high)}
        cells, _, _ = row(on, by, statistics, **full, **interval)
        guided.append(["everywhere" if low is None else f"{low:g} to {high:g}", *cells])
    cells, _, _ = row(on, by, statistics, **{**full, "guidance_scale": 1.0})
    guided.append(["nowhere", *cells])
    text = [
        "# Samplers on the digits model",
        "",
        "Written by `scripts/compare-samplers`: 1,000 samples of `models/digits.pt`, 100 a class, seed 0, ONNX Runtime.",
        "*Recognised* is the part that a support vector machine fitted on real digits names rightly (it names "
        f"{100 * by.held_out_accuracy:.1f} % of held-out real digits). *Spread* is the samples' spread within a class over "
        "the real digits', 1 being right. *Distance* is the Frechet distance to them over 32 principal components; "
        f"two halves of the real digits are {statistics.floor():.3f} apart. Times are of one run on a shared machine.",
        "",
        "Bundles draw with `dpmpp-2m` unless told otherwise: of the samplers without noise, on the model's own levels, "
        f"it is within {gap(quality):.3f} of the nearest to the real digits at 5, 10, 20 and 50 evaluations alike.",
        "",
        "## Without guidance",
        "",
        *table(["levels", "sampler", "steps", *measured], [cells for cells, _, _ in quality]),
        "",
        "`euler` is `ddim` without noise, row for row.",
        "",
        "## Guidance 2 on an interval of sigma (dpmpp-2m, 20 steps)",
        "",
        "Outside the interval `step_plain.onnx` runs, at half the work.",
        "",
        *table(["guided where sigma is", *measured], guided),
        "",
    ]
    Path(out).write_text("\n".join(text), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
