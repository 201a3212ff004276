"""Islands: the layers of a half or int8 network that have to stay fp32, found by measuring.

``fewest_kept`` searches them for anything that makes a network coarser. ``Halving`` makes it half, where two things go
wrong. A value lies beyond its range: float16 ends at 65504. Or rounding in some layer costs more than its share of the
limit. The first is read off the values of the fp32 network; the second off the network with only that layer half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from diffexport.backends.rounding import MOVES
from diffexport.bundle import Precision, Tensors
from diffexport.exporter.precision import FP16_MAX, layer_of, layers_of, lower
from diffexport.exporter.trace import ROOTS
from diffexport.parity import relative_l2
from diffexport.plan import COLUMNS, denoise_rows
from diffexport.probes import probe_labels, probe_levels, probe_state
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    import onnx_ir

    from diffexport.exporter.compose import Traced

DECODER = ROOTS["dec"]

SAMPLES = 2
"""Of each probe; a conditional network also sees them without their labels."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Overflow:
    """A value of a layer beyond float16: the largest one, at the noise level where it was seen."""

    layer: str
    largest: float
    sigma: float

    def __str__(self) -> str:
        return f"{self.layer} reaches {self.largest:.3g} at sigma {self.sigma:.4g}, beyond float16's {FP16_MAX:g}"


class Coarsening(Protocol):
    """A way to make a traced network coarser, with more layers kept in fp32 where that costs too much."""

    def traced(self, kept: Sequence[str]) -> Traced:
        """The network, coarser but for these layers."""
        ...

    def guesses(self) -> Iterator[tuple[str, ...]]:
        """Layers to keep that may be enough, in the order to be tried; each begins with those before it."""
        ...

    def ranked(self, progress: Progress) -> Sequence[str]:
        """The layers by what each costs when it alone is coarser, the costliest first."""
        ...


def fewest_kept(coarsening: Coarsening, holds: Callable[[Sequence[str]], bool], progress: Progress) -> tuple[str, ...]:
    """The layers to keep in fp32 so that a bundle holds; where nothing holds, the ones tried last.

    Where no guess is enough, the costliest layers are kept beside the last one, as many as are needed; see ``fewest``.
    A decoder, which is kept whole or not at all, is made coarser again where the bundle holds all the same.

    Args:
        holds: whether a bundle with these layers kept passes its checks; the last call is made with what is returned.
    """
    guess: tuple[str, ...] = ()
    enough = any(holds(guess := each) for each in coarsening.guesses())
    kept = guess
    if not enough:
        ranked = [layer for layer in coarsening.ranked(progress) if layer not in guess]
        kept += fewest(ranked, lambda more: holds((*guess, *more)), progress)
    without = tuple(layer for layer in kept if layer != DECODER)
    if not without or without == kept or holds(without):
        return without or kept
    holds(kept)
    return kept


class Halving:
    """A traced fp32 network, its weights in a file, that becomes half; see ``Coarsening``.

    Args:
        keep: patterns of layers that stay fp32 in any case.
    """

    def __init__(self, spilled: Traced, precision: Precision, keep: Sequence[str] = ()) -> None:
        self.spilled, self.keep = spilled, keep
        self.precision: Precision = precision
        self.model = spilled.network
        self.levels = [float(sigma) for sigma in probe_levels(spilled.spec)]
        self.feeds = [_feeds(spilled.spec, sigma, draw) for draw, sigma in enumerate(self.levels)]

    def traced(self, kept: Sequence[str]) -> Traced:
        return self.spilled.clone().lowered(self.precision, (*self.keep, *kept))

    def guesses(self) -> Iterator[tuple[str, ...]]:
        decoder = (DECODER,) if self.spilled.decoder is not None else ()
        if decoder:
            yield decoder
        overflowing = tuple(found.layer for found in self.overflows()) if self.precision == "fp16" else ()
        if overflowing:
            yield (*decoder, *overflowing)

    def ranked(self, progress: Progress) -> list[str]:
        return [layer for layer, _ in self.sensitivities(progress)]

    def overflows(self) -> list[Overflow]:
        """What lies beyond float16, one entry a layer that gives or reads such a value, in the order that they run."""
        largest: dict[str, Overflow] = {}
        names, peaks = self._with_peaks()
        for sigma, feeds in zip(self.levels, self.feeds, strict=True):
            values = dict(zip(names, _run(peaks, feeds), strict=True))
            for node in self.model.graph:
                near = [value.name for value in (*node.inputs, *node.outputs) if value is not None]
                peak = max((float(values[name]) for name in near if name in values), default=0.0)
                layer = layer_of(node)
                beyond = node.op_type not in MOVES and not peak <= FP16_MAX
                if beyond and (layer not in largest or peak > largest[layer].largest):
                    largest[layer] = Overflow(layer, peak, sigma)
        return list(largest.values())

    def sensitivities(self, progress: Progress) -> list[tuple[str, float]]:
        """Relative L2 of the network's output with one layer half, the worst of the levels; the largest first."""
        layers = layers_of(self.model)
        expected = [_run(self.model.clone(), feeds)[0] for feeds in self.feeds]
        found = []
        for index, layer in enumerate(layers):
            progress(f"half precision of {layer} alone", index / len(layers))
            alone = self.model.clone()
            lower(alone, self.precision, only=layer)
            run = network_session(alone)
            errors = [relative_l2(run(feeds)[0], right) for feeds, right in zip(self.feeds, expected, strict=True)]
            found.append((layer, float(np.max(errors)) if np.isfinite(errors).all() else np.inf))
        return sorted(found, key=lambda entry: -entry[1])

    def _with_peaks(self) -> tuple[list[str], onnx_ir.Model]:
        """The network with the largest absolute value of every fp32 value as its outputs, and the names of the values."""
        import onnx_ir as ir

        model = self.model.clone()
        names, peaks = [], []
        for node in list(model.graph):
            for value in node.outputs:
                if value.dtype != ir.DataType.FLOAT or node.op_type in MOVES or not value.name:
                    continue
                absolute = ir.node("Abs", [value], name=f"net/peaks/{value.name}.abs")
                peak = ir.node("ReduceMax", [absolute.outputs[0]], {"keepdims": 0}, name=f"net/peaks/{value.name}.max")
                absolute.outputs[0].name, peak.outputs[0].name = f"{value.name}.abs", f"{value.name}.peak"
                peak.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
                peak.outputs[0].shape = ir.Shape([])
                model.graph.extend([absolute, peak])
                names.append(value.name)
                peaks.append(peak.outputs[0])
        model.graph.outputs.clear()
        model.graph.outputs.extend(peaks)
        return names, model


def fewest(ranked: Sequence[str], holds: Callable[[Sequence[str]], bool], progress: Progress) -> tuple[str, ...]:
    """The fewest layers from the front of a list, at least one, so that ``holds``; all of them where nothing less does.

    Twice as many are tried each time until they are enough, since few usually are, and then numbers between by bisection.
    The last call of ``holds`` is made with what is returned.
    """
    tried = 0

    def enough(count: int) -> bool:
        nonlocal tried
        tried = count
        progress(f"keeping {count} layers more in fp32", count / len(ranked))
        return holds(ranked[:count])

    low, high = 1, 1  # fewer than `low` layers are too few; `high` are enough, if all of them are
    while high < len(ranked) and not enough(high):
        low, high = high + 1, min(2 * high, len(ranked))
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    if tried != high:
        holds(ranked[:high])
    return tuple(ranked[:high])


def _feeds(spec: ModelSpec, sigma: float, draw: int) -> Tensors:
    """The network's inputs at a noise level, with labels and without."""
    start = probe_state(spec, sigma, draw, range(SAMPLES))
    row = dict(zip(COLUMNS, denoise_rows(spec, [sigma])[0].astype(np.float32), strict=True))
    x = row["c_in"] * start.x
    labels = probe_labels(spec, range(SAMPLES))
    feeds: Tensors = {"net.x": x}
    if labels is not None:
        feeds = {
            "net.x": np.concatenate([x, x]),
            "net.label": np.concatenate([labels, np.full(SAMPLES, spec.null_label, np.int64)]),
        }
    feeds["net.c_noise"] = np.full(len(feeds["net.x"]), row["c_noise"], np.float32)
    return feeds


def network_session(model: onnx_ir.Model) -> Callable[[Tensors], list[Any]]:
    """A network to run, rounding what is half; its weights lie where its first external tensor says."""
    import onnx_ir as ir

    from diffexport.backends.onnxruntime import load_model
    from diffexport.backends.rounding import rounded

    tensors = [value.const_value for value in model.graph.initializers.values()]
    places = [tensor.base_dir for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    session = load_model(rounded(ir.to_proto(model)), Path(places[0] if places else ".") / "network")
    return lambda feeds: list(session.run(None, feeds))


def _run(model: onnx_ir.Model, feeds: Tensors) -> list[Any]:
    return network_session(model)(feeds)
