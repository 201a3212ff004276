"""Checkpoints for the commands that take one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffexport.errors import BackendError

if TYPE_CHECKING:
    from diffexport_reference.checkpoints import Checkpoint


def read_checkpoint(path: Path, **facts: Any) -> Checkpoint:
    """A checkpoint's module, spec and notes.

    Raises:
        BackendError: PyTorch is not installed.
        CheckpointError, SpecError: see ``diffexport_reference.checkpoints``.
    """
    if importlib.util.find_spec("torch") is None:
        raise BackendError("reading a checkpoint needs PyTorch; pip install 'diffexport[export]'")
    from diffexport_reference.checkpoints import read_checkpoint as read

    return read(path, **facts)
