"""A folder of samples: written as they are drawn, continued to the same bits, never mixed with another run's."""

import filecmp
import json
import os
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
import torch
from conftest import TOYS, ToyNetwork
from PIL import Image
from refusals import assert_refused

import diffexport
from diffexport.errors import BackendError
from diffexport.sample_folder import draw_into
from diffexport.sampler import Sampler


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same(a, b):
    return names(a) == names(b) and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names(a))


def test_a_folder_holds_each_sample_as_it_is_drawn_at_once(diffx, toy_bundle, tmp_path):
    path = toy_bundle("plain").path
    assert diffx("sample", path, "--num", 7, "--steps", 3, "--first", 5, "--out", "all/")[0] == 0
    drawn = toy_bundle("plain").sampler().sample(num=7, steps=3, first=5)
    assert names(tmp_path / "all") == [*(f"{k:06d}.npy" for k in range(5, 12)), "settings.json"]
    for k in range(7):  # two channels are no picture
        np.testing.assert_allclose(np.load(f"all/{k + 5:06d}.npy"), drawn[k], atol=1e-6)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pictures_have_their_own_size(diffx, tmp_path, channels, mode):
    spec = msgspec.structs.replace(TOYS["plain"][1], shape=(channels, 6, 5))
    torch.manual_seed(0)
    bundle = diffexport.export(ToyNetwork(channels, channels).eval(), spec, tmp_path / "a.diffx", max_batch=1)
    status, out, _ = diffx("sample", bundle.path, "--num", 3, "--steps", 4, "--out", "pictures/")
    assert (status, out.splitlines()[-1]) == (0, "wrote pictures/")
    x = bundle.sampler().sample(num=3, steps=4)
    for k in range(3):
        with Image.open(tmp_path / "pictures" / f"{k:06d}.png") as picture:
            assert (picture.mode, picture.size) == (mode, (5, 6))
            expected = np.clip(np.rint((x[k].transpose(1, 2, 0) + 1) * 127.5), 0, 255)
            assert np.array_equal(np.asarray(picture).reshape(expected.shape), expected)


def test_a_run_continues_where_it_stopped_to_the_same_bits(diffx, toy_bundle, tmp_path):
    """Also where it was stopped in the middle of a batch, where files are gone, and where it grows."""
    run = ("sample", toy_bundle("plain").path, "--steps", 3, "--batch", 4, "--sampler", "ddpm")
    assert diffx(*run, "--num", 22, "--out", "whole/")[0] == 0
    assert diffx(*run, "--num", 10, "--out", "part/")[0] == 0
    for gone in (0, 2, 9):
        (tmp_path / "part" / f"{gone:06d}.npy").unlink()
    status, out, _ = diffx(*run, "--num", 22, "--out", "part", "--json")
    assert status == 0
    assert (json.loads(out)["samples"], json.loads(out)["kept"]) == (15, 7)
    assert same(tmp_path / "part", tmp_path / "whole")
    assert diffx(*run, "--num", 22, "--out", "part/")[1].startswith("0 samples (22 more were there)")


def test_parts_drawn_by_different_processes_make_the_same_folder(diffx, toy_bundle, tmp_path):
    run = ("sample", toy_bundle("plain").path, "--steps", 3, "--labels", "3,1,4", "--batch", 4)
    assert diffx(*run, "--num", 12, "--out", "whole/")[0] == 0
    for first, labels in ((8, "4,3,1"), (0, "3,1,4"), (4, "1,4,3")):
        part = (*run[:4], "--labels", labels, "--batch", 4)
        assert diffx(*part, "--first", first, "--num", 4, "--out", "parts/")[0] == 0
    assert same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(("other", "message"), [
    (("--seed", "1"), "seed 0 there, 1 now"),
    (("--steps", "4"), "plan dpmpp-2m, 3 steps, guidance 1 there, dpmpp-2m, 4 steps, guidance 1 now"),
    (("--guidance-scale", "2"), "guidance 2 now"),
    (("--labels", "3"), "labels [0, 1, 2, 3, 4] there, [3] now"),
    (("--first", "1"), "labels"),
])  # fmt: skip
def test_other_settings_in_the_same_folder_are_refused(diffx, toy_bundle, tmp_path, other, message):
    run = ("sample", toy_bundle("plain").path, "--num", 3, "--out", "out/")
    assert diffx(*run, "--steps", 3)[0] == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    assert_refused(diffx(*run, "--steps", 3, *other), message)
    assert_refused(diffx("sample", toy_bundle("flow").path, "--num", 3, "--steps", 3, "--out", "out"), "bundle")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")} == before


def test_a_folder_of_something_else_is_left_alone(diffx, toy_bundle, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000000.png").write_bytes(b"precious")
    run = ("sample", toy_bundle("plain").path, "--num", 3)
    assert_refused(diffx(*run, "--out", "photos/"), "holds other files and no settings.json")
    assert names(tmp_path / "photos") == ["000000.png"]
    (tmp_path / "photos" / "settings.json").write_text("{}")
    assert_refused(diffx(*run, "--out", "photos/"), "settings.json: is damaged")
    assert_refused(diffx(*run, "--out", "new/", "--npz", "a.npz"), "leave out --npz and --trajectory")
    assert_refused(diffx(*run, "--out", "new/", "--batch", "0"), "batch 0")
    assert names(tmp_path) == ["photos"]


class Failing:
    """A session that fails after some steps, as a device that is lost does."""

    def __init__(self, session, steps):
        self.session, self.left = session, steps

    def __getattr__(self, name):
        return getattr(self.session, name)

    def step(self, row, z=None):
        self.left -= 1
        if self.left < 0:
            raise BackendError("the device was lost")
        self.session.step(row, z)


def test_a_backend_that_fails_loses_no_finished_sample(toy_bundle, tmp_path):
    bundle = toy_bundle("plain")
    plan, sampler = bundle.plan(steps=3), bundle.sampler()
    run = dict(labels=[0, 1], num=20, described="", batch=4)
    draw_into(tmp_path / "whole", bundle, sampler, plan, **run)
    failing = Sampler(bundle.spec, Failing(sampler.session, 3 * 3 - 1))  # in the last step of the third batch
    with pytest.raises(BackendError, match="device was lost; 8 samples were finished and stay, the same command"):
        draw_into(tmp_path / "failed", bundle, failing, plan, **run)
    assert len(names(tmp_path / "failed")) == 8 + 1
    done = draw_into(tmp_path / "failed", bundle, sampler, plan, **run)
    assert (done.drawn, done.kept) == (12, 8)
    assert same(tmp_path / "failed", tmp_path / "whole")


def test_kill_minus_nine_loses_no_finished_sample_and_leaves_nothing_else(toy_bundle, tmp_path):
    words = ["sample", str(toy_bundle("plain").path), "--num", "600", "--steps", "10", "--batch", "2", "--out", "out/"]
    command = [sys.executable, "-c", "from diffexport_cli.app import main; main()", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = tmp_path / "out"
    for count in (5, 60, 120):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment)
        deadline = time.monotonic() + 60
        while not (out / f"{count:06d}.npy").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for path in out.glob("*.npy"):
            assert np.load(path).shape == (2, 6, 6)
    kept = len(list(out.glob("*.npy")))
    (out / f".000599.npy.{process.pid}.1").write_bytes(b"half")
    result = subprocess.run([*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert json.loads(result.stdout)["kept"] == kept > 120
    assert names(out) == [*(f"{k:06d}.npy" for k in range(600)), "settings.json"]


def test_memory_does_not_grow_with_the_number_of_samples(toy_bundle, tmp_path):
    """The peak of a process after 400 samples, and after 3,600 more, which with their noise are 11 MB."""
    code = (
        "import sys, resource, diffexport\n"
        "from pathlib import Path\n"
        "from diffexport.sample_folder import draw_into\n"
        "bundle = diffexport.load(sys.argv[1]); s = bundle.sampler(); plan = bundle.plan('ddpm', 10)\n"
        "peaks = []\n"
        "for num in (400, 4000):\n"
        "    draw_into(Path('out'), bundle, s, plan, [0, 1], num, described='', batch=8)\n"
        "    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "print(*peaks)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code, str(toy_bundle("plain").path)],
        cwd=tmp_path, env=environment, capture_output=True, check=True,
    )  # fmt: skip
    before, after = map(int, result.stdout.split())
    unit = 1024 if sys.platform == "darwin" else 1
    assert after - before < 4000 * unit  # kB
