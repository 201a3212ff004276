"""PyTorch as its users run it: eager or compiled, in fp32 or under autocast to bf16, guidance in one doubled batch."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch

from diffexport.backends.session import Session
from diffexport.backends.torch import TorchSession
from diffexport.bench import Contender
from diffexport.bundle import Precision
from diffexport.machine import usable_cores
from diffexport.spec import ModelSpec


class PeerSession(TorchSession):
    """A PyTorch module that sees a guided batch once, doubled."""

    def __init__(self, module: torch.nn.Module, spec: ModelSpec, *, compiled: bool, bf16: bool) -> None:
        super().__init__(module, spec)
        torch.set_num_threads(usable_cores())
        self._forward: Any = torch.compile(module) if compiled else module
        self._bf16 = bf16

    def _network_at(self, r: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if self._label is None or r["w"] == 1:
            return super()._network_at(r, x)
        label = torch.cat([self._label, torch.full_like(self._label, self._spec.null_label)])
        x_in = torch.cat([r["c_in"] * x] * 2)  # (2B, *shape)
        cond, uncond = self._call(x_in, r["c_noise"].expand(len(x_in)), label).chunk(2)
        guided = self._spec.guided_channels or self._spec.shape[0]
        mixed = uncond[:, :guided] + r["w"] * (cond[:, :guided] - uncond[:, :guided])
        return torch.cat([mixed, cond[:, guided:]], dim=1)

    def _call(self, *args: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self._bf16 else contextlib.nullcontext():
            out: torch.Tensor = self._forward(*args)
        return out.float()


def peers(module: torch.nn.Module, spec: ModelSpec) -> list[Contender]:
    """The four ways."""
    found = []
    for compiled in (False, True):
        for bf16 in (False, True):
            precision: Precision = "bf16" if bf16 else "fp32"
            name = f"PyTorch {'compiled' if compiled else 'eager'}{' bf16' if bf16 else ''}"
            found.append(Contender(name, precision, _opener(module, spec, compiled, bf16), ours=False))
    return found


def _opener(module: torch.nn.Module, spec: ModelSpec, compiled: bool, bf16: bool) -> Any:
    return lambda: cast(Session, PeerSession(module, spec, compiled=compiled, bf16=bf16))


def gflop_of(module: torch.nn.Module, spec: ModelSpec) -> float:
    """GFLOP of a guided step of one image, counted by PyTorch over products, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    halves = 2 if spec.guidable else 1
    args = [torch.zeros(halves, *spec.shape), torch.ones(halves)]
    args += [torch.zeros(halves, dtype=torch.int64)] if spec.conditional else []
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(*args)
    return float(counter.get_total_flops()) / 1e9
