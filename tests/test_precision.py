"""Half precision: what is half in the graphs, what it costs, and what happens where half is not enough.

Three trained models: models/digits.pt (DiT, v), tests/trained/unet.pt (U-Net, eps) and tests/trained/official.safetensors
(official DiT, eps with learned variance), the last two by scripts/train-precision.
"""

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from refusals import assert_refused
from torch import nn

import diffexport
from diffexport.backends.onnxruntime import run_graph
from diffexport.backends.rounding import rounded
from diffexport.bundle import Bundle
from diffexport.comparison import compare, scope_of
from diffexport.errors import ExportError, ParityError
from diffexport.exporter.islands import fewest
from diffexport.exporter.precision import KEPT_OPERATORS
from diffexport.plan import COLUMNS
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport.spec import ModelSpec
from diffexport.verification import verify
from diffexport_reference.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[1]
TRAINED = {
    "dit": ROOT / "models/digits.pt",
    "unet": ROOT / "tests/trained/unet.pt",
    "official": ROOT / "tests/trained/official.safetensors",
}
TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
FLOATS = {onnx.TensorProto.FLOAT, *TYPES.values()}


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory):
    """``half_bundle(name, precision)``: one of the trained models, exported once."""
    made = {}

    def make(name, precision):
        if (name, precision) not in made:
            out = tmp_path_factory.mktemp("half") / f"{name}-{precision}.diffx"
            made[name, precision] = diffexport.export(*load_checkpoint(TRAINED[name]), out, precision=precision)
        return made[name, precision]

    return make


def typed(path):
    """Every node of a graph with the types of its floating inputs and outputs, as ONNX's own inference finds them."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    types.update({weight.name: weight.data_type for weight in graph.initializer})
    for node in graph.node:
        read, written = (
            {types[name] for name in names if types.get(name) in FLOATS} for names in (node.input, node.output)
        )
        yield node, read, written


def test_a_trained_network_that_predicts_eps_exports_in_fp32(half_bundle):
    """At its largest sigma D differs by more than 1e-5 of itself, by the rounding of fp32 alone."""
    assert half_bundle("official", "fp32").certificate().passed


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", TRAINED)
def test_parity_holds_on_trained_weights(half_bundle, name, precision):
    """Every value rounded, over single steps, the loop in one call and whole runs; see DESIGN's limits in parity.LIMITS."""
    certificate = half_bundle(name, precision).certificate()
    assert certificate.precision == precision
    assert certificate.passed
    assert {m.batch for m in certificate.measurements} >= {1, 8, 16}
    runs = [m.psnr for m in certificate.measurements if m.psnr is not None]
    assert min(runs) > {"fp16": 40, "bf16": 30}[precision]
    steps = [m.relative_l2 for m in certificate.measurements if m.limit < 1]
    assert max(steps) > {"fp16": 1e-4, "bf16": 1e-3}[precision], "nothing was rounded"


@pytest.mark.parametrize("name", TRAINED)
def test_onnx_runtime_runs_float16_itself(half_bundle, name):
    """With its own kernels, as a user's `diffx sample` does; the golden cases hold PyTorch's results."""
    assert all(finding.passed for finding in verify(half_bundle(name, "fp16").path))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", TRAINED)
def test_graphs_are_half_but_for_the_islands(half_bundle, name, precision):
    bundle, half = half_bundle(name, precision), TYPES[precision]
    counted = {"half": 0, "kept": 0}
    for node, read, written in typed(bundle.graph("step")):
        if not node.name.startswith("net/") or node.op_type == "Cast":
            continue
        if node.op_type in KEPT_OPERATORS:
            assert written == {onnx.TensorProto.FLOAT}, node.name
            counted["kept"] += 1
        elif node.op_type in ("Conv", "Gemm", "MatMul", "Gelu", "Sigmoid"):
            assert read == written == {half}, node.name
            counted["half"] += 1
    assert counted["half"] > 30
    assert counted["kept"] > 10
    model = onnx.load(bundle.graph("step"), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)
    stored = dict.fromkeys(FLOATS, 0)
    for weight in model.graph.initializer:
        if weight.data_type in FLOATS:
            stored[weight.data_type] += math.prod(weight.dims)
    assert stored[half] > 100 * stored[onnx.TensorProto.FLOAT] > 0, "norms' own weights and frequencies stay fp32"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_weights_take_half_the_room(half_bundle, tmp_path, precision):
    full = diffexport.export(*load_checkpoint(TRAINED["dit"]), tmp_path / "full.diffx")
    sizes = [(bundle.path / "weights.bin").stat().st_size for bundle in (half_bundle("dit", precision), full)]
    assert sizes[0] / sizes[1] < 0.502


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", TRAINED)
def test_everything_is_finite(half_bundle, name, precision, rng):
    bundle = half_bundle(name, precision)
    for batch in (1, 2, 7, bundle.manifest.max_batch):
        for sigma in (0.002, 0.05, 1.0, 20.0, 160.0):
            feeds = {
                "x": (np.hypot(1, sigma) * rng.standard_normal((batch, *bundle.spec.shape))).astype(np.float32),
                "sigma": np.full(batch, sigma, np.float32),
                "label": np.arange(batch) % 10,
                "guidance": np.full(batch, 4.0, np.float32),
            }
            assert np.isfinite(run_graph(bundle.graph("denoiser"), feeds, rounded=True)["denoised"]).all()


def overflowing():
    """The trained DiT with the hidden values of one MLP made 20,000 times as large, and its result what it was."""
    module, spec = load_checkpoint(TRAINED["dit"])
    first, _, second = module.blocks[2].mlp
    with torch.no_grad():
        first.weight.mul_(2e4)
        first.bias.mul_(2e4)
        second.weight.div_(2e4)
    return module, spec


def test_an_overflow_is_seen_and_its_layer_named(tmp_path):
    with pytest.raises(
        ParityError, match=r"nan.*blocks\.2\.mlp\.0 reaches .* beyond float16's 65504.*--keep-fp32 auto"
    ):
        diffexport.export(*overflowing(), tmp_path / "out.diffx", precision="fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", ["blocks.2.mlp", "blocks.?.mlp", "auto"])
def test_layers_kept_in_fp32_mend_it(tmp_path, keep):
    bundle = diffexport.export(*overflowing(), tmp_path / "out.diffx", precision="fp16", keep_fp32=[keep])
    assert bundle.certificate().passed
    if keep == "auto":
        assert bundle.manifest.keep_fp32 == tuple(f"blocks.2.mlp.{k}" for k in range(3))
        assert list(tmp_path.iterdir()) == [bundle.path]


def test_a_weight_beyond_half_is_said(tmp_path):
    module, spec = load_checkpoint(TRAINED["dit"])
    with torch.no_grad():
        module.blocks[1].attn.proj.bias[0] = 1e6
    with pytest.raises(ExportError, match=r"blocks\.1\.attn\.proj\.bias: its largest weight, 1e\+06, lies beyond"):
        diffexport.export(module, spec, tmp_path / "out.diffx", precision="fp16")
    assert list(tmp_path.iterdir()) == []


class Offset(nn.Module):
    """Adds much and takes it away: harmless in fp32, and the end of every digit in half."""

    def forward(self, x):
        return (x + 200) - 200


class Rounding(nn.Module):
    """A network one of whose four layers cannot be half, and not because anything overflows."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.offset, self.act = Offset(), nn.Tanh()

    def forward(self, x, c_noise):
        return self.last(self.offset(self.act(self.first(x) + 0.1 * torch.log1p(c_noise)[:, None, None, None])))


SMALL = ModelSpec(family="small", shape=(1, 4, 4), prediction="v", scaled=True, schedule=DEFAULT_SCHEDULES["ddpm"])


def test_the_search_finds_the_one_layer_that_rounding_spoils(tmp_path):
    torch.manual_seed(0)
    module, out = Rounding().eval(), tmp_path / "out.diffx"
    with pytest.raises(ParityError, match="--keep-fp32 auto"):
        diffexport.export(module, SMALL, out, precision="fp16", max_batch=2)
    bundle = diffexport.export(module, SMALL, out, precision="fp16", max_batch=2, keep_fp32=["auto"])
    assert bundle.manifest.keep_fp32 == ("offset",)
    assert Bundle.open(out).certificate().passed


def test_a_pattern_that_names_nothing_is_refused(tmp_path):
    with pytest.raises(
        ExportError, match=r"keep-fp32 'blocks\.2\.mpl': no layer has this name; there is 'blocks\.2\.mlp"
    ):
        diffexport.export(
            *load_checkpoint(TRAINED["dit"]), tmp_path / "out.diffx", precision="fp16", keep_fp32=["blocks.2.mpl"]
        )
    assert list(tmp_path.iterdir()) == []


def test_rounding_rounds_every_value():
    """Against NumPy: 2049 is no float16, and 70000 lies beyond it, though the next operator would bring it back."""
    helper, half, full = onnx.helper, onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=half),
        helper.make_node("Add", ["a", "one"], ["b"]),
        helper.make_node("Mul", ["b", "big"], ["c"]),
        helper.make_node("Div", ["c", "big"], ["d"]),
        *(helper.make_node("Cast", [name], [f"{name}.out"], to=full) for name in "bd"),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.array(value, np.float16), name) for name, value in (("one", 1), ("big", 35))
    ]
    values = [helper.make_tensor_value_info(name, full, [2]) for name in ("x", "b.out", "d.out")]
    graph = helper.make_graph(nodes, "half", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    session = onnxruntime.InferenceSession(rounded(model).SerializeToString())
    b, d = session.run(None, {"x": np.array([2048, 1], np.float32)})
    x = np.array([2048, 1], np.float16)
    with np.errstate(over="ignore"):
        expected = (x + np.float16(1)) * np.float16(35) / np.float16(35)
    np.testing.assert_array_equal(b, (x + np.float16(1)).astype(np.float32))
    np.testing.assert_array_equal(d, expected.astype(np.float32))
    assert np.isinf(d[0])


def test_errors_are_measured_beside_what_the_network_puts_in(half_bundle):
    """At the largest sigma of an eps model D is a small difference of two large terms; one part in 100 of G is seen."""
    from diffexport.backends.onnxruntime import OnnxRuntimeSession

    bundle = half_bundle("unet", "fp16")

    class Off(OnnxRuntimeSession):
        def step(self, row, z=None):
            row = row.copy()
            row[COLUMNS.index("c_out")] *= 1.01
            super().step(row, z)

    reference, spoiled = (kind(bundle.spec, bundle.path, rounded=True) for kind in (OnnxRuntimeSession, Off))
    scope = scope_of(0, 1, 1)
    found = compare(reference, spoiled, bundle.spec, "fp16", scope, bundle.manifest.defaults).measurements
    large = [m for m in found if m.check.startswith("D at sigma 157")]
    assert len(large) == 2
    assert not any(m.passed for m in large)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fp16", "--bf16"], "precision: got fp16 and bf16; give one"),
        (["--fp16", "--precision", "fp32"], "precision: got fp16 and fp32; give one"),
        (["--fp16", "--keep-fp32", "blocks.9"], "keep-fp32 'blocks.9': no layer has this name"),
    ],
)
def test_bad_words_are_one_line(diffx, tmp_path, words, message):
    assert_refused(diffx("export", TRAINED["dit"], "--out", "o.diffx", *words), message)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_half(diffx):
    status, out, _ = diffx("export", TRAINED["unet"], "--fp16", "--out", "u.diffx")
    assert status == 0
    assert ", fp16\n" in out
    assert Bundle.open("u.diffx").manifest.precision == "fp16"
    status, out, _ = diffx(
        "sample", "u.diffx", "--labels", "3,4", "--steps", "4", "--backend", "ort", "--npz", "x.npz", "--out", "x.png"
    )
    assert status == 0
    assert np.isfinite(np.load("x.npz")["x"]).all()


@pytest.mark.parametrize(("layers", "enough"), [(n, k) for n in (1, 2, 3, 7, 40) for k in range(1, n + 2)])
def test_the_fewest_layers_that_are_enough_are_found(layers, enough):
    """For every number that may be enough, and where all are too few; a few trials where few are enough."""
    ranked, tried = [f"layer {k}" for k in range(layers)], []

    def holds(kept):
        tried.append(len(kept))
        return len(kept) >= enough

    assert fewest(ranked, holds, lambda *_: None) == tuple(ranked[:enough])
    assert tried[-1] == min(enough, layers)
    assert len(tried) <= 3 + 2 * math.log2(enough)
