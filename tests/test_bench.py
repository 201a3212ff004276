"""The benchmark measures what it says: whole steps, of every contender, with their errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import assert_refused

from diffexport.backends.torch import TorchSession
from diffexport.bench import Contender, bench, contenders_of
from diffexport.bench_peers import PeerSession, gflop_of
from diffexport.bench_report import markdown, save_chart
from diffexport.noise import normal
from diffexport.parity import relative_l2
from diffexport.probes import mixing_row, probe_labels


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


def test_gflop_of_a_network_counted_by_hand(toy):
    """Two convolutions of 3x3 on 6x6 places, a product of 2 with 16, both halves of guidance."""
    module, spec = toy("plain")
    by_hand = 2 * (2 * 9 * 16 * 36 + 16 * 9 * 2 * 36 + 2 * 16) * 2
    assert gflop_of(module, spec) == pytest.approx(by_hand / 1e9)


def test_every_contender_has_figures_at_every_batch(toy, toy_bundle, tmp_path):
    bundle = toy_bundle("plain")
    contenders = [c for c in contenders_of(bundle, toy("plain")[0]) if "compiled" not in c.name]
    names = {c.name for c in contenders if not c.name.startswith(("trt", "ort-"))}
    assert {"PyTorch eager", "PyTorch eager bf16", "ort", "openvino"} <= names
    report = bench(bundle, contenders, (1, 2), seconds=0.05, gflop=0.001)
    torch.set_num_threads(1)
    measured = {(figure.name, figure.batch): figure for figure in report.figures}
    assert {(name, batch) for name in names for batch in (1, 2)} - set(measured) <= {
        (name, batch) for name in report.left_out for batch in (1, 2)
    }
    for figure in report.figures:
        assert 0 < figure.low_ms <= figure.step_ms <= figure.high_ms
        assert figure.error < (2e-2 if "bf16" in figure.name else 1e-5)
        assert figure.image_ms == pytest.approx(20 * figure.step_ms / figure.batch)
        assert figure.gflops == pytest.approx(0.001 * figure.batch / figure.step_ms * 1e3)
        assert (figure.loop is not None) == (figure.ours and figure.batch == 1)
    table = markdown(report)
    assert all(f"| {name} | " in table for name, _ in measured)
    save_chart(report, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as page:
        colours = {colour for _, colour in page.getcolors(1 << 20)}
    assert {(0x25, 0x63, 0xA8), (0x9A, 0xA4, 0xAE)} <= colours


def test_a_slow_contender_is_seen_to_be_slow(toy_bundle, toy):
    """Time is taken of the step itself: one that sleeps is slower by its sleep."""
    import time

    class Slow(TorchSession):
        def step(self, row, z=None):
            time.sleep(0.02)
            super().step(row, z)

    module, spec = toy("plain")
    contenders = [
        Contender("fast", "fp32", lambda: TorchSession(module, spec), ours=False),
        Contender("slow", "fp32", lambda: Slow(module, spec), ours=False),
    ]
    fast, slow = bench(toy_bundle("plain"), contenders, (1,), seconds=0.1).figures
    assert slow.step_ms - fast.step_ms > 15
    assert np.isfinite(slow.error)


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
