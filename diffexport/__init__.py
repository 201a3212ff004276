"""diffexport: trained diffusion models out of PyTorch, sampling the same images on any runtime.

    sampler = diffexport.load("digits.diffx").sampler(backend="ort")
    x = sampler.sample(labels=[3, 1, 4], steps=20, guidance_scale=3.0, seed=0)     # (3, C, H, W) float32

Importing this package needs NumPy and loads no runtime; ``export`` needs the extra ``[export]``.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from diffexport.bundle import Bundle, Defaults, load
from diffexport.errors import DiffexportError
from diffexport.plan import Plan, make_plan
from diffexport.schedules import Schedule
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    from diffexport.exporter.write import export

__version__ = version("diffexport")
__all__ = [
    "Bundle",
    "Defaults",
    "DiffexportError",
    "ModelSpec",
    "Plan",
    "Schedule",
    "__version__",
    "export",
    "load",
    "make_plan",
]


def __getattr__(name: str) -> Any:
    if name == "export":
        from diffexport.exporter.write import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
