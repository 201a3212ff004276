"""What several commands ask for, in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

BundlePath = Annotated[Path | None, typer.Argument(help="The bundle.", show_default="the only one in this folder")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

# of a plan
SamplerName = Annotated[str | None, typer.Option(help="The sampler; `diffx plan --list` lists them.")]
Steps = Annotated[int | None, typer.Option(help="Number of steps.")]
GuidanceScale = Annotated[float | None, typer.Option(help="Guidance weight w of uncond + w*(cond - uncond); 1 is off.")]
GuidanceInterval = Annotated[
    str | None, typer.Option(help="Guide only where sigma lies in LOW:HIGH.", metavar="LOW:HIGH")
]
Grid = Annotated[
    str | None, typer.Option(help="Noise levels: model, karras, exponential, or falling numbers 10,5,1,0.")
]
Eta = Annotated[float | None, typer.Option(help="Noise of ddim, euler-ancestral and dpmpp-2m-sde.")]
Gam = Annotated[float | None, typer.Option(help="Extrapolation of accelerated.")]
Mu = Annotated[float | None, typer.Option(help="Noise of accelerated.")]


def plan_options(*, grid: str | None, guidance_interval: str | None, **numbers: float | None) -> dict[str, Any]:
    """The keyword arguments of ``make_plan`` that were given."""
    from diffexport.errors import PlanError

    options: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    try:
        if grid is not None:
            options["grid"] = [float(level) for level in grid.split(",")] if "," in grid else grid
        if guidance_interval is not None:
            low, high = guidance_interval.split(":")
            options["guidance_interval"] = (float(low), float(high))
    except ValueError:
        raise PlanError(
            "--grid takes a name or falling numbers 10,5,1,0; --guidance-interval takes LOW:HIGH, such as 0.3:5"
        ) from None
    return options
