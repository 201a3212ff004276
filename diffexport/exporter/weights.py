"""One file of weights that all graphs of a bundle share, as ONNX external data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx
    import onnx_ir

INLINE_BYTES = 64
"""Tensors up to this size stay in each graph: shapes and axes must."""

_ALIGN, _PAGE = 64, 4096


def write_weights(model: onnx_ir.Model, path: Path) -> onnx.GraphProto:
    """Append a network's weights, one after the other, to a file, and return its graph with references to them.

    A tensor of a page or more starts on a page, so that a runtime can map it; smaller ones follow, each on a cache line.
    Weights are never held twice, and the graph stays far below protobuf's 2 GB.
    """
    import onnx_ir

    weights = sorted(model.graph.initializers.items(), key=lambda weight: _size(weight[1]) < _PAGE)
    with path.open("ab") as file:
        for name, value in weights:
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes <= INLINE_BYTES:
                continue
            align = _PAGE if tensor.nbytes >= _PAGE else _ALIGN
            file.write(b"\0" * (-file.tell() % align))
            offset = file.tell()
            file.write(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
            assert file.tell() - offset == tensor.nbytes
            value.const_value = onnx_ir.ExternalTensor(
                path.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=onnx_ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=path.parent,
            )
        if not file.tell():
            file.write(b"\0" * _ALIGN)  # a model of a few numbers keeps them all in its graphs; no file is ever empty
    return onnx_ir.serde.serialize_model(model).graph


def _size(value: onnx_ir.Value) -> int:
    assert value.const_value is not None, f"{value.name} has no value"
    return value.const_value.nbytes
