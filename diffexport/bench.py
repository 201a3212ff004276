"""How fast the backends are beside what a user would run instead, interleaved in one run of one process.

A contender is opened, takes a step to be warm, and then all of them take a step in turn, round after round, a product of
matrices among them, so that whatever else a machine does falls on all alike. Medians are reported, with the quartiles.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffexport.backends import BACKENDS, open_session
from diffexport.backends.session import Session
from diffexport.bundle import Bundle, Precision
from diffexport.errors import BackendError
from diffexport.noise import normal
from diffexport.parity import relative_l2
from diffexport.plan import make_plan
from diffexport.probes import probe_guidance, probe_labels
from diffexport.sampler import Sampler

if TYPE_CHECKING:
    import torch

MATRIX = 2048
STEPS = 20
_SLOW = 0.1
"""Seconds of a step from which on a run is compared with its steps once, not three times."""


@dataclass(frozen=True)
class Contender:
    """Something that takes the bundle's steps.

    Attributes:
        precision: of its products.
        ours: a backend of this package, not a peer.
    """

    name: str
    precision: Precision
    open: Callable[[], Session]
    ours: bool = True


@dataclass(frozen=True)
class Figure:
    """What was measured of one contender at one batch; times in milliseconds.

    Attributes:
        start_ms: opening it, with the first step: loading, tracing and compiling.
        memory_mb: what opening and the first step added to the process at most.
        error: largest relative L2 of its golden steps beside PyTorch's.
        step_ms, low_ms, high_ms: median and quartiles of a guided step.
        image_ms: of a run of 20 steps, for each image.
        gflops: GFLOP/s reached, where the work is known.
        of_matrix: the same as a part of a matrix product's rate of the same precision in the same run.
        loop: a run of 20 steps over 20 times a step; of this package's backends at the smallest batch.
    """

    name: str
    precision: str
    batch: int
    ours: bool
    start_ms: float
    memory_mb: float | None
    error: float
    step_ms: float
    low_ms: float
    high_ms: float
    image_ms: float
    gflops: float | None = None
    of_matrix: float | None = None
    loop: float | None = None


@dataclass
class Report:
    """All figures of a run.

    Attributes:
        gflop: of a guided step of one image, where a module was there to count it.
        matrix: GFLOP/s of a product of two square matrices of side ``MATRIX``, by precision.
        left_out: contenders that cannot run here, with why.
    """

    model: str
    parameters: int
    processor: str
    cores: int
    gflop: float | None
    matrix: dict[str, float] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class _Running:
    contender: Contender
    session: Session
    start_ms: float
    memory_mb: float | None
    error: float
    times: list[float] = field(default_factory=list)


def contenders_of(bundle: Bundle, module: torch.nn.Module | None = None, threads: int | None = None) -> list[Contender]:
    """Everything that is installed and can run a bundle: PyTorch in four ways where its module is given, and backends."""
    precision = bundle.manifest.precision
    found: list[Contender] = []
    if module is not None:
        from diffexport.bench_peers import peers

        found += peers(module, bundle.spec)
    options = {} if threads is None else {"threads": threads}
    for name, entry in BACKENDS.items():
        if name == "torch" or not entry.installed:
            continue
        on_cpu = name in ("ort", "openvino")
        found.append(_backend(bundle, name, precision, **(options if on_cpu else {})))
        if name == "openvino" and precision in ("fp32", "int8"):
            found.append(
                _backend(bundle, name, "bf16" if precision == "fp32" else precision, precision="bf16", **options)
            )
    return found


def _backend(bundle: Bundle, backend: str, held: Precision, **options: Any) -> Contender:
    told = f"{backend} {options['precision']}" if "precision" in options else backend
    return Contender(told, held, lambda: open_session(bundle, backend, **options))


def bench(
    bundle: Bundle,
    contenders: Sequence[Contender],
    batches: Sequence[int] = (1, 4, 16),
    *,
    seconds: float = 20.0,
    gflop: float | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Report:
    """Measure contenders on guided steps of a bundle.

    Args:
        seconds: of each batch's rounds; at least three are run.
        gflop: of a guided step of one image.

    Raises:
        BackendError: no contender can run here.
    """
    from diffexport.machine import processor_name, usable_cores

    tell = progress or (lambda _what, _part: None)
    manifest = bundle.manifest
    report = Report(manifest.name, manifest.parameters, processor_name(), usable_cores(), gflop)
    for number, batch in enumerate(batches):
        running: list[_Running] = []
        course = _Course(bundle, batch)
        for contender in contenders:
            tell(
                f"batch {batch}: opening {contender.name}",
                (number + 0.3 * len(running) / len(contenders)) / len(batches),
            )
            try:
                running.append(_opened(bundle, contender, course))
            except BackendError as error:
                report.left_out[contender.name] = str(error)
        tell(f"batch {batch}: steps in turn", (number + 0.3) / len(batches))
        if not running:
            raise BackendError("none of the backends can run this bundle here: " + "; ".join(report.left_out.values()))
        report.matrix |= _rounds(course, running, seconds)
        tell(f"batch {batch}: whole runs", (number + 0.9) / len(batches))
        for each in running:
            report.figures.append(_figure(bundle, each, course, batch, report, first=number == 0))
            each.session.close()
        del running
        gc.collect()
    tell("done", 1.0)
    return report


def _opened(bundle: Bundle, contender: Contender, course: _Course) -> _Running:
    """A contender after its first steps, which its golden cases judge."""
    before = _memory(reset=True)
    started = time.perf_counter()
    session = contender.open()
    course.begin(session)
    course.step(session)
    start = (time.perf_counter() - started) * 1e3
    after = _memory()
    memory = (after[1] - before[0]) / 1e6 if before and after else None
    return _Running(contender, session, start, memory, _error(bundle, session))


class _Course:
    """What every contender of a batch runs: the first row of a guided DDIM run, again and again."""

    def __init__(self, bundle: Bundle, batch: int) -> None:
        spec = bundle.spec
        plan = make_plan(spec, "ddim", STEPS, probe_guidance(spec))
        self.rows = plan.rows.astype(np.float32)
        self.x = np.float32(plan.x_scale) * normal(0, range(batch), [0], spec.shape)[0]
        self.label = probe_labels(spec, range(batch))

    def begin(self, session: Session) -> None:
        session.begin(self.x, self.label, rows=self.rows)

    def step(self, session: Session) -> None:
        session.step(self.rows[0])


def _error(bundle: Bundle, session: Session) -> float:
    """The largest relative L2 of the golden steps."""
    cases, errors = bundle.golden(), []
    for k in sorted({name.split(".")[1] for name in cases if name.startswith("step.")}):
        case = {name.split(".")[2]: array for name, array in cases.items() if name.startswith(f"step.{k}.")}
        session.begin(case["x"][:1], case["label"][:1] if "label" in case else None, case["h"][:1])
        session.step(case["row"], case["z"][:1])
        errors.append(relative_l2(session.state()[0], case["x_next"][:1]))
    return max(errors)


def _rounds(course: _Course, running: Sequence[_Running], seconds: float) -> dict[str, float]:
    """Time every contender in turn; the matrix product's rates, GFLOP/s by precision."""
    for each in running:
        course.begin(each.session)
        course.step(each.session)
    products = _products()
    times: dict[str, list[float]] = {precision: [] for precision in products}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(running[0].times) < 3:
        for precision, product in products.items():
            times[precision].append(_timed(product))
        for each in running:
            each.times.append(_timed(functools.partial(course.step, each.session)))
    return {precision: 2 * MATRIX**3 / statistics.median(taken) / 1e9 for precision, taken in times.items()}


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _products() -> dict[str, Callable[[], object]]:
    """A product of two matrices in fp32, and in bf16 where PyTorch is there to do it; each run once."""
    try:
        import torch
    except ImportError:
        a = np.ones((MATRIX, MATRIX), np.float32)
        return {"fp32": lambda: a @ a}
    products: dict[str, Callable[[], object]] = {}
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.ones(MATRIX, MATRIX, dtype=kind)
        products[precision] = lambda matrix=matrix: matrix @ matrix  # type: ignore[misc]
        products[precision]()
    return products


def _figure(bundle: Bundle, each: _Running, course: _Course, batch: int, report: Report, *, first: bool) -> Figure:
    low, middle, high = statistics.quantiles(each.times, n=4)
    gflops = report.gflop * batch / middle if report.gflop is not None else None
    rate = report.matrix.get(each.contender.precision)
    return Figure(
        name=each.contender.name,
        precision=each.contender.precision,
        batch=batch,
        ours=each.contender.ours,
        start_ms=each.start_ms,
        memory_mb=each.memory_mb,
        error=each.error,
        step_ms=middle * 1e3,
        low_ms=low * 1e3,
        high_ms=high * 1e3,
        image_ms=STEPS * middle * 1e3 / batch,
        gflops=gflops,
        of_matrix=gflops / rate if gflops is not None and rate else None,
        loop=_loop(bundle, each, course, batch) if first and each.contender.ours else None,
    )


def _loop(bundle: Bundle, each: _Running, course: _Course, batch: int) -> float:
    """A run of 20 steps over 20 single steps of the same session, in turn; the median."""
    sampler = Sampler(bundle.spec, each.session, bundle.manifest.defaults)
    guidance, ratios = probe_guidance(bundle.spec), []
    repeats = 3 if statistics.median(each.times) < _SLOW else 1
    for _ in range(repeats):
        run = _timed(
            lambda: sampler.sample(num=batch, batch=batch, sampler="ddim", steps=STEPS, guidance_scale=guidance)
        )
        course.begin(each.session)
        course.step(each.session)
        single = sum(_timed(functools.partial(course.step, each.session)) for _ in range(STEPS))
        ratios.append(run / single)
    return statistics.median(ratios)


def _memory(*, reset: bool = False) -> tuple[int, int] | None:
    """Bytes resident now and at most since the last reset, where the system tells."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    except OSError:
        return None
    now, most = (int(told[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most
