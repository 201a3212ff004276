"""``diffx plan``: the table of a sampler, as numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle.", show_default="the only one in this folder")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="The sampler.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance weight; 1 is off.")] = None,
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
            options = ", ".join(f"{key} {value:g}" for key, value in settings.items())
            print(f"{name:<16} {entry.about}{f' ({options})' if options else ''}")
        return
    opened = Bundle.open(find_bundle(bundle))
    table = opened.plan(sampler, steps, guidance_scale)
    if json:
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in table.rows.tolist()]
        print_json({"x_scale": table.x_scale, "sigmas": table.sigmas.tolist(), "rows": rows})
        return
    shown = [k for k in range(len(COLUMNS)) if table.rows[:, k].any()]
    print(f"x_scale {table.x_scale:.6g}; columns that are 0 throughout are left out")
    print("  ".join(["row", f"{'sigma':>10}", *(f"{COLUMNS[k]:>10}" for k in shown)]))
    for index, (sigma, row) in enumerate(zip(table.sigmas, table.rows, strict=True)):
        print("  ".join([f"{index:>3}", f"{sigma:10.4g}", *(f"{row[k]:10.4g}" for k in shown)]))
