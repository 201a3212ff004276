"""The models that checkpoints can be of, as a table: how each is recognised, what its tensors tell, how it is made.

Adding a model is adding a row. A fact is read off the tensors' shapes wherever they tell it, so that nothing is built
that the file does not hold.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffexport.errors import CheckpointError, SpecError
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport_reference.dit import DiT
from diffexport_reference.model import (
    CondEmbedderLabel,
    ConditionalMLP,
    IdealDenoiser,
    SigmaEmbedderSinCos,
    TimeInputMLP,
    TimestepEmbedder,
)
from diffexport_reference.official_dit import GUIDED_CHANNELS, PUBLISHED_HEADS, OfficialDiT
from diffexport_reference.unet import Unet
from diffexport_reference.weights import a, name_problems

Args = dict[str, Any]


class Shapes(Mapping[str, tuple[int, ...]]):
    """The shapes of a state dict, by name."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dims(self, name: str, *ranks: int) -> tuple[int, ...]:
        """The shape of one tensor.

        Raises:
            CheckpointError: it is missing, or of none of these ranks.
        """
        shape = self._shapes.get(name)
        if shape is None:
            raise CheckpointError(f"{name} is missing")
        if len(shape) not in ranks:
            raise CheckpointError(f"{name} has shape {shape}, expected {' or '.join(map(str, ranks))} dimensions")
        return shape

    def count(self, prefix: str) -> int:
        """How many members 0, 1, ... follow a prefix without a gap."""
        start = len(prefix) + 1
        there = {name[start:].split(".", 1)[0] for name in self._shapes if name.startswith(f"{prefix}.")}
        return next(n for n in range(len(there) + 1) if str(n) not in there)

    def num_classes(self, table: str) -> int:
        """Labels of an embedding, whose last row is the null label; 0 without one."""
        return self.dims(table, 2)[0] - 1 if table in self else 0


@dataclass(frozen=True)
class Ask:
    """A constructor's argument that tensors do not tell and a flag does."""

    arg: str
    flag: str
    values: Callable[[Shapes], str]
    """The possible values, in words."""


@dataclass(frozen=True)
class Family:
    """A kind of model."""

    name: str
    model_class: str
    """Its name in diffexport's own checkpoints."""
    smallest: Args
    """Arguments of a small model that has every part, whose tensors' names tell the family."""
    read: Callable[[Shapes, Mapping[str, Any]], Args]
    """Constructor's arguments from shapes and given facts; what an ``Ask`` names is None where it was not given."""
    build: Callable[[Args, Shapes], nn.Module]
    optional: tuple[str, ...] = ()
    """Beginnings of the names of parts that a model of the family can be without."""
    asks: tuple[Ask, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the spec that are the same for all models of the family."""


def recognise(names: Iterable[str]) -> Family:
    """The family that shares most of its tensors' names with a state dict, numbers in them left out.

    Raises:
        CheckpointError: none shares half of them; says the nearest and what it lacks.
    """
    names = list(names)
    shares = {family.name: _share(family, names) for family in FAMILIES}
    best = max(FAMILIES, key=lambda family: shares[family.name])
    expected, in_common = shares[best.name]
    if in_common >= 0.5:
        return best
    first = ", ".join(names[:3]) or "none"
    known = ", ".join(family.name for family in FAMILIES)
    nearest = f"; the nearest is {a(best.name)}, but {lacks(best, names)}" if expected else ""
    raise CheckpointError(f"not a model that is known here; its tensors begin with {first}{nearest}; known are {known}")


def lacks(family: Family, names: Iterable[str]) -> str:
    """What a state dict of these names lacks to be of a family, and has too much; empty where that is nothing."""
    names = list(names)
    known, found = {_unnumbered(name) for name in _tensors(family.model_class)}, {_unnumbered(name) for name in names}
    missing = [
        name
        for name in _tensors(family.model_class)
        if _unnumbered(name) not in found and not name.startswith(family.optional)
    ]
    return "; ".join(name_problems(missing, [name for name in names if _unnumbered(name) not in known]))


def _share(family: Family, names: list[str]) -> tuple[float, float]:
    """The part of these names that the family has too, then what both have of all that either has.

    The first alone decides between families where one is the other with more parts.
    """
    known, found = {_unnumbered(name) for name in _tensors(family.model_class)}, {_unnumbered(name) for name in names}
    both = len(known & found)
    return both / max(len(found), 1), both / len(known | found)


@functools.cache
def _tensors(model_class: str) -> tuple[str, ...]:
    """The names in the smallest model of a family that has all its parts."""
    family = by_class(model_class)
    with torch.device("meta"):
        return tuple(family.build(family.smallest, Shapes({"data": (1, 1)})).state_dict())


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def by_class(model_class: Any) -> Family:
    """The family of a class name in diffexport's own checkpoints.

    Raises:
        CheckpointError: none.
    """
    for family in FAMILIES:
        if family.model_class == model_class:
            return family
    known = ", ".join(family.model_class for family in FAMILIES)
    raise CheckpointError(f"model class {model_class!r} is not known here; known are {known}")


def _heads(width: int, given: Mapping[str, Any]) -> int | None:
    heads: int | None = given.get("heads")
    if heads is not None and width % heads:
        raise SpecError(f"--heads {heads}: does not divide the width {width}")
    return heads


def _side(tokens: int, patch: int) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"pos_embed has {tokens} tokens, expected a square")
    return side * patch


def _read_dit(shapes: Shapes, given: Mapping[str, Any]) -> Args:
    width, channels, patch, _ = shapes.dims("x_embed.proj.weight", 4)
    heads = _heads(width, given)
    return {
        "in_dim": _side(shapes.dims("pos_embed", 3)[1], patch),
        "channels": channels,
        "patch_size": patch,
        "depth": shapes.count("blocks"),
        "head_dim": None if heads is None else width // heads,
        "num_heads": heads,
        "mlp_ratio": shapes.dims("blocks.0.mlp.0.weight", 2)[0] / width,
        **_read_embedders(shapes),
    }


def _read_embedders(shapes: Shapes) -> Args:
    timestep = "sig_embed.mlp.4.weight" in shapes
    return {
        "sig_embed": "TimestepEmbedder" if timestep else "SigmaEmbedderSinCos",
        "num_classes": shapes.num_classes("cond_embed.embeddings.weight"),
        "cond_mlp": "cond_embed.mlp.1.weight" in shapes,
    }


def _embedded(base: Callable[..., nn.Module], width: int, args: Args) -> nn.Module:
    embedder = {"TimestepEmbedder": TimestepEmbedder, "SigmaEmbedderSinCos": SigmaEmbedderSinCos}[args["sig_embed"]]
    classes = args["num_classes"]
    cond_embed = CondEmbedderLabel(width, classes, with_mlp=args["cond_mlp"]) if classes else None
    rest = {name: value for name, value in args.items() if name not in ("sig_embed", "num_classes", "cond_mlp")}
    return base(**rest, sig_embed=embedder(width), cond_embed=cond_embed)


def _read_unet(shapes: Shapes, given: Mapping[str, Any]) -> Args:
    ch, in_ch = shapes.dims("conv_in.weight", 4)[:2]
    side: int | None = given.get("image_size")
    levels = range(shapes.count("downs"))
    widths = [shapes.dims(f"downs.{i}.blocks.0.0.layer1.2.weight", 4)[0] for i in levels]
    attention = [i for i in levels if f"downs.{i}.blocks.0.1.norm.weight" in shapes]
    return {
        "in_dim": side,
        "in_ch": in_ch,
        "out_ch": shapes.dims("out_layer.2.weight", 4)[0],
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "embed_ch_mult": shapes.dims("sig_embed.mlp.2.weight", 2)[0] // ch,
        "num_res_blocks": shapes.count("downs.0.blocks"),
        "attn_resolutions": [] if side is None else [side >> i for i in attention],
        "resamp_with_conv": len(levels) < 2 or "downs.0.downsample.1.weight" in shapes,
        **_read_embedders(shapes),
    }


def _read_mlp(shapes: Shapes, given: Mapping[str, Any]) -> Args:
    layers: list[tuple[int, ...]] = []
    while f"net.{2 * len(layers)}.weight" in shapes:
        layers.append(shapes.dims(f"net.{2 * len(layers)}.weight", 2))
    if not layers:
        raise CheckpointError("net.0.weight is missing")
    labels = "cond_embed.embeddings.weight"
    cond_dim = shapes.dims(labels, 2)[1] if labels in shapes else 0
    dim = layers[0][1] - 2 - cond_dim
    if dim < 1 or layers[-1][0] != dim:
        raise CheckpointError(f"the MLP takes points of {dim} numbers and returns {layers[-1][0]}, expected as many")
    args: Args = {"dim": dim, "hidden_dims": [out for out, _ in layers[:-1]]}
    if cond_dim:
        args |= {"cond_dim": cond_dim, "num_classes": shapes.num_classes(labels)}
        args["with_mlp"] = "cond_embed.mlp.1.weight" in shapes
    return args


def _read_official(shapes: Shapes, given: Mapping[str, Any]) -> Args:
    width, channels, patch, _ = shapes.dims("x_embedder.proj.weight", 4)
    return {
        "input_size": _side(shapes.dims("pos_embed", 3)[1], patch),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": shapes.count("blocks"),
        "num_heads": _heads(width, given) or PUBLISHED_HEADS.get(width),
        "mlp_ratio": shapes.dims("blocks.0.mlp.fc1.weight", 2)[0] / width,
        "num_classes": shapes.num_classes("y_embedder.embedding_table.weight"),
        "learn_sigma": shapes.dims("final_layer.linear.weight", 2)[0] == 2 * channels * patch**2,
    }


def _read_ideal(shapes: Shapes, given: Mapping[str, Any]) -> Args:
    shapes.dims("data", 2, 4)
    return {}


def _divisor(table: str) -> Callable[[Shapes], str]:
    return lambda shapes: f"N, a divisor of the width {shapes.dims(table, 4)[0]}"


_OPTIONAL = ("cond_embed.", "sig_embed.mlp.4.")
_EMBEDDED: Args = {"sig_embed": "TimestepEmbedder", "num_classes": 1, "cond_mlp": True}

FAMILIES: tuple[Family, ...] = (
    Family(
        name="DiT",
        model_class="DiT",
        smallest={"in_dim": 1, "channels": 1, "patch_size": 1, "depth": 1, "head_dim": 4, "num_heads": 1} | _EMBEDDED,
        read=_read_dit,
        optional=_OPTIONAL,
        build=lambda args, _: _embedded(DiT, args["head_dim"] * args["num_heads"], args),
        asks=(Ask("num_heads", "heads", _divisor("x_embed.proj.weight")),),
    ),
    Family(
        name="U-Net",
        model_class="Unet",
        smallest={"in_dim": 2, "in_ch": 1, "out_ch": 1, "ch": 32, "ch_mult": [1, 2], "embed_ch_mult": 1}
        | {"num_res_blocks": 1, "attn_resolutions": [1, 2]}
        | _EMBEDDED,
        read=_read_unet,
        optional=_OPTIONAL,
        build=lambda args, _: _embedded(Unet, args["ch"] * args["embed_ch_mult"], args),
        asks=(
            Ask("in_dim", "image_size", lambda shapes: f"N, a multiple of {2 ** (shapes.count('downs') - 1)} pixels"),
        ),
    ),
    Family(
        name="MLP",
        model_class="TimeInputMLP",
        smallest={"dim": 1, "hidden_dims": [1]},
        read=_read_mlp,
        build=lambda args, _: TimeInputMLP(**args),
    ),
    Family(
        name="conditional MLP",
        model_class="ConditionalMLP",
        smallest={"dim": 1, "hidden_dims": [1], "cond_dim": 1, "num_classes": 1},
        read=_read_mlp,
        build=lambda args, _: ConditionalMLP(**args),
    ),
    Family(
        name="official DiT",
        model_class="OfficialDiT",
        smallest={"input_size": 1, "patch_size": 1, "hidden_size": 4, "depth": 1, "num_heads": 1, "num_classes": 1},
        read=_read_official,
        build=lambda args, _: OfficialDiT(**args),
        asks=(Ask("num_heads", "heads", _divisor("x_embedder.proj.weight")),),
        facts={
            "prediction": "eps",
            "scaled": True,
            "schedule": DEFAULT_SCHEDULES["ddpm"],
            "noise_input": "timestep",
            "unit_start": True,
            "spacing": "respaced",
            "guided_channels": GUIDED_CHANNELS,
        },
    ),
    Family(
        name="ideal denoiser",
        model_class="IdealDenoiser",
        smallest={},
        read=_read_ideal,
        build=lambda _, shapes: IdealDenoiser(torch.empty(shapes.dims("data", 2, 4))),
        facts={"prediction": "eps", "scaled": False},
    ),
)
