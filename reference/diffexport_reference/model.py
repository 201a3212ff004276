"""What all networks share: losses and predictions, class modifiers, embeddings, attention, and the toy networks.

Every network is called as ``model(x, sigma, cond=None)`` with x (B, *dims), sigma a scalar, (B,) or (B, 1, ..., 1),
cond (B,) int64 labels. B batch, N tokens, D width, K labels, M samples of a data set. Names and signatures are those
of smalldiffusion 0.5.0 (https://github.com/yuanchenyang/smalldiffusion), so that its users change one import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffexport.errors import ShapeError

FREQUENCIES = 256


def per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma of any accepted shape as (B,), in the type of x."""
    return sigma.to(x.dtype).reshape(-1).expand(x.shape[0])


def per_element(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma of any accepted shape as (1 or B, 1, ..., 1), ready to be multiplied with x."""
    return sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def alpha(sigma: Tensor) -> Tensor:
    """alpha_bar of a noise level, 1/(1 + sigma^2)."""
    return 1 / (1 + sigma**2)


class ModelMixin:
    """Loss, prediction and guidance of a network; without a modifier it predicts eps from x0 + sigma*eps."""

    input_dims: tuple[int, ...]
    """Shape of one sample."""
    cond_embed: Any
    __call__: Callable[..., Any]

    def rand_input(self, batchsize: int) -> Tensor:
        """Unit normal noise (B, *dims)."""
        return torch.randn(batchsize, *self.input_dims)

    def noised(self, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """The network's input in training; sigma (B, 1, ..., 1)."""
        return x0 + sigma * eps

    def target(self, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """What the network's output is compared with in training; sigma (B, 1, ..., 1)."""
        return eps

    def eps_from_output(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        """The direction dx/dsigma that a sampler follows, from the network's output; sigma (B, 1, ..., 1)."""
        return output

    def get_loss(
        self, x0: Tensor, sigma: Tensor, eps: Tensor, cond: Tensor | None = None, loss: Callable[[], Any] = nn.MSELoss
    ) -> Tensor:
        """The training loss of samples (B, *dims) at noise levels sigma with noise eps; ``loss`` makes the measure."""
        level = per_element(sigma, x0)
        output = self(self.noised(x0, level, eps), level, cond=cond)
        value: Tensor = loss()(self.target(x0, level, eps), output)
        return value

    def predict_eps(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """The predicted noise (B, *dims); for a flow model its velocity, eps - x0."""
        return self.eps_from_output(x, per_element(sigma, x), self(x, sigma, cond=cond))

    def predict_eps_cfg(self, x: Tensor, sigma: Tensor, cond: Tensor | None, cfg_scale: float) -> Tensor:
        """The predicted noise with guidance, e_c + cfg_scale*(e_c - e_u): Ho & Salimans 2022, Eq. 6."""
        if cond is None or cfg_scale == 0:
            return self.predict_eps(x, sigma, cond)
        null = torch.full_like(cond, self.cond_embed.null_cond)
        doubled = torch.cat([x, x])  # (2B, *dims)
        eps = self.predict_eps(doubled, per_sample(sigma, x).repeat(2), torch.cat([cond, null]))
        eps_cond, eps_null = eps[: len(x)], eps[len(x) :]
        return eps_cond + cfg_scale * (eps_cond - eps_null)


M = TypeVar("M", bound=ModelMixin)


def _modified(cls: type[M], suffix: str, **methods: Callable[..., Any]) -> type[M]:
    return cast(type[M], type(cls.__name__ + suffix, (cls,), methods))


def Scaled(cls: type[M]) -> type[M]:
    """The class with its input multiplied by 1/sqrt(1 + sigma^2)."""

    def forward(self: M, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        scale = alpha(per_element(sigma, x)).sqrt()
        output: Tensor = cls.forward(self, x * scale, sigma, cond=cond)  # type: ignore[attr-defined]  # of nn.Module
        return output

    return _modified(cls, "Scaled", forward=forward)


def PredX0(cls: type[M]) -> type[M]:
    """The class trained to predict clean data."""

    def target(self: M, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        return x0

    def eps_from_output(self: M, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        return (x - output) / sigma

    return _modified(cls, "PredX0", target=target, eps_from_output=eps_from_output)


def PredV(cls: type[M]) -> type[M]:
    """The class trained to predict v = sqrt(a)*eps - sqrt(1-a)*x0: Salimans & Ho 2022, section 4."""

    def target(self: M, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        a = alpha(sigma)
        return a.sqrt() * eps - (1 - a).sqrt() * x0

    def eps_from_output(self: M, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        a = alpha(sigma)
        return a.sqrt() * (output + (1 - a).sqrt() * x)

    return _modified(cls, "PredV", target=target, eps_from_output=eps_from_output)


def PredFlow(cls: type[M]) -> type[M]:
    """The class trained on x_t = (1-t)*x0 + t*eps to predict eps - x0, with sigma = t: Lipman et al. 2023."""

    def noised(self: M, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        return (1 - sigma) * x0 + sigma * eps

    def target(self: M, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        return eps - x0

    return _modified(cls, "PredFlow", noised=noised, target=target)


def get_sigma_embeds(batches: int, sigma: Tensor, scaling_factor: float = 0.5, log_scale: bool = True) -> Tensor:
    """sin and cos of scaling_factor*log(sigma), or of scaling_factor*sigma: (B, 2)."""
    level = sigma.reshape(-1).expand(batches)
    angle = scaling_factor * (level.log() if log_scale else level)  # (B,)
    return torch.stack([angle.sin(), angle.cos()], dim=1)


class SigmaEmbedderSinCos(nn.Module):
    """sigma to (B, D): two features and a small MLP."""

    def __init__(self, hidden_size: int, scaling_factor: float = 0.5, log_scale: bool = True) -> None:
        super().__init__()
        self.scaling_factor = scaling_factor
        self.log_scale = log_scale
        self.mlp = nn.Sequential(nn.Linear(2, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, batches: int, sigma: Tensor) -> Tensor:
        out: Tensor = self.mlp(get_sigma_embeds(batches, sigma, self.scaling_factor, self.log_scale))
        return out


def sinusoid_frequencies() -> Tensor:
    """exp(-ln(10000)*k/128), (128,): Vaswani et al. 2017, section 3.5. Real even while a module is made on meta."""
    half = FREQUENCIES // 2
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu") / half)


def sinusoids(t: Tensor, frequencies: Tensor) -> Tensor:
    """Times (B,) as (B, 256), [cos | sin]."""
    angle = t[:, None] * frequencies  # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """A flow model's t in [0, 1] to (B, D): 256 features of 1000*t and an MLP."""

    frequencies: Tensor

    def __init__(self, hidden_size: int, mid_size: int = 1024) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCIES, mid_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(mid_size, hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden_size, hidden_size),
        )
        self.register_buffer("frequencies", sinusoid_frequencies(), persistent=False)

    def forward(self, batches: int, sigma: Tensor) -> Tensor:
        t = 1000 * sigma.reshape(-1).expand(batches)  # (B,)
        out: Tensor = self.mlp(sinusoids(t, self.frequencies))
        return out


class CondEmbedderLabel(nn.Module):
    """Labels (B,) to (B, D); in training a label becomes the null label ``num_classes`` with ``dropout_prob``."""

    def __init__(self, hidden_size: int, num_classes: int, dropout_prob: float = 0.1, *, with_mlp: bool = True) -> None:
        super().__init__()
        self.null_cond = num_classes
        self.dropout_prob = dropout_prob
        self.embeddings = nn.Embedding(num_classes + 1, hidden_size)
        # first releases of smalldiffusion used the embedding as it is
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, hidden_size)) if with_mlp else nn.Identity()

    def forward(self, labels: Tensor) -> Tensor:
        if self.training:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.null_cond, labels)
        out: Tensor = self.mlp(self.embeddings(labels))
        return out


def embed_condition(embedder: nn.Module | None, cond: Tensor | None, like: Tensor) -> Tensor | float:
    """The embedding of labels (B,), or 0 for a network without an embedder.

    Raises:
        ShapeError: the network has labels, and none or another number came.
    """
    if embedder is None:
        return 0.0
    if cond is None or cond.shape != like.shape[:1]:
        got = "none" if cond is None else f"shape {tuple(cond.shape)}"
        raise ShapeError(f"cond: got {got}, expected labels ({like.shape[0]},), one a sample")
    out: Tensor = embedder(cond)
    return out


class Attention(nn.Module):
    """Self-attention over tokens (B, N, D), D = head_dim*num_heads: Vaswani et al. 2017, Eq. 1."""

    def __init__(self, head_dim: int, num_heads: int = 8, qkv_bias: bool = False) -> None:
        super().__init__()
        width = head_dim * num_heads
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, head_dim)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (B, N, heads, head_dim)
        out: Tensor = self.proj(mixed.reshape(B, N, D))
        return out


class CondSequential(nn.Sequential):
    """A sequence whose every member is called with the condition too."""

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:  # type: ignore[override]  # pyright: ignore
        for layer in self:
            x = layer(x, cond)
        return x


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class TimeInputMLP(nn.Module, ModelMixin):
    """An MLP of points (B, dim) and two features of sigma."""

    def __init__(
        self, dim: int = 2, output_dim: int | None = None, hidden_dims: Sequence[int] = (16, 128, 256, 128, 16)
    ) -> None:
        super().__init__()
        self.input_dims = (dim,)
        self.net = _mlp((dim + 2, *hidden_dims, output_dim or dim))

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        level = get_sigma_embeds(x.shape[0], per_sample(sigma, x))  # (B, 2)
        out: Tensor = self.net(torch.cat([x, level], dim=1))
        return out


class ConditionalMLP(TimeInputMLP):
    """An MLP of points (B, dim), two features of sigma and an embedded label."""

    def __init__(
        self,
        dim: int = 2,
        hidden_dims: Sequence[int] = (16, 128, 256, 128, 16),
        cond_dim: int = 4,
        num_classes: int = 10,
        dropout_prob: float = 0.1,
        *,
        with_mlp: bool = True,
    ) -> None:
        super().__init__(dim, dim, hidden_dims)
        self.net = _mlp((dim + 2 + cond_dim, *hidden_dims, dim))
        self.cond_embed = CondEmbedderLabel(cond_dim, num_classes, dropout_prob, with_mlp=with_mlp)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        level = get_sigma_embeds(x.shape[0], per_sample(sigma, x))  # (B, 2)
        label = embed_condition(self.cond_embed, cond, x)  # (B, cond_dim)
        assert isinstance(label, Tensor)
        out: Tensor = self.net(torch.cat([x, level, label], dim=1))
        return out


class IdealDenoiser(nn.Module, ModelMixin):
    """The exact answer for a finite data set: the posterior mean, as the eps that it means.

    Weights are softmax(-|x - x_i|^2 / (2 sigma^2)): Karras et al. 2022, Eq. 57. Nothing is trained; ``data`` (M, *dims)
    is the data set: a tensor, or a sequence of samples or of (sample, label) pairs.
    """

    data: Tensor

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        if not isinstance(dataset, Tensor):
            items = (dataset[i] for i in range(len(dataset)))
            dataset = torch.stack([item[0] if isinstance(item, tuple) else item for item in items])
        self.register_buffer("data", dataset)
        self.input_dims = tuple(self.data.shape[1:])

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        points, flat = self.data.flatten(1), x.flatten(1)
        level = per_sample(sigma, x)[:, None]
        distances = (flat[:, None] - points).square().sum(2)  # (B, M)
        weights = torch.softmax(-distances / (2 * level**2), dim=1)
        return ((flat - weights @ points) / level).reshape(x.shape)
