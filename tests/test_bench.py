"""The benchmark measures what it says: whole steps, of every contender, with their errors."""

import dataclasses
import functools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_contenders import broken, dying, fast, slow
from conftest import TOYS
from interrupts import hear_interrupts
from PIL import Image
from refusals import assert_refused

import diffexport
from diffexport.backends.torch import TorchSession
from diffexport.bench import Contender, Figure, Report, Work, bench, contenders_of
from diffexport.bench_peers import PeerSession, work_of
from diffexport.bench_report import markdown, save_chart
from diffexport.errors import BackendError
from diffexport.noise import normal
from diffexport.parity import relative_l2
from diffexport.probes import mixing_row, probe_labels
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport.spec import ModelSpec
from diffexport_reference.official_dit import OfficialDiT


@pytest.mark.parametrize("name", ["plain", "variance", "flow", "points"])
@pytest.mark.parametrize(("bf16", "limit"), [(False, 1e-6), (True, 3e-2)])
def test_a_peer_takes_the_same_step(toy, name, bf16, limit):
    module, spec = toy(name)
    x, h, z = normal(0, range(3), range(3), spec.shape)
    row = mixing_row(spec, 0.5, 2.0 if spec.guidable else 1.0)
    peer, reference = PeerSession(module, spec, compiled=False, bf16=bf16), TorchSession(module, spec)
    for session in (peer, reference):
        session.begin(x, probe_labels(spec, range(3)), h)
        session.step(row, z)
    torch.set_num_threads(1)
    error = relative_l2(peer.state()[0], reference.state()[0])
    assert error < limit
    assert not bf16 or error > 1e-6


def test_the_work_of_a_network_counted_by_hand(toy):
    """Two convolutions of 3x3 on 6x6 places, a product of 2 with 16, both halves of guidance."""
    by_hand = 2 * (2 * 9 * 16 * 36 + 16 * 9 * 2 * 36 + 2 * 16) * 2
    assert work_of(*toy("plain")) == Work(pytest.approx(by_hand / 1e9), 0)


def test_the_work_of_a_transformer_counted_by_hand():
    """N tokens of width D, depth L: 12 D^2 of each token in products, N^2 D twice in attention, 6 D^2 in modulation."""
    D, L, p, C, side, frequencies = 32, 3, 2, 4, 8, 256
    N, halves = (side // p) ** 2, 2
    module = OfficialDiT(input_size=side, hidden_size=D, depth=L, num_heads=4, num_classes=7)
    spec = ModelSpec(
        family="official DiT",
        shape=(C, side, side),
        num_classes=7,
        prediction="eps",
        schedule=DEFAULT_SCHEDULES["ddpm"],
    )
    attention = L * 2 * N * N * D
    embedding = frequencies * D + D * D + N * p * p * C * D
    final = 2 * D * D + N * D * p * p * 2 * C
    whole = L * (12 * N * D * D + 6 * D * D) + attention + embedding + final
    counted = work_of(module, spec)
    assert counted.attention == pytest.approx(2 * halves * attention / 1e9, rel=1e-12)
    assert counted.gflop == pytest.approx(2 * halves * whole / 1e9, rel=1e-12)


def toy_module(name):
    """For other processes."""
    torch.manual_seed(0)
    return TOYS[name][0]().eval()


def test_every_contender_has_figures_at_every_batch(toy_bundle, tmp_path):
    bundle = toy_bundle("plain")
    found = {c.name: c for c in contenders_of(bundle, functools.partial(toy_module, "plain"))}
    peers = {f"PyTorch {way}{kind}" for way in ("eager", "compiled") for kind in ("", " bf16")}
    assert peers | {"ort", "openvino", "openvino bf16"} <= set(found)
    report = bench(bundle, [found["ort"]], (1, 2), seconds=0.05, work=Work(0.001, 0))
    beside = bench(bundle, [found["PyTorch eager bf16"]], (1,), seconds=0.05, work=Work(0.001, 0))
    report.figures += beside.figures
    report.matrix[1] |= beside.matrix[1]
    measured = {(figure.name, figure.batch): figure for figure in report.figures}
    assert set(measured) == {("ort", 1), ("ort", 2), ("PyTorch eager bf16", 1)}
    assert not report.left_out
    for figure in report.figures:
        assert 0 < figure.low_ms <= figure.step_ms <= figure.high_ms
        assert figure.steps >= 3
        assert min(figure.first_ms, figure.start_ms) > 0
        assert figure.error < (2e-2 if "bf16" in figure.name else 1e-5)
        assert figure.image_ms == pytest.approx(20 * figure.step_ms / figure.batch)
        assert figure.gflops == pytest.approx(0.001 * figure.batch / figure.step_ms * 1e3)
        assert figure.of_matrix == pytest.approx(figure.gflops / report.matrix[figure.batch][figure.precision])
        assert (figure.loop is not None) == (figure.ours and figure.batch == 1)
    torch_takes, ort_takes = (measured[name, 1].memory_mb for name in ("PyTorch eager bf16", "ort"))
    assert torch_takes > ort_takes + 50  # the import of torch alone
    table = markdown(report)
    assert all(f"| {name} | " in table for name, _ in measured)
    save_chart(report, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as page:
        colours = {colour for _, colour in page.getcolors(1 << 20)}
    assert {(0x25, 0x63, 0xA8), (0x9A, 0xA4, 0xAE)} <= colours


def test_names_say_what_is_not_fp32(toy_bundle, toy, tmp_path):
    module, spec = toy("plain")
    half = diffexport.export(module, spec, tmp_path / "half.diffx", precision="fp16", max_batch=1)
    named = {c.name: c.precision for c in contenders_of(half) if not c.name.startswith(("trt", "ort-"))}
    assert named == {"ort fp16": "fp16", "openvino fp16": "fp16"}
    named = {c.name: c.precision for c in contenders_of(toy_bundle("plain")) if not c.name.startswith(("trt", "ort-"))}
    assert named == {"ort": "fp32", "openvino": "fp32", "openvino bf16": "bf16"}


def test_images_of_several_batches_stand_side_by_side():
    figure = Figure("ort", "fp32", 1, True, 1.0, 1.0, 1.0, 0.0, 3, 100.0, 90.0, 110.0, 2000.0)
    larger = dataclasses.replace(figure, batch=16, image_ms=1900.0)
    other = dataclasses.replace(figure, name="openvino", image_ms=1800.0)
    report = Report("m", 1, "p", 2, None, figures=[figure, other, larger])
    *_, head, rule, first, second = markdown(report).splitlines()
    assert head == "| s an image, 20 steps | batch 1 | batch 16 |"
    assert rule == "|---|---|---|"
    assert first == "| ort | 2 | 1.9 |"
    assert second == "| openvino | 1.8 |  |"
    report.figures.pop()
    assert "batch 16" not in markdown(report)


def test_a_slow_contender_is_seen_to_be_slow_and_the_broken_are_left_out(toy_bundle):
    """Time is taken of the step itself: one that sleeps is slower by its sleep."""
    bundle = toy_bundle("plain")
    contenders = [
        Contender(opens.__name__, "fp16", functools.partial(opens, bundle), ours=False)
        for opens in (fast, slow, dying, broken)
    ]
    report = bench(bundle, contenders, (1,), seconds=0.1)
    first, second = report.figures
    assert (first.name, second.name) == ("fast", "slow")
    assert second.step_ms - first.step_ms > 15
    assert second.error < 1e-5
    assert report.left_out["broken"] == "batch 1: RuntimeError: out of paper"
    assert "SIGKILL" in report.left_out["dying"]
    assert "Left out: dying: batch 1: " in markdown(report)
    assert not multiprocessing.active_children()
    with pytest.raises(BackendError, match="broken: batch 1: RuntimeError: out of paper"):
        bench(bundle, contenders[3:], (1,), seconds=0.1)


def test_an_interrupt_ends_every_process(toy_bundle):
    """Ctrl-C of a terminal reaches all processes of the group at once."""
    words = ["bench", str(toy_bundle("plain").path), "--batch", "1", "--only", "ort,openvino", "--seconds", "60"]
    run = [sys.executable, "-c", "from diffexport_cli.app import main; main()", *words]
    process = subprocess.Popen(
        run, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_interrupts
    )
    try:
        deadline = time.monotonic() + 60
        while len(children := _children(process.pid)) < 4 and time.monotonic() < deadline:  # a tracker, two, a product
            time.sleep(0.05)
        assert len(children) >= 4
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=30)[1] == ""
        assert process.returncode == 130
        while any(map(_runs, children)) and time.monotonic() < deadline:  # the tracker ends last
            time.sleep(0.05)
        assert not any(map(_runs, children))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _runs(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z"


@pytest.mark.slow
def test_int8_beside_the_rest(diffx):
    """Of the same weights, judged by the same golden steps; the second time it comes from the cache."""
    checkpoint = Path(__file__).parent / "trained" / "unet.pt"
    status, _, err = diffx("export", checkpoint, "--out", "unet.diffx", "--max-batch", "1")
    assert status == 0, err
    words = ("bench", "unet.diffx", "--checkpoint", checkpoint, "--int8", "--batch", "1", "--seconds", "0.05")
    status, out, err = diffx(*words, "--only", "ort", "--json")
    assert status == 0, err
    report = json.loads(out)
    found = {figure["name"]: figure for figure in report["figures"]}
    assert set(found) == {"ort", "ort int8"}
    assert found["ort"]["error"] < 1e-5 < found["ort int8"]["error"] < 1e-1
    assert report["work"]["gflop"] > report["work"]["attention"] > 0
    (note,) = report["notes"]
    assert re.fullmatch(r"Int8: (\d+) of (\d+) layers that can be; its runs are within [\d.]+ dB of PyTorch's\.", note)
    kept = list(Path(os.environ["DIFFX_CACHE"]).glob("bench/*/unet-int8.diffx"))
    assert len(kept) == 1


def test_the_command(diffx, toy_bundle):
    path = toy_bundle("points").path
    words = ("bench", path, "--batch", "1", "--seconds", "0.05", "--only", "ort")
    status, out, _ = diffx(*words, "--chart", "a.png")
    assert status == 0
    assert "| batch 1 |" in out
    assert "wrote a.png" in out
    assert json.loads(diffx(*words, "--json")[1])["figures"][0]["name"] == "ort"
    assert_refused(diffx("bench", path, "--batch", "0"), "--batch 0")
    assert_refused(diffx("bench", path, "--only", "nothing"), "--only nothing")
    assert_refused(diffx("bench", "--model", "DiT-S/3"), "known: DiT-S/2")
    assert_refused(diffx("bench", path, "--model", "DiT-S/2"), "leave out the bundle")
    assert_refused(diffx("bench", path, "--int8"), "give --checkpoint CKPT, or --model")
