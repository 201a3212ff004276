"""Faults planted in every part of the toolkit, and what catches each: export, or a check of ``diffx verify``.

A fault of the exporter is planted in what writes the graphs, so that PyTorch stays right. A fault of a bundle comes with
hashes that were mended, since a hash would see any of them. A fault of the runtime is planted after export.
"""

import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir
import pytest
import torch
from conftest import ToyNetwork
from mending import edit_json, rehash

import diffexport
from diffexport import comparison, probes
from diffexport.backends import onnxruntime as ort
from diffexport.bundle import CERTIFICATE, GOLDEN, MANIFEST, PLANS, WEIGHTS, Bundle, read_tensors, write_tensors
from diffexport.engines.build import build
from diffexport.errors import ParityError
from diffexport.exporter import compose, graphs, trace
from diffexport.exporter.builder import GraphBuilder
from diffexport.verification import verify
from diffexport_reference.dit import DiT
from diffexport_reference.model import CondEmbedderLabel

# --- faults of the exporter: how they are planted, and in the export of what


def builder(change):
    """Every operator that the exporter puts around a network goes through ``change(builder, honest, kind, ...)``."""

    def plant(patch):
        honest = GraphBuilder.op

        def op(self, kind, *inputs, **rest):
            return change(self, lambda *words, **more: honest(self, *words, **more), kind, *inputs, **rest)

        patch.setattr(GraphBuilder, "op", op)

    return plant


def adding(change):
    """Every operator with named outputs goes through ``change(kind, inputs, attributes)``, which alters these."""

    def plant(patch):
        honest = GraphBuilder.add

        def add(self, kind, inputs, outputs, **attributes):
            change(self, kind, inputs, attributes)
            honest(self, kind, inputs, outputs, **attributes)

        patch.setattr(GraphBuilder, "add", add)

    return plant


def traced(change):
    """The traced network is altered before it is written."""

    def plant(patch):
        honest = trace.trace_network

        def altered(module, spec):
            model = honest(module, spec)
            change(model)
            return model

        patch.setattr(trace, "trace_network", altered)

    return plant


def stored(change):
    """The bytes of the weights are altered when they are written."""

    def plant(patch):
        honest = compose.write_weights

        def altered(model, path):
            network = honest(model, path)
            change(np.fromfile(path, np.float32)).astype(np.float32).tofile(path)
            return network

        patch.setattr(compose, "write_weights", altered)

    return plant


def columns_swapped(a, b):
    def plant(patch):
        names = list(graphs.COLUMNS)
        i, j = names.index(a), names.index(b)
        names[i], names[j] = names[j], names[i]
        patch.setattr(graphs, "COLUMNS", tuple(names))

    return plant


def spec_of_step(**changes):
    """The step graph is made for a model with other facts."""

    def plant(patch):
        honest = compose.step_graph
        patch.setattr(
            compose, "step_graph", lambda n, spec, **rest: honest(n, msgspec.structs.replace(spec, **changes), **rest)
        )

    return plant


def decoder_of(**changes):
    def plant(patch):
        honest = compose.decoder_graph
        patch.setattr(
            compose, "decoder_graph", lambda n, spec, c: honest(n, msgspec.structs.replace(spec, **changes), c)
        )

    return plant


def _halves_swapped(b, op, kind, *inputs, outputs=1, **rest):
    result = op(kind, *inputs, outputs=outputs, **rest)
    return result[::-1] if kind == "Split" and outputs == 2 else result


def _backwards(b, op, kind, *inputs, **rest):
    return op(kind, *(inputs[::-1] if kind == "Sub" else inputs), **rest)


def _variance_upside_down(b, op, kind, *inputs, **rest):
    return op("Exp", op("Neg", *inputs)) if kind == "Exp" else op(kind, *inputs, **rest)


def _null_label_is_the_last_class(patch):
    honest = GraphBuilder.constant

    def constant(self, value, dtype=np.float32):
        return honest(self, [4] if dtype is np.int64 and np.array_equal(value, [5]) else value, dtype)

    patch.setattr(GraphBuilder, "constant", constant)


def _one_row_less(self, kind, inputs, attributes):
    if kind == "Loop":
        inputs[0] = self.op("Sub", inputs[0], self.constant(1, np.int64))


def _branches_swapped(self, kind, inputs, attributes):
    if kind == "If":
        attributes["then_branch"], attributes["else_branch"] = attributes["else_branch"], attributes["then_branch"]


def _row_before(b, op, kind, *inputs, **rest):
    """Row i - 1 in place of row i; the first reads the last."""
    if kind == "Gather" and inputs[0] == "plan":
        inputs = inputs[0], op("Sub", inputs[1], b.constant(1, np.int64))
    return op(kind, *inputs, **rest)


def _same_noise(b, op, kind, *inputs, **rest):
    return op("Sub", inputs[0], inputs[0]) if kind == "Mod" else op(kind, *inputs, **rest)


def _renamed(**kinds):
    def change(model):
        found = [node for node in model.graph if node.op_type in kinds]
        assert found
        for node in found:
            node.op_type = kinds[node.op_type]

    return change


def _patches_transposed(model):
    """The two axes of a patch change places where patches become an image again."""
    last = [node for node in model.graph if node.op_type == "Transpose" and len(node.attributes["perm"].as_ints()) == 6]
    assert last
    perm = list(last[-1].attributes["perm"].as_ints())
    a, b = perm.index(3), perm.index(4)
    perm[a], perm[b] = perm[b], perm[a]
    last[-1].attributes["perm"] = onnx_ir.AttrInt64s("perm", perm)


def _over_queries(model):
    """Attention that is normalized over the queries."""
    found = [node for node in model.graph if node.op_type == "Softmax"]
    assert found
    for node in found:
        node.attributes["axis"] = onnx_ir.AttrInt64("axis", -2)


class Mixing(ToyNetwork):
    """Samples of a batch are not independent, as with a normalization over the batch."""

    def forward(self, x, c_noise, label=None):
        return super().forward(x - x.mean(0, keepdim=True), c_noise, label)


class Unknown(ToyNetwork):
    """One weight is NaN."""

    def __init__(self):
        super().__init__()
        self.first.weight.data[0, 0, 0, 0] = torch.nan


def _nothing(patch):
    pass


EXPORT = {
    "swapped guidance halves": ("plain", builder(_halves_swapped)),
    "guidance in the other direction": ("plain", builder(_backwards)),
    "wrong null label": ("plain", _null_label_is_the_last_class),
    "guidance on one channel too many": ("variance", spec_of_step(guided_channels=2)),
    "clamp left out": ("variance", spec_of_step(clip=None)),
    "clamp of another width": ("variance", spec_of_step(clip=1.4)),
    "learned variance upside down": ("variance", builder(_variance_upside_down)),
    "c_skip and c_out swapped": ("plain", columns_swapped("c_skip", "c_out")),
    "noise level and input scale swapped": ("plain", columns_swapped("c_in", "c_noise")),
    "history read with the weight of the estimate": ("plain", columns_swapped("x_d", "x_h")),
    "history written with swapped weights": ("plain", columns_swapped("h_x", "h_d")),
    "noise added in the wrong amount": ("plain", columns_swapped("x_z", "h_h")),
    "loop reads the row before": ("plain", builder(_row_before)),
    "loop drops the last row": ("plain", adding(_one_row_less)),
    "loop guides the rows without guidance": ("plain", adding(_branches_swapped)),
    "loop adds the same noise in every row": ("plain", builder(_same_noise)),
    "sin and cos swapped": ("plain", traced(_renamed(Sin="Cos", Cos="Sin"))),
    "another activation": ("plain", traced(_renamed(Tanh="Softsign"))),
    "transposed patch order": ("dit", traced(_patches_transposed)),
    "attention over the wrong axis": ("dit", traced(_over_queries)),
    "weights rounded to half": ("plain", stored(lambda w: w.astype(np.float16))),
    "weights shifted by one number": ("plain", stored(lambda w: np.roll(w, 1))),
    "wrong scale of latents": ("decoded", decoder_of(scaling_factor=0.18215)),
    "wrong shift of latents": ("decoded", decoder_of(shift=0.0)),
    "samples of a batch that are not independent": ("mixing", _nothing),
    "a weight that is NaN": ("nan", _nothing),
    "fp16 overflow": ("overflow", _nothing),
}
IN_HALF = ("overflow",)


def _scale_hidden(mlp, factor):
    """Hidden values of an MLP as many times as large, beyond what half holds, and its result what it was."""
    first, _, second = mlp
    with torch.no_grad():
        first.weight.mul_(factor)
        first.bias.mul_(factor)
        second.weight.div_(factor)


@pytest.fixture
def model(toy, toy_decoder):
    """``model(name)`` gives a module, its spec and the decoder of what is exported."""

    def make(name):
        if name == "decoded":
            return *toy("variance"), toy_decoder()
        torch.manual_seed(0)
        spec = toy("plain")[1]
        if name in ("dit", "overflow"):
            network = DiT(8, 2, patch_size=2, depth=1, head_dim=8, num_heads=2, cond_embed=CondEmbedderLabel(16, 5))
            for parameter in network.parameters():  # final layers start at zero, where nothing can be seen
                torch.nn.init.normal_(parameter, std=0.3)
            if name == "overflow":
                _scale_hidden(network.blocks[0].mlp, 4e4)
            return network.eval(), msgspec.structs.replace(spec, shape=(2, 8, 8)), None
        others = {"mixing": Mixing, "nan": Unknown}
        return (others[name]().eval(), spec, None) if name in others else (*toy(name), None)

    return make


@pytest.fixture(scope="module")
def traces():
    return {}


@pytest.mark.parametrize("brief", [False, True], ids=["whole", "brief"])
@pytest.mark.parametrize("name", EXPORT)
def test_export_refuses(name, brief, model, traces, tmp_path, monkeypatch):
    """Also where a comparison covers as little as that of a model whose every evaluation takes seconds."""
    what, plant = EXPORT[name]
    if brief:
        monkeypatch.setattr(comparison, "HEAVY_PARAMETERS", 0)
        monkeypatch.setattr(comparison, "VAST_PARAMETERS", 0)
    honest = trace.trace_network

    def traced_once(module, spec):
        """Tracing is most of an export of a toy, and the same for every fault."""
        if what not in traces:
            traces[what] = onnx_ir.serde.serialize_model(honest(module, spec))
        return onnx_ir.serde.deserialize_model(traces[what])

    monkeypatch.setattr(trace, "trace_network", traced_once)
    plant(monkeypatch)
    module, spec, decoder = model(what)
    with pytest.raises(ParityError, match="parity checks failed"):
        precision = "fp16" if what in IN_HALF else "fp32"
        diffexport.export(module, spec, tmp_path / "bad.diffx", decoder=decoder, precision=precision, max_batch=3)
    assert list(tmp_path.iterdir()) == []


def test_export_accepts_the_same_without_faults(model, tmp_path):
    module, spec, decoder = model("dit")
    diffexport.export(module, spec, tmp_path / "dit.diffx", decoder=decoder, max_batch=3)


# --- faults of a bundle, of its runtime, and of what belongs together: what ``diffx verify`` says of them

GOLDEN_ORT, OTHER = "golden cases on ort", "golden cases of the other graphs"


def replaced(*names):
    """Files of a bundle of other weights in the place of its own."""

    def plant(path, other, patch):
        for name in names:
            shutil.copy(other / name, path / name)
            rehash(path, name)

    return plant


def tensors(file, change):
    def plant(path, other, patch):
        held = {name: array.copy() for name, array in read_tensors(path / file).items()}
        change(held)
        write_tensors(path / file, held)
        rehash(path, file)

    return plant


def manifest(change):
    def plant(path, other, patch):
        edit_json(path / MANIFEST, change)
        rehash(path)

    return plant


def certificate(change):
    return lambda path, other, patch: edit_json(path / CERTIFICATE, change)


def model_of_manifest(**changes):
    return manifest(lambda m: m["model"].update(changes))


def runtime(place, name, change):
    """A fault of this package itself, after export."""

    def plant(path, other, patch):
        patch.setattr(place, name, change(getattr(place, name)))

    return plant


def _plain_graph_for_guided_rows(path, other, patch):
    shutil.copy(path / "step_plain.onnx", path / "step.onnx")
    rehash(path, "step.onnx")


def _drop_row(plans):
    plans["ddim.20"] = np.delete(plans["ddim.20"], 7, 0)


def _reverse(plans):
    plans["ddim.20"] = plans["ddim.20"][::-1]


def _scale_start(plans):
    plans["euler.10.x_scale"] *= 2


def _loosen(c):
    c["measurements"][0] |= {"relative_l2": 0.5, "limit": 1.0}


def _pretend(c):
    c["measurements"][0]["relative_l2"] = 0.5


def _stale_engine(path, other, patch):
    """A real engine, built by TensorRT for RTX from the other model."""
    bundle = Bundle.open(shutil.copytree(other, path.with_name("other.diffx")))
    build(bundle, "trt-rtx", targets=["sm86"], batches="1", graphs=["step"])
    shutil.copytree(bundle.path / "engines", path / "engines")


def _keep_labels(begin):
    """The labels of the first batch stay for the next one of its size."""

    def faulty(self, x, label, h=None, **rest):
        again = self._state is not None and len(self._state.label) == len(x)
        begin(self, x, self._state.label if again else label, h, **rest)

    return faulty


def _keep_history(begin):
    return lambda self, x, label, h=None, **rest: begin(self, x, label, None, **rest)


def _never_swapped(step):
    def faulty(self, row, z=None):
        step(self, row, z)
        self._state.current = 0

    return faulty


def _always_plain(session):
    return lambda self, name: session(self, "step_plain" if name == "step" else name)


VERIFY = {
    "weights of another model": (replaced(WEIGHTS), GOLDEN_ORT),
    "swapped label embeddings": (lambda path, other, patch: _swap_embeddings(path, "step.onnx", 0, 1), GOLDEN_ORT),
    "swapped label embeddings of the denoiser": (
        lambda path, other, patch: _swap_embeddings(path, "denoiser.onnx", 1, 2),
        OTHER,
    ),
    "guidance left out": (_plain_graph_for_guided_rows, GOLDEN_ORT),
    "loop of another model": (lambda path, other, patch: _of_other(path, other, "sampler.onnx"), GOLDEN_ORT),
    "denoiser of another model": (lambda path, other, patch: _of_other(path, other, "denoiser.onnx"), OTHER),
    "golden cases of another model": (replaced(GOLDEN), GOLDEN_ORT),
    "golden cases left out": (tensors(GOLDEN, lambda held: [held.pop(n) for n in list(held) if n < "t"]), GOLDEN_ORT),
    "golden cases without labels": (tensors(GOLDEN, lambda held: held.pop("step.0.label")), GOLDEN_ORT),
    "a row dropped from a plan": (tensors(PLANS, _drop_row), "plans"),
    "a plan that runs backwards": (tensors(PLANS, _reverse), "plans"),
    "a start of the wrong variance": (tensors(PLANS, _scale_start), "plans"),
    "a plan left out": (tensors(PLANS, lambda held: held.pop("heun.10")), "plans"),
    "another prediction": (model_of_manifest(prediction="eps"), "plans"),
    "input scaling left out": (model_of_manifest(scaled=False), "plans"),
    "another schedule": (model_of_manifest(schedule={"kind": "ldm", "start": 0.00085, "end": 0.012}), "plans"),
    "a reversed schedule": (model_of_manifest(schedule={"kind": "loglinear", "start": 10.0, "end": 0.02}), "files"),
    "one class too few": (model_of_manifest(num_classes=4), GOLDEN_ORT),
    "one class too many": (model_of_manifest(num_classes=6), GOLDEN_ORT),
    "a stale engine": (_stale_engine, "engines"),
    "a manifest changed afterwards": (lambda path, other, patch: edit_json(path / MANIFEST, _rename), "certificate"),
    "a certificate of another bundle": (
        lambda path, other, patch: shutil.copy(other / CERTIFICATE, path / CERTIFICATE),
        "certificate",
    ),
    "a certificate with loosened limits": (certificate(_loosen), "certificate"),
    "a certificate that passes what failed": (certificate(_pretend), "certificate"),
    "a certificate of nothing": (certificate(lambda c: c.update(measurements=[])), "certificate"),
    "sine and cosine swapped in the noise": (
        runtime(probes, "normal", lambda honest: lambda *a: _swap_pairs(honest(*a))),
        GOLDEN_ORT,
    ),
    "noise of the next sample": (
        runtime(probes, "normal", lambda honest: lambda s, i, d, shape: honest(s, [k + 1 for k in i], d, shape)),
        GOLDEN_ORT,
    ),
    "labels of the batch before": (runtime(ort.OnnxRuntimeSession, "begin", _keep_labels), GOLDEN_ORT),
    "history that is lost": (runtime(ort.OnnxRuntimeSession, "begin", _keep_history), GOLDEN_ORT),
    "a state that never advances": (runtime(ort.OnnxRuntimeSession, "step", _never_swapped), GOLDEN_ORT),
    "the graph without guidance for every row": (
        runtime(ort.OnnxRuntimeSession, "_session", _always_plain),
        GOLDEN_ORT,
    ),
}


def _rename(m):
    m["tools"]["torch"] = "0"


def _swap_pairs(normals):
    flat = normals.reshape(*normals.shape[:2], -1, 2)
    return flat[..., ::-1].reshape(normals.shape).copy()


def _of_other(path, other, graph):
    """A graph of another model with that model's weights, as it would be where two exports were mixed."""
    import onnx

    model = onnx.load(other / graph)
    (path / graph).write_bytes(model.SerializeToString())
    rehash(path, graph)


def _swap_embeddings(path, graph, a, b):
    import onnx

    model = onnx.load(path / graph)
    (table,) = [t for t in model.graph.initializer if list(t.dims) == [6, 16]]
    order = list(range(6))
    order[a], order[b] = b, a
    values = onnx.numpy_helper.to_array(table)[order]
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    (path / graph).write_bytes(model.SerializeToString())
    rehash(path, graph)


@pytest.fixture(scope="module")
def other_bundle(toy, tmp_path_factory):
    """The bundle of a model of the same shape with other weights."""
    torch.manual_seed(3)
    out = tmp_path_factory.mktemp("other") / "plain.diffx"
    return diffexport.export(ToyNetwork().eval(), toy("plain")[1], out, max_batch=2).path


@pytest.mark.parametrize("name", VERIFY)
def test_verify_says(name, toy_bundle, other_bundle, tmp_path, monkeypatch):
    plant, caught_by = VERIFY[name]
    path = tmp_path / "plain.diffx"
    shutil.copytree(toy_bundle("plain").path, path)
    plant(path, other_bundle, monkeypatch)
    findings = {finding.name: finding for finding in verify(path)}
    assert not findings[caught_by].passed
    assert "\n" not in findings[caught_by].detail


def test_the_page_counts_and_names_them():
    page = (Path(__file__).parent.parent / "docs" / "trust.md").read_text()
    counts = re.search(
        r"plants (\d+) faults.*?(\d+) are faults of the exporter.*? (\d+) are faults of a bundle", page, re.DOTALL
    )
    assert [int(count) for count in counts.groups()] == [len(EXPORT) + len(VERIFY), len(EXPORT), len(VERIFY)]
    rows = re.findall(r"^\| (.+?)(?: \(.+\))? \| (export|`diffx verify`, (.+?)) \|$", page, re.MULTILINE)
    assert len(rows) == 14
    for name, _, what in rows:
        if what:
            assert VERIFY[name][1].startswith(what)
        else:
            assert name in EXPORT
