"""The U-Net of smalldiffusion: Ho et al. 2020, appendix B, conditioned on sigma itself.

B batch, C channels of a feature map, S its side, E width of the condition. A level is one resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

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

GROUPS = 32


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


def _conv(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


class ResnetBlock(nn.Module):
    """Two convolutions around an added condition, with a shortcut: (B, C, S, S) to (B, C', S, S)."""

    def __init__(
        self, in_ch: int, out_ch: int, temb_channels: int, dropout: float = 0.0, conv_shortcut: bool = False
    ) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(_norm(in_ch), nn.SiLU(), _conv(in_ch, out_ch))
        self.temb_proj = nn.Sequential(nn.SiLU(), nn.Linear(temb_channels, out_ch))
        self.layer2 = nn.Sequential(_norm(out_ch), nn.SiLU(), nn.Dropout(dropout), _conv(out_ch, out_ch))
        self.shortcut: nn.Module = nn.Identity()
        if in_ch != out_ch:
            self.shortcut = _conv(in_ch, out_ch) if conv_shortcut else nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.layer1(x) + self.temb_proj(emb)[:, :, None, None]
        out: Tensor = self.shortcut(x) + self.layer2(h)
        return out


class AttentionBlock(nn.Module):
    """Attention of one head over all places of a feature map, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.attn = Attention(channels, num_heads=1, qkv_bias=False)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, S*S, C)
        mixed = self.attn(tokens).transpose(1, 2).reshape(x.shape)  # (B, C, S, S)
        out: Tensor = x + self.proj_out(mixed)
        return out


class Downsample(nn.Sequential):
    """Half the side: a convolution after padding right and bottom by one, or the mean of four."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
        super().__init__(*(pad, conv) if with_conv else (nn.AvgPool2d(2),))


class Upsample(nn.Sequential):
    """Twice the side, nearest, then a convolution."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        double = nn.Upsample(scale_factor=2, mode="nearest")
        super().__init__(*(double, _conv(channels, channels)) if with_conv else (double,))


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next one where there is one."""

    def __init__(self, blocks: Sequence[CondSequential], resample: nn.Module | None, name: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample_name = name if resample is not None else None
        if resample is not None:
            self.add_module(name, resample)

    def resample(self, h: Tensor) -> Tensor | None:
        """The feature map at the next resolution; None where this is the last."""
        return None if self.resample_name is None else self.get_submodule(self.resample_name)(h)


class Unet(nn.Module, ModelMixin):
    """A U-Net of images (B, in_ch, S, S) with S = ``in_dim``.

    ``attn_resolutions`` are the sides of the feature maps that get attention. ``sig_embed`` is called (B, sigma) and
    ``cond_embed`` (labels), each to (B, E), E = ch*embed_ch_mult.

    Raises:
        SpecError: a side becomes odd on the way down, or a width is not a multiple of 32.
    """

    def __init__(
        self,
        in_dim: int,
        in_ch: int,
        out_ch: int,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        embed_ch_mult: int = 4,
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        resamp_with_conv: bool = True,
        sig_embed: nn.Module | None = None,
        cond_embed: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check_sides(in_dim, len(ch_mult), ch)
        self.input_dims = (in_ch, in_dim, in_dim)
        width = ch * embed_ch_mult
        self.sig_embed = sig_embed if sig_embed is not None else SigmaEmbedderSinCos(width)
        self.cond_embed = cond_embed
        widths = [ch * mult for mult in ch_mult]
        sides = [in_dim >> level for level in range(len(widths))]
        last = len(widths) - 1

        def block(before: int, level: int) -> CondSequential:
            residual = ResnetBlock(before, widths[level], width, dropout)
            attention = [AttentionBlock(widths[level])] if sides[level] in attn_resolutions else []
            return CondSequential(residual, *attention)

        self.conv_in = _conv(in_ch, ch)
        skips, h = [ch], ch
        self.downs = nn.ModuleList()
        for level in range(len(widths)):
            blocks = [block(h if j == 0 else widths[level], level) for j in range(num_res_blocks)]
            h = widths[level] if num_res_blocks else h
            skips += [h] * (num_res_blocks + (level < last))
            down = Downsample(h, resamp_with_conv) if level < last else None
            self.downs.append(Level(blocks, down, "downsample"))
        self.mid = CondSequential(
            ResnetBlock(h, h, width, dropout), AttentionBlock(h), ResnetBlock(h, h, width, dropout)
        )
        self.ups = nn.ModuleList()
        for level in reversed(range(len(widths))):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(block(h + skips.pop(), level))
                h = widths[level]
            up = Upsample(h, resamp_with_conv) if level > 0 else None
            self.ups.append(Level(blocks, up, "upsample"))
        self.out_layer = nn.Sequential(_norm(h), nn.SiLU(), _conv(h, out_ch))

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        level = per_sample(sigma, x)  # (B,)
        emb = self.sig_embed(x.shape[0], level) + embed_condition(self.cond_embed, cond, x)  # (B, E)
        h = self.conv_in(x)
        skips = [h]
        for down in self.downs:
            assert isinstance(down, Level)
            for block in down.blocks:
                h = block(h, emb)
                skips.append(h)
            smaller = down.resample(h)
            if smaller is not None:
                h = smaller
                skips.append(h)
        h = self.mid(h, emb)
        for up in self.ups:
            assert isinstance(up, Level)
            for block in up.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            larger = up.resample(h)
            h = h if larger is None else larger
        out: Tensor = self.out_layer(h)
        return out


def _check_sides(side: int, levels: int, ch: int) -> None:
    halvings = max(levels - 1, 0)
    if side < 1 or side % 2**halvings:
        raise SpecError(
            f"image side {side}: a U-Net of {levels} levels halves it {halvings} times, "
            f"so it has to be a multiple of {2**halvings}; resize the images, or use fewer levels"
        )
    if levels < 1 or ch < 1 or ch % GROUPS:
        raise SpecError(f"ch {ch} with {levels} levels: expected a multiple of {GROUPS} channels, and at least 1 level")
