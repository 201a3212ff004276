"""A plan applied in float64 to a denoiser that is a formula: what the samplers alone do."""

import numpy as np

from diffexport.plan import COLUMNS, Plan


def run(plan: Plan, denoise, x, noise=None, log_variance=None):
    """The state after a plan, for D = denoise(x, sigma) and V = log_variance(x, sigma)."""
    h = np.zeros_like(x)
    for index, (row, sigma) in enumerate(zip(plan.rows, plan.sigmas, strict=True)):
        r = dict(zip(COLUMNS, row, strict=True))
        d = denoise(x, sigma)
        z = noise[index] if noise is not None else 0.0
        if log_variance is not None:
            z = z * np.exp(r["v_z"] * log_variance(x, sigma))
        x, h = (
            r["x_x"] * x + r["x_d"] * d + r["x_h"] * h + r["x_z"] * z,
            r["h_x"] * x + r["h_d"] * d + r["h_h"] * h,
        )
    return x


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
