"""Golden cases: recorded inputs and PyTorch's outputs, so that any runtime can check itself without PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffexport.backends.session import Session
from diffexport.bundle import HALF, Measurement, Precision, Tensors
from diffexport.errors import BundleError
from diffexport.parity import amplification, measure_run, measure_step, typical_amplification
from diffexport.plan import COLUMNS, GUIDANCE, Plan, denoise_rows
from diffexport.probes import (
    LEVELS,
    mixing_row,
    probe_denoiser,
    probe_guidance,
    probe_labels,
    probe_levels,
    probe_loop,
    probe_state,
    run_plan,
)
from diffexport.spec import DecoderSpec, ModelSpec

Array = NDArray[np.float32]

MAX_BATCH = 10
MAX_NUMBERS = 1 << 13
"""Samples of a case times their numbers; at least two samples are kept whatever their size, of brief cases one."""


def golden_cases(
    reference: Session,
    spec: ModelSpec,
    plan: Plan,
    final: Array,
    denoised: Array,
    *,
    decoded: bool = False,
    brief: bool = False,
) -> Tensors:
    """Recorded inputs and PyTorch's outputs, small enough to travel with the bundle.

    ``step.K.{x,h,z,row,label}`` -> ``step.K.{x_next,h_next}``: one row at the K-th of three noise levels, the second
    without guidance.
    ``loop.{x,label,rows,noise}`` -> ``loop.x_next``: two rows in one call, the second without guidance.
    ``denoiser.{x,sigma,label,guidance}`` -> ``denoiser.denoised``: one batch with every noise level.
    ``run.{rows,x_scale,label}`` -> ``run.x``: a whole run, its noise drawn from seed 0, samples 0, 1.
    ``decoder.x`` -> ``decoder.image``: sample 0 of that run, of bundles with a decoder; ``loop.image``: of ``loop.x_next``.

    Args:
        plan: of the run.
        final: PyTorch's final samples of it, of which the first two are kept; see ``Comparison``.
        denoised: PyTorch's D of what ``probe_denoiser`` gives.
        decoded: whether the reference has a decoder.
        brief: one sample a case, of models whose every evaluation takes seconds.
    """
    batch = 1 if brief else _batch(spec)
    cases: Tensors = {}
    for k, (sigma, w) in enumerate(_steps(spec)):
        start = probe_state(spec, sigma, 2 * k, range(2 * k, 2 * k + batch))
        row = mixing_row(spec, sigma, w)
        reference.begin(start.x, start.label, start.h)
        reference.step(row, start.z)
        x_next, h_next = reference.state()
        case = {"x": start.x, "h": start.h, "z": start.z, "row": row, "x_next": x_next, "h_next": h_next}
        cases.update(_named(f"step.{k}", case, start.label))
    loop = probe_loop(spec, range(1, 1 + min(batch, 2)))
    looped = reference.run(loop.x, loop.label, loop.rows, loop.noise)
    case = {"x": loop.x, "rows": loop.rows, "noise": loop.noise, "x_next": looped}
    cases.update(_named("loop", case, loop.label))
    cases.update(_named("denoiser", {**probe_denoiser(spec), "denoised": denoised}, None))
    run = {"x": final[:2], "rows": plan.rows.astype(np.float32), "x_scale": np.array([plan.x_scale], np.float32)}
    cases.update(_named("run", run, probe_labels(spec, range(len(final[:2])))))
    if decoded:
        cases["decoder.x"], cases["decoder.image"] = final[:1], reference.decode(final[:1])
        cases["loop.image"] = reference.decode(looped[:1])
    return cases


def _named(prefix: str, case: Tensors, label: NDArray[np.int64] | None) -> Tensors:
    return {f"{prefix}.{name}": array for name, array in (case if label is None else {**case, "label": label}).items()}


def _batch(spec: ModelSpec) -> int:
    """Samples of each step that is recorded."""
    return max(2, min(MAX_BATCH, MAX_NUMBERS // math.prod(spec.shape)))


def _steps(spec: ModelSpec) -> list[tuple[float, float]]:
    """Noise level and guidance of each step that is recorded."""
    w = probe_guidance(spec)
    return [(float(sigma), w if k % 2 == 0 else 1.0) for k, sigma in enumerate(probe_levels(spec)[::2])]


@dataclass(frozen=True)
class GoldenCheck:
    """One golden case of a session: the graphs that it runs on, and how to run and measure it."""

    graphs: frozenset[str]
    measure: Callable[[Session], list[Measurement]]


def golden_checks(
    spec: ModelSpec, cases: Tensors, precision: Precision, decoder: DecoderSpec | None = None
) -> list[GoldenCheck]:
    """What can be checked of a session, in parts that its largest batch holds: single steps, rows in one call, a whole run,
    and the images.

    Raises:
        BundleError: the cases are not those of this model.
    """
    check_cases(spec, cases, decoder)

    def step(case: str, session: Session) -> list[Measurement]:
        row, label = cases[f"{case}.row"], cases.get(f"{case}.label")
        x, h, z = (cases[f"{case}.{name}"] for name in ("x", "h", "z"))
        results = []
        for part in _parts(session, len(x)):
            session.begin(x[part], None if label is None else label[part], h[part])
            session.step(row, z[part])
            results.append(session.state())
        outputs = zip(("x_next", "h_next"), zip(*results, strict=True), amplification(row), strict=True)
        name = case.replace(".", " ")
        return [
            measure_step(
                f"golden {name}, {output}", np.concatenate(found), cases[f"{case}.{output}"], precision, amplified
            )
            for output, found, amplified in outputs
        ]

    def call(part: slice) -> tuple[Array, NDArray[np.int64] | None, Array, Array]:
        label = cases.get("loop.label")
        noise = cases["loop.noise"][:, part]
        return cases["loop.x"][part], None if label is None else label[part], cases["loop.rows"], noise

    amplified = sum(amplification(row)[0] for row in cases["loop.rows"])

    def loop(session: Session) -> list[Measurement]:
        found = np.concatenate([session.run(*call(part)) for part in _parts(session, len(cases["loop.x"]))])
        return [measure_step("golden rows in one call", found, cases["loop.x_next"], precision, amplified)]

    rows, expected = cases["run.rows"].astype(np.float64), cases["run.x"]
    plan = Plan(rows, float(cases["run.x_scale"][0]), rows[:, COLUMNS.index("c_noise")])

    def run(session: Session) -> list[Measurement]:
        parts = [range(len(expected))[part] for part in _parts(session, len(expected))]
        found = np.concatenate([run_plan(session, spec, plan, part) for part in parts])
        return [measure_run("golden run", found, expected, precision)]

    def image(session: Session) -> list[Measurement]:
        return [measure_step("golden image", session.decode(cases["decoder.x"]), cases["decoder.image"], precision)]

    def loop_image(session: Session) -> list[Measurement]:
        latents, found = session.run_decoded(*call(slice(0, 1)))
        both = ("x", latents, cases["loop.x_next"][:1]), ("image", found, cases["loop.image"])
        return [
            measure_step(f"golden {name} of the sampler with decoder", a, b, precision, amplified)
            for name, a, b in both
        ]

    names = [f"step.{k}" for k in range(len(_steps(spec)))]
    checks = [GoldenCheck(_graphs_of(cases[f"{name}.row"][None]), functools.partial(step, name)) for name in names]
    checks += [GoldenCheck(frozenset(["sampler"]), loop), GoldenCheck(_graphs_of(rows), run)]
    if decoder is not None:
        checks += [GoldenCheck(frozenset(["decoder"]), image), GoldenCheck(frozenset(["sampler_decoded"]), loop_image)]
    return checks


def check_golden(
    session: Session, spec: ModelSpec, cases: Tensors, precision: Precision, decoder: DecoderSpec | None = None
) -> list[Measurement]:
    """Run the golden cases on a session and compare with what PyTorch gave.

    Raises:
        BundleError: the cases are not those of this model.
    """
    checks = golden_checks(spec, cases, precision, decoder)
    return [m for check in checks if "sampler_decoded" not in check.graphs for m in check.measure(session)]


def _graphs_of(rows: NDArray[np.floating]) -> frozenset[str]:
    """The graphs that apply some rows."""
    return frozenset("step_plain" if row[GUIDANCE] == 1 else "step" for row in rows)


def _parts(session: Session, count: int) -> list[slice]:
    """Samples 0 .. count - 1 in parts that a session takes."""
    size = min(count, session.max_batch or count)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def check_other_graphs(
    folder: Path, spec: ModelSpec, cases: Tensors, precision: Precision, decoder: DecoderSpec | None = None
) -> list[Measurement]:
    """Run the golden cases of the graphs that no session uses, in ONNX Runtime: ``denoiser``, ``sampler_decoded``.

    Raises:
        BundleError: the cases are not those of this model.
        BackendError: a graph cannot be run.
    """
    from diffexport.backends.onnxruntime import run_graph

    check_cases(spec, cases, decoder)
    feeds = {name: cases[f"denoiser.{name}"] for name in probe_denoiser(spec)}
    rounded = precision in HALF
    found = run_graph(folder / "denoiser.onnx", feeds, rounded=rounded)["denoised"]
    amplified, expected = typical_amplification(denoise_rows(spec, probe_levels(spec))), cases["denoiser.denoised"]
    results = [measure_step("golden case of the denoiser graph", found, expected, precision, amplified)]
    if decoder is not None:
        feeds = {"x_init": cases["loop.x"][:1], "plan": cases["loop.rows"], "noise": cases["loop.noise"][:, :1]}
        if spec.conditional:
            feeds["label"] = cases["loop.label"][:1]
        both = run_graph(folder / "sampler_decoded.onnx", feeds, rounded=rounded)
        amplified = sum(amplification(row)[0] for row in cases["loop.rows"])
        for name, expected in (("x", cases["loop.x_next"][:1]), ("image", cases["loop.image"])):
            what = f"golden {name} of the sampler with decoder"
            results.append(measure_step(what, both[name], expected, precision, amplified))
    return results


def check_cases(spec: ModelSpec, cases: Tensors, decoder: DecoderSpec | None = None) -> None:
    """Raise BundleError unless the cases have the shapes, labels and rows that this model's have."""
    steps, looped = _steps(spec), min(_samples(cases, "loop.x"), 2)
    batch = 1 if looped == 1 else _batch(spec)  # brief
    samples = {f"step.{k}": range(2 * k, 2 * k + batch) for k in range(len(steps))}
    samples |= {"loop": range(1, 1 + looped), "run": range(min(_samples(cases, "run.x"), 2))}
    shapes: dict[str, tuple[int, ...]] = {f"{case}.x": (len(indices), *spec.shape) for case, indices in samples.items()}
    for k in range(len(steps)):
        shapes |= {f"step.{k}.{name}": (batch, *spec.shape) for name in ("h", "z", "x_next", "h_next")}
        shapes[f"step.{k}.row"] = (len(COLUMNS),)
    shapes |= {"loop.x_next": (looped, *spec.shape), "loop.rows": (2, len(COLUMNS))}
    shapes["loop.noise"] = (2, looped, *spec.shape)
    shapes |= {f"denoiser.{name}": (LEVELS, *spec.shape) for name in ("x", "denoised")}
    shapes["run.x_scale"] = (1,)
    if decoder is not None:
        image = (1, decoder.channels, *(side * decoder.upscale for side in spec.shape[1:]))
        shapes |= {"decoder.x": (1, *spec.shape), "decoder.image": image, "loop.image": image}
    for name, expected in shapes.items():
        _check_case(cases, name, expected, np.dtype(np.float32))
    _check_case(cases, "run.rows", (*cases.get("run.rows", np.empty(0)).shape[:1], len(COLUMNS)), np.dtype(np.float32))

    values: Tensors = {f"denoiser.{name}": array for name, array in probe_denoiser(spec).items() if name != "x"}
    values |= {f"step.{k}.row": mixing_row(spec, sigma, w) for k, (sigma, w) in enumerate(steps)}
    values["loop.rows"] = probe_loop(spec, [0]).rows
    for case, indices in samples.items():
        labels = probe_labels(spec, indices)
        if labels is not None:
            values[f"{case}.label"] = labels
    for name, value in values.items():
        _check_case(cases, name, value.shape, value.dtype)
        if not np.allclose(cases[name], value, rtol=1e-5, atol=1e-6):
            raise BundleError(f"golden case {name} is not that of the model in the manifest; export the model again")


def _samples(cases: Tensors, name: str) -> int:
    """How many samples a case has, at least 1."""
    return max(1, len(cases[name])) if name in cases and cases[name].ndim else 1


def _check_case(cases: Tensors, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if name not in cases:
        raise BundleError(f"golden case {name} is missing; export the model again")
    array = cases[name]
    if array.shape != shape or array.dtype != dtype or not array.size:
        raise BundleError(
            f"golden case {name} is {array.dtype} {array.shape}, expected {dtype} {shape}; export the model again"
        )
