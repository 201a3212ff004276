"""One build, in a process of its own: ``python -P -m diffexport.engines.worker`` with a job on stdin.

The engine comes out of stdout; on stderr, lines of JSON are reports, and others are what libraries print.

TensorRT builds for seconds to minutes inside one call that nothing interrupts, takes gigabytes that it may not give
back, and can end its process on a fault. Here it can be killed at any moment, its peak memory is its own, and a fault is
an error. The process ends when its parent does. TensorRT orders part of what it writes by addresses in memory, so the
process runs without random ones, in the bundle's folder, and knows no path: then the same key gives the same bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from diffexport.engines.messages import error_log
from diffexport.engines.network import check_precision, describe, network_from_onnx
from diffexport.engines.products import PRODUCTS
from diffexport.engines.profiles import input_ranges
from diffexport.engines.record import EngineKey, Network
from diffexport.errors import DiffexportError, EngineError
from diffexport.files import writing
from diffexport.machine import peak_memory


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to build, of the bundle in the current folder, by which product."""

    backend: str
    key: EngineKey


class Report(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of a worker: what it is doing, how it ended, or why it failed."""

    doing: str | None = None
    network: Network | None = None
    size: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    error: str | None = None


def engine_from_onnx(trt: Any, job: Job, say: Callable[[Report], None], out: BinaryIO) -> Report:
    """Parse a graph, see that it is in its precision, build its engine, and write it to ``out``.

    Raises:
        EngineError: the parser or the builder refuses it.
    """
    key, path = job.key, Path(f"{job.key.graph}.onnx")
    logger = error_log(trt)
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
        for given in described.inputs:
            if any(isinstance(side, str) for side in given.shape):
                least, best, most = input_ranges(given.name, given.shape, profile, key.sides)
                ranges.set_shape(given.name, least, best, most)
        config.add_optimization_profile(ranges)
    monitor = _monitor(trt, say)
    config.progress_monitor = monitor
    started = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"{path.name}: TensorRT cannot build it ({logger.why()})")
    say(Report(doing="writing the engine"))
    with writing(Path(f"engine of {path.name}"), EngineError):
        out.write(engine)
        out.flush()
    return Report(
        network=described, size=engine.nbytes, seconds=time.perf_counter() - started, peak_memory=peak_memory()
    )


def _monitor(trt: Any, say: Callable[[Report], None]) -> Any:
    """Says each phase of a build; TensorRT knows no honest part of the whole."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases = ["building"]

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.append(phase_name[:1].lower() + phase_name[1:])
            say(Report(doing=self._phases[-1]))

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop()
            say(Report(doing=self._phases[-1]))

    return Monitor()


def main() -> None:
    """Do the job in the first line of stdin."""
    _fix_addresses()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no part of an engine

    def say(report: Report) -> None:
        sys.stderr.buffer.write(msgspec.json.encode(report) + b"\n")
        sys.stderr.buffer.flush()

    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        say(engine_from_onnx(PRODUCTS[job.backend].load(), job, say, out))
    except DiffexportError as error:
        say(Report(error=str(error)))


_ADDR_NO_RANDOMIZE = 0x40000


def _fix_addresses() -> None:
    """Start anew without random addresses, where this is Linux and it lets us; see personality(2)."""
    if sys.platform == "linux":
        personality = ctypes.CDLL(None).personality
        now = personality(ctypes.c_ulong(0xFFFFFFFF))
        if now >= 0 and not now & _ADDR_NO_RANDOMIZE and personality(ctypes.c_ulong(now | _ADDR_NO_RANDOMIZE)) >= 0:
            os.execv(sys.executable, sys.orig_argv)


def _end_with_parent() -> None:
    """The parent holds the other end of stdin open for as long as it lives.

    Not ``sys.stdin.read``, which would hold a lock that the interpreter needs to end well.
    """
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
