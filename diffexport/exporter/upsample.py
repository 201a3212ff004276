"""A convolution after an upsampling to twice the sides, computed before it.

Of the nine pixels that a 3x3 convolution reads of an image in which every pixel stands four times, only four differ. So an
output pixel is a 2x2 convolution of the small image, with the weights of equal pixels added up, one of four by whether its
row and its column are even: 16 products in place of 36, and nothing is read four times. The four are put side by side in
the channels and then woven into the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diffexport.exporter.rewrite import Replacement, constant_of

if TYPE_CHECKING:
    import onnx_ir

_TAPS = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
"""[odd, tap, k]: of the three rows (or columns) of a kernel, those that tap 0 or 1 of an even (odd) output row adds up."""

_DOUBLING = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
_CONVOLUTION = {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1), "strides": (1, 1), "dilations": (1, 1)}
"""What the two must say of themselves; PyTorch's exporter leaves nothing to a default."""


def fuse_upsampling(model: onnx_ir.Model) -> int:
    """Rewrite every 3x3 convolution of an image doubled by its nearest pixels; their number.

    Unused nodes and weights are left for a later pass to remove.
    """
    found = [(doubling, node) for node in model.graph if (doubling := _doubling_before(node)) is not None]
    for doubling, convolution in found:
        _rewrite(model, doubling, convolution)
    return len(found)


def _doubling_before(convolution: onnx_ir.Node) -> onnx_ir.Node | None:
    """The Resize that a convolution reads, where the two are of the kind above."""
    if convolution.op_type != "Conv" or convolution.outputs[0].is_graph_output():
        return None
    image, weight = convolution.inputs[:2]
    doubling = image.producer() if image is not None else None
    if doubling is None or doubling.op_type != "Resize" or len(doubling.inputs) != 3 or constant_of(weight) is None:
        return None
    sides = all(convolution.attributes.get_ints(name) == value for name, value in _CONVOLUTION.items())
    nearest = all(doubling.attributes.get_string(name) == value for name, value in _DOUBLING.items())
    scales = constant_of(doubling.inputs[2])
    twice = scales is not None and scales.tolist() == [1, 1, 2, 2]
    return doubling if sides and nearest and twice and convolution.attributes.get_int("group") == 1 else None


def _rewrite(model: onnx_ir.Model, doubling: onnx_ir.Node, convolution: onnx_ir.Node) -> None:
    import onnx_ir as ir

    small, (weight, *bias), out = doubling.inputs[0], convolution.inputs[1:], convolution.outputs[0]
    assert small is not None
    assert small.shape is not None
    assert weight is not None
    assert weight.name is not None
    assert out.shape is not None
    batch, channels, *_ = out.shape
    sides = small.shape[2:]
    kernel = constant_of(weight).astype(np.float64)
    source = weight.name.removesuffix("weight")
    new = Replacement(model, convolution)
    parts = []
    for row in (0, 1):
        for column in (0, 1):
            taps = np.einsum("ay,bx,oiyx->oiab", _TAPS[row], _TAPS[column], kernel).astype(np.float32)
            value = new.weight(f"{source}{row}{column}.weight", taps)
            window: dict[str, Any] = {"kernel_shape": [2, 2], "pads": [1 - row, 1 - column, row, column]}
            parts.append(new.add("Conv", small, value, *bias, shape=[batch, channels, *sides], **window))
    side_by_side = new.add("Concat", *parts, shape=[batch, 4 * channels, *sides], axis=1)
    woven = new.add("DepthToSpace", side_by_side, shape=list(out.shape), blocksize=2, mode="DCR")
    model.graph.insert_before(convolution, new.nodes)
    ir.convenience.replace_all_uses_with(out, woven)
