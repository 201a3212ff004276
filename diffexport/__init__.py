"""diffexport: trained diffusion models out of PyTorch, sampling the same images on any runtime.

    sampler = diffexport.load("digits.diffx").sampler(backend="ort")
    x = sampler.sample(labels=[3, 1, 4], steps=20, guidance_scale=3.0, seed=0)     # (3, C, H, W) float32

Each name is loaded when it is first used, so importing the package costs nothing and loads no runtime; ``export`` needs
the extra ``[export]``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffexport.bundle import Bundle, Defaults, load
    from diffexport.errors import DiffexportError
    from diffexport.exporter.write import export
    from diffexport.plan import Plan, make_plan
    from diffexport.schedules import Schedule
    from diffexport.spec import ModelSpec
    from diffexport.verification import verify

_HOMES = {
    "Bundle": "bundle",
    "Defaults": "bundle",
    "DiffexportError": "errors",
    "ModelSpec": "spec",
    "Plan": "plan",
    "Schedule": "schedules",
    "export": "exporter.write",
    "load": "bundle",
    "make_plan": "plan",
    "verify": "verification",
}

__version__ = version("diffexport")
__all__ = [
    "Bundle",
    "Defaults",
    "DiffexportError",
    "ModelSpec",
    "Plan",
    "Schedule",
    "export",
    "load",
    "make_plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
