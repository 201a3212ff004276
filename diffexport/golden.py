"""Golden cases: recorded inputs and PyTorch's outputs, so that any runtime can check itself without PyTorch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from diffexport.backends.session import Session
from diffexport.bundle import Measurement, Precision, Tensors
from diffexport.parity import amplification, measure_run, measure_step
from diffexport.plan import COLUMNS, Plan
from diffexport.probes import (
    mixing_row,
    probe_guidance,
    probe_labels,
    probe_levels,
    probe_state,
    run_plan,
)
from diffexport.spec import ModelSpec

Array = NDArray[np.float32]

MAX_BATCH = 10
MAX_NUMBERS = 1 << 13
"""Samples of a case times their numbers; at least two samples are kept whatever their size."""


def golden_cases(reference: Session, spec: ModelSpec, plan: Plan, final: Array, *, decoded: bool = False) -> Tensors:
    """Recorded inputs and PyTorch's outputs, small enough to travel with the bundle.

    ``step.K.{x,h,z,row,label}`` -> ``step.K.{x_next,h_next}``: one row at the K-th of three noise levels, the second
    without guidance.
    ``run.{rows,x_scale,label}`` -> ``run.x``: a whole run, its noise drawn from seed 0, samples 0, 1.
    ``decoder.x`` -> ``decoder.image``: sample 0 of that run, of bundles with a decoder.

    Args:
        plan: of the run.
        final: PyTorch's final samples of it, of which the first two are kept; see ``Comparison``.
        decoded: whether the reference has a decoder.
    """
    size = math.prod(spec.shape)
    batch = max(2, min(MAX_BATCH, MAX_NUMBERS // size))
    cases: Tensors = {}
    for k, sigma in enumerate(map(float, probe_levels(spec)[::2])):
        row = mixing_row(spec, sigma, probe_guidance(spec) if k % 2 == 0 else 1.0)
        start = probe_state(spec, sigma, k, range(batch))
        reference.begin(start.x, start.label, start.h)
        reference.step(row, start.z)
        x_next, h_next = reference.state()
        case = {"x": start.x, "h": start.h, "z": start.z, "row": row, "x_next": x_next, "h_next": h_next}
        cases.update({f"step.{k}.{name}": array for name, array in case.items()})
        if start.label is not None:
            cases[f"step.{k}.label"] = start.label
    cases["run.x"] = final[:2]
    cases["run.rows"] = plan.rows.astype(np.float32)
    cases["run.x_scale"] = np.array([plan.x_scale], np.float32)
    labels = probe_labels(spec, range(len(cases["run.x"])))
    if labels is not None:
        cases["run.label"] = labels
    if decoded:
        cases["decoder.x"], cases["decoder.image"] = final[:1], reference.decode(final[:1])
    return cases


def check_golden(session: Session, spec: ModelSpec, cases: Tensors, precision: Precision) -> list[Measurement]:
    """Run the golden cases on a session and compare with what PyTorch gave."""
    results = []
    names = sorted({name.split(".")[1] for name in cases if name.startswith("step.")}, key=int)
    for k in names:
        case = {
            name.removeprefix(f"step.{k}."): array for name, array in cases.items() if name.startswith(f"step.{k}.")
        }
        session.begin(case["x"], case.get("label"), case["h"])
        session.step(case["row"], case["z"])
        parts = zip(("x_next", "h_next"), session.state(), amplification(case["row"]), strict=True)
        for name, found, amplified in parts:
            results.append(measure_step(f"golden step {k}, {name}", found, case[name], precision, amplified))
    rows, x = cases["run.rows"].astype(np.float64), cases["run.x"]
    plan = Plan(rows, float(cases["run.x_scale"][0]), rows[:, COLUMNS.index("c_noise")])
    found = run_plan(session, spec, plan, len(x))
    results.append(measure_run("golden run", found, x, precision))
    if "decoder.x" in cases:
        found = session.decode(cases["decoder.x"])
        results.append(measure_step("golden image", found, cases["decoder.image"], precision))
    return results
