"""The diffusion transformer of smalldiffusion: Peebles & Xie 2023 with adaLN-Zero, conditioned on sigma itself.

B batch, C channels, S side of the image, p side of a patch, s = S/p, N = s*s tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffexport.errors import SpecError
from diffexport_reference.model import (
    Attention,
    CondSequential,
    ModelMixin,
    SigmaEmbedderSinCos,
    embed_condition,
    per_sample,
)


def check_grid(side: int, patch: int, width: int) -> None:
    """Raise SpecError for an image that is no whole number of patches, or a width without whole frequencies."""
    if side < 1 or patch < 1 or side % patch:
        raise SpecError(f"image side {side}: not a multiple of the patch side {patch}")
    if width < 4 or width % 4:
        raise SpecError(f"width {width}: expected a multiple of 4, for sines and cosines along two axes")


def position_embedding(side: int, width: int) -> Tensor:
    """Fixed embedding of a side x side grid of patches, (1, N, D): [sin x | cos x | sin y | cos y] of D/4 frequencies."""
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (s, D/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (s, D/2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, 0)  # (N, D/2)
    return torch.cat([columns, rows], dim=1).float()[None]


def unpatchify(tokens: Tensor, side: int, patch: int) -> Tensor:
    """Tokens (B, N, p*p*C) of a side x side grid as images (B, C, S, S)."""
    channels = tokens.shape[2] // patch**2
    grid = tokens.reshape(-1, side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)


def xavier_linears(module: nn.Module) -> None:
    """Xavier weights and zero biases for every Linear below ``module``, and for patch projections, which are Linears."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | PatchEmbed):
            linear = layer.proj if isinstance(layer, PatchEmbed) else layer
            nn.init.xavier_uniform_(linear.weight.flatten(1))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


def zero_linears(*linears: nn.Module) -> None:
    """Zero weights and biases."""
    for linear in linears:
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)


class PatchEmbed(nn.Module):
    """Images (B, C, S, S) to tokens (B, N, D), row by row."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out.flatten(2).transpose(1, 2)


class Modulation(nn.Module):
    """The condition (B, D) as n vectors (B, 1, D)."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.n = n
        self.proj = nn.Sequential(nn.SiLU(), nn.Linear(width, n * width))

    def forward(self, y: Tensor) -> tuple[Tensor, ...]:
        out: Tensor = self.proj(y)
        return tuple(out[:, None].chunk(self.n, dim=2))


class ModulatedLayerNorm(nn.LayerNorm):
    """A LayerNorm whose scale and shift come from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # pyright: ignore
        scale, shift = self.modulation(y)
        out: Tensor = super().forward(x) * (1 + scale) + shift
        return out


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a modulated norm and a gate."""

    def __init__(self, head_dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        width = head_dim * num_heads
        hidden = int(width * mlp_ratio)
        self.norm1 = ModulatedLayerNorm(width)
        self.attn = Attention(head_dim, num_heads, qkv_bias=True)
        self.norm2 = ModulatedLayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.scale_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gate_attn, gate_mlp = self.scale_modulation(y)
        x = x + gate_attn * self.attn(self.norm1(x, y))
        x = x + gate_mlp * self.mlp(self.norm2(x, y))
        return x


class DiT(nn.Module, ModelMixin):
    """A transformer over patches of images (B, C, S, S), S = ``in_dim``.

    ``sig_embed`` is called (B, sigma) and ``cond_embed`` (labels), each to (B, D), D = head_dim*num_heads; without
    ``cond_embed`` the network has no labels.

    Raises:
        SpecError: the image is no whole number of patches, or D is not a multiple of 4.
    """

    pos_embed: Tensor

    def __init__(
        self,
        in_dim: int = 32,
        channels: int = 3,
        patch_size: int = 2,
        depth: int = 12,
        head_dim: int = 64,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        sig_embed: nn.Module | None = None,
        cond_embed: nn.Module | None = None,
    ) -> None:
        super().__init__()
        width = head_dim * num_heads
        check_grid(in_dim, patch_size, width)
        self.input_dims = (channels, in_dim, in_dim)
        self.patch_size = patch_size
        self.side = in_dim // patch_size
        self.register_buffer("pos_embed", position_embedding(self.side, width))
        self.x_embed = PatchEmbed(channels, width, patch_size)
        self.sig_embed = sig_embed if sig_embed is not None else SigmaEmbedderSinCos(width)
        self.cond_embed = cond_embed
        self.blocks = CondSequential(*(DiTBlock(head_dim, num_heads, mlp_ratio) for _ in range(depth)))
        self.final_norm = ModulatedLayerNorm(width)
        self.final_linear = nn.Linear(width, patch_size**2 * channels)
        self.init()

    def init(self) -> None:
        """Random weights. adaLN-Zero comes last: upstream sets it first, and its Xavier pass undoes it."""
        xavier_linears(self)
        for layer in self.sig_embed.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        zero_linears(self.final_linear, *(m for m in self.modules() if isinstance(m, Modulation)))

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        level = per_sample(sigma, x)  # (B,)
        y = self.sig_embed(x.shape[0], level) + embed_condition(self.cond_embed, cond, x)  # (B, D)
        h = self.x_embed(x) + self.pos_embed  # (B, N, D)
        h = self.final_norm(self.blocks(h, y), y)
        return unpatchify(self.final_linear(h), self.side, self.patch_size)  # (B, C, S, S)
