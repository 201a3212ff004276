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
    import importlib.metadata
    import platform

    from diffexport.backends import BACKENDS
    from diffexport.cache import cache_folder, cache_size
    from diffexport_cli.output import megabytes, print_json

    findings: list[dict[str, Any]] = []
    for name, entry in BACKENDS.items():
        finding: dict[str, Any] = {"backend": name, "runs": entry.runs, "works": None}
        if not entry.installed:
            finding |= {"works": False, "detail": f"not installed; {entry.install}"}
        else:
            finding["detail"] = f"{entry.package} {importlib.metadata.version(entry.package)}"
            problem = _problem(name)
            if problem:
                finding |= {"works": False, "detail": f"{finding['detail']}; {problem}"}
            elif bundle is not None and name != "torch":
                finding |= _golden(bundle, name, finding["detail"])
            else:
                finding["works"] = True
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


def _problem(name: str) -> str | None:
    """Why an installed backend cannot be used, or None."""
    import importlib

    from diffexport.backends import BACKENDS

    try:
        importlib.import_module(f"diffexport.backends.{BACKENDS[name].module}")
    except (ImportError, OSError) as error:
        return f"cannot be loaded ({error})"
    return None


def _golden(bundle: Path, name: str, detail: str) -> dict[str, Any]:
    from diffexport.bundle import Bundle
    from diffexport.verification import golden_finding

    finding = golden_finding(Bundle.open(bundle), name)
    return {"works": finding.passed, "detail": f"{detail}; {finding.name}: {finding.detail}"}
