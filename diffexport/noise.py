"""Counter-based normal noise: a number is decided by seed, sample index, draw and position, and by nothing else.

The bits are Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the normals Box-Muller
in float64, rounded to float32. A sample therefore does not depend on the batch it is drawn in, on the backend or on
the language; ``tests/vectors/noise.json`` holds published vectors.

    key      (seed low 32 bits, seed high 32 bits)
    counter  (block, draw, index low 32 bits, index high 32 bits)

A block of four 32-bit words (a, b, c, d) gives four normals, elements 4*block .. 4*block + 3 of the sample in C order:
with u(k) = (k + 0.5) / 2^32, r(k) = sqrt(-2 ln u(k)), they are r(a)cos(2 pi u(b)), r(a)sin(2 pi u(b)),
r(c)cos(2 pi u(d)), r(c)sin(2 pi u(d)). Draw 0 is the start of sampling, draw 1 + k the noise of the plan's row k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four arrays of one shape holding 32-bit words.
        key: two 32-bit words.

    Returns:
        Four arrays of that shape holding 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def normal(seed: int, indices: Sequence[int], draws: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise for some samples and draws.

    Args:
        seed: 0 .. 2^64 - 1.
        indices: the samples' indices, each 0 .. 2^64 - 1.
        draws: 0 for the start, 1 + k for row k of a plan.
        shape: shape of one sample.

    Returns:
        (len(draws), len(indices), *shape) float32.
    """
    count = math.prod(shape)
    blocks = -(-count // 4)
    index = np.asarray(indices, np.uint64)[None, :, None]
    draw = np.asarray(draws, np.uint64)[:, None, None]
    whole = (draw.size, index.size, blocks)
    counter = (
        np.broadcast_to(np.arange(blocks, dtype=np.uint64), whole),
        np.broadcast_to(draw, whole),
        np.broadcast_to(index & _LOW, whole),
        np.broadcast_to(index >> _SHIFT, whole),
    )
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    a, b, c, d = ((word.astype(np.float64) + 0.5) * 2.0**-32 for word in words)
    out = np.empty((*whole, 4), np.float32)
    for pair, (u, v) in enumerate(((a, b), (c, d))):
        radius, angle = np.sqrt(-2.0 * np.log(u)), (2.0 * np.pi) * v
        out[..., 2 * pair], out[..., 2 * pair + 1] = radius * np.cos(angle), radius * np.sin(angle)
    return out.reshape(draw.size, index.size, 4 * blocks)[..., :count].reshape(draw.size, index.size, *shape)
