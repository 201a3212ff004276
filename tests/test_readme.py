"""The README says what the code does: its Python runs, and its table names every command and sampler."""

import re
import shutil
from pathlib import Path

import numpy as np

from diffexport.backends import BACKENDS
from diffexport.samplers import SAMPLERS
from diffexport_cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks():
    """Indented blocks that begin with an import."""
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", README, flags=re.M)
    lines = [re.sub(r"^    ", "", block, flags=re.M).strip("\n") for block in blocks]
    return [block for block in lines if block.startswith(("import ", "from "))]


def test_the_python_of_the_readme_runs(diffx, tmp_path):
    shutil.copy(ROOT / "models" / "digits.pt", tmp_path / "dit.pt")
    assert diffx("export", "dit.pt", "--out", "digits.diffx", "--max-batch", "3")[0] == 0
    names = {}
    blocks = python_blocks()
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["x"].shape == (3, 1, 8, 8)
    assert names["x"].dtype == np.float32
    assert (tmp_path / "mine.diffx" / "step.onnx").exists()
    assert (tmp_path / "dit.diffx" / "step.onnx").exists()


def test_the_readme_names_every_command_sampler_and_backend():
    for command in app.registered_commands:
        assert f"| `diffx {command.callback.__name__} " in README
    assert ", ".join(SAMPLERS) in README
    for backend in BACKENDS:
        assert f"`{backend}` (" in README


def test_what_the_readme_points_to_is_there():
    for path in re.findall(r"`((?:scripts|models|tests|docs|diffexport)/[\w./-]+)`|\]\(([\w/.-]+)\)", README):
        assert (ROOT / (path[0] or path[1])).exists(), path
