"""A folder of samples, one file each, written as they are drawn, so that a run of any length can stop and go on.

    settings.json    what decides the samples: bundle, plan, seed and labels; a run with others is refused
    000123.png       sample 123: a picture of one or three channels in [-1, 1]; of anything else 000123.npy, as drawn.
                     Latents are decoded first where the bundle has a decoder, unless they are wanted as they are

A sample's index is its name, so what is missing is drawn and nothing else, by one process or by several at once. Batches
start at the same indices in every run, so a run that was interrupted ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from diffexport.bundle import MANIFEST, MAX_JSON, Bundle, sha256_of
from diffexport.decoding import tile_of
from diffexport.errors import DiffexportError
from diffexport.files import creating_file, read_regular, remove_left_overs, replacing_file, why
from diffexport.pictures import save_sample
from diffexport.plan import Plan
from diffexport.sampler import Sampler, check_run

Array = NDArray[np.float32]
SETTINGS = "settings.json"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides the samples of a folder."""

    bundle: str
    """sha256 of its manifest, which vouches for every other file."""
    seed: int
    labels: list[int] | None
    """Sample k has label k modulo their number; None for a model without labels."""
    plan: str
    """In words, for people."""
    rows: str
    """sha256 of the plan's float32 rows and its start."""
    tile: int | None = None
    """Pixels on a side of the tiles that latents were decoded in, 0 for whole images; None where nothing was decoded."""


@dataclass(frozen=True)
class Drawn:
    """What a run did: samples that it drew, and those that were there before."""

    drawn: int
    kept: int


def draw_into(
    folder: Path,
    bundle: Bundle,
    sampler: Sampler,
    plan: Plan,
    labels: Sequence[int] | None,
    num: int,
    *,
    described: str,
    seed: int = 0,
    first: int = 0,
    batch: int | None = None,
    one_call: bool = False,
    latents: bool = False,
    tile: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Drawn:
    """Draw samples ``first .. first + num - 1`` into a folder, but for those that it holds already.

    Args:
        labels: sample first + k has ``labels[k % len(labels)]``; None for a model without labels.
        described: the plan in words.
        latents: leave latents as they are, although the bundle has a decoder.
        tile: see ``diffexport.decoding.decode``.

    Raises:
        DiffexportError: the folder is of another run or cannot be written, or a backend failed; what was finished stays.
    """
    size = sampler.defaults.batch if batch is None else batch
    check_run(seed, first, size)
    turn = None if labels is None else [labels[(k - first) % len(labels)] for k in range(len(labels))]
    decoder = None if latents else bundle.manifest.decoder
    wanted = Settings(
        bundle=sha256_of(bundle.path / MANIFEST),
        seed=seed,
        labels=turn,
        plan=described,
        rows=_digest(plan),
        tile=None if decoder is None else tile_of(decoder, tile) * decoder.upscale,
    )
    channels = bundle.spec.shape[0] if decoder is None else decoder.channels
    name = "{:06d}.png" if channels in (1, 3) and len(bundle.spec.shape) == 3 else "{:06d}.npy"
    stop, drawn = first + num, 0
    try:
        _claim(folder, wanted)
        there = set(os.listdir(folder))
        for start in range(first, stop, size):
            indices = range(start, min(start + size, stop))
            missing = [index for index in indices if name.format(index) not in there]
            if missing:
                run: dict[str, Any] = dict(plan=plan, seed=seed, first=start, batch=size, one_call=one_call)
                each = None if turn is None else [turn[index % len(turn)] for index in indices]
                count = len(indices) if turn is None else None
                if decoder is None:
                    x = sampler.sample(each, num=count, **run)
                else:
                    x = sampler.images(each, num=count, tile=tile, **run)[1]
                for index in missing:
                    _save(x[index - start], folder / name.format(index))
                    drawn += 1
            if progress is not None:
                progress("sampling", (indices.stop - first) / num)
    except OSError as error:
        what = f"{error.filename or folder}: cannot be written ({error.strerror or error})"
        raise DiffexportError(what + _what_stays(drawn)) from error
    except DiffexportError as error:
        raise type(error)(f"{error}{_what_stays(drawn)}") from error
    return Drawn(drawn, num - drawn)


def _what_stays(drawn: int) -> str:
    return f"; {drawn} samples were finished and stay, the same command goes on from there" if drawn else ""


def _save(x: Array, path: Path) -> None:
    with replacing_file(path, alone=False) as work:
        if path.suffix == ".png":
            save_sample(x, work)
        else:
            with work.open("wb") as file:
                np.save(file, x)


def _digest(plan: Plan) -> str:
    """sha256 of what a runtime is given of a plan."""
    return hashlib.sha256(np.append(plan.rows, plan.x_scale).astype("<f4").tobytes()).hexdigest()


def _claim(folder: Path, wanted: Settings) -> None:
    """Make the folder this run's own, or see that it is.

    Raises:
        DiffexportError: it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_left_overs(folder)
    path = folder / SETTINGS
    if not os.path.lexists(path):
        if any(not name.startswith(".") for name in os.listdir(folder)):
            raise DiffexportError(f"{folder}: holds other files and no {SETTINGS}; choose an empty or a new folder")
        with creating_file(path) as work:
            work.write_bytes(msgspec.json.format(msgspec.json.encode(wanted), indent=2) + b"\n")
    try:
        found = msgspec.json.decode(read_regular(path, MAX_JSON), type=Settings)
    except OSError as error:
        raise DiffexportError(f"{path}: cannot be read ({why(error)}); choose another folder") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DiffexportError(f"{path}: is damaged ({error}); choose another folder") from error
    for decides, told in (
        ("bundle", "bundle"),
        ("seed", "seed"),
        ("labels", "labels"),
        ("rows", "plan"),
        ("tile", "tile"),
    ):
        if getattr(found, decides) != getattr(wanted, decides):
            there, now = _short(getattr(found, told)), _short(getattr(wanted, told))
            raise DiffexportError(
                f"{folder}: holds samples of another run ({told} {there} there, {now} now); "
                "choose another folder, or that run's settings"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
