"""The command line as its user meets it: what is printed, written, and returned."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import assert_refused


def test_sample_writes_a_picture_and_arrays(diffx, toy_bundle):
    path = toy_bundle("plain").path
    status, out, _ = diffx(
        "sample", path, "--labels", "3,1,4", "--steps", 5, "--seed", 7, "--out", "a.png", "--npz", "a.npz"
    )
    assert status == 0
    assert "wrote a.png" in out
    arrays = np.load("a.npz")
    assert arrays["labels"].tolist() == [3, 1, 4]
    assert arrays["x"].dtype == np.float32
    expected = toy_bundle("plain").sampler().sample([3, 1, 4], steps=5, seed=7)
    np.testing.assert_allclose(arrays["x"], expected, atol=1e-6)
    with Image.open("a.png") as picture:
        assert picture.format == "PNG"


def test_sample_takes_labels_by_name_range_and_count(diffx, toy_bundle):
    path = toy_bundle("variance").path
    for words, labels in {
        ("--labels", "bee,4"): [1, 4],
        ("--labels", "1-3"): [1, 2, 3],
        ("--labels", "all", "--per-label", "2"): [0, 1, 2, 3, 4] * 2,
        ("--labels", "cat", "--num", "3"): [2, 2, 2],
        ("--num", "7"): [0, 1, 2, 3, 4, 0, 1],
        (): [0, 1, 2, 3, 4],
    }.items():
        assert diffx("sample", path, "--steps", 2, "--npz", "a.npz", *words)[0] == 0
        assert np.load("a.npz")["labels"].tolist() == labels


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "ddpm"])
def test_samples_do_not_depend_on_the_number_of_processes(toy_bundle, tmp_path, sampler):
    """Sixteen in one process, and four in each of four that run at once."""
    labels = [k % 5 for k in range(16)]

    def start(first, last):
        return subprocess.Popen([
            Path(sys.executable).with_name("diffx"), "sample", toy_bundle("plain").path, "--sampler", sampler,
            "--labels", ",".join(map(str, labels[first:last])), "--first", str(first), "--guidance-scale", "2",
            "--seed", "5", "--npz", tmp_path / f"{first}-{last}.npz",
        ])  # fmt: skip

    parts = [(0, 16), *((first, first + 4) for first in range(0, 16, 4))]
    assert [process.wait() for process in [start(*part) for part in parts]] == [0] * 5
    whole, *quarters = (np.load(tmp_path / f"{first}-{last}.npz")["x"] for first, last in parts)
    np.testing.assert_allclose(np.concatenate(quarters), whole, atol=1e-5)
    assert np.abs(whole[0] - whole[5]).max() > 0.1  # of one label, and still two samples


def test_sample_finds_the_only_bundle_of_a_folder(diffx, toy_bundle, tmp_path):
    assert_refused(diffx("sample"), "there is none in this folder")
    shutil.copytree(toy_bundle("points").path, tmp_path / "one.diffx")
    status, out, _ = diffx("sample", "--num", 20, "--steps", 3, "--json")
    result = json.loads(out)
    assert (status, result["samples"], result["written"]) == (0, 20, ["points.png"])
    shutil.copytree(toy_bundle("plain").path, tmp_path / "two.diffx")
    assert_refused(diffx("sample"), "several here: one.diffx, two.diffx")


def test_torch_backend_needs_the_checkpoint(diffx, toy_bundle):
    assert_refused(diffx("sample", toy_bundle("plain").path, "--backend", "torch"), "--checkpoint")


@pytest.mark.parametrize(("words", "message"), [
    (("--labels", "9"), "labels 0..4"),
    (("--labels", "-1"), "label"),
    (("--labels", "horse"), "no label has this name"),
    (("--steps", "0"), "steps 0: expected at least 1"),
    (("--num", "0"), "--num 0"),
    (("--per-label", "0"), "--per-label 0"),
    (("--sampler", "dimm"), "did you mean 'ddim'"),
    (("--backend", "ortt"), "did you mean 'ort'"),
    (("--grid", "1,2"), "fall strictly"),
    (("--grid", "1,x"), "--grid takes"),
    (("--guidance-interval", "5"), "--guidance-interval takes LOW:HIGH"),
    (("--guidance-interval", "900:1000"), "overlapping"),
    (("--seed", "-1"), "seed -1"),
    (("--threads", "0"), "--threads 0"),
    (("--backend", "ort", "--checkpoint", "x.pt"), "leave it out"),
    (("--out", "/dev/null/x.png"), "/dev/null"),
])  # fmt: skip
def test_bad_calls_of_sample_are_one_line_and_write_nothing(diffx, toy_bundle, tmp_path, words, message):
    assert_refused(diffx("sample", toy_bundle("plain").path, *words), message)
    assert list(tmp_path.iterdir()) == []


def test_verify_says_what_holds_and_fails_loudly(diffx, toy_bundle, tmp_path):
    shutil.copytree(toy_bundle("plain").path, tmp_path / "b.diffx")
    status, out, _ = diffx("verify", "b.diffx")
    assert (status, out.count("ok  ")) == (0, 5)
    weights = tmp_path / "b.diffx" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    status, out, _ = diffx("verify", "b.diffx")
    assert status == 1
    assert "FAIL" in out
    assert "weights.bin: sha256" in out
    status, out, _ = diffx("verify", "b.diffx", "--json")
    assert (status, json.loads(out)["passed"]) == (1, False)
    assert_refused(diffx("sample", "b.diffx"), "weights.bin: sha256")
    assert_refused(diffx("verify", "nothing.diffx"), "no such folder")


def test_inspect_and_plan_and_doctor_report(diffx, toy_bundle):
    path = toy_bundle("variance").path
    status, out, _ = diffx("inspect", path)
    assert status == 0
    for words in ("toy variance", "learned variance", "ant, bee", "first 1 channels", "all hold", "weights.bin"):
        assert words in out
    assert json.loads(diffx("inspect", path, "--json")[1])["manifest"]["model"]["family"] == "toy variance"
    table = json.loads(diffx("plan", path, "--sampler", "heun", "--steps", 3, "--json")[1])
    assert len(table["rows"]) == 5  # the last step ends at 0, where Heun needs no second evaluation
    assert diffx("plan", path, "--steps", 3)[1].count("\n") == 6
    assert "dpmpp-2m" in diffx("plan", "--list")[1]
    status, out, _ = diffx("doctor", path)
    assert status == 0
    assert "ok    ort" in out
    report = json.loads(diffx("doctor", "--json")[1])
    works = {entry["backend"]: entry["works"] for entry in report["backends"]}
    assert all(works[name] for name in ("ort", "openvino", "torch"))


def test_a_plan_is_drawn(diffx, toy_bundle, tmp_path):
    path = toy_bundle("plain").path
    status, out, _ = diffx("plan", path, "--sampler", "ddpm", "--guidance-scale", "2", "--out", "plan.png")
    assert (status, out.splitlines()[-1]) == (0, "wrote plan.png")
    with Image.open("plan.png") as picture:
        assert picture.size == (640, 5 * 150)  # sigma, w, x_x, x_d and x_z; ddpm has no history
        shade = np.asarray(picture.convert("L"), float)[:150]
    dark = [np.flatnonzero(column < 180) for column in shade[30:, [30, 320, 610]].T]
    assert np.all(np.diff([rows.mean() for rows in dark]) > 0), "sigma falls from left to right"
    assert_refused(diffx("plan", path, "--out", "/dev/null/x.png"), "/dev/null")


def test_debug_shows_the_traceback(toy_bundle):
    command = [Path(sys.executable).with_name("diffx"), "--debug", "sample", toy_bundle("plain").path, "--steps", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "PlanError: steps 0" in result.stderr


def test_every_command_has_an_example(diffx):
    for command in ("export", "sample", "verify", "inspect", "plan", "bench", "doctor", "train"):
        status, out, _ = diffx(command, "--help")
        assert status == 0
        assert f"Example: diffx {command}" in " ".join(out.split())
