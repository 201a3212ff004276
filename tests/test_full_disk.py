"""A disk that is full, or fills up: the old state or the new one, one line that says so, a status that is not 0."""

import shutil

import numpy as np
import pytest
import torch
from refusals import assert_refused
from small_disk import held, run_on_small_disk

FULL = "cannot be written (No space left on device)"
SIZE = "--width 16 --depth 1 --heads 2 --steps 60 --batch-size 16 --threads 1"
TRAIN = ("train", "digits", "--out", "t.pt", "--log", "t.log", *SIZE.split())


def assert_full(outcome, place, after=""):
    """One line that names what could not be written, after what an export says it takes; nothing temporary."""
    assert_refused((outcome.status, outcome.out, outcome.err), f"{place}: {FULL}{after}")
    assert not [name for name in outcome.held if "/." in f"/{name}"]


@pytest.fixture
def place(toy_bundle, tmp_path):
    """A folder with a bundle in it."""
    shutil.copytree(toy_bundle("plain").path, tmp_path / "before" / "a.diffx")
    return tmp_path / "before"


@pytest.mark.parametrize("free", [0, 60_000])
@pytest.mark.parametrize("words", [
    ("verify", "a.diffx", "--backend", "all"),
    ("sample", "a.diffx", "--num", 3, "--steps", 3, "--npz", "{}/a.npz"),
    ("sample", "a.diffx", "--num", 3, "--steps", 3, "--backend", "ort", "--npz", "{}/a.npz"),
], ids=["verify", "sample", "sample on ort"])  # fmt: skip
def test_a_full_cache_fails_nothing(place, toy_bundle, tmp_path, words, free):
    """ONNX Runtime, OpenVINO and the choice of a backend go without; no half entry is left to be found later."""
    words = [str(word).format(tmp_path) for word in words]
    done = run_on_small_disk(tmp_path, words, free=free, before=place)
    assert (done.status, done.err) == (0, "")
    if words[0] == "sample":
        expected = toy_bundle("plain").sampler().sample(num=3, steps=3)
        np.testing.assert_allclose(np.load(tmp_path / "a.npz")["x"], expected, atol=1e-5)
    else:
        assert {line.split()[0] for line in done.out.splitlines()[:-1]} == {"ok"}
    cached = {name: data for name, data in done.held.items() if name not in held(place)}
    assert all(cached.values())
    assert not [name for name in cached if not name.startswith("cache/") or "/." in name]


@pytest.mark.parametrize(("words", "target"), [
    (("sample", "a.diffx", "--num", 3, "--steps", 3, "--backend", "ort", "--npz", "x.npz"), "x.npz"),
    (("sample", "p.diffx", "--num", 3, "--steps", 3, "--backend", "ort", "--out", "x.png"), "x.png"),
    (("plan", "a.diffx", "--out", "x.png"), "x.png"),
    (("embed", "a.diffx", "--out", "x"), "x"),
], ids=["arrays", "picture", "plan", "project"])  # fmt: skip
def test_what_a_command_writes_is_there_whole_or_not_at_all(place, toy_bundle, tmp_path, words, target):
    shutil.copytree(toy_bundle("points").path, place / "p.diffx")
    if target != "x":
        (place / target).write_bytes(b"old")
    done = run_on_small_disk(tmp_path, words, free=100, before=place, cache=tmp_path / "cache")
    assert_full(done, target, "; nothing was left behind" if target == "x" else "")
    assert done.held == held(place)


def test_samples_that_were_finished_stay_and_the_run_goes_on_to_the_same_bits(diffx, place, tmp_path):
    words = ("sample", "a.diffx", "--num", 12, "--steps", 3, "--batch", 4, "--backend", "ort", "--out", "out/")
    done = run_on_small_disk(tmp_path, words, free=40_000, before=place, cache=tmp_path / "cache")
    finished = [name for name in done.held if name.endswith(".npy")]
    assert 0 < len(finished) < 12
    assert_full(done, "out", f"; {len(finished)} samples were finished and stay, the same command goes on from there")
    kept = done.held
    for folder in (done.folder, place):
        assert diffx(words[0], folder / "a.diffx", *words[2:-1], f"{folder}/out/")[0] == 0
    assert held(done.folder) == held(place)
    assert kept.items() <= done.held.items()


def losses(folder):
    return [line for line in (folder / "t.log").read_text().splitlines() if '"loss"' in line and line[2:6] == "step"]


@pytest.mark.parametrize(("free", "save_every", "what", "left"), [
    (0, 20, "t.log", set()),
    (8192, 20, "t.pt.state", {"t.log"}),
    (180_000, 20, "t.pt.state", {"t.log", "t.pt.state"}),
    (30_000, 1000, "t.pt", {"t.log"}),
])  # fmt: skip
def test_training_goes_on_to_the_same_weights(diffx, tmp_path, monkeypatch, free, save_every, what, left):
    """Where the log, the first state, the second, or the checkpoint itself does not fit."""
    words = (*TRAIN, "--save-every", save_every)
    done = run_on_small_disk(tmp_path, words, free=free, cache=tmp_path / "cache")
    assert_full(done, what)
    assert done.held.keys() == left
    for folder in (done.folder, tmp_path / "empty"):
        monkeypatch.chdir(folder)
        assert diffx(*words)[0] == 0
    found, expected = (
        torch.load(f / "t.pt", weights_only=True)["state_dict"] for f in (done.folder, tmp_path / "empty")
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert losses(done.folder) == losses(tmp_path / "empty")
    assert len(losses(done.folder)) == 2
