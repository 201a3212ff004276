"""scripts/gpu-check, whose code a machine without a GPU runs with small models on the CPU."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROUNDS", 2)
    monkeypatch.setattr(module, "STEPS", 1)
    return module


def rows_of(path):
    """The cells of each line of the table below its head."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_a_machine_without_a_gpu_gets_a_table_that_says_what_was_not_run(script, tmp_path):
    script.main(["--out", str(tmp_path / "gpu.md")])
    rows = rows_of(tmp_path / "gpu.md")
    assert [row[2] for row in rows] == ["PyTorch eager", "torch.compile", "ort-cuda", "ort-trt", "trt", "trt-rtx"]
    assert all("**not run**: " in row[4] for row in rows)
    assert "no NVIDIA GPU" in (tmp_path / "gpu.md").read_text()


def test_every_runner_that_is_there_is_measured_and_compared(script, tmp_path):
    out = tmp_path / "gpu.md"
    words = ["--tiny", "--models", "tiny DiT", "--batches", "1,3", "--backends", "ort-cuda,trt-rtx", "--no-compile"]
    script.main([*words, "--out", str(out)])
    rows = rows_of(out)
    assert {row[2] for row in rows if "not run" in row[4]} == {"torch.compile", "trt-rtx"}
    measured = [row for row in rows if "not run" not in row[4]]
    assert [(row[1], row[2].split(" on ")[0]) for row in measured] == [
        (batch, runner) for batch in ("1", "3") for runner in ("PyTorch eager", "ort-cuda")
    ]
    for row in measured:
        assert re.fullmatch(r"[\d.e+-]+ ms \([\d.e+-]+ to [\d.e+-]+\)", row[4])
        assert float(row[5]) > 0
        assert row[6].endswith("%")
        assert float(row[7]) < 1e-5


def test_a_runner_that_computes_something_else_shows_its_error(script, tmp_path, monkeypatch):
    real = script.session_peer

    def wrong(*given):
        peer = real(*given)
        result = peer.result
        peer.result = lambda: 1.01 * result()
        return peer

    monkeypatch.setattr(script, "session_peer", wrong)
    words = ["--tiny", "--models", "tiny DiT", "--batches", "1", "--backends", "ort-cuda", "--no-compile"]
    script.main([*words, "--out", str(tmp_path / "gpu.md")])
    errors = {row[2].split(" on ")[0]: float(row[7]) for row in rows_of(tmp_path / "gpu.md") if "not run" not in row[4]}
    assert errors["ort-cuda"] == pytest.approx(0.01, rel=1e-3)
    assert errors["PyTorch eager"] < 1e-6


def test_a_runner_that_fails_is_a_row_and_the_others_go_on(script, tmp_path, monkeypatch):
    def fails(*_given, **_options):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(script, "open_session", fails)
    words = ["--tiny", "--models", "tiny DiT", "--batches", "1", "--backends", "ort-cuda", "--no-compile"]
    script.main([*words, "--out", str(tmp_path / "gpu.md")])
    rows = rows_of(tmp_path / "gpu.md")
    assert [row[4] for row in rows if row[2] == "ort-cuda"] == ["**not run**: RuntimeError: out of memory"]
    assert any(row[2] == "PyTorch eager" and "ms" in row[4] for row in rows)
