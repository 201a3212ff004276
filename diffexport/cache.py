"""The one folder outside a bundle that diffexport writes to: what can be made again, and takes time to make.

It is ``$DIFFX_CACHE`` where that is set, else ``$XDG_CACHE_HOME/diffx``, else ``~/.cache/diffx`` (``%LOCALAPPDATA%\\diffx``
on Windows). Anything in it may be removed at any time. Entries are named by the sha256 of what they were made from, so
that none is ever taken for another, and the least recently used go where all of them outgrow the limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from diffexport.files import replacing_folder

LIMIT = 16 << 30
"""Bytes that the cache may hold."""


def cache_folder() -> Path:
    """Where the cache is; it need not exist."""
    if given := os.environ.get("DIFFX_CACHE"):
        return Path(given)
    home = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return Path(home or Path.home() / ".cache") / "diffx"


def key_of(*parts: object) -> str:
    """The name of an entry that is made from these."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def cached(kind: str, key: str) -> Path | None:
    """The folder of an entry; None where there is none."""
    path = cache_folder() / kind / key
    if not path.is_dir():
        return None
    with contextlib.suppress(OSError):  # a cache that can only be read has no order of use
        os.utime(path)
    return path


def put(kind: str, key: str, make: Callable[[Path], None]) -> Path | None:
    """Make an entry by ``make(folder)``; None where the cache cannot be written, so that its user does without it."""
    path = cache_folder() / kind / key
    try:
        with replacing_folder(path) as work:
            make(work)
        _trim(keep=path)
    except OSError:
        return None
    return path


def cache_size() -> int:
    """Bytes that all entries take."""
    return sum(map(_size, _entries()))


def _entries() -> list[Path]:
    return [path for path in cache_folder().glob("*/*") if path.is_dir() and not path.name.startswith(".")]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _trim(keep: Path) -> None:
    """Remove what was not used for the longest time until the rest is within the limit."""
    total = 0
    for path in sorted(_entries(), key=lambda path: path.stat().st_mtime, reverse=True):
        total += _size(path)
        if total > LIMIT and path != keep:
            shutil.rmtree(path, ignore_errors=True)
