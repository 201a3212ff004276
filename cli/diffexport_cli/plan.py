"""``diffx plan``: the table of a sampler, as numbers and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffexport_cli.options import (
    BundlePath,
    Eta,
    Gam,
    Grid,
    GuidanceInterval,
    GuidanceScale,
    Mu,
    SamplerName,
    Steps,
    plan_options,
)

if TYPE_CHECKING:
    from diffexport.plan import Plan


def plan(
    bundle: BundlePath = None,
    sampler: SamplerName = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    grid: Grid = None,
    eta: Eta = None,
    gam: Gam = None,
    mu: Mu = None,
    out: Annotated[
        Path | None, typer.Option(help="Write a PNG of it: sigma, guidance and the weights of x, D, history and noise.")
    ] = None,
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
    if out is not None:
        _plot(table, out)
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
    if out is not None:
        print(f"wrote {out}")


def _plot(table: Plan, path: Path) -> None:
    """Sigma on a logarithmic scale, and every column of the update and of guidance that is not 0 throughout."""
    import numpy as np

    from diffexport.files import replacing_file, writing
    from diffexport.pictures import panels
    from diffexport.plan import COLUMNS

    shown = [name for name in ("w", "x_x", "x_d", "x_h", "x_z") if table.rows[:, COLUMNS.index(name)].any()]
    series = {name: table.rows[:, COLUMNS.index(name)].tolist() for name in shown}
    with writing(path), replacing_file(path) as work:
        panels({"log10 sigma": np.log10(table.sigmas).tolist(), **series}).save(work, format="PNG")
