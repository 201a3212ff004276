"""Training: a configuration and a data set become a checkpoint that says what it is.

All randomness of a step is keyed by (seed, step, process), so that a run which was killed and continued from its state
file ends with the same weights as one that was never interrupted, and no generator's state has to be kept.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffexport.errors import CheckpointError, DiffexportError
from diffexport.files import replacing_file, writing
from diffexport.schedules import schedule_sigmas
from diffexport.spec import ModelSpec
from diffexport_reference.checkpoints import save_checkpoint, save_whole
from diffexport_reference.data import LoadedData, load_data
from diffexport_reference.recipe import (
    Network,
    TrainConfig,
    build_network,
    level_weights,
    plain_config,
    require,
)

REPORT_EVERY = 10
MEAN_OVER = 100
LOG_EVERY = 50
STATE_FORMAT = "diffexport.training"


@dataclass(frozen=True)
class Progress:
    """Where a run is, for a progress bar."""

    step: int
    steps: int
    loss: float
    """Mean over the last few steps."""
    lr: float


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    path: Path
    spec: ModelSpec
    parameters: int
    steps: int
    loss: float | None
    """Mean over the last steps; None where nothing was trained."""
    seconds: float
    resumed_from: int
    """The step a killed run was continued from; 0 for a whole run."""
    main: bool
    """Whether this process wrote the checkpoint; the others of ``accelerate launch`` only helped."""


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    log: str | Path | None = None,
    threads: int | None = None,
    save_every: int = 500,
    restart: bool = False,
    command: str = "",
    progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train a model and write its checkpoint, with averaged weights and the configuration inside.

    Every ``save_every`` steps the run is written to ``out`` + ".state"; the same call continues from there. Under
    ``accelerate launch --multi_gpu --num_processes N``, on CPUs too, each process takes its part of every batch.

    Args:
        log: file for one JSON object a line: first the command, configuration, seed and versions, then the losses.
        threads: of PyTorch; None leaves them as they are.
        restart: ignore and replace what an earlier run left.
        command: what the user typed, for the log and the checkpoint.

    Raises:
        DiffexportError: a configuration or data that cannot be trained on, another run's state, a loss of NaN.
    """
    out = Path(out)
    state_path = out.with_name(out.name + ".state")
    require(save_every >= 1, f"save every {save_every}: expected at least 1 step")
    require(threads is None or threads >= 1, f"threads {threads}: expected at least 1")
    require(not out.is_dir(), f"{out}: is a folder; give the name of a file")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    require(os.access(out.parent, os.W_OK), f"{out}: cannot be written, its folder is read-only")
    if threads is not None:
        torch.set_num_threads(threads)
    data = load_data(config.data, image_size=config.image_size, layout=config.layout)
    accelerator = _accelerator(config)
    if out.exists() and not state_path.exists() and not restart:
        raise DiffexportError(f"{out}: is there already; give --restart to train it again, or another --out")
    accelerator.wait_for_everyone()  # all have looked before one of them writes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_key(config.seed))
        config, network = build_network(config, data)
        run = _Run(config, data, network, accelerator, state_path)
        if restart:
            run.forget()
        first = run.resume()
        head = _head(config, data, network, accelerator.num_processes, command)
        lines = _Log(log if run.main else None, head, first)
        started = time.monotonic()
        loss = run.steps(first, save_every, lines, progress)
    seconds = time.monotonic() - started
    if run.main:
        training = {**head, "steps": run.total, "loss": loss, "seconds": round(seconds, 1)}
        save_checkpoint(
            out,
            model_class=network.model_class,
            args=network.args,
            spec=network.spec,
            state_dict=_stored(run.averaged_state(), config.half),
            training=training,
        )
    run.forget()
    count = sum(p.numel() for p in network.module.parameters())
    return TrainResult(out, network.spec, count, run.total, loss, seconds, first, run.main)


class _Loss(nn.Module):
    """The training loss as a module's forward, which is what DistributedDataParallel can wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x0: Tensor, sigma: Tensor, eps: Tensor, cond: Tensor | None) -> Tensor:
        loss: Tensor = self.model.get_loss(x0, sigma, eps, cond=cond)  # type: ignore[operator]  # of ModelMixin
        return loss


class _Run:
    """One run: network, averaged weights, optimiser, and the step they are at."""

    def __init__(self, config: TrainConfig, data: LoadedData, network: Network, accelerator: Any, path: Path) -> None:
        self.config = config
        self.data = data
        self.module = network.module
        self.accelerator = accelerator
        self.path = path
        self.main: bool = accelerator.is_main_process
        self.total = 0 if config.model == "ideal" else config.steps or 0
        self.sigmas = torch.tensor(schedule_sigmas(config.schedule), dtype=torch.float32)  # (levels,)
        weights = level_weights(schedule_sigmas(config.schedule), config.noise_density or "schedule")
        self.up_to = torch.tensor(np.cumsum(weights))  # (levels,): how often a level up to this one is drawn
        self.module.to(accelerator.device)
        self.averaged = [p.detach().clone() for p in self.module.parameters()]
        self.recent: list[Tensor] = []  # losses of the last steps
        if self.total == 0:
            return
        optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
        )
        self.loss, self.optimizer = accelerator.prepare(_Loss(self.module), optimizer)

    def steps(
        self, first: int, save_every: int, lines: _Log, progress: Callable[[Progress], None] | None
    ) -> float | None:
        """Train from step ``first`` to the last; the mean loss of the last steps."""
        if self.total == 0:
            return None
        self.loss.train()
        mean = math.nan
        for step in range(first, self.total):
            self.recent.append(self._step(step))
            done = step + 1
            last = done == self.total
            if done % REPORT_EVERY and done % save_every and not last:
                continue
            mean = self._mean_loss(done)
            if progress is not None and self.main:
                progress(Progress(done, self.total, mean, self._lr(step)))
            if done % LOG_EVERY == 0 or last:
                lines.write({"step": done, "loss": round(mean, 6), "lr": round(self._lr(step), 9)})
            if done % save_every == 0 and not last:
                self._save(done)
            self.recent = self.recent[-MEAN_OVER:]
        return mean

    def _step(self, step: int) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(step)
        x0, sigma, eps, labels = self._batch(step)
        loss: Tensor = self.loss(x0, sigma, eps, labels)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        decay = min(self.config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(self.averaged, self.module.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        return loss.detach()

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """This process's samples (B, *shape), noise levels (B, 1, ...), noise and labels (B,) of a step.

        The levels of a batch lie evenly over their distribution, from a random start: Kingma et al. 2021 (VDM),
        section I.1.
        """
        batch, processes = self.config.batch_size, self.accelerator.num_processes
        share = torch.arange(batch).chunk(processes)[self.accelerator.process_index]
        start = torch.rand((), generator=torch.Generator().manual_seed(_key(self.config.seed, step)))
        levels = torch.searchsorted(self.up_to, (share + start.double()) / batch).clamp(max=len(self.sigmas) - 1)
        torch.manual_seed(_key(self.config.seed, step, self.accelerator.process_index))
        x0, labels = self.data.batch(self._indices(step * batch + share))
        sigma = self.sigmas[levels].reshape(-1, *[1] * (x0.ndim - 1))
        device = self.accelerator.device
        eps = torch.randn(x0.shape)
        return x0.to(device), sigma.to(device), eps.to(device), None if labels is None else labels.to(device)

    def _indices(self, positions: Tensor) -> Tensor:
        """The samples at ``positions`` of an endless row of shuffled epochs."""
        count = len(self.data.samples)
        epochs = positions // count
        indices = torch.empty_like(positions)
        for epoch in set(epochs.tolist()):
            here = epochs == epoch
            order = np.random.default_rng([self.config.seed, 1, epoch]).permutation(count)
            indices[here] = torch.from_numpy(order)[positions[here] % count]
        return indices

    def _lr(self, step: int) -> float:
        warm = min(1.0, (step + 1) / (self.config.warmup + 1))
        return self.config.lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / self.total))

    def _mean_loss(self, done: int) -> float:
        mean = float(self.accelerator.reduce(torch.stack(self.recent).mean(), reduction="mean"))
        if not math.isfinite(mean):
            raise DiffexportError(
                f"the loss became {mean} before step {done}; train again with a smaller --lr (it was {self.config.lr:g})"
            )
        return mean

    def _save(self, done: int) -> None:
        if not self.main:
            return
        content = {
            "format": STATE_FORMAT,
            "config": self._identity(),
            "step": done,
            "model": self.module.state_dict(),
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
            "recent": torch.stack(self.recent),
        }
        save_whole(content, self.path)

    def resume(self) -> int:
        """Take up what the state file holds; the step to go on from, 0 without a file.

        Raises:
            CheckpointError: it is damaged, or of a run with another configuration.
        """
        if self.total == 0 or not self.path.exists():
            return 0
        again = "give --restart to begin again, or another --out"
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            saved, recent = dict(state["config"]), list(state["recent"])
        except Exception as e:  # PyTorch has a different exception for every kind of damage
            raise CheckpointError(f"{self.path}: not a state of training ({type(e).__name__}); {again}") from e
        now = self._identity()
        differences = [
            f"{name} {saved.get(name)} there, {now.get(name)} now"
            for name in sorted(saved.keys() | now.keys())
            if saved.get(name) != now.get(name)
        ]
        if differences:
            raise CheckpointError(f"{self.path}: of another run ({'; '.join(differences)}); {again}")
        self.module.load_state_dict(state["model"])
        for target, value in zip(self.averaged, state["averaged"], strict=True):
            target.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.recent = [loss.to(self.accelerator.device) for loss in recent[-MEAN_OVER:]]
        return int(state["step"])

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be continued."""
        return {
            **plain_config(self.config),
            "samples": len(self.data.samples),
            "shape": list(self.data.shape),
            "processes": self.accelerator.num_processes,
        }

    def forget(self) -> None:
        """Remove the state file, once every process is here."""
        self.accelerator.wait_for_everyone()
        if self.main:
            self.path.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def averaged_state(self) -> dict[str, Tensor]:
        """The state dict with averaged weights."""
        state = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        for (name, _), value in zip(self.module.named_parameters(), self.averaged, strict=True):
            state[name] = value.clone()
        return {name: value.cpu() for name, value in state.items()}


class _Log:
    """JSON lines; a continued run goes on in the same file, from the step that it is continued from."""

    def __init__(self, path: str | Path | None, head: Mapping[str, Any], first: int) -> None:
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        lines = [json.dumps(head)]
        if first and self.path.exists():
            old = self.path.read_text(encoding="utf-8").splitlines()
            lines = [line for line in old if _step(line) <= first]
            lines.append(json.dumps({"continued_from": first}))
        with writing(self.path), replacing_file(self.path) as work:
            work.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        if self.path is not None:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


def _step(line: str) -> float:
    """The step that a line of a log is of, 0 of its head; beyond all where the line was cut off by a full disk."""
    try:
        return int(json.loads(line).get("step", 0))
    except ValueError:
        return math.inf


def _head(config: TrainConfig, data: LoadedData, network: Network, processes: int, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "seed": config.seed,
        "config": plain_config(config),
        "samples": len(data.samples),
        "parameters": sum(p.numel() for p in network.module.parameters()),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("diffexport", "torch", "numpy", "accelerate")},
    }


def _accelerator(config: TrainConfig) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as e:
        raise DiffexportError("training needs accelerate; run: pip install 'diffexport[train]'") from e
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # said, or processes on CPUs find no group
    if config.batch_size % accelerator.num_processes:
        raise DiffexportError(
            f"batch size {config.batch_size}: not a multiple of {accelerator.num_processes} processes; "
            "it counts the samples of all processes together"
        )
    return accelerator


def _stored(state: Mapping[str, Tensor], half: bool) -> dict[str, Tensor]:
    return {name: value.half() if half and value.is_floating_point() else value for name, value in state.items()}


def _key(*numbers: int) -> int:
    """A well-mixed 63-bit seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
