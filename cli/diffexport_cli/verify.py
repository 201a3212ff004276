"""``diffx verify``: does a bundle still give what it was certified for?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffexport_cli.options import BundlePath
from diffexport_cli.progress import progress_bar


def verify(
    bundle: BundlePath = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend to run the golden cases on, or all. Repeatable.", show_default="ort"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="What the backend computes in, as `diffx sample` takes it.", metavar="P")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="The checkpoint to compare with.", metavar="CKPT")] = None,
    vae: Annotated[
        Path | None, typer.Option(help="With --against: the decoder's folder to compare with.", metavar="FOLDER")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="With --against: ema or model, of a snapshot that holds both.")
    ] = None,
    thorough: Annotated[
        bool, typer.Option(help="With --against: whole runs at every batch, for large models too.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check files, certificate, plans and golden cases; exit status 0 only where every check holds.

    Example: diffx verify dit.diffx --against dit.pt
    """
    from diffexport.backends import BACKENDS
    from diffexport.bundle import Bundle
    from diffexport.errors import DiffexportError
    from diffexport.verification import verify as verify_bundle
    from diffexport_cli.checkpoint import read_checkpoint_of, read_decoder
    from diffexport_cli.output import find_bundle, print_json

    path, named = find_bundle(bundle), backend or ["ort"]
    if vae is not None and against is None:
        raise DiffexportError("--vae compares the decoder beside the checkpoint; give --against CKPT too")
    with progress_bar("verifying") as progress:
        found = read_checkpoint_of(against, Bundle.open(path).spec, weights) if against is not None else None
        folder = vae or (found.vae if found is not None and Bundle.open(path).manifest.decoder is not None else None)
        decoder = read_decoder(folder)[0] if folder is not None else None
        usable = [name for name, entry in BACKENDS.items() if entry.problem() is None and (name != "torch" or found)]
        findings = verify_bundle(
            path,
            list(dict.fromkeys(name for given in named for name in (usable if given == "all" else [given]))),
            options={"precision": precision} if precision else None,
            module=found.module if found else None,
            spec=found.spec if found else None,
            decoder=decoder,
            thorough=thorough,
            progress=progress,
        )
    passed = all(finding.passed for finding in findings)
    if json:
        print_json({"bundle": str(path), "passed": passed, "findings": findings})
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.passed else 'FAIL'}  {finding.name}: {finding.detail}")
        print(
            f"{path}: every check holds" if passed else f"{path}: {sum(not f.passed for f in findings)} checks FAILED"
        )
    if not passed:
        raise typer.Exit(1)
