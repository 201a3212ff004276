"""The network alone, traced once: ``F(x, c_noise, label) -> out`` with a dynamic batch N.

Everything around it (guidance, preconditioning, the update) is put there by ``diffexport.exporter.graphs``, so one trace
serves every graph of a bundle and no wrapper can change what was traced.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from diffexport.errors import ExportError
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    import onnx_ir
    import torch

OPSET = 20
"""Newest opset whose attention, written out, ONNX Runtime, OpenVINO and TensorRT all take in every precision."""

BATCH = "batch"
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
    args = (x, c_noise, label) if spec.conditional else (x, c_noise)
    names = ["net.x", "net.c_noise", "net.label"][: len(args)]
    batch = torch.export.Dim(BATCH, min=1, max=1 << 16)
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                args,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=tuple({0: batch} for _ in args),
                input_names=names,
                output_names=["net.out"],
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises what its many stages raise
        reason = str(error).strip().splitlines()
        raise ExportError(
            f"{spec.family}: PyTorch cannot trace this module ({type(error).__name__}: {reason[0] if reason else ''})"
        ) from error
    assert program is not None
    model = program.model
    _simplify(model)
    _check_shapes(model, spec)
    _clean(model)
    return model


def _simplify(model: onnx_ir.Model) -> None:
    """Compute what is constant, transposed weights for one, and keep each constant and each expression once.

    The exporter's own optimizer also tries every rewrite rule at every node; a runtime does that better and its result
    differs here by a dozen shape operators, so its seconds are saved.
    """
    import onnx_ir
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants

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


def _check_shapes(model: onnx_ir.Model, spec: ModelSpec) -> None:
    """The exporter can write a static batch without a word: see that it did not, and that the output fits the spec."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        dim = value.shape[0] if value.shape is not None else None
        if dim is None or isinstance(dim, int):
            raise ExportError(
                f"{spec.family}: the traced batch of {value.name} is fixed at {dim}; a forward that depends on the "
                "batch in Python (int(x.shape[0]), chunk of a concatenated batch) does this"
            )
    (out,) = model.graph.outputs
    found = tuple(out.shape)[1:] if out.shape is not None else ()
    if found != spec.output_shape:
        raise ExportError(
            f"{spec.family}: the module returns samples of shape {found}, its spec says {spec.output_shape}"
        )


def _clean(model: onnx_ir.Model) -> None:
    """Remove what describes the machine or the moment, and name what has no name of its own by its place."""
    import onnx_ir

    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    named = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    weights = {id(value) for value in model.graph.initializers.values()}
    for index, node in enumerate(onnx_ir.traversal.RecursiveGraphIterator(model.graph)):
        node.metadata_props.clear()
        node.doc_string = None
        node.name = f"net.{index}.{node.op_type}"
        for position, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if id(value) not in named:
                value.name = f"net.{index}.{position}"
    for position, value in enumerate(list(model.graph.initializers.values())):
        value.metadata_props.clear()
        assert id(value) in weights
        assert value.name is not None
        _rename_initializer(model, value, f"net.{_weight_name(value, position)}")


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
