"""Promises of docs/trust.md that no other test holds: threads, the network, folders, writes that meet or are cut off."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
from refusals import assert_refused

import diffexport
from diffexport import files
from diffexport.bundle import Bundle
from diffexport.files import replacing_folder

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("shared", [False, True], ids=["a sampler each", "one sampler"])
def test_eight_threads_give_the_samples_of_one(toy_bundle, shared):
    bundle = toy_bundle("plain")
    settings = dict(labels=[0, 1, 2, 3, 4], steps=8, sampler="ddpm", guidance_scale=2.0, batch=2)
    common = bundle.sampler(threads=1)
    expected = [common.sample(**settings, seed=seed) for seed in range(8)]
    found = [None] * 8

    def draw(seed):
        sampler = common if shared else bundle.sampler(threads=1)
        for _ in range(3):
            found[seed] = sampler.sample(**settings, seed=seed)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)


GUARDED = """
import sys
def guard(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        sys.stderr.write(f"NETWORK {event} {args}\\n")
        raise SystemExit(99)
sys.addaudithook(guard)
from diffexport_cli.app import main
main()
"""


def test_nothing_needs_the_network_or_writes_outside_its_place(tmp_path):
    """Export, verify and sample without a network, each writing its output and the cache, and nothing else."""
    homes = {name: tmp_path / name.lower() for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    cache, work = tmp_path / "cache", tmp_path / "work"
    for folder in (*homes.values(), work):
        folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "DIFFX_"))}
    environment |= {name: str(folder) for name, folder in homes.items()}
    environment |= {"DIFFX_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    cut = ["unshare", "--map-root-user", "--net"]  # no interface at all; elsewhere the guard alone stands for it
    if subprocess.run([*cut, "true"], capture_output=True, check=False).returncode:
        cut = []
    weights = ROOT / "tests" / "oracles" / "sd_mlp.safetensors"
    export = ["export", str(weights), "--out", "a.diffx", "--max-batch", "2"]
    for words in (
        [*export, "--prediction", "eps", "--no-scaled", "--schedule", "ddpm"],
        ["verify", "a.diffx"],
        ["sample", "a.diffx", "--num", "3", "--steps", "5", "--npz", "a.npz"],
    ):
        done = subprocess.run(
            [*cut, sys.executable, "-W", "ignore", "-c", GUARDED, *words],
            cwd=work, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in work.iterdir()) == ["a.diffx", "a.npz"]
    written = [path for folder in homes.values() for path in folder.rglob("*") if path.is_file()]
    assert written == []
    assert {path.name for path in cache.iterdir()} == {"choice", "openvino", "ort"}


# --- writes


WRITER = """
import sys
from pathlib import Path
from diffexport.files import replacing_folder
target, mark = Path(sys.argv[1]), sys.argv[2]
for _ in range(200):
    with replacing_folder(target) as work:
        for name in "abc":
            (work / name).write_text(mark)
"""


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged in one step", "renamed twice"])
def test_of_processes_that_write_the_same_folder_one_wins_and_all_end_well(tmp_path, exchange):
    target = tmp_path / "x.diffx"
    code = WRITER if exchange else "import diffexport.files as f; f._exchange = lambda a, b: False\n" + WRITER
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(target), mark], env=environment) for mark in ("one", "two")
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len({path.read_text() for path in target.iterdir()}) == 1
    assert sorted(path.name for path in target.iterdir()) == ["a", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.diffx"]


def test_what_a_killed_process_was_replacing_is_put_back(tmp_path, monkeypatch):
    """Where two folders cannot be exchanged, a kill between two renames leaves neither; the next run mends that."""
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    moved = tmp_path / f".x.diffx.{dead.pid}.abc" / files._OLD
    moved.mkdir(parents=True)
    (moved / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "x.diffx"):
        raise KeyboardInterrupt
    assert (tmp_path / "x.diffx" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.diffx"]


SCRATCH = """
import os, sys
from pathlib import Path
from conftest import TOYS
import diffexport
def progress(what, part):
    if sum(name.startswith(".") for name in os.listdir()) == 2:
        os._exit(9)
build, spec = TOYS["plain"]
diffexport.export(build().eval(), spec, "a.diffx", precision="int8", max_batch=1, progress=progress)
"""


def test_all_that_an_export_to_int8_leaves_goes_with_the_next_run(toy, tmp_path):
    """It has a second temporary folder, for what is measured of each layer; it ends here as kill -9 would end it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRATCH], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 9
    assert [path.name[:9] for path in tmp_path.iterdir()] == [".a.diffx."] * 2
    diffexport.export(*toy("plain"), tmp_path / "a.diffx", max_batch=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.diffx"]


@pytest.mark.slow
def test_of_two_exports_to_one_place_both_end_well(tmp_path):
    """Real commands at once: one wins, and the bundle is the one that one of them alone writes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    weights = ROOT / "tests" / "oracles" / "sd_mlp.safetensors"
    facts = "--max-batch", "2", "--no-scaled", "--schedule", "ddpm"
    runs = [("a.diffx", "eps"), ("a.diffx", "x0"), ("eps.diffx", "eps"), ("x0.diffx", "x0")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", "from diffexport_cli.app import main; main()", "export", weights,
             "--out", out, "--prediction", prediction, *facts],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
        )
        for out, prediction in runs
    ]  # fmt: skip
    assert [(process.communicate(timeout=300), process.returncode)[1] for process in processes] == [0] * 4
    assert sorted(os.listdir(tmp_path)) == ["a.diffx", "eps.diffx", "x0.diffx"]
    both, eps, x0 = (
        {
            path.name: path.read_bytes()
            for path in (tmp_path / name).iterdir()
            if path.suffix in (".onnx", ".safetensors")
        }
        for name in sorted(os.listdir(tmp_path))
    )
    assert eps != x0
    assert both in (eps, x0)
    assert all(finding.passed for finding in diffexport.verify(tmp_path / "a.diffx"))


@pytest.mark.slow
def test_kill_minus_nine_leaves_the_old_or_the_new():
    """One moment of each command; scripts/kill-nine takes fifty."""
    script = [sys.executable, "-W", "ignore", ROOT / "scripts" / "kill_nine.py", "--count", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\| (\w+) \| [\d.]+ \| 1 \|", done.stdout, re.MULTILINE) == [
        "export", "build", "train", "verify", "sample",
    ]  # fmt: skip


def test_what_the_system_says_of_a_file_is_one_line(diffx, toy_bundle, monkeypatch):
    """Where nothing better is said of it, such as weights that only another user may read."""

    def refuse(path, *rest):
        raise PermissionError(13, "Permission denied", "weights\x1b[2J.bin")

    monkeypatch.setattr(Bundle, "open", refuse)
    result = diffx("inspect", toy_bundle("plain").path)
    assert_refused(result, "diffx: error: weights\\x1b[2J.bin: Permission denied")


# --- what comes with it


def _requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    return [line for group in groups for line in group] + project["build-system"]["requires"]


def test_every_dependency_is_bounded_on_both_sides():
    for line in _requirements():
        if not line.startswith("diffexport["):
            assert re.fullmatch(r"[\w.-]+>=[\d.]+,<[\d.]+", line), line


def test_what_the_tests_run_with_is_locked():
    """Every package that is installed here because of this one has its version in constraints.txt; see scripts/lock."""
    locked = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    locked = {_canonical(name): version for name, version in locked.items()}
    waiting, seen = [re.split(r"[<>=\[;]", line)[0] for line in _requirements()], set()
    while waiting:
        name = _canonical(waiting.pop())
        if name in seen or name in ("diffexport", "hatchling", "pip", "setuptools"):
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra, or of another system
        assert name in locked, f"{name} is not in constraints.txt; run scripts/lock"
        for line in found.requires or ():
            if "extra ==" not in line:
                waiting.append(re.split(r"[^\w.-]", line)[0])
    assert len(seen & locked.keys()) > 30


def _canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_licences_and_the_way_to_report_are_there():
    notice, security = ((ROOT / name).read_text() for name in ("NOTICE", "SECURITY.md"))
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        assert re.split(r"[<>=]", line)[0] in notice
    assert "out of scope" in security.lower()
    assert shutil.which("git") is None or (ROOT / "LICENSE").is_file()
