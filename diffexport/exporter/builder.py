"""ONNX graphs written operator by operator, with networks inside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffexport.exporter.parts import inputs_of, needed
from diffexport.exporter.trace import OPSET

if TYPE_CHECKING:
    import onnx

IR_VERSION = 10


class GraphBuilder:
    """Operators and constants in order, each call returning the name of its result.

    A builder of a subgraph, made by ``inner``, keeps its constants in the outermost graph, and puts its scope before the
    names of its values, so that every name is unique.
    """

    def __init__(self, scope: str = "", constants: list[onnx.TensorProto] | None = None) -> None:
        self.scope = scope
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = [] if constants is None else constants

    def inner(self, scope: str) -> GraphBuilder:
        """A builder for a subgraph of this graph."""
        return GraphBuilder(f"{self.scope}{scope}.", self.constants)

    def op(self, kind: str, *inputs: str, outputs: int = 1, name: str | None = None, **attributes: Any) -> Any:
        """Append an operator; its result's name, or a tuple of names for several outputs."""
        index = len(self.nodes)
        names = [name] if name else [f"{self.scope}{kind.lower()}.{index}.{k}" for k in range(outputs)]
        self.add(kind, list(inputs), names, **attributes)
        return names[0] if outputs == 1 else tuple(names)

    def add(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        """Append an operator whose outputs are named."""
        from onnx import helper

        name = f"{self.scope}{len(self.nodes)}.{kind}"
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A small constant kept in the graph."""
        from onnx import numpy_helper

        name = f"constant.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def network(
        self, network: onnx.GraphProto, feeds: dict[str, str], wanted: Sequence[str] = (), scope: str = ""
    ) -> list[str]:
        """The nodes of a network that make ``wanted``, its output where nothing is named, from ``feeds``.

        Args:
            feeds: what takes the place of inputs of the network and of values inside.
            scope: put before the names of values, where nodes are in the graph once more.

        Returns:
            The names of what was wanted.
        """
        import onnx

        wanted = wanted or [network.output[0].name]
        scope = self.scope + scope
        shared = {weight.name for weight in network.initializer} | {""}

        def renamed(name: str) -> str:
            return feeds.get(name) or (name if name in shared else scope + name)

        for node in needed(network, wanted, feeds):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = scope + node.name
            copy.input[:] = [renamed(name) for name in node.input]
            copy.output[:] = [renamed(name) for name in node.output]
            self.nodes.append(copy)
        return [renamed(name) for name in wanted]

    def graph(self, name: str, inputs: list[Any], outputs: list[Any], *networks: onnx.GraphProto) -> onnx.GraphProto:
        """A graph of these nodes and the weights of the networks that they read."""
        from onnx import helper

        read = inputs_of(self.nodes)
        weights = [weight for network in networks for weight in network.initializer if weight.name in read]
        return helper.make_graph(self.nodes, name, inputs, outputs, weights)

    def model(self, name: str, inputs: list[Any], outputs: list[Any], *networks: onnx.GraphProto) -> onnx.ModelProto:
        """A model of these nodes, the constants, and the weights of the networks that they read."""
        from onnx import helper

        graph = self.graph(name, inputs, outputs, *networks)
        graph.initializer.extend(self.constants)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            producer_name="diffexport",
            ir_version=IR_VERSION,
        )


def tensor(name: str, shape: list[Any], kind: str = "FLOAT") -> onnx.ValueInfoProto:
    """A graph's input or output."""
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)
