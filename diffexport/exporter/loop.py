"""The whole sampler as one graph: an ONNX Loop whose body applies one row of the plan.

The weights belong to the graph whose operators use them: the branches of guidance, or the body where there are none.
ONNX Runtime lays out constant weights ahead of the first run, but does not find those of an outermost graph two levels
up; and what a subgraph takes from outside is handed to it anew in every row, one weight after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diffexport.exporter.builder import GraphBuilder, tensor
from diffexport.exporter.graphs import apply_decoder, apply_row
from diffexport.exporter.trace import BATCH
from diffexport.plan import COLUMNS, GUIDANCE
from diffexport.spec import DecoderSpec, ModelSpec

if TYPE_CHECKING:
    import onnx


def sampler_graph(network: onnx.GraphProto, spec: ModelSpec, *, shared: bool = False) -> onnx.ModelProto:
    """(x_init, label, plan, noise) -> x: every row of the plan applied, the number of rows decided when it runs.

    x_init (B, *shape) is the start of the state, x_scale times unit noise; plan (rows, 13); noise (rows, B, *shape), or
    (1, 1, *shape) of anything finite for a plan that adds none. Rows with w = 1 evaluate the network once, not twice.
    """
    b = GraphBuilder()
    inputs, outputs = _loop(b, network, spec, shared)
    return b.model("sampler", inputs, outputs, *([network] if shared else []))


def decoded_sampler_graph(
    network: onnx.GraphProto,
    spec: ModelSpec,
    decoder: onnx.GraphProto,
    decoder_spec: DecoderSpec,
    *,
    shared: bool = False,
) -> onnx.ModelProto:
    """(x_init, label, plan, noise) -> image, x: as ``sampler_graph``, and the latents decoded."""
    b = GraphBuilder()
    inputs, outputs = _loop(b, network, spec, shared)
    apply_decoder(b, decoder, decoder_spec, "x")
    sides = (decoder_spec.upscale * side for side in spec.shape[1:])
    image = tensor("image", [BATCH, decoder_spec.channels, *sides])
    return b.model("sampler_decoded", inputs, [image, *outputs], decoder, *([network] if shared else []))


def _loop(b: GraphBuilder, network: onnx.GraphProto, spec: ModelSpec, shared: bool) -> tuple[list[Any], list[Any]]:
    """The Loop in a graph; the inputs that it reads and its output x."""
    rows = b.op("Shape", "plan", start=0, end=1)
    rows = b.op("Squeeze", rows, b.constant([0], np.int64))
    zero = b.op("Expand", b.constant(0.0), b.op("Shape", "x_init"))
    body = _body(b.inner("body"), network, spec, shared)
    b.add("Loop", [rows, "", "x_init", zero], ["x", "h_last"], body=body)
    inputs = [
        tensor("x_init", [BATCH, *spec.shape]),
        *([tensor("label", [BATCH], "INT64")] if spec.conditional else []),
        tensor("plan", ["rows", len(COLUMNS)]),
        tensor("noise", ["noise_rows", "noise_batch", *spec.shape]),
    ]
    return inputs, [tensor("x", [BATCH, *spec.shape])]


def _body(b: GraphBuilder, network: onnx.GraphProto, spec: ModelSpec, shared: bool) -> onnx.GraphProto:
    """(i, going, x, h) -> (going, x', h')."""
    own = [] if shared else [network]
    scope = b.scope
    i, going, x, h = (scope + name for name in ("i", "going", "x", "h"))
    row = b.op("Gather", "plan", i, axis=0)  # (13,)
    axis = b.constant([0], np.int64)
    noise_rows = b.op("Squeeze", b.op("Shape", "noise", start=0, end=1), axis)
    z = b.op("Gather", "noise", b.op("Mod", i, noise_rows), axis=0)  # (B or 1, *shape)
    following = (scope + "x_next", scope + "h_next")
    if spec.guidable:
        w = b.op("Gather", row, b.constant(GUIDANCE, np.int64), axis=0)
        branches = {}
        for name, guided in (("then_branch", False), ("else_branch", True)):
            branch = b.inner(name.removesuffix("_branch"))
            ends = (branch.scope + "x_next", branch.scope + "h_next")
            apply_row(branch, network, spec, row, z, (x, h), ends, guided=guided)
            branches[name] = branch.graph(name, [], [tensor(end, [BATCH, *spec.shape]) for end in ends], *own)
        b.add("If", [b.op("Equal", w, b.constant(1.0))], list(following), **branches)
    else:
        apply_row(b, network, spec, row, z, (x, h), following, guided=False)
    b.add("Identity", [b.constant(True, np.bool_)], [scope + "going_on"])  # TensorRT does not give a body its condition
    state = [tensor(name, [BATCH, *spec.shape]) for name in (x, h)]
    inputs = [tensor(i, [], "INT64"), tensor(going, [], "BOOL"), *state]
    outputs = [tensor(scope + "going_on", [], "BOOL"), *(tensor(end, [BATCH, *spec.shape]) for end in following)]
    return b.graph("body", inputs, outputs, *([] if spec.guidable else own))
