"""What an export will take, said before it begins."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffexport.backends.onnxruntime import LARGE, SMALL
from diffexport.bundle import HALF, Precision
from diffexport.errors import ExportError
from diffexport.spec import DecoderSpec, ModelSpec

if TYPE_CHECKING:
    import torch

_PROCESS, _BYTES_A_NUMBER = 530e6, 40_000
"""Bytes of PyTorch, the exporter and ONNX Runtime with a small model; of what is computed for each number of a sample."""

_MAPPED, _PACKED, _BESIDE = 1, 3, 7
"""Weights that are held beside the module's, in units of their size: mapped where they are large; with those that ONNX
Runtime packs, of one graph at a time, and of all graphs where they are small."""

_INT8, _QUANTIZER = 0.3, 200e6
"""Of int8 weights: their part of the room of fp32 ones, and bytes of the quantizer, by measurement of models/digits.pt."""

_BYTES_A_PIXEL = 6_000
"""Of a decoder's feature maps, by measurement of Stable Diffusion's."""

_GRAPHS, _RECORDED = 4e6, 40
"""Bytes of graphs and plans; numbers of golden cases for each number of a sample, at most."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of memory, of the bundle on disk, and of what lies on disk beside it until it is done; about."""

    memory: float
    disk: float
    passing: float = 0.0

    def __str__(self) -> str:
        more = f", and {_size(self.passing)} more of it until it is done" if self.passing else ""
        return f"about {_size(self.memory)} of memory and {_size(self.disk)} of disk{more}"


def forecast(
    module: torch.nn.Module, spec: ModelSpec, decoder: tuple[torch.nn.Module, DecoderSpec] | None, precision: Precision
) -> Forecast:
    """What exporting a module takes: it stays in memory beside the graphs that it is compared with."""
    weights = _bytes_of(module) + (_bytes_of(decoder[0]) if decoder is not None else 0)
    written = weights * (0.5 if precision in HALF else _INT8 if precision == "int8" else 1.0)
    sample = math.prod(spec.shape)
    pixels = math.prod(decoder[1].upscale * side for side in spec.shape[1:]) if decoder is not None else 0
    images = 2 * pixels * decoder[1].channels if decoder is not None else 0
    beside = _MAPPED if written >= LARGE else _PACKED if written >= SMALL else _BESIDE
    quantizer = 0.0
    if precision == "int8":
        beside, quantizer = _BESIDE, _QUANTIZER
    computed = _BYTES_A_NUMBER * sample + _BYTES_A_PIXEL * pixels
    return Forecast(
        memory=_PROCESS + quantizer + weights + beside * weights + computed,
        disk=written + _GRAPHS + 4 * (_RECORDED * sample + images),
        passing=3 * weights if precision == "int8" else 0.0,
    )


def check_disk(out: Path, needed: Forecast) -> None:
    """Raise ExportError where the disk lacks what a bundle needs, or there can be no such folder."""
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if not folder.is_dir():
        raise ExportError(f"{out}: cannot be written, {folder} is not a folder; choose another --out")
    free = shutil.disk_usage(folder).free
    if free < needed.disk + needed.passing:
        raise ExportError(
            f"{out}: needs about {_size(needed.disk + needed.passing)} of disk, {folder} has {_size(free)} free; "
            "free some, or choose another --out"
        )


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(4 * tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
