"""What several commands print, in one form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffexport.bundle import Decoder, Measurement
from diffexport.errors import BundleError
from diffexport.spec import ModelSpec


def print_json(value: Any) -> None:
    """A value as indented JSON on stdout."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode())


def megabytes(size: int) -> str:
    """A file's size for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def size_of(folder: Path) -> str:
    """The size of all files of a folder, for people."""
    return megabytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def worst_of(measurements: Sequence[Measurement], *, runs: bool) -> Measurement:
    """The measurement nearest to its limit among single steps or whole runs."""
    from diffexport.parity import severity

    kind = [m for m in measurements if (m.psnr is not None) == runs]
    return max(kind or measurements, key=severity)


def describe_decoder(decoder: Decoder, spec: ModelSpec) -> str:
    """A bundle's decoder in one line."""
    image = " x ".join(map(str, (decoder.channels, *(decoder.upscale * side for side in spec.shape[1:]))))
    shift = f", shifted by {decoder.shift:g}" if decoder.shift else ""
    tiled = 0 < (decoder.tile or 0) < decoder.upscale * max(spec.shape[1:])
    tiles = f" in tiles of {decoder.tile} pixels" if tiled else ""
    return (
        f"decoder, {decoder.parameters / 1e6:.2f} M parameters, images {image}{tiles}, "
        f"latents divided by {decoder.scaling_factor:g}{shift}"
    )


def find_bundle(given: Path | None) -> Path:
    """The bundle that was named, or the only one in the current folder.

    Raises:
        BundleError: there is none, or there are several.
    """
    if given is not None:
        return given
    found = sorted(Path().glob("*.diffx"))
    if not found:
        raise BundleError("no bundle was named and there is none in this folder; make one with `diffx export CKPT`")
    if len(found) > 1:
        raise BundleError("no bundle was named and there are several here: " + ", ".join(map(str, found)))
    return found[0]
