"""A half graph as one in fp32 that rounds every value to half: what hardware with fp32 accumulators gives, on any CPU.

ONNX Runtime has no kernels of bfloat16 on a CPU, and where it lacks one of float16 it computes in fp32 and drops the casts
between neighbours, so that an overflow goes unseen. Here each operator computes in fp32 from half numbers, and casts that
stay round its result: the strictest reading of a graph that a check can hold it to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

MOVES = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that move numbers without computing: they keep the type of what they move, and there is nothing to round."""

_OTHER_TYPES = frozenset(
    {"Shape", "Size", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "ArgMax", "IsNaN"}
)
"""What has half inputs and another kind of output."""


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace half arithmetic by fp32 arithmetic with rounded results, in place; weights stay as they are stored.

    Inputs and outputs of the graph are fp32 or integers, as those of every graph of a bundle are.
    """
    _round_graph(model.graph, {})
    return model


def _round_graph(graph: onnx.GraphProto, half: dict[str, int]) -> None:
    """Round a graph; ``half`` has the type of every half value around it, whose names now hold fp32 numbers."""
    from onnx import AttributeProto, NodeProto, TensorProto, helper

    kinds = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    nodes: list[onnx.NodeProto] = []

    def cast(source: str, target: str, kind: int) -> None:
        nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=kind))

    def round_to(kind: int, source: str, target: str) -> None:
        cast(source, f"{target}.rounded", kind)
        cast(f"{target}.rounded", target, TensorProto.FLOAT)
        half[target] = kind

    for weight in graph.initializer:
        if weight.data_type in kinds:
            half[weight.name] = weight.data_type
            cast(f"{weight.name}.stored", weight.name, TensorProto.FLOAT)
            weight.name = f"{weight.name}.stored"
    for original in graph.node:
        node = NodeProto()
        node.CopyFrom(original)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _round_graph(attribute.g, dict(half))
        read = [half[name] for name in node.input if name in half]
        if node.op_type == "Cast":
            to = helper.get_node_attr_value(node, "to")
            if to in kinds:
                round_to(to, node.input[0], node.output[0])
                continue
        elif read and node.op_type in MOVES | {"Concat"}:
            half.update(dict.fromkeys(node.output, read[0]))
        elif read and node.op_type not in _OTHER_TYPES:
            targets = list(node.output)
            node.output[:] = [f"{name}.wide" if name else "" for name in targets]
            nodes.append(node)
            for target in filter(None, targets):
                round_to(read[0], f"{target}.wide", target)
            continue
        nodes.append(node)
    del graph.node[:]
    del graph.value_info[:]
    graph.node.extend(nodes)
