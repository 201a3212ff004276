"""Time and memory of a DiT-S/2 as its batch and its depth grow, with the straight line that fits them: docs/growth.png.

The parts are run by themselves, so that a measurement is short: export, batch, depth, draw.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffexport.bench import Report, bench, contenders_of
from diffexport.bundle import Bundle
from diffexport_cli.bench_models import random_model
from diffexport_cli.progress import progress_bar

MODEL, BATCHES, DEPTHS = "DiT-S/2", (1, 2, 4, 8, 16), (3, 6, 12, 24)
SECONDS = 6.0
OUT, PICTURE = Path("out/growth"), Path("docs/growth.png")
BACKENDS = {"openvino": "#2563a8", "ort": "#b45309"}
PAPER, INK, GRID = "#ffffff", "#1f2328", "#d7dce1"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 330, 70, 20, 50, 50

Series = dict[str, dict[str, list[float]]]
"""By quantity and backend, a number for each batch or depth."""


def bundle_of(depth: int) -> Bundle:
    with progress_bar(f"depth {depth}") as progress:
        return Bundle.open(random_model(MODEL, progress, depth=depth)[1])


def measured(bundle: Bundle, batches: Sequence[int]) -> Report:
    contenders = [contender for contender in contenders_of(bundle) if contender.name in BACKENDS]
    with progress_bar("measuring") as progress:
        return bench(bundle, contenders, batches, seconds=SECONDS, progress=progress)


def series_of(reports: Sequence[Report]) -> Series:
    figures = [figure for report in reports for figure in report.figures]
    return {
        quantity: {name: [getattr(figure, field) for figure in figures if figure.name == name] for name in BACKENDS}
        for quantity, field in (("ms a step", "step_ms"), ("MB, whole process", "memory_mb"))
    }


def straight(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Slope and start of the line whose relative deviations have the least squares, and the largest of these."""
    slope, start = np.polyfit(xs, ys, 1, w=1 / np.asarray(ys))
    return float(slope), float(start), float(np.max(np.abs(slope * np.asarray(xs) + start - ys) / ys))


def panel(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], what: str, xs: Sequence[int], lines: dict[str, list[float]]
) -> None:
    """One plot from zero: points, and the line that fits each backend's."""
    title, font = ImageFont.load_default(16), ImageFont.load_default(13)
    left, top = corner[0] + LEFT, corner[1] + TOP
    right, bottom = corner[0] + WIDTH - RIGHT, corner[1] + HEIGHT - BOTTOM
    highest = 1.3 * max(max(ys) for ys in lines.values())
    draw.text((left, corner[1] + 8), what, INK, title)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / (1.05 * xs[-1]), bottom - (bottom - top) * y / highest

    unit = 10 ** np.floor(np.log10(highest))
    unit *= next(part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if highest / (part * unit) <= 6)
    for y in np.arange(0, highest, unit):
        draw.line((left, at(0, y)[1], right, at(0, y)[1]), GRID)
        draw.text((left - 8, at(0, y)[1]), f"{y:g}", INK, font, anchor="rm")
    for x in xs:
        draw.text((at(x, 0)[0], bottom + 8), str(x), INK, font, anchor="mt")
    draw.line((left, top, left, bottom, right, bottom), INK)
    for row, (name, ys) in enumerate(lines.items()):
        slope, start, deviation = straight(xs, ys)
        colour = BACKENDS[name]
        draw.line((at(0, start), at(xs[-1], slope * xs[-1] + start)), colour, 2)
        for x, y in zip(xs, ys, strict=True):
            px, py = at(x, y)
            draw.ellipse((px - 4, py - 4, px + 4, py + 4), colour)
        text = f"{name}: {start:.3g} + {slope:.3g} each, at most {deviation:.1%} off the line"
        draw.text((left + 12, top + 18 * row), text, colour, font)


def draw_all(parts: dict[str, tuple[Sequence[int], Series]]) -> None:
    page = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), PAPER)
    draw = ImageDraw.Draw(page)
    for column, (part, (xs, series)) in enumerate(parts.items()):
        for row, (quantity, lines) in enumerate(series.items()):
            panel(draw, (column * WIDTH, row * HEIGHT), f"{quantity}, by {part}", xs, lines)
            for name, ys in lines.items():
                slope, start, deviation = straight(xs, ys)
                told = ", ".join(f"{y:.4g}" for y in ys)
                line = f"{start:.3g} + {slope:.3g} each"
                print(f"| {name}, {quantity}, by {part} | {told} | {line} | {deviation:.1%} |")
    page.save(PICTURE)
    print(f"wrote {PICTURE}")


def main(part: str) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    if part == "export":
        for depth in DEPTHS:
            bundle_of(depth)
    elif part == "batch":
        (OUT / "batch.json").write_text(json.dumps(series_of([measured(bundle_of(12), BATCHES)])))
    elif part == "depth":
        (OUT / "depth.json").write_text(json.dumps(series_of([measured(bundle_of(depth), (1,)) for depth in DEPTHS])))
    else:
        read = {name: json.loads((OUT / f"{name}.json").read_text()) for name in ("batch", "depth")}
        draw_all({"batch": (BATCHES, read["batch"]), "depth": (DEPTHS, read["depth"])})


if __name__ == "__main__":
    main(*sys.argv[1:])
