"""What people look at: grids of samples, and clouds of points, as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffexport.errors import ShapeError

Array = NDArray[np.float32]

TILE = 64
"""Samples with a shorter side are enlarged by a whole factor to about this many pixels."""
_GAP, _CAPTION = 4, 16
_PAPER, _INK = 240, (40, 40, 40)


def to_pixels(x: Array) -> NDArray[np.uint8]:
    """Samples in [-1, 1], (B, C, H, W), as (B, H, W, 3) bytes: one channel is gray, three are RGB.

    Of any other number of channels, latents for one, the first three are shown, each stretched to its own range.
    """
    if x.ndim != 4:
        raise ShapeError(f"a picture needs samples of shape (C, H, W), got {x.shape[1:]}")
    channels = x.shape[1]
    if channels not in (1, 3):
        x = x[:, : 3 if channels > 3 else 1]
        low, high = x.min((0, 2, 3), keepdims=True), x.max((0, 2, 3), keepdims=True)
        x = (x - low) / np.maximum(high - low, 1e-12) * 2 - 1
    pixels = np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.repeat(pixels, 3, 1).transpose(0, 2, 3, 1) if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)


def grid(x: Array, captions: Sequence[str] | None = None, columns: int | None = None) -> Image.Image:
    """Samples side by side, (B, C, H, W) in [-1, 1].

    Args:
        captions: one for each sample, drawn above it unless the sample above has the same one.
        columns: samples in a row; about a square where not given.
    """
    pixels = to_pixels(x)
    count, height, width = pixels.shape[:3]
    columns = columns or math.ceil(math.sqrt(count))
    factor = max(1, round(TILE / max(height, width)))
    pixels = pixels.repeat(factor, 1).repeat(factor, 2)
    height, width = height * factor, width * factor
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    captioned = [captions is not None and _new_captions(captions, row, columns) for row in rows]
    page = Image.new(
        "RGB",
        (columns * (width + _GAP) + _GAP, len(rows) * (height + _GAP) + _GAP + sum(captioned) * _CAPTION),
        (_PAPER,) * 3,
    )
    draw, font, top = ImageDraw.Draw(page), ImageFont.load_default(12), _GAP
    for row, has_caption in zip(rows, captioned, strict=True):
        if has_caption and captions is not None:
            for column, index in enumerate(row):
                centre = _GAP + column * (width + _GAP) + width // 2
                draw.text((centre, top + _CAPTION // 2 - 1), _fit(captions[index], width), _INK, font, anchor="mm")
            top += _CAPTION
        for column, index in enumerate(row):
            page.paste(Image.fromarray(pixels[index]), (_GAP + column * (width + _GAP), top))
        top += height + _GAP
    return page


def points(x: Array, size: int = 480) -> Image.Image:
    """Samples of two numbers, (B, 2), as dots on a square page."""
    if x.ndim != 2 or x.shape[1] != 2:
        raise ShapeError(f"a cloud of points needs samples of shape (2,), got {x.shape[1:]}")
    scale = 4  # drawn large and reduced, for smooth edges
    page = Image.new("RGB", (size * scale, size * scale), (_PAPER,) * 3)
    draw, radius = ImageDraw.Draw(page), 3 * scale
    middle, half = (x.min(0) + x.max(0)) / 2, max(float(np.ptp(x, 0).max()) / 2, 1e-6) * 1.08
    for u, v in (x - middle) / half:
        left, top = (u + 1) / 2 * size * scale, (1 - v) / 2 * size * scale
        draw.ellipse((left - radius, top - radius, left + radius, top + radius), fill=(31, 91, 158))
    return page.resize((size, size), Image.Resampling.LANCZOS)


def save_samples(x: Array, path: str | Path, captions: Sequence[str] | None = None, columns: int | None = None) -> None:
    """Write samples as a PNG: a grid of images, or a cloud of points."""
    picture = points(x) if x.ndim == 2 else grid(x, captions, columns)
    picture.save(path, format="PNG")


def save_sample(x: Array, path: str | Path) -> None:
    """Write one sample (C, H, W) as a PNG of its own size, one channel as gray."""
    pixels = to_pixels(x[None])[0]
    Image.fromarray(pixels[..., 0] if len(x) == 1 else pixels).save(path, format="PNG")


def panels(series: Mapping[str, Sequence[float]], size: tuple[int, int] = (640, 150)) -> Image.Image:
    """One panel below the other, each a line through its numbers from left to right, named, with its range."""
    scale, margin = 3, 24  # drawn large and reduced, for smooth lines
    width, height = size[0] * scale, size[1] * scale
    page = Image.new("RGB", (width, height * len(series)), (_PAPER,) * 3)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12 * scale)
    for index, (name, numbers) in enumerate(series.items()):
        top, edge = index * height, margin * scale
        low, high = min(numbers), max(numbers)
        draw.text((edge // 4, top + edge // 4), f"{name}: {low:.4g} .. {high:.4g}", _INK, font)
        draw.line((edge, top + height - edge // 2, width - edge, top + height - edge // 2), (200,) * 3, scale)
        spots = []
        for k, number in enumerate(numbers):
            part = (number - low) / (high - low) if high > low else 0.5
            across = edge + (width - 2 * edge) * k / max(len(numbers) - 1, 1)
            spots.append((across, top + height - edge - (height - 2.5 * edge) * part))
        draw.line(spots, (31, 91, 158), 2 * scale)
        for u, v in spots:
            draw.ellipse((u - 3 * scale, v - 3 * scale, u + 3 * scale, v + 3 * scale), fill=(31, 91, 158))
    return page.resize((size[0], size[1] * len(series)), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Frame:
    """One evaluation of a run: the noise level, the state at unit variance and the denoised estimate, (B, C, H, W)."""

    level: float
    x: Array
    denoised: Array


MAX_STRIP_COLUMNS = 10


def strip(frames: Sequence[Frame], samples: int = 3) -> Image.Image:
    """A run from left to right, for some samples: the state in one row, the denoised estimate in the row below it."""
    shown = [frames[round(k)] for k in np.linspace(0, len(frames) - 1, min(len(frames), MAX_STRIP_COLUMNS))]
    tiles, captions = [], []
    for index in range(min(samples, len(shown[0].x))):
        for part in ("x", "denoised"):
            tiles += [getattr(frame, part)[index] for frame in shown]
            captions += [f"{frame.level:.3g}" for frame in shown]
    return grid(np.stack(tiles), captions, len(shown))


def save_trajectory(frames: Sequence[Frame], path: str | Path, kind: str) -> None:
    """Write a run as an animation (``gif``: states left, denoised estimates right) or as a strip (``png``)."""
    if frames[0].x.ndim != 4:
        raise ShapeError(f"a trajectory is drawn of samples of shape (C, H, W), got {frames[0].x.shape[1:]}")
    if kind == "png":
        strip(frames).save(path, format="PNG")
        return
    pages = [_side_by_side(grid(frame.x), grid(frame.denoised)) for frame in frames]
    durations = [120] * (len(pages) - 1) + [1500]  # ms; the end stays to be looked at
    pages[0].save(path, format="GIF", save_all=True, append_images=pages[1:], duration=durations, loop=0)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    page = Image.new("RGB", (left.width + right.width + 2 * _GAP, left.height), (_PAPER,) * 3)
    page.paste(left, (0, 0))
    page.paste(right, (left.width + 2 * _GAP, 0))
    return page


def _new_captions(captions: Sequence[str], row: range, columns: int) -> bool:
    """Whether any sample of the row has another caption than the one above it."""
    return any(index < columns or captions[index] != captions[index - columns] for index in row)


def _fit(text: str, width: int) -> str:
    letters = max(1, width // 6)
    return text if len(text) <= letters else text[: letters - 1] + "…"
