"""``diffx doctor``: which backends work here, and what to install for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle, whose golden cases each backend is run on.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say which backends are installed here, which really work, and what to type for the others.

    Example: diffx doctor digits.diffx
    """
    import platform

    from diffexport.backends import BACKENDS
    from diffexport.cache import cache_folder, cache_size
    from diffexport_cli.output import megabytes, print_json

    findings: list[dict[str, Any]] = []
    for name, entry in BACKENDS.items():
        finding: dict[str, Any] = {"backend": name, "runs": entry.runs, "works": None}
        installed = f"{entry.package} {_version(entry.package)}; " if entry.installed else ""
        problem = entry.problem()
        if problem:
            finding |= {"works": False, "detail": installed + problem}
        elif bundle is not None and name != "torch":
            finding |= _golden(bundle, name, installed)
        else:
            finding |= {"works": True, "detail": installed.removesuffix("; ")}
        findings.append(finding)
    folder, size = cache_folder(), cache_size()
    if json:
        machine = {"python": platform.python_version(), "machine": platform.machine()}
        print_json(machine | {"cache": str(folder), "cache_bytes": size, "backends": findings})
        return
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for finding in findings:
        print(
            f"{'ok  ' if finding['works'] else '--  '}  {finding['backend']:<8} {finding['runs']}: {finding['detail']}"
        )
    print(f"cache: {folder} ({megabytes(size)}); $DIFFX_CACHE moves it, and it may be removed")


def _version(package: str) -> str:
    """The version of what was installed to have a package, which may have another name."""
    import importlib.metadata

    installed_as = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(installed_as[0])


def _golden(bundle: Path, name: str, detail: str) -> dict[str, Any]:
    """How the bundle's golden cases fare on a backend; one that cannot run this bundle does not work for it."""
    from diffexport.bundle import Bundle
    from diffexport.errors import BackendError
    from diffexport.verification import golden_finding

    opened = Bundle.open(bundle)
    try:
        finding = golden_finding(opened, name)
    except BackendError as error:
        return {"works": False, "detail": f"{detail}{error}"}
    return {"works": finding.passed, "detail": f"{detail}{finding.name}: {finding.detail}"}
