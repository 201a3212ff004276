"""What the exporter does to a network so that less is computed: attention, conditions ahead, one half for two."""

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

import diffexport
from diffexport.backends import open_session
from diffexport.backends.conditions import Conditions
from diffexport.backends.onnxruntime import run_graph
from diffexport.backends.torch import TorchSession
from diffexport.exporter.attention import fuse_attention
from diffexport.exporter.trace import trace_network
from diffexport.noise import normal
from diffexport.parity import relative_l2
from diffexport.plan import make_plan
from diffexport.probes import mixing_row, probe_labels, run_plan
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport.spec import ModelSpec
from diffexport_reference.dit import DiT
from diffexport_reference.model import CondEmbedderLabel

SPEC = ModelSpec(
    family="DiT", shape=(1, 8, 8), prediction="eps", scaled=True, schedule=DEFAULT_SCHEDULES["ddpm"], num_classes=5
)
DEPTH = 2


@pytest.fixture(scope="module")
def small_dit():
    """A DiT whose scale of attention, 12^-0.5, is no power of two, with no weight left at zero."""
    torch.manual_seed(0)
    module = DiT(in_dim=8, channels=1, depth=DEPTH, head_dim=12, num_heads=2, cond_embed=CondEmbedderLabel(24, 5))
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return module.eval()


@pytest.fixture(scope="module")
def dit_bundle(small_dit, tmp_path_factory):
    return diffexport.export(small_dit, SPEC, tmp_path_factory.mktemp("dit") / "dit.diffx", max_batch=4)


def graph(bundle, name):
    return onnx.load(bundle.graph(name), load_external_data=False).graph


def test_attention_is_left_with_its_two_products(dit_bundle):
    nodes = graph(dit_bundle, "step").node
    makers = {name: node for node in nodes for name in node.output}
    softmaxes = [node for node in nodes if node.op_type == "Softmax"]
    assert len(softmaxes) == DEPTH
    for softmax in softmaxes:
        scores = makers[softmax.input[0]]
        assert scores.op_type == "MatMul"
        q, k = (makers[source] for source in scores.input)
        assert list(k.attribute[0].ints) == [0, 1, 3, 2]
        for moved in (q, makers[k.input[0]]):
            assert list(moved.attribute[0].ints) == [0, 2, 1, 3]
    transposed = [list(node.attribute[0].ints) for node in nodes if node.op_type == "Transpose"]
    assert [2, 0, 3, 1, 4] not in transposed


class OtherAttention(nn.Module):
    """Queries of their own product; keys and values of one."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x, c_noise, label):
        k, v = self.kv(x[:, 0]).chunk(2, 2)
        scores = self.q(x[:, 0]) @ k.transpose(1, 2)
        return (torch.softmax(scores, 2) @ v)[:, None] + c_noise[:, None, None, None]


def test_another_attention_is_left_alone():
    model = trace_network(OtherAttention(), SPEC)
    assert sum(node.op_type == "Softmax" for node in model.graph) == 1
    assert fuse_attention(model) == 0


def test_every_modulation_is_in_the_condition(dit_bundle, small_dit):
    """Six vectors a block and two at the end; the steps that take the condition have no weight of a modulation."""
    (condition,) = graph(dit_bundle, "conditioning").output
    assert condition.type.tensor_type.shape.dim[1].dim_value == (6 * DEPTH + 2) * 24
    weights = {weight.name for weight in graph(dit_bundle, "step").initializer}
    ahead = {weight.name for weight in graph(dit_bundle, "step_conditioned").initializer}
    assert any("modulation" in name for name in weights)
    assert not any("modulation" in name or "embed.mlp" in name for name in ahead)
    assert "label" not in {value.name for value in graph(dit_bundle, "step_conditioned").input}


@pytest.mark.parametrize("mode", ["latency", "throughput"])
@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_a_step_whose_condition_was_computed_ahead_is_the_step(dit_bundle, small_dit, mode, weight):
    session = open_session(dit_bundle, "openvino", threads=2, mode=mode)
    reference, ort = TorchSession(small_dit, SPEC), open_session(dit_bundle, "ort")
    rows = np.stack([mixing_row(SPEC, sigma, weight) for sigma in (9.0, 0.5, 0.5, 2.0)])
    for batch in (1, 3):
        x, h, z = normal(0, range(batch), range(3), SPEC.shape)
        for each in (reference, ort, session):
            each.begin(x, probe_labels(SPEC, range(batch)), h, rows)
            for row in rows:
                each.step(row, z)
        for found in (session.state(), ort.state()):
            for a, b in zip(found, reference.state(), strict=True):
                assert relative_l2(a, b) < 5e-6


def test_a_run_of_another_batch_or_plan_has_its_own_conditions(dit_bundle, small_dit):
    """Conditions are kept between runs and must not be taken for another's."""
    session, reference = open_session(dit_bundle, "ort"), TorchSession(small_dit, SPEC)
    for labels, rows in (([3, 1], [9.0, 1.0]), ([1, 3], [9.0, 1.0]), ([4, 0], [9.0, 1.0]), ([4, 0], [5.0, 1.0])):
        table = np.stack([mixing_row(SPEC, sigma, 2.0) for sigma in rows])
        x, z = normal(0, range(2), range(2), SPEC.shape)
        for each in (session, reference):
            each.begin(x, np.array(labels), rows=table)
            for row in table:
                each.step(row, z)
        assert relative_l2(session.state()[0], reference.state()[0]) < 5e-6


def test_conditions_beyond_the_limit_of_memory_are_computed_as_the_run_goes(dit_bundle, monkeypatch):
    plan = make_plan(SPEC, "heun", 6, 2.0)
    session = open_session(dit_bundle, "ort")
    expected = run_plan(session, SPEC, plan, range(3))
    computed = []
    real = Conditions._computed
    monkeypatch.setattr(
        Conditions, "_computed", lambda self, noises: computed.append(len(noises)) or real(self, noises)
    )
    width = (6 * DEPTH + 2) * 24
    for at_once, calls in ((1 << 26, 2), (4 * width * 4 * 2, 4)):
        monkeypatch.setattr("diffexport.backends.conditions._AT_ONCE", at_once)
        computed.clear()
        fresh = open_session(dit_bundle, "ort")
        assert np.array_equal(run_plan(fresh, SPEC, plan, range(3)), expected)
        assert len(computed) == calls
        computed.clear()
        run_plan(fresh, SPEC, plan, range(3))
        assert bool(computed) == (at_once < 1 << 26), "what fits is kept for the next batch"


def test_what_depends_on_x_alone_is_computed_once_for_both_halves(toy_bundle):
    nodes = graph(toy_bundle("plain"), "step").node
    first = next(node for node in nodes if node.op_type == "Conv")
    readers = [node for node in nodes if first.output[0] in node.input]
    assert first.input[1] == "net.first.weight"
    assert [node.op_type for node in readers] == ["Concat"]
    assert list(readers[0].input) == [first.output[0]] * 2


def test_conditions_of_a_network_without_labels(tmp_path):
    """A condition of the noise level alone, with a row of its own for each sample."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.noise = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(1, 1)

        def forward(self, x, c_noise):
            return torch.tanh(self.conv(x)) * self.noise(torch.log1p(c_noise)[:, None])[:, :, None, None]

    spec = ModelSpec(family="mine", shape=(1, 4, 4), prediction="eps", schedule=DEFAULT_SCHEDULES["ddpm"])
    torch.manual_seed(0)
    bundle = diffexport.export(Network(), spec, tmp_path / "n.diffx", max_batch=2)
    assert "conditioning" in bundle.manifest.graphs
    feeds = {"c_noise": np.array([0.5, 7.0], np.float32)}
    assert run_graph(bundle.graph("conditioning"), feeds)["condition"].shape == (2, 1)


class Upsampling(nn.Module):
    """A convolution after an upsampling, then one that brings other sizes back."""

    def __init__(self, kernel=3, mode="nearest", scale=2.0, stride=1, **options):
        super().__init__()
        self.mode, self.scale = mode, scale
        self.first = nn.Conv2d(1, 6, kernel, padding=kernel // 2, stride=stride, **options)
        self.last = nn.Conv2d(6, 1, 3, stride=int(scale) // stride, padding=1)

    def forward(self, x, c_noise, label):
        x = self.first(nn.functional.interpolate(x, scale_factor=self.scale, mode=self.mode))
        return self.last(x) + (c_noise + label)[:, None, None, None]


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_a_doubled_image_is_computed_before_the_doubling(bias):
    torch.manual_seed(0)
    module = Upsampling(bias=bias).eval()
    model = onnx_ir.to_proto(trace_network(module, SPEC))
    kernels = [
        list(attribute.ints)
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "kernel_shape"
    ]
    assert kernels == [[2, 2]] * 4 + [[3, 3]]
    x, c_noise, label = torch.randn(3, *SPEC.shape), torch.tensor([0.5, 2.0, 9.0]), torch.tensor([1, 2, 0])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"net.x": x.numpy(), "net.c_noise": c_noise.numpy(), "net.label": label.numpy()})
    with torch.inference_mode():
        assert relative_l2(found, module(x, c_noise, label).numpy()) < 1e-6


@pytest.mark.parametrize(
    "options",
    [{"kernel": 5}, {"mode": "bilinear"}, {"scale": 3.0}, {"padding_mode": "circular"}, {"stride": 2}],
    ids=str,
)
def test_another_upsampling_is_left_alone(options):
    model = trace_network(Upsampling(**options), SPEC)
    assert "DepthToSpace" not in {node.op_type for node in model.graph}
