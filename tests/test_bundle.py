"""Bundles: what they hold, that they are reproducible, and that any change to them is seen."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from mending import rehash
from refusals import assert_refused

import diffexport
from diffexport.bundle import (
    GOLDEN,
    MANIFEST,
    PLANS,
    WEIGHTS,
    Bundle,
    read_tensors,
    write_tensors,
)
from diffexport.errors import BundleError, DiffexportError, ExportError, ParityError, ShapeError
from diffexport.files import replacing_file, replacing_folder
from diffexport.verification import verify


@pytest.fixture
def copy(toy_bundle, tmp_path):
    """A copy of the toy bundle that a test may damage."""
    path = tmp_path / "copy.diffx"
    shutil.copytree(toy_bundle("plain").path, path)
    return path


def failed(findings):
    return [finding.name for finding in findings if not finding.passed]


def test_the_same_input_gives_the_same_bytes(toy, toy_bundle, tmp_path):
    """Also in another process, whose hash seed differs."""
    first = toy_bundle("plain").path
    out = tmp_path / "plain.diffx"
    code = (
        "import sys, torch; sys.path.insert(0, 'tests'); import conftest, diffexport\n"
        "build, spec = conftest.TOYS['plain']; torch.manual_seed(0)\n"
        f"diffexport.export(build().eval(), spec, {str(out)!r}, max_batch=4)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    for path in sorted(first.iterdir()):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_bundle_holds_nothing_of_the_machine_that_made_it(toy_bundle):
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__))).encode()
    for path in toy_bundle("variance").path.iterdir():
        data = path.read_bytes()
        assert here not in data, path
        for word in (b"stack_trace", b"conftest", b"namespace", b"site-packages"):
            assert word not in data, (path, word)


def test_graphs_share_one_weights_file_and_take_the_users_batch(toy_bundle):
    import onnx

    for name in ("plain", "variance", "points"):
        bundle = toy_bundle(name)
        for graph in ("step", "step_plain", "denoiser"):
            model = onnx.load(bundle.graph(graph), load_external_data=False)
            onnx.checker.check_model(str(bundle.graph(graph)), full_check=True)
            external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
            assert {entry.value for t in external for entry in t.external_data if entry.key == "location"} <= {WEIGHTS}
            for value in (*model.graph.input, *model.graph.output):
                if value.name != "row":
                    assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
        assert external or name == "points"  # so small that all of it stays in the graphs


@pytest.mark.parametrize("name", [WEIGHTS, "step.onnx", "step_plain.onnx", "denoiser.onnx", PLANS, GOLDEN, MANIFEST])
def test_one_changed_byte_anywhere_is_seen(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    assert failed(verify(copy))


@pytest.mark.parametrize("name", [WEIGHTS, "step.onnx", PLANS, GOLDEN, MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "missing", "link", "folder"])
def test_a_damaged_file_is_refused_when_the_bundle_is_opened(copy, name, damage):
    path = copy / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()
    if damage == "link":
        path.symlink_to("/etc/hostname")
    if damage == "folder":
        path.mkdir()
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_weight_is_seen_even_where_all_hashes_were_mended(copy):
    weights = np.fromfile(copy / WEIGHTS, np.float32)
    index = np.abs(weights).argmax()
    weights[index] *= 1.05
    weights.tofile(copy / WEIGHTS)
    rehash(copy, WEIGHTS)
    assert "golden cases on ort" in failed(verify(copy))


def test_swapped_label_embeddings_are_seen_even_where_all_hashes_were_mended(toy, tmp_path, toy_bundle):
    """The weights of another module whose label table is permuted, in the bundle of the first."""
    module, spec = toy("plain")
    import copy as copying

    swapped = copying.deepcopy(module)
    swapped.embedding.weight.data[[0, 1]] = module.embedding.weight.data[[1, 0]]
    other = diffexport.export(swapped, spec, tmp_path / "swapped.diffx", max_batch=4)
    path = tmp_path / "copy.diffx"
    shutil.copytree(toy_bundle("plain").path, path)
    for name in (WEIGHTS, "step.onnx", "step_plain.onnx"):
        shutil.copy(other.path / name, path / name)
        rehash(path, name)
    assert "golden cases on ort" in failed(verify(path))


def test_a_changed_plan_is_seen_even_where_all_hashes_were_mended(copy):
    plans = {name: array.copy() for name, array in read_tensors(copy / PLANS).items()}
    plans["heun.10"][4, 6] *= 1.01
    write_tensors(copy / PLANS, plans)
    rehash(copy, PLANS)
    findings = verify(copy)
    assert failed(findings) == ["plans"]
    assert "heun.10" in next(f.detail for f in findings if f.name == "plans")


def test_a_swapped_label_name_is_seen(toy_bundle, tmp_path):
    path = tmp_path / "names.diffx"
    shutil.copytree(toy_bundle("variance").path, path)
    manifest = path / MANIFEST
    manifest.write_text(
        manifest.read_text().replace('"ant"', '"tmp"').replace('"bee"', '"ant"').replace('"tmp"', '"bee"')
    )
    findings = verify(path)
    assert failed(findings) == ["certificate"]
    assert "manifest was changed" in findings[1].detail


def test_verify_against_the_checkpoint_sees_other_weights_and_other_facts(toy, toy_bundle):
    import msgspec
    import torch

    module, spec = toy("plain")
    path = toy_bundle("plain").path
    assert not failed(verify(path, ("ort", "torch"), module=module, spec=spec))
    torch.manual_seed(3)
    other = type(module)().eval()
    assert failed(verify(path, module=other, spec=spec)) == ["weights of the checkpoint", "results beside PyTorch's"]
    findings = verify(path, module=module, spec=msgspec.structs.replace(spec, scaled=False))
    assert "facts of the checkpoint" in failed(findings)


@pytest.mark.parametrize(("edit", "message"), [
    (lambda m: m | {"schema": 99}, "schema version 99"),
    (lambda m: m | {"surprise": 1}, "surprise"),
    (lambda m: {k: v for k, v in m.items() if k != "model"}, "model"),
    (lambda m: m | {"files": {"../step.onnx": {"size": 1, "sha256": ""}}}, "plain file name"),
    (lambda m: m | {"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "plain file name"),
    (lambda m: m | {"files": {}}, "does not list weights.bin"),
    (lambda m: m | {"model": m["model"] | {"shape": [0, 0, 0]}}, "at least 1"),
    (lambda m: [], "not a valid manifest"),
])  # fmt: skip
def test_a_manifest_that_is_not_one_is_refused(copy, edit, message):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(edit(manifest)))
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(copy)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_bundle_is_said(tmp_path):
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.open(tmp_path / "nothing.diffx")
    (tmp_path / "file.diffx").write_text("")
    with pytest.raises(BundleError, match="not a folder"):
        Bundle.open(tmp_path / "file.diffx")
    (tmp_path / "empty.diffx").mkdir()
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read"):
        Bundle.open(tmp_path / "empty.diffx")


def test_a_failed_check_writes_no_bundle_and_says_how_far(toy, tmp_path, monkeypatch):
    """A fault planted in the graphs: one weight that differs from the module's."""
    from diffexport.exporter import compose, write

    honest = compose.write_weights

    def corrupt(model, path):
        network = honest(model, path)
        values = np.fromfile(path, np.float32)
        values[np.abs(values).argmax()] *= 1.02
        values.tofile(path)
        return network

    monkeypatch.setattr(compose, "write_weights", corrupt)
    out = tmp_path / "bad.diffx"
    with pytest.raises(
        ParityError, match=r"parity checks failed; the worst is .* at sigma .* relative L2 .*limit"
    ) as caught:
        diffexport.export(*toy("plain"), out, max_batch=4)
    assert "No bundle was written" in str(caught.value)
    assert list(tmp_path.iterdir()) == []

    bundle = write.export(*toy("plain"), out, max_batch=4, allow_mismatch=True)
    assert not bundle.certificate().passed
    findings = verify(out)
    assert failed(findings)[:2] == ["certificate", "golden cases on ort"]
    assert "--allow-mismatch" in findings[1].detail


def test_a_module_that_does_not_fit_its_spec_is_refused(toy, tmp_path):
    import msgspec

    module, spec = toy("plain")
    with pytest.raises(ExportError, match=r"returns samples of shape \(2, 6, 6\), its spec says \(4, 6, 6\)"):
        diffexport.export(module, msgspec.structs.replace(spec, variance="learned"), tmp_path / "x.diffx")
    assert list(tmp_path.iterdir()) == []


def test_a_module_whose_batch_is_fixed_is_refused(toy, tmp_path):
    import torch

    module, spec = toy("plain")

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x, c_noise, label):
            first, second = torch.cat([x, x]).chunk(2)  # the exporter's trap: a static batch without a word
            return self.inner(0.5 * (first + second), c_noise, label)

    with pytest.raises(ExportError, match=r"batch of .* is fixed at 3"):
        diffexport.export(Fixed(), spec, tmp_path / "x.diffx")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_checked_at_batch_one_alone_verifies(toy, tmp_path):
    """As that of every large model is, whose whole runs are compared at the smallest batch."""
    module, spec = toy("plain")
    bundle = diffexport.export(module, spec, tmp_path / "x.diffx", max_batch=1)
    assert len(bundle.golden()["run.x"]) == 1
    findings = diffexport.verify(bundle.path)
    assert all(finding.passed for finding in findings), findings


def test_an_export_replaces_a_bundle_but_nothing_else(toy, tmp_path):
    out = tmp_path / "again.diffx"
    diffexport.export(*toy("points"), out, max_batch=2)
    diffexport.export(*toy("points"), out, max_batch=3)
    assert diffexport.load(out).manifest.max_batch == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="not a bundle"):
        diffexport.export(*toy("points"), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.diffx", "mine"]


def test_an_interrupted_write_leaves_the_old_state(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "a").write_text("old")
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing_folder(folder) as work:
        (work / "a").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), replacing_file(file) as work:
        work.write_text("half")
        raise KeyboardInterrupt
    assert ((folder / "a").read_text(), file.read_text()) == ("old", "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_left_overs_of_a_killed_process_are_removed_by_the_next(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left_over = tmp_path / f".b.diffx.{dead.pid}.abc"
    left_over.mkdir()
    with replacing_folder(tmp_path / "b.diffx") as work:
        (work / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["b.diffx"]


def test_every_error_of_the_library_is_in_one_tree():
    for kind in (BundleError, ExportError, ParityError, ShapeError):
        assert issubclass(kind, DiffexportError)


def test_every_backend_that_is_named_is_checked(toy_bundle, diffx):
    """The last one alone was, and nothing said so."""
    path = toy_bundle("plain").path
    named = ("--backend", "openvino", "--backend", "ort", "--backend", "openvino")
    status, out, _ = diffx("verify", path, *named)
    assert status == 0
    assert re.findall(r"golden cases on (\w+)", out) == ["openvino", "ort"]
    assert_refused(diffx("verify", path, "--backend", "ortt", "--backend", "ort"), "did you mean 'ort'")
    assert_refused(diffx("verify", path, "--backend", "ortt", "--backend", "all"), "did you mean 'ort'")
