"""Batch profiles: which batches an engine takes, and what shapes follow for each input of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from diffexport.errors import EngineError

LOOP_ROWS = (1, 20, 1000)
"""Rows of a plan that the loop in one call takes: the least, the usual, the most."""

_LARGEST = 1 << 16


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A range of batches: the least, the one that kernels are tuned for, the most."""

    least: int
    best: int
    most: int

    @property
    def fixed(self) -> bool:
        return self.least == self.most

    def __str__(self) -> str:
        return str(self.least) if self.fixed else f"{self.least}-{self.most}"


def parse_profiles(text: str | None, default_batch: int, max_batch: int) -> tuple[Profile, ...]:
    """Profiles from words: ``1,4,16`` is a fixed one each, ``1-16`` one range; ranges are tuned for the default batch.

    Without words it is one range up to the largest batch that the export was checked at.

    Raises:
        EngineError: anything else.
    """
    if text is None:
        return (_range(1, max_batch, default_batch),)
    profiles = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        numbers = [low, high] if dash else [low]
        if not all(number.isdecimal() and 1 <= int(number) <= _LARGEST for number in numbers):
            raise EngineError(f"--batch {text}: expected numbers such as 1,4,16 or a range such as 1-16")
        least, most = int(numbers[0]), int(numbers[-1])
        if least > most:
            raise EngineError(f"--batch {part.strip()}: the range ends below its start")
        profiles.append(_range(least, most, default_batch))
    return tuple(sorted(set(profiles), key=lambda p: (p.most, p.least)))


def _range(least: int, most: int, default_batch: int) -> Profile:
    return Profile(least, min(max(least, default_batch), most), most)


def choose(profiles: Sequence[Profile], batch: int) -> tuple[int, int] | None:
    """The profile for a batch and the batch it is run at, or None where it is above all of them.

    A batch that no profile holds is filled up to the least of the next one.
    """
    fits = [(max(batch, p.least), p.most, index) for index, p in enumerate(profiles) if batch <= p.most]
    if not fits:
        return None
    size, _, index = min(fits)
    return index, size


def input_ranges(
    name: str, shape: Sequence[int | str], profile: Profile, sides: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The least, the best and the largest shape of an input, whose free dimensions are named.

    Args:
        shape: numbers, and names of free dimensions.
        sides: sizes of the dimensions that a profile does not vary, such as a decoder's latent sides.

    Raises:
        EngineError: a free dimension that is not known.
    """
    known: dict[str, tuple[int, int, int]] = {
        "batch": (profile.least, profile.best, profile.most),
        "rows": LOOP_ROWS,
        "noise_rows": LOOP_ROWS,
        "noise_batch": (1, profile.best, profile.most),
        **{side: (size, size, size) for side, size in sides.items()},
    }
    for dim in shape:
        if isinstance(dim, str) and dim not in known:
            raise EngineError(f"input {name}: its dimension {dim!r} is not one that a profile knows; export again")
    least, best, most = (tuple(known[d][k] if isinstance(d, str) else d for d in shape) for k in range(3))
    return least, best, most
