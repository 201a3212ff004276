"""Which backend runs a bundle where none is named: the fastest that works here and passes its golden cases.

It is measured once for a kind of bundle on a machine, and remembered in the cache until a runtime changes.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from diffexport.backends import BACKENDS, open_session
from diffexport.bundle import Bundle
from diffexport.cache import cached, key_of, put
from diffexport.errors import BackendError, DiffexportError
from diffexport.golden import golden_checks
from diffexport.machine import processor, usable_cores

BUDGET = 5.0
"""Seconds of golden cases for one backend, after which the rest of them is left to `diffx verify`."""
_REPEATS = 3
_FILE = "choice.json"


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A backend, and why it was chosen."""

    backend: str
    why: str


def choose(bundle: Bundle, options: Sequence[str] = ()) -> Choice:
    """Choose a backend; remembered choices cost a look into the cache.

    Args:
        options: of backends that were asked for; only those that take them are looked at.

    Raises:
        BackendError: none works here and passes its golden cases.
    """
    names = [name for name, entry in BACKENDS.items() if name != "torch" and entry.installed and _takes(name, options)]
    if not names:
        raise BackendError(
            f"no installed backend takes {', '.join(options)}"
            if options
            else "no backend is installed; see `diffx doctor`"
        )
    manifest, spec = bundle.manifest, bundle.spec
    kind = (spec.family, spec.shape, manifest.parameters, manifest.precision, manifest.max_batch)
    versions = [_version(BACKENDS[name].package) for name in names]
    key = key_of(*kind, *names, *versions, processor(), usable_cores())
    entry = cached("choice", key)
    if entry is not None:
        try:
            return msgspec.json.decode((entry / _FILE).read_bytes(), type=Choice)
        except (OSError, msgspec.DecodeError):
            pass  # a damaged entry is measured anew
    choice = _measured(bundle, names)
    put("choice", key, lambda work: _write(work, choice))
    return choice


def _write(folder: Path, choice: Choice) -> None:
    (folder / _FILE).write_bytes(msgspec.json.encode(choice))


def _takes(name: str, options: Sequence[str]) -> bool:
    if not options:
        return True
    try:
        return set(options) <= set(inspect.signature(BACKENDS[name].load().open_session).parameters)
    except (ImportError, OSError):
        return False


def _version(package: str) -> str:
    """The version of an installed runtime, as far as its distribution has the package's name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _measured(bundle: Bundle, names: Sequence[str]) -> Choice:
    speeds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            speeds[name] = _speed(bundle, name)
        except (DiffexportError, ImportError, OSError) as error:
            failed[name] = str(error)
    if not speeds:
        raise BackendError("no backend works here: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    ranked = sorted(speeds, key=lambda name: speeds[name])
    told = ", ".join(f"{name} {speeds[name] * 1e3:.3g} ms" for name in ranked)
    return Choice(ranked[0], f"the fastest here a golden step ({told}) whose golden cases hold")


def _speed(bundle: Bundle, name: str) -> float:
    """Seconds of the golden cases' first step, warm.

    Raises:
        BackendError: the backend does not work here, or fails a golden case.
    """
    spec, manifest = bundle.spec, bundle.manifest
    session: Any = open_session(bundle, name)
    try:
        checks = golden_checks(spec, bundle.golden(), manifest.precision, manifest.decoder)
        started = time.perf_counter()
        for check in checks:
            failed = [m for m in check.measure(session) if not m.passed]
            if failed:
                raise BackendError(f"{failed[0].check} differs from PyTorch's")
            if time.perf_counter() - started > BUDGET:
                break
        times = []
        for _ in range(_REPEATS):
            before = time.perf_counter()
            checks[0].measure(session)
            times.append(time.perf_counter() - before)
        return min(times)
    finally:
        session.close()
