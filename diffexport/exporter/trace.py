"""The network alone, traced once: ``F(x, c_noise, label) -> out`` with a dynamic batch N; and a decoder likewise.

Everything around it (guidance, preconditioning, the update) is put there by ``diffexport.exporter.graphs``, so one trace
serves every graph of a bundle and no wrapper can change what was traced.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffexport.errors import ExportError
from diffexport.spec import DecoderSpec, ModelSpec

if TYPE_CHECKING:
    import onnx_ir
    import torch

TRACED_OPSET = 20
"""Above it the exporter writes GroupNormalization, whose result ONNX's own inference of types does not know."""

OPSET = 22
"""What the graphs declare: the oldest opset whose convolutions may be bfloat16. ONNX Runtime, OpenVINO and TensorRT take
it, and what a traced network is made of means the same in both."""

BATCH = "batch"
LATENT_SIDES = ("height", "width")
ROOTS = {"net": "network", "dec": "decoder"}
"""The layer of what a network's own forward computes, outside any module of it. A decoder's layers lie below its root."""
EXAMPLE_BATCH = 3
"""Not 1, which an exporter may take for a constant, nor 2, the factor of guidance."""


def trace_network(module: torch.nn.Module, spec: ModelSpec) -> onnx_ir.Model:
    """Trace a module.

    Args:
        module: called as ``module(x, c_noise, label)``, or ``module(x, c_noise)`` where the spec has no labels, with x
            (N, *shape) float32, c_noise (N,) float32, label (N,) int64; returns (N, *output_shape).

    Returns:
        A model with inputs ``net.x``, ``net.c_noise``, ``net.label``, output ``net.out``, free of source paths, stack
        traces and time, whose nodes and values are named by their place in the graph.

    Raises:
        ExportError: the module cannot be traced, has another output shape than its spec says, or lost its dynamic batch.
    """
    import torch

    x = torch.zeros(EXAMPLE_BATCH, *spec.shape)
    c_noise = torch.ones(EXAMPLE_BATCH)
    label = torch.zeros(EXAMPLE_BATCH, dtype=torch.int64)
    args = {"x": x, "c_noise": c_noise} | ({"label": label} if spec.conditional else {})
    model = _traced(module, "net", spec.family, args, {0: BATCH})
    _check_batch(model, spec.family)
    (out,) = model.graph.outputs
    found = tuple(out.shape)[1:] if out.shape is not None else ()
    if found != spec.output_shape:
        raise ExportError(
            f"{spec.family}: the module returns samples of shape {found}, its spec says {spec.output_shape}"
        )
    return model


def trace_decoder(module: torch.nn.Module, spec: DecoderSpec, channels: int) -> onnx_ir.Model:
    """Trace a decoder, called as ``module(latents)`` with latents (N, channels, h, w) of any sides.

    Returns:
        As ``trace_network``, with input ``dec.x`` and output ``dec.out``.

    Raises:
        ExportError: the module cannot be traced, or does not fit its spec.
    """
    import torch

    small = 4
    try:
        with torch.inference_mode():
            found = tuple(module.eval()(torch.zeros(1, channels, small, small)).shape)
    except RuntimeError as error:
        raise ExportError(
            f"decoder: does not take latents of {channels} channels ({str(error).splitlines()[0]})"
        ) from error
    expected = (1, spec.channels, small * spec.upscale, small * spec.upscale)
    if found != expected:
        raise ExportError(
            f"decoder: the module makes {found} of latents {(1, channels, small, small)}, its spec says {expected}"
        )
    x = torch.zeros(EXAMPLE_BATCH, channels, 8, 9)  # different sides, so that neither stands for the other
    model = _traced(module, "dec", "decoder", {"x": x}, dict(enumerate(LATENT_SIDES, 2)) | {0: BATCH})
    _check_batch(model, "decoder")
    return model


def _traced(
    module: torch.nn.Module, scope: str, what: str, args: Mapping[str, torch.Tensor], dynamic: Mapping[int, str]
) -> onnx_ir.Model:
    """A module's graph, its inputs called ``scope.name``, with the named axes of every input dynamic."""
    import torch

    axes: dict[int, Any] = {axis: torch.export.Dim(name, min=1, max=1 << 16) for axis, name in dynamic.items()}
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                tuple(args.values()),
                dynamo=True,
                opset_version=TRACED_OPSET,
                dynamic_shapes=tuple(axes for _ in args),
                input_names=[f"{scope}.{name}" for name in args],
                output_names=[f"{scope}.out"],
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises what its many stages raise, around what went wrong first
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        reason = str(first).strip().splitlines()
        raise ExportError(
            f"{what}: PyTorch cannot trace this module ({type(first).__name__}: {reason[0] if reason else ''})"
        ) from error
    assert program is not None
    model = program.model
    _simplify(model)
    model.graph.opset_imports[""] = OPSET
    _clean(model, scope)
    return model


def _simplify(model: onnx_ir.Model) -> None:
    """Compute what is constant, transposed weights for one, and keep each constant and each expression once.

    The exporter's own optimizer also tries every rewrite rule at every node; a runtime does that better and its result
    differs here by a dozen shape operators, so its seconds are saved.
    """
    import onnx_ir
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants

    from diffexport.exporter.attention import fuse_attention
    from diffexport.exporter.upsample import fuse_upsampling

    everything = 1 << 40  # no limit of size: a weight that is left transposed would be transposed in every step
    with _quiet():
        fold_constants(model, onnx_shape_inference=True, input_size_limit=everything, output_size_limit=everything)
        onnx_ir.passes.Sequential(
            passes.InlinePass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.DeduplicateInitializersPass(),
            passes.CommonSubexpressionEliminationPass(),
            passes.RemoveUnusedNodesPass(),
        )(model)
        fuse_attention(model)
        fuse_upsampling(model)
        passes.RemoveUnusedNodesPass()(model)


def _check_batch(model: onnx_ir.Model, what: str) -> None:
    """The exporter can write a static batch without a word: see that it did not."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        dim = value.shape[0] if value.shape is not None else None
        if dim is None or isinstance(dim, int):
            raise ExportError(
                f"{what}: the traced batch of {value.name} is fixed at {dim}; a forward that depends on the "
                "batch in Python (int(x.shape[0]), chunk of a concatenated batch) does this"
            )


def _clean(model: onnx_ir.Model, scope: str) -> None:
    """Remove what describes the machine or the moment, and name what has no name of its own by its place.

    A node is called SCOPE/LAYER/PLACE.OPERATOR, its layer being the PyTorch module that it came from; one that the exporter
    put in belongs to the layer before it.
    """
    import onnx_ir

    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    named = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    weights = {id(value) for value in model.graph.initializers.values()}
    layer = root = ROOTS[scope]
    for index, node in enumerate(onnx_ir.traversal.RecursiveGraphIterator(model.graph)):
        layer = _layer(node, root) or layer
        node.metadata_props.clear()
        node.doc_string = None
        node.name = f"{scope}/{layer}/{index}.{node.op_type}"
        for position, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if id(value) not in named:
                value.name = f"{scope}.{index}.{position}"
    for position, value in enumerate(list(model.graph.initializers.values())):
        value.metadata_props.clear()
        assert id(value) in weights
        assert value.name is not None
        _rename_initializer(model, value, f"{scope}.{_weight_name(value, position)}")


def _layer(node: onnx_ir.Node, root: str) -> str | None:
    """The module whose forward wrote a node, from what the exporter notes: every module around it, then the operator."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    if len(scopes) < 2 or scopes[0]:
        return None
    path = scopes[-2].replace("/", "_")
    return ".".join(filter(None, (root, path))) if root == ROOTS["dec"] or not path else path


def _weight_name(value: onnx_ir.Value, position: int) -> str:
    """The state dict's name; a weight that the exporter transposed is named after its node's place."""
    assert value.name is not None
    return value.name if "." in value.name else f"constant.{position}"


def _rename_initializer(model: onnx_ir.Model, value: onnx_ir.Value, name: str) -> None:
    assert value.name is not None
    del model.graph.initializers[value.name]
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    model.graph.initializers[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes about itself (optional packages, renamed axes) say nothing to this package's user."""
    logger = logging.getLogger("torch.onnx")
    level, collecting = logger.level, gc.isenabled()
    logger.setLevel(logging.ERROR)
    gc.disable()  # tracing makes millions of objects that live to its end; collecting takes a quarter of its time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if collecting:
            gc.enable()
