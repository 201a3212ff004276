"""The graphs of a bundle, put together around the traced network.

``step`` is the definition of ``diffexport.plan`` written in ONNX operators, all of it in float32; ``denoiser`` is Karras
et al. 2022, Eq. 7, with the preconditioning computed from sigma. B is the user's batch; where guidance is in the graph
the network sees 2B, the conditioned half first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffexport.exporter.builder import GraphBuilder, tensor
from diffexport.exporter.parts import C_NOISE, LABEL, Part, X, cut_at, inputs_of, needed
from diffexport.exporter.trace import BATCH, LATENT_SIDES
from diffexport.plan import COLUMNS
from diffexport.schedules import schedule_sigmas
from diffexport.spec import DecoderSpec, ModelSpec

if TYPE_CHECKING:
    import onnx

FLOAT = 1  # of onnx.TensorProto


def step_graph(
    network: onnx.GraphProto, spec: ModelSpec, *, guided: bool, condition: Sequence[Part] = ()
) -> onnx.ModelProto:
    """(x, h, z, label, row) -> (x_next, h_next): one row applied, with the batch doubled inside where ``guided``.

    ``label`` is an input of models with labels only. Where ``condition`` names the parts of the condition, it takes the
    label's place: (2B, K), the conditioned half first, or (B, K) without guidance; see ``conditioning_graph``.
    """
    b = GraphBuilder()
    apply_row(b, network, spec, "row", "z", ("x", "h"), ("x_next", "h_next"), guided=guided, condition=condition)
    width = sum(math.prod(part.sides) for part in condition)
    inputs = [
        *(tensor(name, [BATCH, *spec.shape]) for name in ("x", "h", "z")),
        *([tensor("label", [BATCH], "INT64")] if spec.conditional and not condition else []),
        *([tensor("condition", ["conditions", width])] if condition else []),
        tensor("row", [len(COLUMNS)]),
    ]
    outputs = [tensor(name, [BATCH, *spec.shape]) for name in ("x_next", "h_next")]
    return b.model("step" if guided else "step_plain", inputs, outputs, network)


def conditioning_graph(network: onnx.GraphProto, spec: ModelSpec, condition: Sequence[Part]) -> onnx.ModelProto:
    """(c_noise, label) -> condition: what the network makes of noise level and label alone, (N, K) for N of each."""
    b = GraphBuilder()
    feeds = {C_NOISE: "c_noise", LABEL: "label"}
    values = b.network(network, feeds, [part.name for part in condition])
    flat = []
    for part, value in zip(condition, values, strict=True):
        size = math.prod(part.sides)
        row = b.op("Reshape", value, b.constant([-1, size], np.int64))
        flat.append(row if part.kind == FLOAT else b.op("Cast", row, to=FLOAT))
    b.op("Concat", *flat, axis=1, name="condition")
    inputs = [tensor("c_noise", [BATCH]), *([tensor("label", [BATCH], "INT64")] if spec.conditional else [])]
    width = sum(math.prod(part.sides) for part in condition)
    return b.model("conditioning", inputs, [tensor("condition", [BATCH, width])], network)


def branch_graph(network: onnx.GraphProto, spec: ModelSpec, condition: Sequence[Part]) -> onnx.ModelProto:
    """(x, condition, row) -> out: the network's prediction for one half of a guided batch, (B, *output_shape).

    ``condition`` is that half's (B, K). Two runs of it side by side, then ``update``, are a guided step.
    """
    b = GraphBuilder()
    x_in, c_noise = _network_inputs(b, _columns(b, "row"), "x")
    (out,) = b.network(network, {X: x_in, C_NOISE: c_noise} | _from_condition(b, condition))
    b.add("Identity", [out], ["out"])
    width = sum(math.prod(part.sides) for part in condition)
    inputs = [tensor("x", [BATCH, *spec.shape]), tensor("condition", [BATCH, width]), tensor("row", [len(COLUMNS)])]
    return b.model("branch", inputs, [tensor("out", [BATCH, *spec.output_shape])], network)


def update_graph(spec: ModelSpec) -> onnx.ModelProto:
    """(x, h, z, row, cond, uncond) -> (x_next, h_next): what a guided step does after the network."""
    b = GraphBuilder()
    r = _columns(b, "row")
    output = _mixed(b, spec, "cond", "uncond", r["w"])
    _update(b, spec, r, "z", ("x", "h"), ("x_next", "h_next"), *output)
    inputs = [
        *(tensor(name, [BATCH, *spec.shape]) for name in ("x", "h", "z")),
        tensor("row", [len(COLUMNS)]),
        *(tensor(name, [BATCH, *spec.output_shape]) for name in ("cond", "uncond")),
    ]
    return b.model("update", inputs, [tensor(name, [BATCH, *spec.shape]) for name in ("x_next", "h_next")])


def apply_row(
    b: GraphBuilder,
    network: onnx.GraphProto,
    spec: ModelSpec,
    row: str,
    z: str,
    state: tuple[str, str],
    following: tuple[str, str],
    *,
    guided: bool,
    condition: Sequence[Part] = (),
) -> None:
    """The definition of ``diffexport.plan`` for one row: from the state (x, h) to the following one, by name."""
    x = state[0]
    r = _columns(b, row)
    x_in, c_noise = _network_inputs(b, r, x)
    output = _guided_output(b, network, spec, x_in, c_noise, r["w"], guided=guided, condition=condition)
    _update(b, spec, r, z, state, following, *output)


def _columns(b: GraphBuilder, row: str) -> dict[str, str]:
    """A row's numbers by the names of their columns, each (1,)."""
    return dict(zip(COLUMNS, b.op("Split", row, outputs=len(COLUMNS), axis=0, num_outputs=len(COLUMNS)), strict=True))


def _network_inputs(b: GraphBuilder, r: dict[str, str], x: str) -> tuple[str, str]:
    """x_in (B, *shape) and c_noise (B,) of a row."""
    size = b.op("Shape", x, start=0, end=1)
    return b.op("Mul", x, r["c_in"]), b.op("Expand", r["c_noise"], size)


def _update(
    b: GraphBuilder,
    spec: ModelSpec,
    r: dict[str, str],
    z: str,
    state: tuple[str, str],
    following: tuple[str, str],
    out: str,
    log_variance: str | None,
) -> None:
    """From the network's prediction to the following state."""
    x, h = state
    denoised = _denoised(b, spec, x, r["c_skip"], r["c_out"], out)
    if spec.clip is not None and spec.clip_keeps == "eps":
        rest = b.op("Mul", b.op("Sub", b.constant(1.0), r["c_skip"]), x)
        x = b.op("Add", denoised, b.op("Sub", rest, b.op("Mul", r["c_out"], out)))

    noise = b.op("Mul", r["x_z"], z)
    if log_variance is not None:
        noise = b.op("Mul", b.op("Exp", b.op("Mul", r["v_z"], log_variance)), noise)
    _weighted_sum(b, following[0], [(r["x_x"], x), (r["x_d"], denoised), (r["x_h"], h)], plus=noise)
    _weighted_sum(b, following[1], [(r["h_x"], x), (r["h_d"], denoised), (r["h_h"], h)])


def denoiser_graph(network: onnx.GraphProto, spec: ModelSpec) -> onnx.ModelProto:
    """(x, sigma, label, guidance) -> denoised, with sigma and guidance (B,), one for each sample.

    ``label`` is an input of models with labels only, ``guidance`` of those that can be guided. sigma must lie above 0.
    """
    b = GraphBuilder()
    ones = [1] * len(spec.shape)
    column = b.constant([-1, *ones], np.int64)
    sigma = b.op("Reshape", "sigma", column)  # (B, 1, ..., 1)
    one = b.constant(1.0)
    alpha_bar = b.op("Div", one, b.op("Add", one, b.op("Mul", sigma, sigma)))
    c_in = b.op("Sqrt", alpha_bar) if spec.scaled else None
    x_in = b.op("Mul", "x", c_in) if c_in else "x"
    c_noise = _timestep(b, spec) if spec.noise_input == "timestep" else "sigma"
    w = b.op("Reshape", "guidance", column) if spec.guidable else None
    out, _ = _guided_output(b, network, spec, x_in, c_noise, w, guided=spec.guidable)
    c_skip, c_out = _preconditioning(b, spec, sigma, alpha_bar, one)
    _denoised(b, spec, "x", c_skip, c_out, out, name="denoised")

    inputs = [tensor("x", [BATCH, *spec.shape]), tensor("sigma", [BATCH])]
    if spec.conditional:
        inputs.append(tensor("label", [BATCH], "INT64"))
    if spec.guidable:
        inputs.append(tensor("guidance", [BATCH]))
    return b.model("denoiser", inputs, [tensor("denoised", [BATCH, *spec.shape])], network)


def decoder_graph(decoder: onnx.GraphProto, spec: DecoderSpec, channels: int) -> onnx.ModelProto:
    """x -> image: latents (B, channels, h, w) as the sampler leaves them, of any sides, to images in about -1 .. 1."""
    b = GraphBuilder()
    apply_decoder(b, decoder, spec, "x")
    inputs = [tensor("x", [BATCH, channels, *LATENT_SIDES])]
    image = tensor("image", [BATCH, spec.channels, *(f"{spec.upscale}*{side}" for side in LATENT_SIDES)])
    return b.model("decoder", inputs, [image], decoder)


def apply_decoder(b: GraphBuilder, decoder: onnx.GraphProto, spec: DecoderSpec, x: str) -> None:
    """The definition of ``DecoderSpec``: from latents x to ``image``."""
    latents = b.op("Add", b.op("Div", x, b.constant(spec.scaling_factor)), b.constant(spec.shift))
    b.add("Identity", b.network(decoder, {"dec.x": latents}), ["image"])


def _guided_output(
    b: GraphBuilder,
    network: onnx.GraphProto,
    spec: ModelSpec,
    x_in: str,
    c_noise: str,
    w: str | None,
    *,
    guided: bool,
    condition: Sequence[Part] = (),
) -> tuple[str, str | None]:
    """The network's prediction after guidance, (B, *shape), and its learned variance or None."""
    channels = spec.shape[0]
    total = spec.output_shape[0]
    if not guided or not spec.guidable:
        feeds = {X: x_in, C_NOISE: c_noise, LABEL: "label"} | _from_condition(b, condition)
        (out,) = b.network(network, feeds)
        return (_channels(b, out, 0, channels), _channels(b, out, channels, total)) if total > channels else (out, None)
    assert w is not None
    doubled = _doubled_output(b, network, spec, x_in, c_noise, condition)
    cond, uncond = b.op("Split", doubled, outputs=2, axis=0, num_outputs=2)
    return _mixed(b, spec, cond, uncond, w)


def _mixed(b: GraphBuilder, spec: ModelSpec, cond: str, uncond: str, w: str) -> tuple[str, str | None]:
    """The prediction after guidance and the learned variance of the two halves, each (B, *output_shape)."""
    channels, total = spec.shape[0], spec.output_shape[0]
    mixed_channels = spec.guided_channels or channels
    cond_mixed, uncond_mixed = cond, uncond
    if mixed_channels < total:
        cond_mixed, uncond_mixed = (_channels(b, half, 0, mixed_channels) for half in (cond, uncond))
    out = b.op("Add", uncond_mixed, b.op("Mul", w, b.op("Sub", cond_mixed, uncond_mixed)))
    if mixed_channels < channels:
        out = b.op("Concat", out, _channels(b, cond, mixed_channels, channels), axis=1)
    return out, _channels(b, cond, channels, total) if total > channels else None


def _doubled_output(
    b: GraphBuilder, network: onnx.GraphProto, spec: ModelSpec, x_in: str, c_noise: str, condition: Sequence[Part]
) -> str:
    """The network's output for both halves of guidance, (2B, C or 2C, ...).

    What depends on x alone is the same in both and computed once.
    """
    feeds = _from_condition(b, condition)
    once = [part.name for part in cut_at(network, frozenset({X}))]
    made = b.network(network, {X: x_in, C_NOISE: c_noise}, once, "once.") if once else []
    feeds |= {name: b.op("Concat", value, value, axis=0) for name, value in zip(once, made, strict=True)}
    read = inputs_of(needed(network, [network.output[0].name], feeds))
    if X in read:
        feeds[X] = b.op("Concat", x_in, x_in, axis=0)  # (2B, *shape)
    if C_NOISE in read:
        feeds[C_NOISE] = b.op("Concat", c_noise, c_noise, axis=0)
    if LABEL in read:
        size = b.op("Shape", "label", start=0, end=1)
        null = b.op("Expand", b.constant([spec.null_label], np.int64), size)
        feeds[LABEL] = b.op("Concat", "label", null, axis=0)
    (out,) = b.network(network, feeds)
    return out


def _from_condition(b: GraphBuilder, condition: Sequence[Part]) -> dict[str, str]:
    """The values that the network's parts had, by name, from the input ``condition``."""
    if not condition:
        return {}
    sizes = [math.prod(part.sides) for part in condition]
    pieces = ["condition"]
    if len(sizes) > 1:
        pieces = list(b.op("Split", "condition", b.constant(sizes, np.int64), outputs=len(sizes), axis=1))
    feeds = {}
    for part, piece in zip(condition, pieces, strict=True):
        value = piece if part.kind == FLOAT else b.op("Cast", piece, to=part.kind)
        feeds[part.name] = b.op("Reshape", value, b.constant([-1, *part.sides], np.int64))
    return feeds


def _channels(b: GraphBuilder, value: str, start: int, stop: int) -> str:
    bounds = [b.constant([bound], np.int64) for bound in (start, stop, 1)]
    return str(b.op("Slice", value, *bounds))


def _denoised(
    b: GraphBuilder, spec: ModelSpec, x: str, c_skip: str, c_out: str, out: str, name: str | None = None
) -> str:
    """D = c_skip*x + c_out*out, clamped where the model asks for it."""
    clipped = spec.clip is not None
    terms = b.op("Mul", c_skip, x), b.op("Mul", c_out, out)
    denoised = b.op("Add", *terms, name=None if clipped else name)
    if clipped:
        denoised = b.op("Clip", denoised, b.constant(-spec.clip), b.constant(spec.clip), name=name)  # type: ignore[operator]
    return str(denoised)


def _preconditioning(b: GraphBuilder, spec: ModelSpec, sigma: str, alpha_bar: str, one: str) -> tuple[str, str]:
    """c_skip and c_out of ``diffexport.plan.preconditioning``, in operators."""
    if spec.prediction == "x0":
        return b.constant(0.0), one
    if spec.prediction == "v":
        scaled_sigma = b.op("Mul", sigma, b.op("Sqrt", alpha_bar))
        rest = b.op("Sqrt", b.op("Sub", one, alpha_bar))
        return b.op("Sub", one, b.op("Mul", scaled_sigma, rest)), b.op("Neg", scaled_sigma)
    return one, b.op("Neg", sigma)


def _timestep(b: GraphBuilder, spec: ModelSpec) -> str:
    """``diffexport.plan.timesteps`` in operators: the schedule's step for each sigma, linear in log sigma, (B,)."""
    logs = np.log(schedule_sigmas(spec.schedule)).astype(np.float32)
    table = b.constant(logs)
    log_sigma = b.op("Clip", b.op("Log", "sigma"), b.constant(logs[0]), b.constant(logs[-1]))
    above = b.op("GreaterOrEqual", b.op("Unsqueeze", log_sigma, b.constant([1], np.int64)), table)  # (B, N)
    count = b.op("ReduceSum", b.op("Cast", above, to=7), b.constant([1], np.int64), keepdims=0)
    one = b.constant(1, np.int64)
    low = b.op("Clip", b.op("Sub", count, one), b.constant(0, np.int64), b.constant(len(logs) - 2, np.int64))
    start, end = b.op("Gather", table, low), b.op("Gather", table, b.op("Add", low, one))
    part = b.op("Div", b.op("Sub", log_sigma, start), b.op("Sub", end, start))
    return str(b.op("Add", b.op("Cast", low, to=1), part))


def _weighted_sum(b: GraphBuilder, name: str, terms: list[tuple[str, str]], plus: str | None = None) -> None:
    products = [b.op("Mul", weight, value) for weight, value in terms] + ([plus] if plus else [])
    total = products[0]
    for index, product in enumerate(products[1:]):
        total = b.op("Add", total, product, name=name if index == len(products) - 2 else None)
