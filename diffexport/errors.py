"""Every error that a user of diffexport can cause.

    DiffexportError
      CheckpointError     a checkpoint that is missing, damaged, unsafe or not understood
      SpecError           a fact about a model that is missing or impossible
      PlanError           a sampler, schedule or number of steps that cannot be
      BundleError         a bundle that is missing, damaged or of another version
      ShapeError          an array whose shape or range does not fit the model
      EngineError         an engine that cannot be built, or does not belong to this bundle or machine
      BackendError        a runtime that is not installed, cannot run here, or failed
      ExportError         a module that cannot be turned into a graph
      ParityError         numbers that differ from PyTorch's by more than the limit

A message says what is wrong, what was found, what was expected and what to do. Mistakes of the
library itself are assertions, not members of this tree.
"""

from __future__ import annotations

MAX_MESSAGE = 1000
"""Characters of a message; files of strangers must not fill a screen."""


class DiffexportError(Exception):
    """Base of all errors that a user can cause; its text is one line that is safe to print, whatever it quotes."""

    def __str__(self) -> str:
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__()[: MAX_MESSAGE + 1])
        return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 3]}..."


class CheckpointError(DiffexportError):
    """A checkpoint that is missing, damaged, unsafe or of an unknown model."""


class SpecError(DiffexportError):
    """A fact about a model that is missing, impossible or contradicts another."""


class PlanError(DiffexportError):
    """A sampler, schedule, guidance or number of steps that cannot be."""


class BundleError(DiffexportError):
    """A bundle that is missing, damaged, altered or of another version."""


class ShapeError(DiffexportError):
    """An array or a label whose shape or range does not fit the model."""


class BackendError(DiffexportError):
    """A runtime that is not installed, cannot run on this machine, or failed while running."""


class EngineError(DiffexportError):
    """An engine that cannot be built, or that was built for other weights, another version or another machine."""


class ExportError(DiffexportError):
    """A module that could not be turned into a graph, or a bundle that could not be written."""


class ParityError(DiffexportError):
    """Results that differ from PyTorch's by more than the limit of their precision."""
