"""Half precision as a policy: which values of a network are half, and which stay fp32.

TensorRT and every other runtime with typed graphs computes an operator in the type of its tensors, so half precision means
a graph whose tensors are half, with a cast wherever the type changes. The policy is three rules, in this order:

1. Layers that a pattern names stay fp32 (``keep``), as do the operators of ``KEPT_OPERATORS``.
2. What is computed from the noise level alone, up to the first product with a weight, stays fp32: frequencies of up to 1000
   times a time, whose sine would be lost.
3. Everything else is half; a weight has the type of the operator that reads it.

The network takes and gives fp32, and what is around it (guidance, preconditioning, the update of the state) is fp32.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffexport.backends.rounding import MOVES
from diffexport.bundle import Precision
from diffexport.errors import ExportError
from diffexport.exporter.parts import PRODUCTS

if TYPE_CHECKING:
    import onnx_ir

KEPT_OPERATORS = frozenset(
    {
        "BatchNormalization",  # statistics: sums of squares over many values
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LpNormalization",
        "RMSNormalization",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "CumSum",
        "Softmax",  # a sum of exponentials
        "LogSoftmax",
        "Exp",  # what leaves the range of half, or loses its small end
        "Log",
        "Pow",
        "Reciprocal",
        "Sqrt",
        "Sin",  # arguments of up to 1000 radians
        "Cos",
    }
)
"""Operators that are computed in fp32 whatever the layer."""

FP16_MAX = 65504.0


def layer_of(node: onnx_ir.Node) -> str:
    """The module that a node of a traced network belongs to, as PyTorch names it: ``blocks.0.attn.qkv``."""
    assert node.name is not None
    return node.name.split("/")[1]


def _scope(node: onnx_ir.Node) -> str:
    assert node.name is not None
    return node.name.rpartition("/")[0]


def layers_of(model: onnx_ir.Model) -> list[str]:
    """The layers of a traced network that compute, in the order they run."""
    return list(dict.fromkeys(layer_of(node) for node in model.graph if node.op_type not in MOVES))


def lower(model: onnx_ir.Model, precision: Precision, keep: Sequence[str] = (), *, only: str | None = None) -> None:
    """Make a traced network half, in place. See the module for the policy.

    Args:
        model: from ``trace_network`` or ``trace_decoder``, every tensor fp32.
        precision: "fp16" or "bf16".
        keep: patterns of layers that stay fp32, each with everything below it; ``*`` and ``?`` as in a file name.
        only: the one layer that becomes half, to see what it costs; all do without.

    Raises:
        ExportError: the network has branches of its own.
    """
    _Lowering(model, precision, lambda layer: matches(layer, keep) or only not in (None, layer)).apply()


def matches(layer: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern names a layer or one above it."""
    parts = layer.split(".")
    above = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(fnmatch.fnmatchcase(name, pattern) for name in above for pattern in patterns)


def check_patterns(patterns: Sequence[str], layers: Sequence[str]) -> None:
    """Raise ExportError for a pattern that names no layer."""
    for pattern in patterns:
        if not any(matches(layer, (pattern,)) for layer in layers):
            close = difflib.get_close_matches(pattern, layers, n=1, cutoff=0.3) or layers[:1]
            raise ExportError(f"keep-fp32 {pattern!r}: no layer has this name; there is {close[0]!r}, for one")


class _Lowering:
    """One pass over the nodes in order, after which every edge has one type."""

    def __init__(self, model: onnx_ir.Model, precision: Precision, kept: Callable[[str], bool]) -> None:
        import onnx_ir as ir

        self.graph = model.graph
        self.kept = kept
        self.float = ir.DataType.FLOAT
        self.half = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
        self.floating = {self.float, self.half}
        self.embedding = {value for value in self.graph.inputs if value.name == "net.c_noise"}
        self.copies: dict[tuple[onnx_ir.Value, onnx_ir.DataType], onnx_ir.Value] = {}

    def apply(self) -> None:
        for node in list(self.graph):
            if any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values()):
                raise ExportError(
                    f"{layer_of(node)}: {node.op_type} holds a graph of its own, which half precision does not reach; "
                    "export with fp32"
                )
            self._type(node)
        self._finish()

    def _type(self, node: onnx_ir.Node) -> None:
        import onnx_ir as ir

        inputs = self._inputs(node)
        if not inputs or node.op_type == "Cast":
            return
        kind = self._kind(node, [value for _, value in inputs])
        for index, value in inputs:
            if value.dtype != kind:
                node.replace_input_with(index, self._converted(node, value, kind))
        for value in node.outputs:
            if value.dtype in self.floating:
                value.type = ir.TensorType(kind)

    def _inputs(self, node: onnx_ir.Node) -> list[tuple[int, onnx_ir.Value]]:
        """The floating-point inputs whose type is free; the scales of a Resize, for one, are fp32 always."""
        import onnx

        schema = onnx.defs.get_schema(node.op_type, self.graph.opset_imports[""], node.domain)
        last = len(schema.inputs) - 1
        return [
            (index, value)
            for index, value in enumerate(node.inputs)
            if value is not None
            and value.dtype in self.floating
            and schema.inputs[min(index, last)].type_str != "tensor(float)"
        ]

    def _kind(self, node: onnx_ir.Node, values: list[onnx_ir.Value]) -> onnx_ir.DataType:
        """The policy."""
        if self.kept(layer_of(node)) or node.op_type in KEPT_OPERATORS:
            return self.float
        computed = [value for value in values if not value.is_initializer()]
        if node.op_type not in PRODUCTS and computed and all(value in self.embedding for value in computed):
            self.embedding.update(node.outputs)
            return self.float
        if node.op_type in MOVES and computed and computed[0] is values[0]:
            kind = values[0].dtype
            assert kind is not None
            return kind
        return self.half

    def _converted(self, node: onnx_ir.Node, value: onnx_ir.Value, kind: onnx_ir.DataType) -> onnx_ir.Value:
        """The value in another type: a weight is stored in it, anything else cast once."""
        import onnx_ir as ir

        if (value, kind) in self.copies:
            return self.copies[value, kind]
        suffix = {self.float: "fp32"}.get(kind, "half")
        if value.is_initializer():
            copy = ir.Value(
                name=f"{value.name}.{suffix}",
                shape=value.shape,
                type=ir.TensorType(kind),
                const_value=_converted_weight(value, kind, f"{value.name}.{suffix}"),
            )
            self.graph.register_initializer(copy)
        else:
            cast = ir.node("Cast", [value], attributes={"to": kind.value}, name=f"{_scope(node)}/{value.name}.{suffix}")
            copy = cast.outputs[0]
            copy.name, copy.shape, copy.dtype = f"{value.name}.{suffix}", value.shape, kind
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], cast)
            else:
                self.graph.insert_after(producer, cast)
            if value in self.embedding:
                self.embedding.add(copy)
        self.copies[value, kind] = copy
        return copy

    def _finish(self) -> None:
        """fp32 at the end, and no weight that nothing reads in its old type."""
        import onnx_ir as ir

        (out,) = self.graph.outputs
        if out.dtype != self.float:
            producer = out.producer()
            assert producer is not None
            name, out.name = out.name, f"{out.name}.half"
            cast = ir.node("Cast", [out], attributes={"to": self.float.value}, name=f"{producer.name}.fp32")
            cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].dtype = name, out.shape, self.float
            self.graph.insert_after(producer, cast)
            self.graph.outputs[0] = cast.outputs[0]
        for name, value in list(self.graph.initializers.items()):
            if not value.uses():
                del self.graph.initializers[name]


def _converted_weight(value: onnx_ir.Value, kind: onnx_ir.DataType, name: str) -> onnx_ir.LazyTensor:
    """A weight rounded to another type when it is written, not before: a model is never held twice."""
    import onnx_ir as ir

    original = value.const_value
    assert original is not None

    def convert() -> onnx_ir.TensorProtocol:
        array = original.numpy()
        with np.errstate(over="ignore"):
            rounded = array.astype(kind.numpy())
        if np.isfinite(array).all() and not np.isfinite(rounded.astype(np.float32)).all():
            raise ExportError(
                f"{value.name}: its largest weight, {np.abs(array).max():.3g}, lies beyond half precision "
                f"({FP16_MAX:g}); keep its layer in fp32 with --keep-fp32, or --keep-fp32 auto"
            )
        return ir.Tensor(rounded, dtype=kind, name=name)

    return ir.LazyTensor(convert, kind, ir.Shape(original.shape.numpy()), name=name)
