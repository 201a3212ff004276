"""The decoder of Stable Diffusion's autoencoder: Rombach et al. 2022, in the names of diffusers' ``AutoencoderKL``.

B batch, C channels of a feature map, h and w sides of the latents. Read are folders with a ``config.json`` beside the
weights, whose encoder stays unread; sizes are taken from the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffexport.bundle import MAX_JSON
from diffexport.errors import CheckpointError, SpecError
from diffexport.files import read_regular
from diffexport.spec import DecoderSpec
from diffexport_reference.families import Shapes
from diffexport_reference.weights import DEPRECATED, check_names, read_content, sound_state

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

TILE = 512
"""Pixels; an image of this side takes 1.5 GB to decode whole with the widths of Stable Diffusion, and four times the
pixels take four times that, attention sixteen times."""


class _Config(msgspec.Struct, frozen=True):
    """What the tensors do not tell, with diffusers' defaults; other keys do not bear on the decoder."""

    class_name: str = msgspec.field(name="_class_name", default="AutoencoderKL")
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    act_fn: str = "silu"
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: Any = None
    latents_std: Any = None

    def __post_init__(self) -> None:
        if self.norm_num_groups < 1:
            raise SpecError(f"norm_num_groups {self.norm_num_groups}: expected at least 1")
        for name, value, expected in (
            ("_class_name", self.class_name, "AutoencoderKL"),
            ("act_fn", self.act_fn, "silu"),
            ("latents_mean", self.latents_mean, None),
            ("latents_std", self.latents_std, None),
            *(("up_block_types", kind, "UpDecoderBlock2D") for kind in self.up_block_types),
        ):
            if value != expected:
                raise SpecError(f"{name} is {value!r}, known here is {expected!r} alone")
        if not (math.isfinite(self.scaling_factor) and self.scaling_factor > 0):
            raise SpecError(f"scaling_factor {self.scaling_factor}: expected a number above 0")


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut: (B, C, h, w) to (B, C', h, w)."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, after, eps=1e-6)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class AttentionBlock(nn.Module):
    """Attention of one head over all places of a feature map, with a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h*w, C)
        q, k, v = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        mixed: Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + mixed.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """The lowest resolution: two residual blocks, with attention between them where the model has it."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.resnets
        h = first(x)
        for attention in self.attentions:
            h = attention(h)
        out: Tensor = second(h)
        return out


class Upsample(nn.Module):
    """Twice the side, nearest, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class UpBlock(nn.Module):
    """The residual blocks of one resolution, and the way up to the next where there is one."""

    def __init__(self, before: int, after: int, layers: int, groups: int, up: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(before if j == 0 else after, after, groups) for j in range(layers))
        self.upsamplers = nn.ModuleList([Upsample(after)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Feature maps up from the latents; ``widths`` from the highest resolution to the lowest, as in diffusers."""

    def __init__(
        self, latents: int, channels: int, widths: Sequence[int], layers: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        rising = list(reversed(widths))
        self.conv_in = nn.Conv2d(latents, rising[0], 3, padding=1)
        self.mid_block = MidBlock(rising[0], groups, attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(rising[max(i - 1, 0)], width, layers, groups, up=i < len(rising) - 1)
            for i, width in enumerate(rising)
        )
        self.conv_norm_out = nn.GroupNorm(groups, rising[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(rising[-1], channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out


class VaeDecoder(nn.Module):
    """``AutoencoderKL.decode``: unscaled latents (B, C, h, w) to images (B, channels, H, W), about -1 .. 1.

    Args:
        latents: channels of the latents.
        channels: of the images.
        widths: ``block_out_channels`` of diffusers.
        layers: residual blocks of a resolution, ``layers_per_block`` + 1.
        groups: of every normalization.
        attention: whether the lowest resolution has it.
        post_quant: whether a 1x1 convolution of the latents comes first.
    """

    def __init__(
        self,
        latents: int = 4,
        channels: int = 3,
        widths: Sequence[int] = (128, 256, 512, 512),
        layers: int = 3,
        groups: int = 32,
        attention: bool = True,
        post_quant: bool = True,
    ) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if post_quant else None
        self.decoder = Decoder(latents, channels, widths, layers, groups, attention)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        return out


def load_decoder(folder: str | Path) -> tuple[nn.Module, DecoderSpec]:
    """The decoder of an ``AutoencoderKL`` folder, float32 in eval mode, and its spec.

    Args:
        folder: holds ``config.json`` and ``diffusion_pytorch_model.safetensors`` or ``.bin``; of a pipeline's folder,
            its ``vae`` is taken.

    Raises:
        CheckpointError: a file that is missing, damaged, unsafe, or not of such a decoder.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        folder /= "vae"
    try:
        config = _read_config(folder)
        path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
        if path is None:
            raise CheckpointError(f"no weights in it; expected {' or '.join(WEIGHT_FILES)}")
        state = sound_state(_decoder_state(read_content(path)))
        shapes = Shapes({name: tuple(value.shape) for name, value in state.items()})
        with torch.device("meta"):
            module = VaeDecoder(**_read_args(shapes, config.norm_num_groups))
        expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        check_names("AutoencoderKL decoder", expected, shapes)
    except (CheckpointError, SpecError, ValueError) as error:  # ValueError: GroupNorm's, of groups that do not divide
        raise CheckpointError(f"{folder}: {error}") from error
    module.load_state_dict(state, assign=True)
    spec = DecoderSpec(
        channels=shapes["decoder.conv_out.weight"][0],
        upscale=2 ** (len(module.decoder.up_blocks) - 1),
        scaling_factor=config.scaling_factor,
        shift=config.shift_factor or 0.0,
        tile=TILE,
    )
    return module.eval().requires_grad_(False), spec


def _read_config(folder: Path) -> _Config:
    try:
        return msgspec.json.decode(read_regular(folder / "config.json", MAX_JSON), type=_Config)
    except OSError as error:
        raise CheckpointError(
            f"config.json cannot be read ({error.strerror}); expected the folder of an AutoencoderKL, "
            "with config.json and its weights"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, SpecError) as error:
        raise CheckpointError(f"config.json: {error}") from error


def _decoder_state(content: dict[str, Any]) -> dict[str, Any]:
    """The decoder's tensors, in today's names; attention that was saved as 1x1 convolutions as the same Linear."""
    state = {}
    for name, value in content.items():
        if not name.startswith(("decoder.", "post_quant_conv.")):
            continue
        parts = name.split(".")
        if "attentions" in parts:
            parts[-2] = DEPRECATED.get(parts[-2], parts[-2])
            if isinstance(value, Tensor) and value.ndim == 4:
                value = value.flatten(1)
        state[".".join(parts)] = value
    return state


def _read_args(shapes: Shapes, groups: int) -> dict[str, Any]:
    blocks = range(shapes.count("decoder.up_blocks"))
    rising = [shapes.dims(f"decoder.up_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in blocks]
    if not rising:
        raise CheckpointError("decoder.up_blocks.0.resnets.0.conv1.weight is missing")
    return {
        "latents": shapes.dims("decoder.conv_in.weight", 4)[1],
        "channels": shapes.dims("decoder.conv_out.weight", 4)[0],
        "widths": rising[::-1],
        "layers": shapes.count("decoder.up_blocks.0.resnets"),
        "groups": groups,
        "attention": shapes.count("decoder.mid_block.attentions") > 0,
        "post_quant": "post_quant_conv.weight" in shapes,
    }
