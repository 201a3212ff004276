"""``diffx plan``: the table of a sampler, as numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def plan(
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle.", show_default="the only one in this folder")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="The sampler.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance weight; 1 is off.")] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help="Guide only where sigma lies in LOW:HIGH.", metavar="LOW:HIGH")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Noise levels: model, karras, exponential, or falling numbers 10,5,1,0.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Noise of ddim, euler-ancestral and dpmpp-2m-sde.")] = None,
    gam: Annotated[float | None, typer.Option(help="Extrapolation of accelerated.")] = None,
    mu: Annotated[float | None, typer.Option(help="Noise of accelerated.")] = None,
    list_samplers: Annotated[bool, typer.Option("--list", help="List the samplers instead.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Print the table that a sampler becomes: one row for each evaluation of the network.

    Example: diffx plan dit.diffx --sampler heun --steps 10
    """
    from diffexport.bundle import Bundle
    from diffexport.plan import COLUMNS
    from diffexport.samplers import SAMPLERS
    from diffexport_cli.output import find_bundle, print_json

    if list_samplers:
        for name, entry in SAMPLERS.items():
            settings = {**entry.options, **{f"{key} fixed at": value for key, value in entry.fixed.items()}}
            numbers = ", ".join(f"{key} {value:g}" for key, value in settings.items())
            print(f"{name:<16} {entry.about}{f' ({numbers})' if numbers else ''}")
        return
    opened = Bundle.open(find_bundle(bundle))
    options = plan_options(grid=grid, guidance_interval=guidance_interval, eta=eta, gam=gam, mu=mu)
    table = opened.plan(sampler, steps, guidance_scale, **options)
    if json:
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in table.rows.tolist()]
        print_json({"x_scale": table.x_scale, "sigmas": table.sigmas.tolist(), "rows": rows})
        return
    shown = [k for k in range(len(COLUMNS)) if table.rows[:, k].any()]
    saved = f", {table.saved} saved outside the guidance interval" if table.saved else ""
    print(f"{len(table)} rows, {table.evaluations} network evaluations a sample{saved}")
    print(f"x_scale {table.x_scale:.6g}; columns that are 0 throughout are left out")
    print("  ".join(["row", f"{'sigma':>10}", *(f"{COLUMNS[k]:>10}" for k in shown)]))
    for index, (sigma, row) in enumerate(zip(table.sigmas, table.rows, strict=True)):
        print("  ".join([f"{index:>3}", f"{sigma:10.4g}", *(f"{row[k]:10.4g}" for k in shown)]))


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
