"""Nodes written in the place of others in a traced network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray


def constant_of(value: onnx_ir.Value | None) -> Any:
    """The array of a value that is known, else None."""
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def sides_of(value: onnx_ir.Value) -> list[int] | None:
    """The sides of one sample of a value whose first axis is the batch; None where they are not all known."""
    if value.shape is None or len(value.shape) == 0 or isinstance(value.shape[0], int):
        return None
    sides = [side for side in value.shape[1:] if isinstance(side, int)]
    return sides if len(sides) == len(value.shape) - 1 else None


class Replacement:
    """Nodes that belong to the layer of the one whose place they take, in order.

    Args:
        model: gets the weights; the nodes are left to the caller to insert.
    """

    def __init__(self, model: onnx_ir.Model, of: onnx_ir.Node) -> None:
        self._model, self._of = model, of
        self.nodes: list[onnx_ir.Node] = []

    def add(self, kind: str, *inputs: onnx_ir.Value | None, shape: Sequence[Any], **attributes: Any) -> onnx_ir.Value:
        """Append an operator; its result, of the type of what the replaced node gives."""
        import onnx_ir as ir

        node = ir.node(kind, inputs, attributes)
        node.metadata_props.update(self._of.metadata_props)
        self.nodes.append(node)
        (value,) = node.outputs
        value.type, value.shape = self._of.outputs[0].type, ir.Shape(shape)
        return value

    def weight(self, name: str, array: NDArray[Any]) -> onnx_ir.Value:
        """A weight of the model."""
        import onnx_ir as ir

        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self._model.graph.initializers[name] = value
        return value
