"""``diffx build``: the graphs of a bundle become TensorRT engines."""

from __future__ import annotations

from typing import Annotated

import typer

from diffexport_cli.options import AsJson, BundlePath
from diffexport_cli.progress import activity


def build(
    bundle: BundlePath = None,
    backend: Annotated[
        str,
        typer.Option(
            help="trt-rtx: TensorRT for RTX, which needs no GPU to build. trt: TensorRT, on the machine that will run it."
        ),
    ] = "trt-rtx",
    target: Annotated[
        str | None,
        typer.Option(
            help="GPUs to build for, as compute capabilities: sm86,sm89,sm120.", show_default="the GPU of this machine"
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Batches: 1,4,16 for a fixed profile each, 1-16 for one range.",
            show_default="1 to the bundle's largest",
        ),
    ] = None,
    graph: Annotated[
        list[str] | None,
        typer.Option(help="Build this graph only, such as step. Repeatable.", show_default="all that sampling needs"),
    ] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let fp32 products run in TF32, faster and less exact.")] = False,
    workspace: Annotated[
        int | None, typer.Option(help="Most scratch memory, in MB.", metavar="MB", show_default="the builder's own")
    ] = None,
    level: Annotated[
        int | None, typer.Option(help="Optimization level, 0 to 5.", show_default="the builder's own")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build engines that are there already, too.")] = False,
    json: AsJson = False,
) -> None:
    """Build a bundle's engines, each with a record of what it is; engines that fit are not built again.

    Example: diffx build dit.diffx --backend trt-rtx --target sm86,sm89,sm120 --batch 1,4,16
    """
    from diffexport.bundle import Bundle
    from diffexport.engines.build import build as build_engines
    from diffexport_cli.output import find_bundle, megabytes, print_json

    opened = Bundle.open(find_bundle(bundle))
    with activity("building") as progress:
        results = build_engines(
            opened,
            backend,
            targets=target.split(",") if target is not None else (),
            batches=batch,
            graphs=graph or (),
            tf32=tf32,
            workspace=workspace * 1_000_000 if workspace is not None else None,
            level=level,
            force=force,
            progress=progress,
        )
    if json:
        print_json(
            [
                {"engine": str(b.engine.path), "hit": b.hit, "instead_of": b.instead_of, "record": b.engine.record}
                for b in results
            ]
        )
        return
    for built in results:
        record = built.engine.record
        how = (
            "up to date"
            if built.hit
            else f"built in {record.build_seconds:.1f} s, peak memory {megabytes(record.peak_memory)}"
        )
        print(f"{record.key.graph:<11} {megabytes(record.engine.size):>9}  {how}  {built.engine.path}")
        if built.instead_of:
            print(f"{'':<11} the one that was there: {'; '.join(built.instead_of)}")
