"""INT8: weights a channel at a time, activations a tensor at a time, as Q/DQ pairs that every runtime takes.

Products with a weight compute in int8: the quantizer of ONNX Runtime puts a QuantizeLinear and a DequantizeLinear before
each and stores its weight in int8. All scales are symmetric with zero point 0, which TensorRT needs; biases, attention
and everything else stay fp32. What activations span is measured on the states that the model's own sampler visits.

A convolution that reads a concatenation stays fp32, and so does one that reads the network's input, which is one where
guidance doubles the batch: OpenVINO 2026.4 takes the quantization through the concatenation and comes out with other
numbers, with a relative L2 of 0.31 of D for the first layer of models/digits.pt and above 1 for a U-Net's shortcuts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from diffexport.backends.session import Session
from diffexport.bundle import LayerError, Tensors
from diffexport.errors import ExportError
from diffexport.exporter.precision import layer_of, matches
from diffexport.exporter.rewrite import sides_of
from diffexport.exporter.trace import TRACED_OPSET
from diffexport.noise import normal
from diffexport.parity import relative_l2
from diffexport.plan import COLUMNS, Plan
from diffexport.probes import SEED, probe_labels
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    import onnx
    import onnx_ir

    from diffexport.exporter.compose import Traced

SAMPLES = 8
"""Runs whose states calibrate; a conditional network sees each state with its label and without."""

JUDGED_ROWS, JUDGED_NUMBERS = 5, 10_000
"""Of these states, those that the error of a single layer is measured on: rows from all parts of the run, and in each as
many samples as make so many numbers of output."""

QUANTIZED = ("Conv", "MatMul")

_SWITCHES = "net.int8"

_SMALL_IMAGE = 64
"""Pixels; see ``_spread_over_small_images``."""

_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": list(QUANTIZED),
}

Progress = Callable[[str, float], None]


def visited_states(reference: Session, spec: ModelSpec, plan: Plan, progress: Progress) -> list[Tensors]:
    """The network's inputs in each row of a run, both halves of guidance.

    The runs are not those that a bundle is compared on: their seed is another.
    """
    labels = probe_labels(spec, range(SAMPLES))
    draws = normal(SEED + 1, range(SAMPLES), range(1 + len(plan)), spec.shape)
    reference.begin(np.float32(plan.x_scale) * draws[0], labels)
    feeds: list[Tensors] = []
    for index, (row, z) in enumerate(zip(plan.rows.astype(np.float32), draws[1:], strict=True)):
        progress("sampling for calibration", index / len(plan))
        r = dict(zip(COLUMNS, row, strict=True))
        x = r["c_in"] * reference.state()[0]
        halves = 2 if spec.guidable else 1
        feeds.append(
            {"net.x": np.concatenate([x] * halves), "net.c_noise": np.full(halves * len(x), r["c_noise"], np.float32)}
        )
        if labels is not None:
            null = [np.full_like(labels, spec.null_label)] * (halves - 1)
            feeds[-1]["net.label"] = np.concatenate([labels, *null])
        reference.step(row, z)
    return feeds


class Quantizer:
    """A traced fp32 network, calibrated, of which any layers can be made int8; see ``islands.Coarsening``.

    Args:
        spilled: what was traced, its weights in the file of a folder.
        folder: that folder.
        feeds: from ``visited_states``.
        keep: patterns of layers that stay fp32.
    """

    def __init__(
        self, spilled: Traced, folder: Path, feeds: list[Tensors], keep: Sequence[str], progress: Progress
    ) -> None:
        import onnx
        import onnx_ir as ir

        self.spilled, self.feeds = spilled, feeds
        self.errors: list[LayerError] = []
        network = spilled.network.clone()
        _separate_biases(network)
        _spread_over_small_images(network)
        self.nodes = _candidates(network, keep)
        if not self.nodes:
            raise ExportError(f"{spilled.spec.family}: no product with a weight is left to compute in int8")
        self.layer_of_value = {
            value.name: layer_of(node) for node in network.graph for value in node.inputs if value is not None
        }
        path = folder / "calibrated.onnx"
        ir.save(network, path)
        self.model: onnx.ModelProto = onnx.load(path)
        self.ranges = _ranges(path, feeds, progress)

    @property
    def layers(self) -> list[str]:
        """The layers that can be int8, in the order they run."""
        return list(self.nodes)

    def traced(self, kept: Sequence[str]) -> Traced:
        """What was traced with its network quantized; a decoder stays as it is."""
        original = self.spilled.clone()
        return dataclasses.replace(original, network=self.quantized(kept))

    def guesses(self) -> Iterator[tuple[str, ...]]:
        yield ()

    def ranked(self, progress: Progress) -> list[str]:
        return [error.layer for error in self.errors]

    def quantized(self, kept: Sequence[str] = ()) -> onnx_ir.Model:
        """The network with its layers int8, but for those named."""
        import onnx
        import onnx_ir as ir
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import QuantType

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        chosen = [name for layer, names in self.nodes.items() if layer not in kept for name in names]
        with _quiet():
            int8 = QuantType.QInt8
            quantizer = QDQQuantizer(
                model, True, False, int8, int8, self.ranges, chosen, [], list(QUANTIZED), dict(_OPTIONS)
            )
            if chosen:
                quantizer.quantize_model()
        result: onnx_ir.Model = ir.from_proto(quantizer.model.model)
        for node in result.graph:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                value = str(node.name).removesuffix(f"_{node.op_type}")
                node.name = f"net/{self.layer_of_value[value]}/{node.name}"
            if node.op_type == "DequantizeLinear":
                _leave_to(set(chosen), node)
        result.graph.sort()
        result.graph.opset_imports[""] = TRACED_OPSET
        return result

    def layers_beside(self, kept: Sequence[str]) -> list[LayerError]:
        """What each layer costs alone, and which of them stay fp32."""
        return [msgspec.structs.replace(error, kept=error.layer in kept) for error in self.errors]

    def measure(self, progress: Progress) -> None:
        """Find ``errors``: relative L2 of the network's output over the states with one layer int8; the largest first."""
        from diffexport.exporter.islands import network_session

        picked = [self.feeds[round(k)] for k in np.linspace(0, len(self.feeds) - 1, JUDGED_ROWS)]
        numbers = sum(feed["net.x"].size for feed in picked) // SAMPLES
        samples = min(SAMPLES, -(-JUDGED_NUMBERS // numbers))
        shown = {name: np.concatenate([_some(feed[name], samples) for feed in picked]) for name in self.feeds[0]}
        run = network_session(self._switched())
        layers = self.layers

        def output(int8: str | None) -> np.ndarray[Any, Any]:
            found: np.ndarray[Any, Any] = run(shown | {_SWITCHES: np.array([layer == int8 for layer in layers])})[0]
            return found

        expected, errors = output(None), []
        for index, layer in enumerate(layers):
            progress(f"int8 of {layer} alone", index / len(layers))
            errors.append(LayerError(layer=layer, relative_l2=relative_l2(output(layer), expected), kept=False))
        self.errors = sorted(errors, key=lambda entry: -entry.relative_l2)

    def _switched(self) -> onnx_ir.Model:
        """The fp32 network with one more input, a bool for each layer: whether what its products read is rounded to int8.

        One session of it measures every layer; quantizing the network anew for each takes longer than running it.
        """
        import onnx_ir as ir

        quantized = {str(node.name): node for node in self.quantized().graph}
        network: onnx_ir.Model = ir.from_proto(self.model)
        graph, count = network.graph, len(self.nodes)
        switches = ir.Value(name=_SWITCHES, shape=ir.Shape([count]), type=ir.TensorType(ir.DataType.BOOL))
        graph.inputs.append(switches)
        split = ir.node("Split", [switches], {"axis": 0, "num_outputs": count}, num_outputs=count)
        graph.insert_before(graph[0], split)
        products = {str(node.name): node for node in graph}
        for switch, names in zip(split.outputs, self.nodes.values(), strict=True):
            for name in names:
                for place, value in enumerate(products[name].inputs[:2]):
                    assert value is not None
                    nodes = _rounding(value, quantized[name].inputs[place])
                    nodes.append(ir.node("Where", [switch, nodes[-1].outputs[0], value]))
                    graph.insert_before(products[name], nodes)
                    products[name].replace_input_with(place, nodes[-1].outputs[0])
        return network


def _leave_to(products: set[str], dequantize: onnx_ir.Node) -> None:
    """Let whatever reads a rounded value beside these products, as residuals and norms do, read it as it was."""
    quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
    if quantize is None:
        return  # a weight
    for user, place in list(dequantize.outputs[0].uses()):
        if user.name not in products:
            user.replace_input_with(place, quantize.inputs[0])


def _rounding(value: onnx_ir.Value, rounded: onnx_ir.Value | None) -> list[onnx_ir.Node]:
    """Nodes that round a value as a DequantizeLinear of another graph rounds it: with its scale, zero point and axis."""
    import onnx_ir as ir

    told = rounded.producer() if rounded is not None else None
    assert told is not None
    known = [ir.node("Constant", [], {"value": each.const_value}) for each in told.inputs[1:] if each is not None]
    scale, zero = (node.outputs[0] for node in known)
    axis = {name: attribute.value for name, attribute in told.attributes.items()}
    quantize = ir.node("QuantizeLinear", [value, scale, zero], axis)
    return [*known, quantize, ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], axis)]


def _some(array: np.ndarray[Any, Any], samples: int) -> np.ndarray[Any, Any]:
    """The first samples of each half."""
    halves = array.reshape(-1, SAMPLES, *array.shape[1:])[:, :samples]
    return halves.reshape(-1, *array.shape[1:])


def _candidates(network: onnx_ir.Model, keep: Sequence[str]) -> dict[str, list[str]]:
    """The nodes that can be int8, by layer: products with a weight."""
    nodes: dict[str, list[str]] = {}
    for node in network.graph:
        first, weight = (*node.inputs[:2], None, None)[:2]
        if node.op_type not in QUANTIZED or first is None or weight is None or not weight.is_initializer():
            continue
        producer = first.producer()
        concatenated = first.name == "net.x" or (producer is not None and producer.op_type == "Concat")
        if (node.op_type == "Conv" and concatenated) or matches(layer_of(node), keep):
            continue
        nodes.setdefault(layer_of(node), []).append(str(node.name))
    return nodes


def _separate_biases(network: onnx_ir.Model) -> None:
    """Write a Gemm with a weight as MatMul and Add: runtimes compute the one in int8 only with a quantized bias."""
    import onnx_ir as ir

    for node in list(network.graph):
        if node.op_type != "Gemm" or node.inputs[1] is None or not node.inputs[1].is_initializer():
            continue
        told = {name: attribute.value for name, attribute in node.attributes.items()}
        if told.get("transA") or told.get("alpha", 1.0) != 1 or told.get("beta", 1.0) != 1:
            continue
        weight = stored = node.inputs[1]
        if told.get("transB"):
            weight = _transposed(network, stored)
        out, name = node.outputs[0], str(node.name)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        product = ir.node("MatMul", [node.inputs[0], weight], name=f"{name}.product")
        added = [] if bias is None else [ir.node("Add", [product.outputs[0], bias], name=f"{name}.bias")]
        product.outputs[0].name = f"{out.name}.product"
        last = (added or [product])[0].outputs[0]
        last.shape, last.type = out.shape, out.type
        network.graph.insert_before(node, [product, *added])
        ir.convenience.replace_all_uses_with(out, last)
        if out in network.graph.outputs:
            network.graph.outputs[network.graph.outputs.index(out)] = last
        network.graph.remove(node, safe=True)
        last.name = out.name
        if not stored.uses():
            network.graph.initializers.pop(str(stored.name), None)


def _spread_over_small_images(network: onnx_ir.Model) -> None:
    """Give what small images are multiplied with and shifted by a channel at a time their own size.

    OpenVINO scales, shifts, activates and quantizes in one kernel, which takes a loop a channel: as long for 4x4 pixels as
    for 16x16, and a tenth of a U-Net's step in int8. The numbers stay the same; runtimes spread them when they load.
    """
    import onnx_ir as ir

    for node in list(network.graph):
        sides = _image_of(node) if node.op_type in ("Add", "Mul") else []
        if len(sides) != 3 or math.prod(sides[1:]) > _SMALL_IMAGE:
            continue
        for place, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.shape != [sides[0], 1, 1]:
                continue
            to = ir.node("Constant", [], {"value": ir.tensor(np.array([1, *sides], np.int64))})
            spread = ir.node("Expand", [value, to.outputs[0]], name=f"{node.name}.spread")
            spread.outputs[0].type = value.type
            network.graph.insert_before(node, [to, spread])
            node.replace_input_with(place, spread.outputs[0])


def _image_of(node: onnx_ir.Node) -> list[int]:
    """The sides of a sample that a node gives, or of the sum that it is only part of; none where they are not known."""
    users = node.outputs[0].consumers()
    sums = [user for user in users if len(users) == 1 and user.op_type == "Add"]
    known = (sides_of(shown.outputs[0]) for shown in (node, *sums))
    return next((sides for sides in known if sides is not None), [])


def _transposed(network: onnx_ir.Model, weight: onnx_ir.Value) -> onnx_ir.Value:
    import onnx_ir as ir

    name = f"{weight.name}.transposed"
    if name not in network.graph.initializers:
        assert weight.const_value is not None
        array = np.ascontiguousarray(weight.const_value.numpy().T)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=weight.type, const_value=ir.tensor(array, name=name)
        )
        network.graph.register_initializer(value)
    return network.graph.initializers[name]


def _ranges(path: Path, feeds: list[Tensors], progress: Progress) -> Any:
    """The largest and the smallest number of every value that can be quantized, over the states."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(enumerate(feeds))

        def get_next(self) -> Any:
            index, feed = next(self.rest, (0, None))
            progress("calibrating", index / len(feeds))
            return feed

    with _quiet():
        calibrator = create_calibrator(
            path,
            list(QUANTIZED),
            augmented_model_path=str(path.with_name("augmented.onnx")),
            calibrate_method=CalibrationMethod.MinMax,
        )
        calibrator.collect_data(Reader())
        return calibrator.compute_data()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer advises on the root logger what this package does already."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
