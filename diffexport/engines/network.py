"""The network that TensorRT's parser makes of a graph: what it holds, and whether it is in the precision asked for.

TensorRT 11 and TensorRT for RTX know strongly typed networks only: a half engine comes from a graph whose tensors are
half, and from no flag. So the types of the parsed network are what the engine will compute in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffexport.bundle import Precision
from diffexport.engines.record import Network, TensorInfo
from diffexport.errors import EngineError

TYPES: dict[Precision, str] = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8"}
"""What TensorRT calls the type of each precision."""

LEAST_SHARE = 0.5
"""A network has a precision if this part of its multiply-adds is in it: some layers are kept in fp32 on purpose."""

_PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "EINSUM", "MATRIX_MULTIPLY")
_MOVES = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY")
"""Kinds of layers that pass quantized numbers on as they are."""


def network_from_onnx(trt: Any, builder: Any, logger: Any, path: Path) -> Any:
    """The strongly typed network of an ONNX file and its external data.

    Raises:
        EngineError: the parser refuses it.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [error.desc().strip() for error in errors]
        raise EngineError(f"{path.name}: TensorRT's parser refuses it ({said[0] if said else 'without a reason'})")
    return network


def describe(trt: Any, network: Any) -> Network:
    """What a network holds."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds: dict[str, Counter[str]] = {}
    sources: dict[str, Any] = {}
    for layer in layers:
        for output in _tensors(layer.get_output, layer.num_outputs):
            kinds.setdefault(layer.type.name, Counter())[output.dtype.name] += 1
            sources[output.name] = layer
    work: Counter[str] = Counter()
    for layer in layers:
        if layer.type.name in _PRODUCTS:
            work[_computed_in(layer, sources)] += _multiply_adds(trt, layer)
    return Network(
        inputs=tuple(_info(tensor) for tensor in _tensors(network.get_input, network.num_inputs)),
        outputs=tuple(_info(tensor) for tensor in _tensors(network.get_output, network.num_outputs)),
        layers={kind: dict(sorted(kinds[kind].items())) for kind in sorted(kinds)},
        multiply_adds=dict(sorted(work.items())),
    )


def share(described: Network, precision: Precision) -> float:
    """The part of the multiply-adds that is computed in a precision."""
    total = sum(described.multiply_adds.values())
    return described.multiply_adds.get(TYPES[precision], 0) / total if total else 1.0


def check_precision(name: str, described: Network, precision: Precision) -> None:
    """See that a network is in the precision that its bundle was exported in.

    Raises:
        EngineError: most of its work is in another.
    """
    if share(described, precision) < LEAST_SHARE:
        total = sum(described.multiply_adds.values())
        found = ", ".join(f"{count / total:.0%} {kind}" for kind, count in described.multiply_adds.items())
        raise EngineError(
            f"{name}: asked for {precision}, but the multiply-adds of the parsed network are {found}; an engine would "
            f"run at that speed. Export the model again with --{precision}"
        )


def _tensors(get: Any, count: int) -> Iterator[Any]:
    """Tensors by index, without those that are left out."""
    for index in range(count):
        tensor = get(index)
        if tensor is not None:
            yield tensor


def _info(tensor: Any) -> TensorInfo:
    shape = tuple(
        side if side >= 0 else tensor.get_dimension_name(axis) or "?" for axis, side in enumerate(tensor.shape)
    )
    return TensorInfo(tensor.name, tensor.dtype.name, shape)


def _computed_in(layer: Any, sources: dict[str, Any]) -> str:
    """The type that a product is computed in: that of its result, or of the quantized numbers that it reads."""
    kinds = {_quantized(tensor, sources) for tensor in _tensors(layer.get_input, layer.num_inputs)}
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind or str(layer.get_output(0).dtype.name)


def _quantized(tensor: Any, sources: dict[str, Any]) -> str | None:
    """The type of the quantized numbers that a tensor was made from, or None."""
    while tensor.name in sources:
        source = sources[tensor.name]
        tensor = source.get_input(0)
        if source.type.name == "DEQUANTIZE":
            return str(tensor.dtype.name)
        if source.type.name not in _MOVES:
            break
    return None


def _multiply_adds(trt: Any, layer: Any) -> int:
    """Multiply-adds of a product, free dimensions counted as 1."""
    source, result = (_sides(tensor.shape) for tensor in (layer.get_input(0), layer.get_output(0)))
    if layer.type.name == "MATRIX_MULTIPLY":
        rows = result[-2] if len(result) > 1 else 1
        return math.prod(result) * math.prod(source[-2:]) // rows  # (..., M, K) x (..., K, N)
    if layer.type.name == "EINSUM":
        return math.prod(result) * source[-1]
    forward = layer.type.name == "CONVOLUTION"
    convolution = layer
    convolution.__class__ = trt.IConvolutionLayer if forward else trt.IDeconvolutionLayer  # the API hands out the base
    kernel = math.prod(_sides(convolution.kernel_size_nd)) // int(convolution.num_groups)
    return kernel * (math.prod(result) * source[1] if forward else math.prod(source) * result[1])


def _sides(shape: Any) -> list[int]:
    return [max(1, side) for side in shape]
