"""The diffusion transformer of facebookresearch/DiT, whose published weights load into it: Peebles & Xie 2023.

B batch, C channels, S side of the latent image, p side of a patch, N tokens, D width. The network is told the step of
the diffusion process, not sigma, and with ``learn_sigma`` says 2C channels: eps, then v of the log variance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffexport_reference.dit import (
    PatchEmbed,
    check_grid,
    position_embedding,
    unpatchify,
    xavier_linears,
    zero_linears,
)
from diffexport_reference.model import FREQUENCIES, Attention, per_sample, sinusoid_frequencies, sinusoids

GUIDED_CHANNELS = 3
"""Guidance acts on these alone; the published samples were made so."""

PUBLISHED_HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}
"""Heads by width: XL, L, B and S."""


class StepEmbedder(nn.Module):
    """Steps (B,) to (B, D)."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("frequencies", sinusoid_frequencies(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.mlp(sinusoids(t, self.frequencies))
        return out


class LabelEmbedder(nn.Module):
    """Labels (B,) to (B, D); in training a label becomes the null label ``num_classes`` with ``dropout_prob``."""

    def __init__(self, num_classes: int, width: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), width)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        out: Tensor = self.embedding_table(labels)
        return out


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


def _adaln(width: int, n: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, n * width))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP, each behind a modulated norm and a gate; one projection makes all six vectors."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width // num_heads, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = _adaln(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation: Tensor = self.adaLN_modulation(c)[:, None]  # (B, 1, 6D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=2)
        x = x + gate_attn * self.attn(_modulate(self.norm1(x), shift_attn, scale_attn))
        x = x + gate_mlp * self.mlp(_modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    """Tokens (B, N, D) to patches (B, N, p*p*C)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = _adaln(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        out: Tensor = self.linear(_modulate(self.norm_final(x), shift, scale))
        return out


class OfficialDiT(nn.Module):
    """The published model; ``DiT`` in its own code base.

    Raises:
        SpecError: the image is no whole number of patches, or D is not a multiple of 4.
    """

    pos_embed: Tensor

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        check_grid(input_size, patch_size, hidden_size)
        self.input_dims = (in_channels, input_size, input_size)
        self.patch_size = patch_size
        self.side = input_size // patch_size
        out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = StepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.register_buffer("pos_embed", position_embedding(self.side, hidden_size))
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels)
        self.init()

    def init(self) -> None:
        """Random weights, adaLN-Zero last."""
        xavier_linears(self)
        for layer in (self.y_embedder.embedding_table, *self.t_embedder.mlp.modules()):
            if isinstance(layer, nn.Embedding | nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        modulations = [m.adaLN_modulation for m in self.modules() if isinstance(m, Block | FinalLayer)]
        zero_linears(self.final_layer.linear, *modulations)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Output (B, C or 2C, S, S) for latents x (B, C, S, S), steps t and labels y (B,), the null label without."""
        if y is None:
            y = torch.full(x.shape[:1], self.y_embedder.num_classes, device=x.device)
        c = self.t_embedder(per_sample(t, x)) + self.y_embedder(y)  # (B, D)
        h = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            h = block(h, c)
        return unpatchify(self.final_layer(h, c), self.side, self.patch_size)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Output with guidance, e_u + cfg_scale*(e_c - e_u) on the first three channels.

        Args:
            x: the latents twice, (2B, C, S, S), of which the first half is read.
            t: steps (2B,).
            y: labels (2B,), null in the second half.
        """
        half = len(x) // 2
        out = self.forward(torch.cat([x[:half], x[:half]]), t, y)  # (2B, C or 2C, S, S)
        cond, null = out[:half, :GUIDED_CHANNELS], out[half:, :GUIDED_CHANNELS]
        guided = null + cfg_scale * (cond - null)
        return torch.cat([guided.repeat(2, 1, 1, 1), out[:, GUIDED_CHANNELS:]], dim=1)


DiT = OfficialDiT
