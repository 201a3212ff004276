"""A network cut by what its values depend on, so that nothing is computed more often than it changes.

What depends on noise level and label alone is the same for every state: its results, side by side in one tensor, are the
*condition* (N, K), which can be computed for all rows of a plan at once. What depends on x alone is the same in both halves
of a guided batch, and is computed once for both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

X, C_NOISE, LABEL = "net.x", "net.c_noise", "net.label"
CONDITION = frozenset({C_NOISE, LABEL})

_SHAPES = frozenset({"Shape", "Size"})
"""Operators whose result depends on the shape of their input, not on its values."""

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
"""Operators with a weight."""


@dataclass(frozen=True)
class Part:
    """A value at a cut.

    Attributes:
        sides: its shape without the first axis, the batch.
        kind: its element type, of ``onnx.TensorProto``.
    """

    name: str
    sides: tuple[int, ...]
    kind: int


def take_batch_from_noise(network: onnx.GraphProto) -> None:
    """Let every node that asks an input for its batch ask c_noise, which is there in every part of a cut network."""
    from onnx import helper

    for node in network.node:
        if node.op_type != "Shape" or node.input[0] not in (X, LABEL):
            continue
        window = {attribute.name: attribute.i for attribute in node.attribute}
        if node.input[0] == LABEL or (window.get("start", 0), window.get("end")) == (0, 1):
            node.input[0] = C_NOISE
            del node.attribute[:]
            node.attribute.extend([helper.make_attribute("start", 0), helper.make_attribute("end", 1)])


def cut_at(network: onnx.GraphProto, inputs: frozenset[str]) -> tuple[Part, ...]:
    """The values that depend on some of ``inputs`` and on nothing else, where others begin that depend on more.

    There are none where no product with a weight lies before them, or where one has no fixed shape beside its batch.
    """
    depends = _dependences(network)
    outputs = {value.name for value in network.output}
    beyond = {
        name
        for node in network.node
        if node.op_type not in _SHAPES and not all(depends[output] <= inputs for output in node.output)
        for name in _read(node)
    }
    names = [
        name
        for node in network.node
        for name in node.output
        if depends[name] and depends[name] <= inputs and (name in beyond or name in outputs)
    ]
    if not any(node.op_type in PRODUCTS for node in needed(network, names)):
        return ()
    known = {value.name: value.type.tensor_type for value in network.value_info}
    parts = [_part(name, known.get(name)) for name in names]
    return tuple(part for part in parts if part is not None) if all(parts) else ()


def needed(network: onnx.GraphProto, wanted: Collection[str], given: Collection[str] = ()) -> list[onnx.NodeProto]:
    """The nodes, in order, that make ``wanted`` where ``given`` is there already."""
    waiting, nodes = set(wanted) - set(given), []
    for node in reversed(network.node):
        if waiting & set(node.output):
            nodes.append(node)
            waiting |= set(_read(node)) - set(given)
    return nodes[::-1]


def inputs_of(nodes: Collection[onnx.NodeProto]) -> set[str]:
    """The names of all that some nodes read."""
    return {name for node in nodes for name in _read(node)}


def _dependences(network: onnx.GraphProto) -> dict[str, frozenset[str]]:
    """Of every value, the inputs whose values it depends on."""
    depends = {value.name: frozenset({value.name}) for value in network.input}
    for node in network.node:
        read = [] if node.op_type in _SHAPES else list(_read(node))
        union = frozenset[str]().union(*(depends.get(name, frozenset()) for name in read))
        depends.update(dict.fromkeys(node.output, union))
    return depends


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, and what graphs inside it do."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for each in inner.node:
                yield from _read(each)


def _part(name: str, kind: onnx.TypeProto.Tensor | None) -> Part | None:
    from onnx import TensorProto

    dims = list(kind.shape.dim) if kind is not None else []
    if kind is None or not dims or dims[0].HasField("dim_value"):
        return None
    if kind.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return None
    if not all(dim.HasField("dim_value") for dim in dims[1:]):
        return None
    return Part(name, tuple(dim.dim_value for dim in dims[1:]), kind.elem_type)
