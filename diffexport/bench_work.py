"""What the processes of a benchmark do when it is their turn: guided steps of a contender, or products of matrices."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np

from diffexport.backends.session import Session
from diffexport.bundle import Bundle
from diffexport.machine import peak_memory, usable_cores
from diffexport.noise import normal
from diffexport.parity import amplification, measure_step
from diffexport.plan import GUIDANCE, make_plan
from diffexport.precision import Precision
from diffexport.probes import probe_guidance, probe_labels
from diffexport.sampler import Sampler

MATRIX = 2048
STEPS = 20
_TURN = 1.0
_TURN_STEPS = 5
"""A turn is as many steps as fit into so many seconds, at most so many; one at least."""
_LOOPS = 10.0
"""Seconds after which no more runs are compared with single steps; one is at least, five are at most."""


class Steps:
    """A contender that takes the first row of a guided DDIM run, again and again.

    Args:
        open: opens its session.
    """

    def __init__(self, bundle: Bundle, open: Callable[[], Session], batch: int) -> None:
        self._bundle, self._open, self._batch = bundle, open, batch
        plan = make_plan(bundle.spec, "ddim", STEPS, probe_guidance(bundle.spec))
        self._rows = plan.rows.astype(np.float32)
        self._x = np.float32(plan.x_scale) * normal(0, range(batch), [0], bundle.spec.shape)[0]
        self._label = probe_labels(bundle.spec, range(batch))

    def start(self) -> float:
        """Open the session and take a step; seconds."""
        started = time.perf_counter()
        self._session = self._open()
        self._begin()
        self._step()
        return time.perf_counter() - started

    def judge(self) -> float:
        """The largest error, as ``diffexport.parity`` measures it, of the golden steps that are as guided as those timed.

        One sample fills the batch.
        """
        cases, errors = self._bundle.golden(), []
        for k in sorted({name.split(".")[1] for name in cases if name.startswith("step.")}):
            case = {name.split(".")[2]: array for name, array in cases.items() if name.startswith(f"step.{k}.")}
            row = case.pop("row")
            if self._bundle.spec.guidable and row[GUIDANCE] == 1:
                continue
            batch = {name: np.repeat(array[:1], self._batch, axis=0) for name, array in case.items()}
            self._session.begin(batch["x"], batch.get("label"), batch["h"])
            self._session.step(row, batch["z"])
            found, amplified = self._session.state()[0], amplification(row)[0]
            errors.append(measure_step("golden step", found, batch["x_next"], "fp32", amplified).relative_l2)
        self._begin()
        self._step()
        return max(errors)

    def turn(self) -> list[float]:
        """Seconds of each of a turn's steps."""
        return _turn(self._step)

    def loop(self) -> float:
        """A run of 20 steps over 20 single steps, in turn; the median."""
        sampler = Sampler(self._bundle.spec, self._session, self._bundle.manifest.defaults)
        ratios: list[float] = []
        settings = {"sampler": "ddim", "steps": STEPS, "guidance_scale": probe_guidance(self._bundle.spec)}
        spent = 0.0
        while not ratios or (spent < _LOOPS and len(ratios) < 5):
            self._step()
            run = _seconds(lambda: sampler.sample(num=self._batch, batch=self._batch, **settings))  # type: ignore[arg-type]
            self._begin()
            self._step()
            single = sum(_seconds(self._step) for _ in range(STEPS))
            ratios.append(run / single)
            spent += run + single
        return statistics.median(ratios)

    def memory(self) -> int:
        """The most memory that this process has held, in bytes."""
        return peak_memory()

    def _begin(self) -> None:
        self._session.begin(self._x, self._label, rows=self._rows)

    def _step(self) -> None:
        self._session.step(self._rows[0])


class Product:
    """The product of two random matrices of side ``MATRIX``, by PyTorch, or by NumPy where it is not installed."""

    def __init__(self, precision: Precision) -> None:
        self._multiply: Callable[[], object]
        if importlib.util.find_spec("torch") is None:
            a, b = np.random.default_rng(0).standard_normal((2, MATRIX, MATRIX), np.float32)
            self._multiply = lambda: a @ b
            return
        import torch

        torch.set_num_threads(usable_cores())
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        left, right = (torch.randn(MATRIX, MATRIX).to(kind) for _ in range(2))
        self._multiply = lambda: left @ right

    def turn(self) -> list[float]:
        """Seconds of each of a turn's products."""
        return _turn(self._multiply)


def product_precisions(precisions: set[Precision]) -> list[Precision]:
    """The precisions among these that a product can be computed in here."""
    known: tuple[Precision, ...] = ("fp32", "bf16") if importlib.util.find_spec("torch") is not None else ("fp32",)
    return [precision for precision in known if precision in precisions]


def _turn(step: Callable[[], object]) -> list[float]:
    """Seconds of some steps, after one that is not counted, as what others did to the caches falls on it."""
    fit = int(_TURN / _seconds(step))
    return [_seconds(step) for _ in range(max(1, min(_TURN_STEPS, fit)))]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
