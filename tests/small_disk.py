"""A command on a file system that is too small: a real one, mounted in memory for one process and its children."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_RUN = """
import os, shutil, subprocess, sys
before, after, free, start, *words = sys.argv[1:]
shutil.copytree(before, ".", dirs_exist_ok=True)
with open(".ballast", "wb") as ballast:
    room = os.statvfs(".")
    ballast.write(bytes(room.f_bavail * room.f_frsize - int(free)))
code = f"import sys; sys.argv[0] = 'diffx'; {start}; from diffexport_cli.app import main; main()"
status = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *words]).returncode
os.unlink(".ballast")
shutil.copytree(".", after, dirs_exist_ok=True)
sys.exit(status)
"""


@dataclass(frozen=True)
class Outcome:
    """What a command said, and the folder with what it left."""

    status: int
    out: str
    err: str
    folder: Path

    @property
    def held(self) -> dict[str, bytes]:
        return held(self.folder)


def held(folder):
    """Every file under a folder, temporary ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_on_small_disk(tmp_path, words, *, free, before=None, cache=None, start="pass"):
    """``diffx`` in a file system that holds what ``before`` does and has ``free`` bytes left.

    Args:
        tmp_path: a folder to mount it in and to leave what was in it at the end; another for each call.
        cache: folder of the cache; by default it is on the small disk, too.
        start: Python that the process runs first.
    """
    mounted, empty, after = (tmp_path / name for name in ("small", "empty", "after"))
    for folder in (mounted, empty, after):
        folder.mkdir(parents=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "DIFFX_CACHE": str(cache or mounted / "cache"),
    }
    script = f'mount -t tmpfs -o size=32m tmpfs {mounted} && cd {mounted} && exec "$@"'
    run = [sys.executable, "-c", _RUN, before or empty, after, free, start, *words]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *map(str, run)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr, after)
