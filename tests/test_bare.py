"""The base install: what it loads, and that it samples where PyTorch is not installed."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
HEAVY = (
    "torch",
    "openvino",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "sklearn",
    "scipy",
    "tensorrt_rtx",
    "matplotlib",
    "accelerate",
)


def loaded_by(code):
    """The heavy modules that a fresh interpreter has loaded after running some code."""
    script = f"{code}\nimport sys; print('|' + ' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return set(out.rsplit("|", 1)[1].split()) & {*HEAVY, "onnxruntime", "numpy"}


def test_importing_the_library_loads_no_runtime():
    assert loaded_by("import diffexport") == set()
    assert loaded_by("import diffexport; diffexport.load, diffexport.make_plan") == {"numpy"}
    assert loaded_by("import diffexport_cli.app") == set()


@pytest.mark.parametrize("name", ["plain", "decoded"])
def test_sampling_loads_no_torch_and_no_exporter(toy_bundle, tmp_path, name):
    path, out = toy_bundle(name).path, tmp_path / "a.png"
    words = ["diffx", "sample", str(path), "--backend", "ort", "--out", str(out)]
    code = f"import diffexport_cli.app as a, sys; sys.argv = {words!r}; "
    assert loaded_by(code + "a.app(standalone_mode=False)") == {"numpy", "onnxruntime"}
    assert out.exists()


@pytest.mark.slow
def test_the_base_install_has_no_torch_and_samples_the_same(toy_bundle, tmp_path):
    """A wheel in an environment of its own, with nothing but what it asks for."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True, cwd=tmp_path
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    bin_ = tmp_path / "env" / "bin"
    constraints = ROOT / "constraints.txt"
    subprocess.run([bin_ / "python", "-m", "pip", "install", "-q", "-c", constraints, wheel], check=True)
    installed = subprocess.run(
        [bin_ / "python", "-m", "pip", "list"], check=True, capture_output=True, text=True
    ).stdout
    names = {line.split()[0].lower().replace("-", "_") for line in installed.splitlines()[2:]}
    assert "onnxruntime" in names
    assert not names & set(HEAVY)

    bundle = toy_bundle("variance")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [
        bin_ / "diffx",
        "sample",
        bundle.path,
        "--sampler",
        "ddpm",
        "--steps",
        "10",
        "--seed",
        "5",
        "--npz",
        "a.npz",
    ]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    expected = bundle.sampler().sample(num=5, sampler="ddpm", steps=10, seed=5)
    np.testing.assert_allclose(np.load(tmp_path / "a.npz")["x"], expected, atol=1e-6)
    subprocess.run([bin_ / "diffx", "verify", bundle.path], check=True, cwd=tmp_path, env=environment)
    refused = subprocess.run(
        [bin_ / "diffx", "export", "x.pt"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "needs PyTorch; pip install 'diffexport[export]'" in refused.stderr
