"""Samplers: pure functions from a falling list of noise levels to updates of the state.

All work in sigma space, x_sigma = x0 + sigma*eps. ``s`` is the level of a step, ``n`` the next one (0 at the end), D the
denoised estimate at s, h the history tensor, z standard normal noise:

    x' = x_x*x + x_d*D + x_h*h + x_z*exp(v_z*V)*z
    h' = h_x*x + h_d*D + h_h*h

Each function is pure and in float64: sigmas (steps + 1,) in, one ``Update`` for each evaluation of the network out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from diffexport.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one evaluation of the network at ``sigma`` does to the state."""

    sigma: float
    x_x: float = 0.0
    x_d: float = 0.0
    x_h: float = 0.0
    x_z: float = 0.0
    v_z: float = 0.0
    h_x: float = 0.0
    h_d: float = 0.0
    h_h: float = 0.0


def ddim(sigmas: Sequence[float], eta: float = 0.0) -> list[Update]:
    """DDIM with any eta: Song et al. 2021, Eq. 12 and 16.

    In sigma space its noise is eta*n*sqrt(s^2 - n^2)/s for every process, so eta = 0 is Euler's method on the
    probability flow (k-diffusion's ``sample_euler``), eta = 1 is DDPM with the smaller variance (Ho et al. 2020, Eq. 7)
    and the same function is k-diffusion's ``sample_euler_ancestral``.
    """
    updates = []
    for s, n in pairwise(sigmas):
        up = min(n, eta * n * math.sqrt(s * s - n * n) / s)
        down = math.sqrt(n * n - up * up)
        updates.append(Update(sigma=s, x_x=down / s, x_d=1 - down / s, x_z=up))
    return updates


def ddpm_learned(sigmas: Sequence[float]) -> list[Update]:
    """DDPM with learned variance: Nichol & Dhariwal 2021, Eq. 15, on the process that visits ``sigmas`` alone.

    The log variance lies between that of the posterior (V = -1) and beta (V = +1), both in variance-preserving units;
    division by sqrt(alpha_bar of n) takes the noise to sigma space.
    """
    updates = []
    for s, n in pairwise(sigmas):
        beta = (s * s - n * n) / (1 + s * s)  # 1 - alpha_bar(s)/alpha_bar(n)
        x_z = v_z = 0.0
        if n > 0:
            posterior = beta * (n * n / (1 + n * n)) / (s * s / (1 + s * s))
            log_beta, log_posterior = math.log(beta), math.log(posterior)
            x_z = math.exp((log_beta + log_posterior) / 4) * math.sqrt(1 + n * n)
            v_z = (log_beta - log_posterior) / 4
        updates.append(Update(sigma=s, x_x=n * n / (s * s), x_d=1 - n * n / (s * s), x_z=x_z, v_z=v_z))
    return updates


def ddpm_large(sigmas: Sequence[float]) -> list[Update]:
    """DDPM with the larger variance, beta of the process that visits ``sigmas`` alone: Ho et al. 2020, section 3.2."""
    return [
        Update(sigma=u.sigma, x_x=u.x_x, x_d=u.x_d, x_z=u.x_z * math.exp(u.v_z))  # V = +1
        for u in ddpm_learned(sigmas)
    ]


def accelerated(sigmas: Sequence[float], gam: float = 2.0, mu: float = 0.0) -> list[Update]:
    """smalldiffusion's family: Permenter & Yuan 2024, Algorithm 2; gam above 1 extrapolates the last two estimates.

    gam = 1, mu = 0 is DDIM; gam = 1, mu = 0.5 is DDPM; gam = 2, mu = 0 is their accelerated sampler. h holds the last eps.
    """
    if not 0 <= mu < 1:
        raise PlanError(f"mu {mu:g}: expected 0 <= mu < 1")
    updates = []
    for first, (s, n) in zip((True, *[False] * len(sigmas)), pairwise(sigmas), strict=False):
        g = 1.0 if first else gam
        p = (n / s**mu) ** (1 / (1 - mu))
        eta = math.sqrt(max(n * n - p * p, 0.0))
        k = (s - p) * g / s
        updates.append(Update(sigma=s, x_x=1 - k, x_d=k, x_h=-(s - p) * (1 - g), x_z=eta, h_x=1 / s, h_d=-1 / s))
    return updates


def heun(sigmas: Sequence[float]) -> list[Update]:
    """Heun's second-order method, two rows a step: Karras et al. 2022, Algorithm 1. h holds the slope at s."""
    updates = []
    for s, n in pairwise(sigmas):
        updates.append(Update(sigma=s, x_x=n / s, x_d=1 - n / s, h_x=1 / s, h_d=-1 / s))
        if n > 0:
            d = n - s
            updates.append(Update(sigma=n, x_x=1 + d / (2 * n), x_d=-d / (2 * n), x_h=-d / 2))
    return updates


def dpmpp_2m(sigmas: Sequence[float]) -> list[Update]:
    """DPM-Solver++(2M): Lu et al. 2022, Algorithm 2. h holds the last D."""
    updates: list[Update] = []
    last = 0.0
    for s, n in pairwise(sigmas):
        if n == 0:
            updates.append(Update(sigma=s, x_d=1, h_d=1))
            continue
        step = math.log(s / n)
        e = -math.expm1(-step)
        slope = e / (2 * (last / step)) if updates else 0.0
        updates.append(Update(sigma=s, x_x=n / s, x_d=e + slope, x_h=0.0 - slope, h_d=1))
        last = step
    return updates


def dpmpp_2m_sde(sigmas: Sequence[float], eta: float = 1.0) -> list[Update]:
    """The SDE form of DPM-Solver++(2M), midpoint variant, as k-diffusion's ``sample_dpmpp_2m_sde``. h holds the last D."""
    updates: list[Update] = []
    last = 0.0
    for s, n in pairwise(sigmas):
        if n == 0:
            updates.append(Update(sigma=s, x_d=1, h_d=1))
            continue
        step = math.log(s / n)
        e = -math.expm1(-(1 + eta) * step)
        slope = e / (2 * (last / step)) if updates else 0.0
        noise = n * math.sqrt(-math.expm1(-2 * eta * step))
        updates.append(
            Update(sigma=s, x_x=n / s * math.exp(-eta * step), x_d=e + slope, x_h=0.0 - slope, x_z=noise, h_d=1)
        )
        last = step
    return updates


def lms_2(sigmas: Sequence[float]) -> list[Update]:
    """The linear multistep method of order 2, as k-diffusion's ``sample_lms`` at order 2. h holds the last slope."""
    updates: list[Update] = []
    last = math.nan
    for s, n in pairwise(sigmas):
        c0, c1 = n - s, 0.0
        if updates:  # integrals from s to n of the line through the slopes at s and at the level before it
            c1 = (n - s) ** 2 / (2 * (last - s))
            c0 = (n - s) - c1
        updates.append(Update(sigma=s, x_x=1 + c0 / s, x_d=-c0 / s, x_h=c1, h_x=1 / s, h_d=-1 / s))
        last = s
    return updates


@dataclass(frozen=True)
class Sampler:
    """A sampler by name.

    Attributes:
        about: what it is, in one line for people.
        rows: its function.
        options: the numbers that its user may set, with their defaults.
        fixed: the numbers that make it this member of a family.
        flow: whether it also holds for flow models; those that add noise, or solve for log sigma, are derived for
            x0 + sigma*eps alone.
    """

    about: str
    rows: Callable[..., list[Update]]
    options: dict[str, float] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=dict)
    flow: bool = True


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("first order; eta above 0 adds noise", ddim, {"eta": 0.0}),
    "ddpm": Sampler("the stochastic ancestor of all; wants many steps", ddim, fixed={"eta": 1.0}, flow=False),
    "euler": Sampler("first order on the probability flow; the same as ddim without noise", ddim, fixed={"eta": 0.0}),
    "euler-ancestral": Sampler("euler with noise put back after each step", ddim, {"eta": 1.0}, flow=False),
    "heun": Sampler("second order, two evaluations a step", heun),
    "dpmpp-2m": Sampler("DPM-Solver++, second order, one evaluation a step", dpmpp_2m, flow=False),
    "dpmpp-2m-sde": Sampler("DPM-Solver++, second order, with noise", dpmpp_2m_sde, {"eta": 1.0}, flow=False),
    "lms-2": Sampler("linear multistep, second order, one evaluation a step", lms_2),
    "accelerated": Sampler(
        "smalldiffusion's extrapolation of the last two steps", accelerated, {"gam": 2.0, "mu": 0.0}
    ),
}
