"""Schedules, training and sampling under smalldiffusion's names (Permenter & Yuan 2023).

N levels of a schedule, B batch. Schedules are the numbers of ``diffexport.schedules`` as tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffexport.schedules import Schedule as ScheduleData
from diffexport.schedules import schedule_sigmas


class Schedule:
    """Noise levels (N,), ascending."""

    def __init__(self, sigmas: Any) -> None:
        self.sigmas = torch.as_tensor(sigmas).to(torch.float32)

    def __getitem__(self, i: Any) -> Tensor:
        return self.sigmas[i]

    def __len__(self) -> int:
        return len(self.sigmas)

    def sample_batch(self, x0: Tensor) -> Tensor:
        """A level drawn for every sample of a batch, (B,)."""
        drawn = torch.randint(len(self), (x0.shape[0],))
        return self[drawn].to(x0)

    def sample_sigmas(self, steps: int) -> Tensor:
        """Levels for a run of ``steps``, (steps + 1,), largest first, with "trailing" spacing: Lin et al. 2024, Table 2."""
        indices = [round(len(self) * (1 - i / steps)) - 1 for i in range(steps)]
        return self[[*indices, 0]]


def _sigmas(**numbers: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return schedule_sigmas(ScheduleData(**numbers)).copy()


def sigmas_from_betas(betas: Tensor) -> Tensor:
    """sigma = sqrt(1/cumprod(1 - beta) - 1), (N,) float64."""
    return torch.expm1(-torch.log1p(-betas.double()).cumsum(0)).sqrt()


class ScheduleLogLinear(Schedule):
    """Sigmas evenly spaced in their logarithm."""

    def __init__(self, N: int, sigma_min: float = 0.02, sigma_max: float = 10) -> None:
        super().__init__(_sigmas(kind="loglinear", N=N, start=sigma_min, end=sigma_max))


class ScheduleDDPM(Schedule):
    """Betas linear in the step: Ho et al. 2020, section 4."""

    def __init__(self, N: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02) -> None:
        super().__init__(_sigmas(kind="ddpm", N=N, start=beta_start, end=beta_end))


class ScheduleLDM(Schedule):
    """Betas linear in their square root: Rombach et al. 2022."""

    def __init__(self, N: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> None:
        super().__init__(_sigmas(kind="ldm", N=N, start=beta_start, end=beta_end))


class ScheduleSigmoid(Schedule):
    """Betas along a sigmoid from -6 to 6: Xu et al. 2022 (GeoDiff)."""

    def __init__(self, N: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02) -> None:
        super().__init__(_sigmas(kind="sigmoid", N=N, start=beta_start, end=beta_end))


class ScheduleCosine(Schedule):
    """alpha_bar along a squared cosine: Nichol & Dhariwal 2021, Eq. 17."""

    def __init__(
        self, N: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02, max_beta: float = 0.999
    ) -> None:
        if max_beta == 0.999:
            super().__init__(_sigmas(kind="cosine", N=N))
            return
        t = torch.arange(N + 1, dtype=torch.float64) / N
        alpha_bar = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
        super().__init__(sigmas_from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)))


class ScheduleFlow(Schedule):
    """t evenly spaced, for flow models: sigma is t."""

    def __init__(self, N: int = 1000, t_min: float = 0.001, t_max: float = 1) -> None:
        super().__init__(_sigmas(kind="flow", N=N, start=t_min, end=t_max))
        self.t_min = t_min
        self.t_max = t_max

    def sample_sigmas(self, steps: int) -> Tensor:
        """t_max to t_min in even steps, then 0: (steps + 1,) float64."""
        t = torch.linspace(self.t_max, self.t_min, steps, dtype=torch.float64)
        return torch.cat([t, t.new_zeros(1)])


class ScheduleLogNormalFlow(ScheduleFlow):
    """A flow schedule that trains most on the middle: t is the sigmoid of a normal (Esser et al. 2024, Eq. 19)."""

    def sample_batch(self, x0: Tensor) -> Tensor:
        """A time drawn for every sample of a batch, (B,)."""
        return torch.randn(x0.shape[0]).sigmoid().clamp(self.t_min, self.t_max).to(x0)


def generate_train_sample(
    x0: Any, schedule: Schedule, conditional: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A batch with noise levels and noise drawn for it.

    Args:
        x0: samples (B, *dims), or with ``conditional`` a pair of samples and labels (B,).

    Returns:
        x0, sigma (B, 1, ..., 1), eps like x0, and the labels or None.
    """
    x, cond = x0 if conditional else (x0, None)
    sigma = schedule.sample_batch(x).reshape(-1, *[1] * (x.ndim - 1))
    return x, sigma, torch.randn_like(x), cond


def training_loop(
    loader: Iterable[Any],
    model: Any,
    schedule: Schedule,
    accelerator: Any = None,
    epochs: int = 10000,
    lr: float = 1e-3,
    conditional: bool = False,
) -> Iterator[SimpleNamespace]:
    """Train with AdamW, and yield after every batch.

    Args:
        loader: batches as ``generate_train_sample`` takes them.
        accelerator: an ``accelerate.Accelerator``; one is made without. It needs the extra ``train``.

    Yields:
        A namespace with ``loss``, ``pbar``, ``x0``, ``sigma``, ``eps``, ``cond``, ``model`` and ``optimizer``.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]  # publishes no types

    if accelerator is None:
        from accelerate import Accelerator

        accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with tqdm(range(epochs), disable=not accelerator.is_main_process) as pbar:
        for _ in pbar:
            for batch in loader:
                model.train()
                x0, sigma, eps, cond = generate_train_sample(batch, schedule, conditional)
                optimizer.zero_grad()
                loss = model.get_loss(x0, sigma, eps, cond=cond)
                accelerator.backward(loss)
                optimizer.step()
                yield SimpleNamespace(
                    loss=loss, pbar=pbar, x0=x0, sigma=sigma, eps=eps, cond=cond, model=model, optimizer=optimizer
                )


@torch.no_grad()
def samples(
    model: Any,
    sigmas: Tensor,
    gam: float = 1.0,
    mu: float = 0.0,
    cfg_scale: float = 0.0,
    batchsize: int = 1,
    xt: Tensor | None = None,
    cond: Tensor | None = None,
    accelerator: Any = None,
) -> Iterator[Tensor]:
    """Sample, and yield x (B, *dims) after every step: Permenter & Yuan 2023, Algorithm 1 and section 4.

    gam=1, mu=0 is DDIM; gam=1, mu=0.5 is DDPM; gam=2, mu=0 the accelerated sampler. Noise comes from
    ``model.rand_input`` in every step.

    Args:
        sigmas: levels (steps + 1,), largest first.
        cfg_scale: weight of guidance, 0 without: eps = e_c + cfg_scale*(e_c - e_u).
        xt: where to start, (B, *dims) at noise level sigmas[0]; drawn without.
        cond: labels (B,).
        accelerator: says on which device; without one the model's own.
    """
    model.eval()
    device = accelerator.device if accelerator is not None else _device_of(model)
    x = (model.rand_input(batchsize) * sigmas[0] if xt is None else xt).to(device)
    cond = None if cond is None else cond.to(device)
    eps_last: Tensor | None = None
    for sigma, sigma_next in pairwise(sigmas.to(device)):
        eps = model.predict_eps_cfg(x, sigma.to(x.dtype), cond, cfg_scale)
        direction = eps if eps_last is None else gam * eps + (1 - gam) * eps_last
        sigma_down = (sigma_next / sigma**mu) ** (1 / (1 - mu))
        eta = (sigma_next**2 - sigma_down**2).clamp(min=0).sqrt()
        x = x - (sigma - sigma_down) * direction + eta * model.rand_input(len(x)).to(x)
        eps_last = eps
        yield x


def _device_of(model: Any) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
