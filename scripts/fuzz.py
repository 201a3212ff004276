"""The long run of tests/strangers.py: coverage-guided altered files for every reader, each in a process of its own.

libFuzzer, by way of atheris, ends a reader's process at the first input that raises anything but a refusal, takes more
than 5 s, or takes more memory than 1 GB, and leaves that input beside it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS, MEGABYTES = 5, 1024


def fuzz_one(name: str, runs: int, seed: int, folder: Path) -> None:
    """Run one reader in this process; libFuzzer ends it."""
    import atheris

    sys.path[:0] = [str(ROOT / "tests")]
    with atheris.instrument_imports(include=["diffexport", "diffexport_reference"]):
        import strangers

    reader = strangers.readers(folder / "files")[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    for index, whole in enumerate(reader.seeds):
        (corpus / str(index)).write_bytes(whole)
    largest = max(map(len, reader.seeds))
    atheris.Setup(
        [
            "fuzz", str(corpus), f"-runs={runs}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-seed={seed}",
            f"-max_len={2 * largest + 256}", f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=0",
        ],
        lambda data: strangers.outcome(reader, data),
    )  # fmt: skip
    atheris.Fuzz()


def fuzz(name: str, runs: int, seed: int) -> str:
    """Run one reader in a process of its own; a row of the table, or what ended it."""
    with tempfile.TemporaryDirectory(prefix="diffx-fuzz-") as folder:
        started = time.monotonic()
        words = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--reader",
            name,
            "--runs",
            str(runs),
            "--seed",
            str(seed),
            "--in",
            folder,
        ]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        seconds = time.monotonic() - started
        stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stdout))  # where atheris names an exception, too
        if done.returncode or int(stats.get("number_of_executed_units", 0)) < runs:
            kept = [path.read_bytes() for path in Path(folder).glob("*-*") if path.is_file()]
            raise SystemExit(
                f"{name}: FAILED, exit status {done.returncode}\n{done.stdout[-6000:]}\ninput: {kept[:1]!r}"
            )
        return f"| {name} | {stats['number_of_executed_units']} | {stats['peak_rss_mb']} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=12_500, help="inputs for each reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reader", action="append", help="only this one; repeatable")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is not None:
        return fuzz_one(given.reader[0], given.runs, given.seed, given.folder)
    sys.path[:0] = [str(ROOT / "tests")]
    import strangers

    with tempfile.TemporaryDirectory(prefix="diffx-fuzz-") as folder:
        names = given.reader or list(strangers.readers(Path(folder)))
    print("| reader | inputs | peak memory, MB | s |\n|---|---|---|---|")
    for name in names:
        print(fuzz(name, given.runs, given.seed), flush=True)


if __name__ == "__main__":
    main()
