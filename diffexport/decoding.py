"""From latents to images: one at a time, and in tiles where an image is too large to be decoded at once.

Tiles overlap by a quarter or more and are blended linearly. A decoder with normalizations or attention sees less of an
image in a tile than in the whole, so that tiled and whole images differ; docs/decoder.md says how much.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffexport.backends.session import Session
from diffexport.errors import ShapeError
from diffexport.spec import DecoderSpec

Array = NDArray[np.float32]

OnTile = Callable[[int, int], None]
"""Called after each tile with (tiles done so far, those of the whole call)."""

_OVERLAP = 4
"""Tiles share at least their side divided by this."""


@dataclass(frozen=True)
class Span:
    """What a tile covers of one axis.

    Attributes:
        latents, pixels: the part of the latents and of the image.
        weight: (pixels,) of the tile's pixels; the weights of all tiles that cover a pixel add up to 1.
    """

    latents: slice
    pixels: slice
    weight: Array


def decode(
    session: Session, decoder: DecoderSpec, x: Array, tile: int | None = None, on_tile: OnTile | None = None
) -> Array:
    """Images of latents.

    Args:
        x: latents as the sampler leaves them, (B, C, h, w).
        tile: side of the tiles in pixels, for images that are larger; 0 for none; the decoder's own if None.
        on_tile: called after each tile.

    Returns:
        (B, channels, upscale*h, upscale*w) float32, about -1 .. 1.

    Raises:
        ShapeError: a tile that cannot be.
    """
    rows, columns = (spans(side, tile_of(decoder, tile), decoder.upscale) for side in x.shape[2:])
    images = np.zeros((len(x), decoder.channels, *(decoder.upscale * side for side in x.shape[2:])), np.float32)
    tiles = list(itertools.product(range(len(x)), rows, columns))
    for done, (index, row, column) in enumerate(tiles, 1):
        part = np.ascontiguousarray(x[index : index + 1, :, row.latents, column.latents])
        weight = row.weight[:, None] * column.weight
        images[index, :, row.pixels, column.pixels] += session.decode(part)[0] * weight
        if on_tile is not None:
            on_tile(done, len(tiles))
    return images


def tile_of(decoder: DecoderSpec, tile: int | None = None) -> int:
    """The side in latents of the tiles that ``tile`` pixels mean; 0 for none.

    Raises:
        ShapeError: it is not a multiple of the decoder's scale.
    """
    pixels = (decoder.tile or 0) if tile is None else tile
    least = _OVERLAP * decoder.upscale
    if pixels < 0 or pixels % decoder.upscale or 0 < pixels < least:
        raise ShapeError(
            f"tile {pixels}: expected a multiple of {decoder.upscale} pixels, at least {least}, or 0 for whole images"
        )
    return pixels // decoder.upscale


def spans(side: int, tile: int, upscale: int) -> list[Span]:
    """The tiles along an axis of ``side`` latents, all of the same size, the first and last at its ends."""
    tile = min(tile or side, side)
    overlap = tile // _OVERLAP
    count = 1 + math.ceil((side - tile) / (tile - overlap))
    starts = [round(start) for start in np.linspace(0, side - tile, count)]
    place = np.arange(tile * upscale) + 0.5
    raw = np.zeros((count, side * upscale))
    for k, start in enumerate(starts):
        rising = place if k > 0 else math.inf
        falling = place[::-1] if k < count - 1 else math.inf
        raw[k, start * upscale : (start + tile) * upscale] = np.minimum(
            np.minimum(rising, falling) / (overlap * upscale), 1.0
        )
    weights = (raw / raw.sum(0)).astype(np.float32)
    return [
        Span(slice(start, start + tile), pixels, weight[pixels])
        for start, weight in zip(starts, weights, strict=True)
        for pixels in [slice(start * upscale, (start + tile) * upscale)]
    ]
