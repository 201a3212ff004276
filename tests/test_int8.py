"""INT8: what the graphs hold, what it costs a trained model, and which layers stay fp32."""

import collections
from pathlib import Path

import numpy as np
import onnx
import pytest
from digits_quality import judge, make_judge
from onnx import numpy_helper
from refusals import assert_refused

import diffexport
from diffexport.backends.torch import TorchSession
from diffexport.engines.build import build
from diffexport.exporter.compose import Traced
from diffexport.exporter.islands import network_session
from diffexport.exporter.quantize import SAMPLES, Quantizer, visited_states
from diffexport.exporter.trace import trace_network
from diffexport.parity import psnr, relative_l2
from diffexport.plan import make_plan
from diffexport.sampler import Sampler
from diffexport.verification import verify
from diffexport_reference.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[1]
TRAINED = {"dit": ROOT / "models/digits.pt", "unet": ROOT / "tests/trained/unet.pt"}
STORED = ("step", "step_plain", "denoiser")


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory):
    """``int8_bundle(name)``: one of the trained models, exported once."""
    made = {}

    def make(name):
        if name not in made:
            out = tmp_path_factory.mktemp("int8") / f"{name}.diffx"
            made[name] = diffexport.export(*load_checkpoint(TRAINED[name]), out, precision="int8", max_batch=4)
        return made[name]

    return make


def products(path):
    """Products with a weight of a graph: name to (what is before its input, the weight's scales, its output channels)."""
    graph = onnx.load(path).graph
    made = {output: node for node in graph.node for output in node.output}
    weights = {weight.name: weight for weight in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        before, weight = (made.get(name) for name in node.input[:2])
        if weight is not None and weight.op_type == "DequantizeLinear" and weight.input[0] in weights:
            channels = weights[weight.input[0]].dims[0 if node.op_type == "Conv" else 1]
            found[node.name] = before, numpy_helper.to_array(weights[weight.input[1]]), channels
        elif node.input[1] in weights:
            found[node.name] = before, None, None
    return found, made, weights


@pytest.mark.parametrize("name", TRAINED)
def test_a_bundle_holds_the_limits_and_every_backend_runs_it(int8_bundle, name):
    bundle = int8_bundle(name)
    certificate = bundle.certificate()
    assert (certificate.passed, certificate.precision) == (True, "int8")
    runs = [m.psnr for m in certificate.measurements if m.psnr is not None]
    assert min(runs) >= 30
    findings = verify(bundle.path, ["ort", "openvino"])
    assert all(finding.passed for finding in findings), findings
    assert {f.name for f in findings} >= {"golden cases on ort", "golden cases on openvino"}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("graph", STORED)
def test_graphs_hold_what_tensorrt_takes(int8_bundle, name, graph):
    """Signed, symmetric, weights by output channel; nothing but products is int8; no convolution of a concatenation is."""
    bundle = int8_bundle(name)
    found, made, weights = products(bundle.graph(graph))
    int8 = {node for node, (_, scales, _) in found.items() if scales is not None}
    kept = {entry.layer for entry in bundle.certificate().quantization.layers if entry.kept}
    assert int8
    for node, (before, scales, channels) in found.items():
        layer = node.split("/")[1]
        reads_concatenation = layer in ("conv_in", "x_embed.proj") or ("ups." in layer and layer.endswith(".shortcut"))
        assert (node in int8) == (layer not in kept and not reads_concatenation), node
        if node in int8:
            assert before.op_type == "DequantizeLinear"
            assert made[before.input[0]].op_type == "QuantizeLinear"
            assert scales.shape == (channels,)
    for node in made.values():
        rounds = [name for name in node.input if name in made and made[name].op_type == "DequantizeLinear"]
        assert not rounds or node.name in int8, "what is beside a product reads values as they were"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = weights[node.input[2]]
            assert zero.data_type == onnx.TensorProto.INT8
            assert not numpy_helper.to_array(zero).any()


def test_norms_of_small_images_are_not_spread_a_channel_at_a_time(int8_bundle):
    """OpenVINO would take a loop a channel for it; the U-Net's images have 8x8 pixels and less."""
    graph = onnx.load(int8_bundle("unet").graph("step"), load_external_data=False).graph
    weights = {weight.name: list(weight.dims) for weight in graph.initializer}
    made = {output: node.op_type for node in graph.node for output in node.output}
    read = [name for node in graph.node if node.op_type in ("Add", "Mul") for name in node.input]
    assert sum(made.get(name) == "Expand" for name in read) == 2 * sum(
        node.op_type == "InstanceNormalization" for node in graph.node
    )
    assert not [name for name in read if weights.get(name, [])[1:] == [1, 1]]


@pytest.mark.parametrize("name", TRAINED)
def test_tensorrt_for_rtx_builds_it(int8_bundle, name):
    (built,) = build(int8_bundle(name), "trt-rtx", targets=["sm89"], batches="1-4", graphs=["step"])
    layers = built.engine.record.network.layers
    assert set(layers["QUANTIZE"]) == {"INT8"}
    assert sum(layers["DEQUANTIZE"].values()) > sum(layers["QUANTIZE"].values()) > 20


def test_weights_are_a_quarter_and_shared(int8_bundle, tmp_path):
    bundle = int8_bundle("dit")
    size = (bundle.path / "weights.bin").stat().st_size
    assert size < 0.32 * 4 * bundle.manifest.parameters
    assert all(graph.stat().st_size < 0.15 * size for graph in bundle.path.glob("*.onnx"))


def test_digits_are_recognised_as_before(int8_bundle):
    """The classifier's accuracy falls by at most one point, and runs stay above 25 dB."""
    bundle = int8_bundle("dit")
    module, _ = load_checkpoint(TRAINED["dit"])
    labels = np.repeat(np.arange(10), 20)
    settings = dict(labels=labels.tolist(), guidance_scale=2.0, steps=20, batch=100, seed=3)
    found = bundle.sampler().sample(**settings)
    expected = bundle.sampler("torch", module=module).sample(**settings)
    by = make_judge()
    assert judge(found, labels, by).accuracy >= judge(expected, labels, by).accuracy - 0.01
    assert psnr(found, expected) > 25


def test_calibration_sees_the_states_of_the_sampler(toy):
    """Every row of a run, both halves of guidance, several labels: compared with a sampler that shows its states."""
    module, spec = toy("plain")
    plan = make_plan(spec, "dpmpp-2m", 6, 2.0)
    feeds = visited_states(TorchSession(module, spec), spec, plan, lambda *_: None)
    seen = []
    sampler = Sampler(spec, TorchSession(module, spec))
    labels = feeds[0]["net.label"][:SAMPLES]
    sampler.sample(labels.tolist(), plan=plan, seed=1, on_state=lambda _row, x, _d: seen.append(x))
    assert len(feeds) == len(plan)
    assert set(labels) == {0, 1, 2, 3, 4}
    for feed, x, row in zip(feeds, seen, plan.rows, strict=True):
        np.testing.assert_allclose(feed["net.x"], np.concatenate([x, x]) * row[0], rtol=1e-4, atol=1e-4)
        assert feed["net.label"].tolist() == [*labels, *[spec.null_label] * SAMPLES]
        assert set(feed["net.c_noise"]) == {np.float32(row[1])}


def test_what_a_layer_costs_alone_is_what_a_network_with_it_alone_int8_costs(toy, tmp_path):
    """One session switches each layer to int8; beside networks quantized by themselves, on the same states."""
    module, spec = toy("plain")
    plan = make_plan(spec, "dpmpp-2m", 6, 2.0)
    feeds = visited_states(TorchSession(module, spec), spec, plan, lambda *_: None)
    spilled = Traced(trace_network(module, spec), spec, None).spilled(tmp_path)
    quantizer = Quantizer(spilled, tmp_path, feeds, (), lambda *_: None)
    quantizer.measure(lambda *_: None)
    assert {error.layer for error in quantizer.errors} == {"noise", "last"}
    shown = [feeds[k] for k in (0, 1, 2, 4, 5)]  # of six rows, evenly; 8 samples of 72 numbers are all needed
    expected = outputs_of(quantizer.quantized(quantizer.layers), shown)
    for error in quantizer.errors:
        alone = quantizer.quantized([layer for layer in quantizer.layers if layer != error.layer])
        found = relative_l2(outputs_of(alone, shown), expected)
        assert found > 1e-4
        assert error.relative_l2 == pytest.approx(found, rel=1e-3)


def outputs_of(network, feeds):
    run = network_session(network)
    return np.concatenate([run(feed)[0] for feed in feeds])


def test_layers_that_cost_most_stay_fp32_until_the_budget_is_met(tmp_path):
    module, spec = load_checkpoint(TRAINED["dit"])
    told = []
    bundle = diffexport.export(
        module, spec, tmp_path / "b.diffx", precision="int8", int8_psnr=47.0, max_batch=1,
        keep_fp32=["blocks.3"], progress=lambda what, _part: told.append(what),
    )  # fmt: skip
    found = bundle.certificate().quantization
    kept = [entry.kept for entry in found.layers]
    errors = [entry.relative_l2 for entry in found.layers]
    assert errors == sorted(errors, reverse=True)
    assert 0 < sum(kept) < len(kept)
    assert kept == sorted(kept, reverse=True), "the costliest come first"
    assert min(m.psnr for m in bundle.certificate().measurements if m.psnr is not None) >= 47
    assert not any(entry.layer.startswith("blocks.3.") for entry in found.layers)
    assert bundle.manifest.keep_fp32 == ("blocks.3", *(entry.layer for entry in found.layers if entry.kept))
    words = collections.Counter(what.split()[0] for what in told)
    assert words["int8"] == len(found.layers)
    assert words["calibrating"] == 21
    assert words["sampling"] == 20


@pytest.mark.parametrize(("words", "message"), [
    (("--int8", "--fp16"), "fp16 and int8; give one"),
    (("--int8", "--int8-psnr", "nan"), "int8_psnr nan"),
    (("--int8", "--keep-fp32", "blocks.9"), "no layer has this name"),
    (("--int8", "--keep-fp32", "*"), "no product with a weight is left"),
])  # fmt: skip
def test_bad_calls_are_one_line_and_write_nothing(diffx, tmp_path, words, message):
    assert_refused(diffx("export", TRAINED["dit"], *words), message)
    assert list(tmp_path.iterdir()) == []
