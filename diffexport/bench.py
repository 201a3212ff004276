"""How fast the backends are beside what a user would run instead, interleaved in one run.

Each contender has a process of its own, so that none meets another's threads or memory. They take turns, one at a time: a
step that is not counted and a few that are, round after round, products of matrices among them, so that whatever else a
machine does falls on all alike. Medians are reported, with the quartiles.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffexport.backends import BACKENDS, open_session
from diffexport.backends.session import Session
from diffexport.bench_work import MATRIX, STEPS, Product, Steps, product_precisions
from diffexport.bundle import Bundle, Precision
from diffexport.errors import BackendError
from diffexport.worker import Worker

if TYPE_CHECKING:
    import torch

    from diffexport.spec import ModelSpec

ROUNDS = 3
"""Turns that each contender takes at least."""

Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Contender:
    """Something that takes the bundle's steps.

    Attributes:
        precision: of its products.
        open: opens its session in a process of its own, and is pickled on its way there: a function of a module, or
            ``functools.partial`` of one.
        ours: a backend of this package, not a peer.
    """

    name: str
    precision: Precision
    open: Callable[[], Session]
    ours: bool = True


@dataclass(frozen=True)
class Work:
    """What a guided step of one image is made of, in GFLOP.

    Attributes:
        attention: the part of it that is in the products of attention.
    """

    gflop: float
    attention: float


@dataclass(frozen=True)
class Figure:
    """What was measured of one contender at one batch; times in milliseconds.

    Attributes:
        first_ms: from the call to open until the first step's end in a fresh process with empty caches: importing the
            runtime, reading weights and compiling are in it, the start of Python is not.
        start_ms: the same once more, in another fresh process that finds what the first has left in the caches.
        memory_mb: resident memory of the process at most, all in all.
        error: largest relative L2, as ``diffexport.parity`` has it, of the bundle's golden steps, PyTorch's in fp32.
        steps: how many were timed.
        step_ms, low_ms, high_ms: median and quartiles of a guided step.
        image_ms: of a run of 20 steps, for each image.
        gflops: GFLOP/s reached, where the work is known.
        of_matrix: the same as a part of a matrix product's rate of the same precision, measured in turn.
        loop: a run of 20 steps over 20 times a step; of this package's backends at the first batch.
    """

    name: str
    precision: str
    batch: int
    ours: bool
    first_ms: float
    start_ms: float
    memory_mb: float
    error: float
    steps: int
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
        work: of a guided step of one image, where a module was there to count it.
        matrix: by batch and precision, GFLOP/s of a product of two square matrices of side ``MATRIX``, in turn with the
            batch's contenders.
        left_out: contenders that cannot run here or failed, with where and why.
        notes: what else a reader should know, a sentence each.
    """

    model: str
    parameters: int
    processor: str
    cores: int
    work: Work | None
    matrix: dict[int, dict[Precision, float]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(eq=False)
class _Runner:
    """What takes turns, and what they took."""

    name: str
    worker: Worker
    times: list[float] = field(default_factory=list)


@dataclass
class _Opened:
    contender: Contender
    runner: _Runner
    first: float
    start: float
    error: float


def contenders_of(
    bundle: Bundle, module: Callable[[], torch.nn.Module] | None = None, threads: int | None = None
) -> list[Contender]:
    """Everything that is installed and can run a bundle: PyTorch in four ways where its module is given, and backends.

    Args:
        module: makes or reads the module; it is called in other processes, see ``Contender.open``.
        threads: of ort and openvino; all cores where not given.
    """
    precision = bundle.manifest.precision
    found = _peers(module, bundle.spec) if module is not None else []
    options = {} if threads is None else {"threads": threads}
    for name, entry in BACKENDS.items():
        if name == "torch" or not entry.installed:
            continue
        on_cpu = name in ("ort", "openvino")
        found.append(_backend(bundle, name, precision, **(options if on_cpu else {})))
        if name == "openvino" and precision in ("fp32", "int8"):
            found.append(_backend(bundle, name, precision, precision="bf16", **options))
    return found


def _peers(module: Callable[[], torch.nn.Module], spec: ModelSpec) -> list[Contender]:
    found = []
    for compiled in (False, True):
        for bf16 in (False, True):
            name = f"PyTorch {'compiled' if compiled else 'eager'}{' bf16' if bf16 else ''}"
            opens = functools.partial(_open_peer, module, spec, compiled=compiled, bf16=bf16)
            found.append(Contender(name, "bf16" if bf16 else "fp32", opens, ours=False))
    return found


def _open_peer(module: Callable[[], torch.nn.Module], spec: ModelSpec, *, compiled: bool, bf16: bool) -> Session:
    from diffexport.bench_peers import PeerSession

    return PeerSession(module(), spec, compiled=compiled, bf16=bf16)


def _backend(bundle: Bundle, backend: str, held: Precision, **options: Any) -> Contender:
    """A contender whose name says what is not fp32: the bundle, or what its fp32 layers are computed in."""
    asked: Precision = options.get("precision", "fp32")
    name = " ".join((backend, *dict.fromkeys(precision for precision in (held, asked) if precision != "fp32")))
    return Contender(
        name, asked if held == "fp32" else held, functools.partial(open_session, bundle, backend, **options)
    )


def bench(
    bundle: Bundle,
    contenders: Sequence[Contender],
    batches: Sequence[int] = (1, 4, 16),
    *,
    seconds: float = 20.0,
    work: Work | None = None,
    progress: Tell | None = None,
) -> Report:
    """Measure contenders on guided steps of a bundle. A contender that fails or dies is left out, with why.

    Args:
        seconds: of each batch's turns; each contender takes at least ``ROUNDS``.
        work: of a guided step of one image.

    Raises:
        BackendError: no contender can run here.
    """
    from diffexport.machine import processor_name, usable_cores

    tell = progress or (lambda _what, _part: None)
    manifest = bundle.manifest
    report = Report(manifest.name, manifest.parameters, processor_name(), usable_cores(), work)
    with contextlib.ExitStack() as stack:
        matrix: dict[Precision, Worker] = {
            precision: stack.enter_context(Worker(functools.partial(Product, precision)))
            for precision in product_precisions({contender.precision for contender in contenders})
        }
        for number, batch in enumerate(batches):
            _measure(
                bundle,
                contenders,
                matrix,
                batch,
                seconds,
                report,
                lambda what, part, n=number, b=batch: tell(f"batch {b}: {what}", (n + part) / len(batches)),  # type: ignore[misc]
                with_loop=number == 0,
            )
    if not report.figures:
        why = "; ".join(f"{name}: {reason}" for name, reason in report.left_out.items())
        raise BackendError(f"none of the contenders can run this bundle here: {why}")
    tell("done", 1.0)
    return report


def _measure(
    bundle: Bundle,
    contenders: Sequence[Contender],
    matrix: dict[Precision, Worker],
    batch: int,
    seconds: float,
    report: Report,
    tell: Tell,
    *,
    with_loop: bool,
) -> None:
    """Add the figures of one batch to a report."""

    def leave_out(name: str, error: BackendError) -> None:
        report.left_out.setdefault(name, f"batch {batch}: {error}")

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches, contextlib.ExitStack() as workers:
        opened: list[_Opened] = []
        for number, contender in enumerate(contenders):
            tell(f"opening {contender.name}", 0.4 * number / len(contenders))
            try:
                opened.append(_opened(bundle, contender, batch, Path(tempfile.mkdtemp(dir=caches)), workers))
            except BackendError as error:
                leave_out(contender.name, error)
        if not opened:
            return
        products: dict[Precision, _Runner] = {
            precision: _Runner(f"matrix product {precision}", worker) for precision, worker in matrix.items()
        }
        runners = [*products.values(), *(each.runner for each in opened)]
        _take_turns(runners, seconds, leave_out, lambda part: tell("steps in turn", 0.4 + 0.5 * part))
        rates: dict[Precision, float] = {
            precision: 2 * MATRIX**3 / statistics.median(product.times) / 1e9
            for precision, product in products.items()
            if product in runners
        }
        report.matrix[batch] = rates
        tell("whole runs", 0.9)
        for each in opened:
            if each.runner in runners:
                try:
                    report.figures.append(_figure(each, batch, report.work, rates, with_loop=with_loop))
                except BackendError as error:
                    leave_out(each.contender.name, error)


def _opened(bundle: Bundle, contender: Contender, batch: int, caches: Path, workers: contextlib.ExitStack) -> _Opened:
    """A contender after its first step in a second process, and its error."""
    steps = functools.partial(Steps, bundle, contender.open, batch)
    environment = {"DIFFX_CACHE": str(caches / "diffx"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    with Worker(steps, environment) as worker:
        first = worker.ask("start")
    worker = workers.enter_context(Worker(steps, environment))
    return _Opened(contender, _Runner(contender.name, worker), first, worker.ask("start"), worker.ask("judge"))


def _take_turns(
    runners: list[_Runner],
    seconds: float,
    leave_out: Callable[[str, BackendError], None],
    tell: Callable[[float], None],
) -> None:
    """Let runners take turns; those that fail leave the list."""
    started, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - started < seconds:
        for runner in list(runners):
            tell(min(rounds / ROUNDS, (time.perf_counter() - started) / seconds, 1.0))
            try:
                runner.times += runner.worker.ask("turn")
            except BackendError as error:
                leave_out(runner.name, error)
                runners.remove(runner)
        rounds += 1


def _figure(each: _Opened, batch: int, work: Work | None, rates: dict[Precision, float], *, with_loop: bool) -> Figure:
    contender, worker, times = each.contender, each.runner.worker, each.runner.times
    low, middle, high = statistics.quantiles(times, n=4)
    gflops = work.gflop * batch / middle if work is not None else None
    rate = rates.get(contender.precision)
    return Figure(
        name=contender.name,
        precision=contender.precision,
        batch=batch,
        ours=contender.ours,
        first_ms=each.first * 1e3,
        start_ms=each.start * 1e3,
        memory_mb=worker.ask("memory") / 1e6,
        error=each.error,
        steps=len(times),
        step_ms=middle * 1e3,
        low_ms=low * 1e3,
        high_ms=high * 1e3,
        image_ms=STEPS * middle * 1e3 / batch,
        gflops=gflops,
        of_matrix=gflops / rate if gflops is not None and rate else None,
        loop=worker.ask("loop") if with_loop and contender.ours else None,
    )
