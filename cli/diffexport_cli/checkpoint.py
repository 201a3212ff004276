"""Checkpoints for the commands that take one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffexport.errors import BackendError, SpecError

if TYPE_CHECKING:
    import torch

    from diffexport.spec import DecoderSpec, ModelSpec
    from diffexport_reference.checkpoints import Checkpoint


def read_checkpoint(path: Path, **facts: Any) -> Checkpoint:
    """A checkpoint's module, spec and notes.

    Raises:
        BackendError: PyTorch is not installed.
        CheckpointError, SpecError: see ``diffexport_reference.checkpoints``.
    """
    _need_torch()
    from diffexport_reference.checkpoints import read_checkpoint as read

    return read(path, **facts)


def read_decoder(folder: Path) -> tuple[torch.nn.Module, DecoderSpec]:
    """The decoder of an AutoencoderKL folder.

    Raises:
        BackendError: PyTorch is not installed.
        CheckpointError: see ``diffexport_reference.vae``.
    """
    _need_torch()
    from diffexport_reference.vae import load_decoder

    return load_decoder(folder)


def _need_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise BackendError("reading a checkpoint needs PyTorch; pip install 'diffexport[export]'")


def read_checkpoint_of(path: Path, spec: ModelSpec, weights: str | None = None) -> Checkpoint:
    """The checkpoint that a bundle is of; what a bare state dict does not tell is taken from the bundle's spec."""
    chosen: dict[str, Any] = {"weights": weights}
    if spec.guidable:
        chosen["guidance_channels"] = spec.guided_channels or "all"
    try:
        return read_checkpoint(path, **chosen)
    except SpecError:
        return read_checkpoint(
            path,
            **chosen,
            null_label=("last" if spec.has_null else "none") if spec.architecture.get("num_class_embeds") else None,
            heads=spec.architecture.get("num_heads"),
            image_size=spec.shape[-1] if len(spec.shape) == 3 else None,
            prediction=spec.prediction,
            scaled=spec.scaled,
            schedule=spec.schedule,
        )


def read_module_of(path: Path, spec: ModelSpec) -> torch.nn.Module:
    """The module of a checkpoint that a bundle is of."""
    return read_checkpoint_of(path, spec).module
