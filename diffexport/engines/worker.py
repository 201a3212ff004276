"""One build, in a process of its own: ``python -m diffexport.engines.worker`` with a job on stdin.

TensorRT builds for seconds to minutes inside one call that nothing interrupts, takes gigabytes that it may not give
back, and can end its process on a fault. Here it can be killed at any moment, its peak memory is its own, and a fault is
an error. The process ends when its parent does.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from diffexport.engines.network import check_precision, describe, network_from_onnx
from diffexport.engines.products import PRODUCTS
from diffexport.engines.profiles import input_ranges
from diffexport.engines.record import EngineKey, Network
from diffexport.errors import DiffexportError, EngineError


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to build: a graph by its path, where to write the engine, and what it is to be."""

    graph: str
    out: str
    backend: str
    key: EngineKey
    sides: dict[str, int]


class Report(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of a worker: what it is doing, how it ended, or why it failed."""

    doing: str | None = None
    network: Network | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    error: str | None = None


def engine_from_onnx(trt: Any, job: Job, say: Any) -> Report:
    """Parse a graph, see that it is in its precision, and build and write its engine.

    Raises:
        EngineError: the parser or the builder refuses it.
    """
    key, path = job.key, Path(job.graph)
    logger = _logger(trt)
    builder = trt.Builder(logger)
    say(Report(doing="reading the graph"))
    network = network_from_onnx(trt, builder, logger, path)
    described = describe(trt, network)
    check_precision(path.name, described, key.precision)
    config = builder.create_builder_config()
    if not key.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and then fp32 is not fp32
    if key.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, key.workspace)
    if key.level is not None:
        config.builder_optimization_level = key.level
    if PRODUCTS[job.backend].targets:
        config.num_compute_capabilities = len(key.targets)
        for index, target in enumerate(key.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    for profile in key.profiles:
        ranges = builder.create_optimization_profile()
        for tensor in described.inputs:
            if any(isinstance(side, str) for side in tensor.shape):
                ranges.set_shape(tensor.name, *input_ranges(tensor.name, tensor.shape, profile, job.sides))
        config.add_optimization_profile(ranges)
    monitor = _monitor(trt, say)
    config.progress_monitor = monitor
    started = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(
            f"{path.name}: TensorRT cannot build it ({logger.errors[0] if logger.errors else 'no reason'})"
        )
    say(Report(doing="writing the engine"))
    Path(job.out).write_bytes(engine)
    return Report(network=described, seconds=time.perf_counter() - started, peak_memory=_peak_memory())


def _logger(trt: Any) -> Any:
    """TensorRT's messages, of which the errors are kept."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg.strip().splitlines()[0])

    return Log()


def _monitor(trt: Any, say: Any) -> Any:
    """Says each phase of a build; TensorRT knows no honest part of the whole."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            say(Report(doing=phase_name[:1].lower() + phase_name[1:]))

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _peak_memory() -> int:
    """The most memory that this process held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike the resource module, it does not count what the parent held before the exec
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    """Read a job from the first line of stdin, report on stdout, one JSON line each."""

    def say(report: Report) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
        sys.stdout.buffer.flush()

    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        say(engine_from_onnx(PRODUCTS[job.backend].load(), job, say))
    except DiffexportError as error:
        say(Report(error=str(error)))


def _end_with_parent() -> None:
    """The parent holds the other end of stdin open for as long as it lives."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
