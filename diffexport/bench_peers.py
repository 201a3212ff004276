"""PyTorch as its users run it: eager or compiled, in fp32 or under autocast to bf16, guidance in one doubled batch; and
what a step computes, as PyTorch counts it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from diffexport.backends.torch import TorchSession
from diffexport.bench import Work
from diffexport.machine import usable_cores
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


class PeerSession(TorchSession):
    """A PyTorch module that sees a guided batch once, doubled."""

    def __init__(self, module: torch.nn.Module, spec: ModelSpec, *, compiled: bool, bf16: bool) -> None:
        super().__init__(module, spec)
        torch.set_num_threads(usable_cores())
        self._forward: Any = torch.compile(module) if compiled else module
        self._bf16 = bf16
        self._network = self._call

    def _network_at(self, r: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if self._label is None or r["w"] == 1:
            return super()._network_at(r, x)
        label = torch.cat([self._label, torch.full_like(self._label, self._spec.null_label)])
        x_in = torch.cat([r["c_in"] * x] * 2)  # (2B, *shape)
        cond, uncond = self._network(x_in, r["c_noise"].expand(len(x_in)), label).chunk(2)
        guided = self._spec.guided_channels or self._spec.shape[0]
        mixed = uncond[:, :guided] + r["w"] * (cond[:, :guided] - uncond[:, :guided])
        return torch.cat([mixed, cond[:, guided:]], dim=1)

    def _call(self, *args: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self._bf16 else contextlib.nullcontext():
            out: torch.Tensor = self._forward(*args)
        return out.float()


def work_of(module: torch.nn.Module, spec: ModelSpec) -> Work:
    """The products, convolutions and attention of a guided step of one image, counted by PyTorch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    halves = 2 if spec.guidable else 1
    args = [torch.zeros(halves, *spec.shape), torch.ones(halves)]
    args += [torch.zeros(halves, dtype=torch.int64)] if spec.conditional else []
    counter = FlopCounterMode(display=False)
    attention = _AttentionCounter(counter)
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        counter,
        attention,
    ):  # no other kernel of a CPU is counted
        module(*args)
    return Work(counter.get_total_flops() / 1e9, attention.flops / 1e9)


class _AttentionCounter(TorchFunctionMode):
    """What a counter counts inside of PyTorch's attention."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter, self.flops = counter, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.flops += self.counter.get_total_flops() - before
        return result
