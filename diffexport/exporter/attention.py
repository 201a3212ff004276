"""Self-attention in the one form that runtimes have a fused kernel for.

A network that makes queries, keys and values with one product, ``qkv(x).reshape(N, T, 3, H, d).permute(2, 0, 3, 1, 4)``,
as the official DiT, timm and smalldiffusion do, costs two passes over all of them that move numbers and two that scale
them. Here each of the three is a product of its own, the scale is in the weights of the queries, and what is left is

    MatMul(Softmax(MatMul(q, k)), v)    q (N, H, T, d), k (N, H, d, T), v (N, H, T, d), each a transposed (N, T, H, d)

which OpenVINO computes in one kernel. Keys are transposed twice, first as queries and values are and then on their own:
OpenVINO takes both into its kernel so, but not a single one that does the same. N batch, T tokens, H heads, d width of a
head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diffexport.exporter.rewrite import Replacement, constant_of

if TYPE_CHECKING:
    import onnx_ir

_STACK = [2, 0, 3, 1, 4]


@dataclass(frozen=True)
class _Projection:
    """x @ weight (+ bias), reshaped to (N, T, 3, H, d)."""

    x: onnx_ir.Value
    product: onnx_ir.Node
    weight: onnx_ir.Value
    bias: onnx_ir.Value | None
    sides: onnx_ir.Value
    """What it is reshaped to."""


@dataclass(frozen=True)
class _Attention:
    """One attention as the exporter writes it."""

    projection: _Projection
    scale: float
    scores: onnx_ir.Node
    mixed: onnx_ir.Node


def fuse_attention(model: onnx_ir.Model) -> int:
    """Rewrite every self-attention of a traced network whose projection is one product; their number.

    Any other attention is left as it is. Unused nodes are left for a later pass to remove.
    """
    found = [attention for node in model.graph if (attention := _attention_at(node)) is not None]
    for attention in found:
        _rewrite(model, attention)
    return len(found)


def _attention_at(softmax: onnx_ir.Node) -> _Attention | None:
    """The attention that a Softmax belongs to."""
    scores = _producer(softmax.inputs[0], "MatMul") if softmax.op_type == "Softmax" else None
    users = list(softmax.outputs[0].consumers()) if scores is not None else []
    if (
        scores is None
        or len(users) != 1
        or users[0].op_type != "MatMul"
        or users[0].inputs[0] is not softmax.outputs[0]
    ):
        return None
    q, q_scale = _unscaled(scores.inputs[0])
    k, k_scale = _unscaled(scores.inputs[1])
    parts = [_part(q), _part(_untransposed(k)), _part(users[0].inputs[1])]
    if [part and part[1] for part in parts] != [0, 1, 2]:
        return None
    stacked = {id(part[0]) for part in parts if part}
    transpose = parts[0][0] if parts[0] and len(stacked) == 1 else None
    projection = _projection(transpose) if transpose is not None else None
    return _Attention(projection, q_scale * k_scale, scores, users[0]) if projection is not None else None


def _producer(value: onnx_ir.Value | None, kind: str) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _unscaled(value: onnx_ir.Value | None) -> tuple[onnx_ir.Value | None, float]:
    """A value before it was multiplied by a number, and the number."""
    node = _producer(value, "Mul")
    if node is None:
        return value, 1.0
    number = constant_of(node.inputs[1])
    return (node.inputs[0], float(number.reshape(()))) if number is not None and number.size == 1 else (value, 1.0)


def _untransposed(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """Keys before their last two axes changed places, which the exporter does inside a reshape to three axes."""
    outer = _producer(value, "Reshape")
    node = _producer(outer.inputs[0] if outer else value, "Transpose")
    if node is None:
        return None
    order = list(node.attributes["perm"].as_ints())
    if order[-2:] != [len(order) - 1, len(order) - 2] or order[:-2] != list(range(len(order) - 2)):
        return None
    inner = _producer(node.inputs[0], "Reshape")
    return inner.inputs[0] if outer and inner else node.inputs[0]


def _part(value: onnx_ir.Value | None) -> tuple[onnx_ir.Node, int] | None:
    """The transposed stack of queries, keys and values that a value is cut from, and which of the three it is."""
    squeeze = _producer(value, "Squeeze")
    cut = _producer(squeeze.inputs[0], "Slice") if squeeze is not None else None
    if cut is None or len(cut.inputs) < 4:
        return None
    start, stop, axis = (constant_of(source) for source in cut.inputs[1:4])
    stack = _producer(cut.inputs[0], "Transpose")
    if stack is None or start is None or stop is None or axis is None or stop.item() != start.item() + 1 or axis.item():
        return None
    return (stack, int(start.item())) if list(stack.attributes["perm"].as_ints()) == _STACK else None


def _projection(stack: onnx_ir.Node) -> _Projection | None:
    """The product that the stack is reshaped from."""
    reshape = _producer(stack.inputs[0], "Reshape")
    if reshape is None:
        return None
    add = _producer(reshape.inputs[0], "Add")
    bias = add.inputs[1] if add is not None else None
    product = _producer(add.inputs[0] if add is not None else reshape.inputs[0], "MatMul")
    if product is None or constant_of(product.inputs[1]) is None or (bias is not None and constant_of(bias) is None):
        return None
    x, weight, sides = product.inputs[0], product.inputs[1], reshape.inputs[1]
    shape = reshape.outputs[0].shape
    if x is None or weight is None or sides is None or shape is None or len(shape) != 5 or shape[2] != 3:
        return None
    return _Projection(x, product, weight, bias, sides)


def _rewrite(model: onnx_ir.Model, attention: _Attention) -> None:
    """Give the two products of an attention inputs of their own."""
    p = attention.projection
    weight, bias = constant_of(p.weight), constant_of(p.bias)
    shape = p.product.outputs[0].shape
    heads = _heads(p)
    assert shape is not None
    batch, tokens, _ = shape
    width = weight.shape[1] // 3
    new = Replacement(model, p.product)
    source = p.bias.name.removesuffix("bias") if p.bias is not None and p.bias.name else f"{p.weight.name}."
    sides = new.weight(f"{source}sides", np.array([0, 0, *heads], np.int64))

    def transposed(value: onnx_ir.Value, order: Sequence[int]) -> onnx_ir.Value:
        assert value.shape is not None
        return new.add("Transpose", value, shape=[value.shape[axis] for axis in order], perm=order)

    made = []
    for index, part in enumerate("qkv"):
        scale = np.float32(attention.scale if part == "q" else 1.0)
        columns = slice(index * width, (index + 1) * width)
        own = new.weight(f"{source}{part}.weight", np.ascontiguousarray(weight[:, columns] * scale))
        y = new.add("MatMul", p.x, own, shape=[batch, tokens, width])
        if bias is not None:
            y = new.add(
                "Add", y, new.weight(f"{source}{part}.bias", bias[columns] * scale), shape=[batch, tokens, width]
            )
        split = new.add("Reshape", y, sides, shape=[batch, tokens, *heads], allowzero=0)
        made.append(transposed(split, [0, 2, 1, 3]))
    q, k, v = made
    k = transposed(k, [0, 1, 3, 2])
    model.graph.insert_before(attention.scores, new.nodes)
    attention.scores.replace_input_with(0, q)
    attention.scores.replace_input_with(1, k)
    attention.mixed.replace_input_with(1, v)


def _heads(projection: _Projection) -> tuple[int, int]:
    """(H, d)."""
    (reshape,) = [node for node in _users(projection) if node.op_type == "Reshape"]
    shape = reshape.outputs[0].shape
    assert shape is not None
    return int(shape[3]), int(shape[4])  # type: ignore[arg-type]


def _users(projection: _Projection) -> Iterator[onnx_ir.Node]:
    value = projection.product.outputs[0]
    for node in value.consumers():
        yield node
        if node.op_type == "Add":
            yield from node.outputs[0].consumers()
