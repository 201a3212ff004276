"""Train a small official DiT with learned variance on real digits as 4-channel latents, for the tests of precision.

    python scripts/train_official.py OUT.safetensors [--steps 3000]

The digits of scikit-learn (8x8) are doubled in size and folded to (4, 8, 8), one channel for each pixel of a 2x2 square.
The loss is that of the original: squared error of eps, and the bound on the learned variance with eps detached (Nichol and
Dhariwal 2021, section 3.1), weighted by 0.001 * T.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

from diffexport_reference import OfficialDiT

T = 1000
ARCHITECTURE = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=128, depth=4, num_heads=4, num_classes=10)


def latents() -> tuple[Tensor, Tensor]:
    """(N, 4, 8, 8) in [-1, 1] and labels (N,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32))[:, None] / 8 - 1
    doubled = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    return torch.nn.functional.pixel_unshuffle(doubled, 2), torch.from_numpy(digits.target.astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data, labels = latents()
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    variance = betas * (1 - before) / (1 - bars)  # of the posterior
    log_small = torch.log(torch.cat([variance[1:2], variance[1:]])).float()
    log_large = torch.log(betas).float()
    eps_weight = (betas**2 / (2 * (1 - betas) * (1 - bars))).float()  # of |eps - eps_theta|^2 in the posterior's mean

    model = OfficialDiT(**ARCHITECTURE)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps, pct_start=0.05)
    for step in track(range(args.steps), "training"):
        chosen = torch.randint(len(data), (64,))
        x0, y = data[chosen], labels[chosen]
        y = torch.where(torch.rand(len(y)) < 0.1, torch.full_like(y, ARCHITECTURE["num_classes"]), y)
        t = torch.randint(T, (len(x0),))
        eps = torch.randn_like(x0)
        bar = bars[t].float()[:, None, None, None]
        predicted, v = model(bar.sqrt() * x0 + (1 - bar).sqrt() * eps, t, y).chunk(2, dim=1)
        small, large = (table[t][:, None, None, None] for table in (log_small, log_large))
        log_variance = small + (v + 1) / 2 * (large - small)
        spread = torch.exp(small - log_variance)
        shift = 2 * eps_weight[t][:, None, None, None] * (eps - predicted.detach()) ** 2 * torch.exp(-log_variance)
        bound = 0.5 * (log_variance - small + spread - 1 + shift)  # KL of two Gaussians, a number of the image
        loss = ((eps - predicted) ** 2).mean() + 1e-3 * T * bound.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        with torch.no_grad():
            decay = min(0.995, (1 + step) / (10 + step))
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
    save_file({name: tensor.half().contiguous() for name, tensor in average.state_dict().items()}, args.out)
    print(f"last loss {loss.item():.4f}; wrote {args.out}")


if __name__ == "__main__":
    main()
