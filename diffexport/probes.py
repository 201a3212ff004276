"""Probes: the inputs that checks give to a session, chosen so that every part of a step counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffexport.backends.session import Session
from diffexport.bundle import Defaults
from diffexport.noise import normal
from diffexport.plan import COLUMNS, Plan, denoise_rows, make_plan
from diffexport.schedules import schedule_sigmas
from diffexport.spec import ModelSpec

Array = NDArray[np.float32]
Labels = NDArray[np.int64]

SEED = 0
LEVELS = 5
"""How many noise levels single steps are checked at, from the largest to the smallest of the schedule."""


def probe_levels(spec: ModelSpec) -> NDArray[np.float64]:
    """The noise levels, (LEVELS,), largest first."""
    trained = schedule_sigmas(spec.schedule)
    return np.geomspace(trained[-1], trained[0], LEVELS)


def probe_guidance(spec: ModelSpec) -> float:
    """The guidance weight: none where it is not possible, else one that makes both halves count."""
    return 2.0 if spec.guidable else 1.0


def probe_labels(spec: ModelSpec, samples: Sequence[int]) -> Labels | None:
    """The label of each sample, spread over all of the model's for the first ten samples; None without labels."""
    if not spec.conditional:
        return None
    return (np.asarray(samples, np.int64) % 10 * max(1, spec.num_classes // 10)) % spec.num_classes


@dataclass(frozen=True)
class State:
    """What a step starts from, each (B, *shape) but the labels (B,)."""

    x: Array
    h: Array
    z: Array
    label: Labels | None


def probe_state(spec: ModelSpec, sigma: float, draw: int, samples: Sequence[int]) -> State:
    """Noise of the variance that data has at ``sigma``; a sample's numbers depend on its index and the draw alone.

    A check at the K-th of ``probe_levels`` takes draw K and begins with sample K, so that checks of a level share what
    PyTorch computes for it, and each level has a label of its own.
    """
    x, h, z = normal(SEED, samples, [draw, draw + 100, draw + 200], spec.shape)
    return State(np.float32(math.hypot(1.0, sigma)) * x, h, z, probe_labels(spec, samples))


def mixing_row(spec: ModelSpec, sigma: float, w: float) -> Array:
    """A row whose every coefficient counts, so that an error in any of them is seen."""
    row = denoise_rows(spec, [sigma], w)[0]
    mixing = {
        "x_x": 0.7 / max(sigma, 1.0),
        "x_d": 0.9,
        "x_h": -0.4,
        "x_z": 0.3,
        "v_z": 0.2,
        "h_x": 0.5 / max(sigma, 1.0),
        "h_d": -0.6,
        "h_h": 0.8,
    }
    for name, value in mixing.items():
        row[COLUMNS.index(name)] = value
    return np.asarray(row, np.float32)


def probe_denoiser(spec: ModelSpec) -> dict[str, NDArray[Any]]:
    """Inputs of the denoiser graph: one batch of sample K at the K-th level, each with its label, with guidance."""
    levels = probe_levels(spec)
    x = np.concatenate([probe_state(spec, float(sigma), k, [k]).x for k, sigma in enumerate(levels)])
    feeds: dict[str, NDArray[Any]] = {
        "x": x,
        "sigma": levels.astype(np.float32),
        "guidance": np.full(len(levels), probe_guidance(spec), np.float32),
    }
    labels = probe_labels(spec, range(len(levels)))
    return feeds if labels is None else {**feeds, "label": labels}


@dataclass(frozen=True)
class Loop:
    """Two rows for one call, the second without guidance, each with noise of its own: what the loop starts from."""

    x: Array
    label: Labels | None
    rows: Array
    noise: Array


def probe_loop(spec: ModelSpec, samples: Sequence[int]) -> Loop:
    """The loop's inputs for some samples: x (B, *shape), noise (2, B, *shape)."""
    levels = probe_levels(spec)
    start = probe_state(spec, float(levels[1]), 1, samples)
    weights = ((1, probe_guidance(spec)), (2, 1.0))
    rows = np.stack([mixing_row(spec, float(levels[k]), weight) for k, weight in weights])
    return Loop(start.x, start.label, rows, np.stack([start.z, start.h]))


def default_plan(spec: ModelSpec, defaults: Defaults, *, guided: bool) -> Plan:
    """The bundle's default run; where ``guided``, with guidance even if the default is without."""
    scale = probe_guidance(spec) if guided and defaults.guidance_scale == 1 else defaults.guidance_scale
    return make_plan(spec, defaults.sampler, defaults.steps, scale)


def run_plan(session: Session, spec: ModelSpec, plan: Plan, samples: Sequence[int]) -> Array:
    """A whole run of some samples with the seed's noise, (len(samples), *shape)."""
    draws = normal(SEED, samples, range(1 + len(plan)), spec.shape)
    rows = plan.rows.astype(np.float32)
    session.begin(np.float32(plan.x_scale) * draws[0], probe_labels(spec, samples), rows=rows)
    for row, z in zip(rows, draws[1:], strict=True):
        session.step(row, z)
    return session.state()[0]
