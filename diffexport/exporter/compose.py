"""Every graph of a bundle around the traced networks, in a precision, and their weights in one file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffexport.backends.onnxruntime import LARGE
from diffexport.bundle import HALF, WEIGHTS, Precision
from diffexport.exporter.graphs import (
    branch_graph,
    conditioning_graph,
    decoder_graph,
    denoiser_graph,
    step_graph,
    update_graph,
)
from diffexport.exporter.loop import decoded_sampler_graph, sampler_graph
from diffexport.exporter.parts import CONDITION, cut_at, take_batch_from_noise
from diffexport.exporter.precision import check_patterns, layers_of, lower
from diffexport.exporter.rewrite import sides_of
from diffexport.exporter.trace import TRACED_OPSET
from diffexport.exporter.weights import write_weights
from diffexport.spec import DecoderSpec, ModelSpec

if TYPE_CHECKING:
    import onnx_ir


@dataclass(frozen=True)
class Traced:
    """What was traced, every tensor fp32: the network and, where there is one, the decoder."""

    network: onnx_ir.Model
    spec: ModelSpec
    decoder: tuple[onnx_ir.Model, DecoderSpec] | None = None

    def clone(self) -> Traced:
        """The same in other objects, the weights shared."""
        decoder = (self.decoder[0].clone(), self.decoder[1]) if self.decoder is not None else None
        return Traced(self.network.clone(), self.spec, decoder)

    def spilled(self, folder: Path) -> Traced:
        """The same with its weights in a file of a folder, from which they are mapped; this one is used up."""
        write_weights(self.network, folder / WEIGHTS)
        if self.decoder is not None:
            write_weights(self.decoder[0], folder / WEIGHTS)
        return self

    def lowered(self, precision: Precision, keep: Sequence[str] = ()) -> Traced:
        """The same in a precision, where that is a half one; this one is used up.

        Args:
            keep: patterns of layers that stay fp32; see ``diffexport.exporter.precision.lower``.

        Raises:
            ExportError: a pattern names no layer, or the network cannot be half.
        """
        check_patterns(keep, self.layers)
        if precision in HALF:
            for model in (self.network, *([self.decoder[0]] if self.decoder is not None else [])):
                lower(model, precision, keep)
        return self

    @property
    def widest(self) -> int | None:
        """Numbers of one sample in the largest value inside the network, where shapes are known."""
        sides = (sides_of(value) for node in self.network.graph for value in node.outputs)
        return max((math.prod(known) for known in sides if known is not None), default=None)

    @property
    def layers(self) -> list[str]:
        """Every layer, in the order they run."""
        return layers_of(self.network) + (layers_of(self.decoder[0]) if self.decoder is not None else [])


def write_graphs(traced: Traced, folder: Path, precision: Precision) -> list[str]:
    """Write the weights and graphs into a folder. What was traced is used up, so that its weights are never held twice.

    Args:
        traced: in that precision already; see ``Traced.lowered`` and ``diffexport.exporter.quantize``.

    Returns:
        The names of the graphs.
    """
    folder.joinpath(WEIGHTS).unlink(missing_ok=True)
    spec, network = traced.spec, write_weights(traced.network, folder / WEIGHTS)
    take_batch_from_noise(network)
    large = (folder / WEIGHTS).stat().st_size >= LARGE
    graphs = {
        "step": step_graph(network, spec, guided=True),
        "step_plain": step_graph(network, spec, guided=False),
        "denoiser": denoiser_graph(network, spec),
        "sampler": sampler_graph(network, spec, shared=large),
    }
    condition = None if precision in HALF else cut_at(network, CONDITION)  # cut elsewhere, half rounds elsewhere
    if condition:
        graphs["conditioning"] = conditioning_graph(network, spec, condition)
        graphs["step_conditioned"] = step_graph(network, spec, guided=True, condition=condition)
        graphs["step_plain_conditioned"] = step_graph(network, spec, guided=False, condition=condition)
        if spec.guidable:
            graphs["branch"] = branch_graph(network, spec, condition)
            graphs["update"] = update_graph(spec)
    if traced.decoder is not None:
        model, decoder_spec = traced.decoder
        decoder = write_weights(model, folder / WEIGHTS)
        graphs["decoder"] = decoder_graph(decoder, decoder_spec, spec.shape[0])
        graphs["sampler_decoded"] = decoded_sampler_graph(network, spec, decoder, decoder_spec, shared=large)
    for name, graph in graphs.items():
        if precision == "int8":  # from opset 21 on, ONNX Runtime 1.31 moves Q/DQ pairs and gives them two types at once
            graph.opset_import[0].version = TRACED_OPSET
        (folder / f"{name}.onnx").write_bytes(graph.SerializeToString(deterministic=True))
    return list(graphs)
