"""Writing that leaves either the old state or the new, never half of one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from diffexport.errors import DiffexportError


@contextlib.contextmanager
def writing(target: Path, kind: type[DiffexportError] = DiffexportError, then: str = "") -> Iterator[None]:
    """Errors of the file system in the block, as one that says in a line what cannot be written, and why.

    Args:
        then: what becomes of it.

    Raises:
        DiffexportError: of the ``kind``.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{target}: cannot be written ({why(error)}){then}") from error


def why(error: OSError) -> str:
    """The reason in the system's words; of several files that were copied at once, the first one's."""
    if isinstance(error, shutil.Error) and (number := re.search(r"\[Errno (\d+)\]", str(error))):
        return os.strerror(int(number[1]))
    return error.strerror or str(error)


@contextlib.contextmanager
def replacing_file(target: Path, *, alone: bool = True) -> Iterator[Path]:
    """A temporary sibling file that takes the place of ``target`` when the block ends well, and else is removed.

    A killed process leaves ``target`` as it was; its left-over sibling is removed by the next run.

    Args:
        alone: False for one of very many files of a folder, whose left-overs the caller removes once for all.
    """
    with _sibling_file(target, alone) as work:
        yield work
        work.replace(target)


@contextlib.contextmanager
def creating_file(target: Path) -> Iterator[Path]:
    """A temporary sibling file that becomes ``target`` when the block ends well, unless another process was first."""
    with _sibling_file(target, alone=True) as work:
        yield work
        try:
            os.link(work, target)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            work.replace(target)


@contextlib.contextmanager
def _sibling_file(target: Path, alone: bool) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    if alone:
        remove_left_overs(target.parent, target.name)
    work = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield work
    finally:
        work.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling folder that takes the place of ``target`` when the block ends well, and else is removed.

    A killed process leaves ``target`` as it was; its left-over sibling is removed by the next run. Of several processes
    that write the same folder the last one to end wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_left_overs(target.parent, target.name)
    with scratch_folder(target) as work:
        work.chmod(0o755)
        yield work
        _put(work, target)


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling folder for what it takes to make ``target``; a killed process's is removed by the next run."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}.", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put(work: Path, target: Path) -> None:
    """Give a folder another's name; what had that name before is under the folder's old name afterwards, or gone."""
    moved: list[Path] = []
    while True:
        try:
            os.rename(work, target)  # where nothing is there, or an empty folder
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _exchange(work, target):
            break
        moved.append(Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}.", dir=target.parent)))
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(target, moved[-1] / _OLD)
    for folder in moved:
        shutil.rmtree(folder)


_OLD = "old"
"""The name of what is being replaced, inside a temporary folder, where a file system cannot exchange two folders."""


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step, which Linux can on most file systems; False where it cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a small regular file, reached without a link.

    Raises:
        OSError: there is none, it is a link, a folder, a pipe or a device, or it has more than ``limit`` bytes.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.is_symlink():
        raise OSError(errno.EINVAL, "a link, not a regular file", str(path))
    with open(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if found.st_size > limit:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes, at most {limit} are read", str(path))
        return file.read(limit)


def remove_left_overs(folder: Path, name: str | None = None) -> None:
    """Remove what processes that no longer run left in a folder while they wrote ``name``, or anything.

    What one of them was about to replace is put back.
    """
    for entry in os.listdir(folder):
        found, path = _LEFT_OVER.fullmatch(entry), folder / entry
        if found is None or (name is not None and found["name"] != name) or _runs(int(found["pid"])):
            continue
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
            continue
        if (path / _OLD).is_dir():
            with contextlib.suppress(OSError):  # the new one is there
                os.rename(path / _OLD, folder / found["name"])
        shutil.rmtree(path, ignore_errors=True)


_LEFT_OVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d{1,9})\.\w+", re.DOTALL)


def _runs(pid: int) -> bool:
    """Whether a process of this number runs, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
