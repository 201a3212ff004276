"""What an export will take, said before it begins."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffexport.backends.onnxruntime import LARGE
from diffexport.bundle import HALF, Precision
from diffexport.errors import ExportError
from diffexport.spec import DecoderSpec, ModelSpec

if TYPE_CHECKING:
    import torch

_PROCESS = 600e6
"""Bytes of PyTorch, the exporter and ONNX Runtime with a small model."""

_SESSIONS = 4
"""Graphs with weights of their own that are open at once where these are not large."""

_BYTES_A_PIXEL = 6_000
"""Of a decoder's feature maps, by measurement of Stable Diffusion's."""

_GRAPHS, _RECORDED = 4e6, 40
"""Bytes of graphs and plans; numbers of golden cases for each number of a sample, at most."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of memory and of disk, about."""

    memory: float
    disk: float

    def __str__(self) -> str:
        return f"about {_size(self.memory)} of memory and {_size(self.disk)} of disk"


def forecast(
    module: torch.nn.Module, spec: ModelSpec, decoder: tuple[torch.nn.Module, DecoderSpec] | None, precision: Precision
) -> Forecast:
    """What exporting a module takes: it stays in memory beside the graphs that it is compared with."""
    weights = _bytes_of(module) + (_bytes_of(decoder[0]) if decoder is not None else 0)
    written = weights * (0.5 if precision in HALF else 1.0)
    sample = math.prod(spec.shape)
    pixels = math.prod(decoder[1].upscale * side for side in spec.shape[1:]) if decoder is not None else 0
    images = 2 * pixels * decoder[1].channels if decoder is not None else 0
    graphs = 1 if written >= LARGE else _SESSIONS
    return Forecast(
        memory=_PROCESS + weights + graphs * weights + pixels * _BYTES_A_PIXEL,
        disk=written + _GRAPHS + 4 * (_RECORDED * sample + images),
    )


def check_disk(out: Path, needed: Forecast) -> None:
    """Raise ExportError where the disk lacks what a bundle needs, or there can be no such folder."""
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if not folder.is_dir():
        raise ExportError(f"{out}: cannot be written, {folder} is not a folder; choose another --out")
    free = shutil.disk_usage(folder).free
    if free < needed.disk:
        raise ExportError(
            f"{out}: needs about {_size(needed.disk)} of disk, {folder} has {_size(free)} free; "
            "free some, or choose another --out"
        )


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(4 * tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
