"""The PyTorch module itself, the reference that every other backend is held to.

The step is written here from the definition in ``diffexport.plan``, apart from the exporter's graphs, so that a
comparison of the two checks both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from diffexport.backends.session import Array
from diffexport.errors import BackendError
from diffexport.plan import COLUMNS, NOISE
from diffexport.spec import DecoderSpec, ModelSpec

if TYPE_CHECKING:
    from diffexport.bundle import Bundle

Module = Callable[..., torch.Tensor]

REMEMBERED = 1 << 28
"""Bytes of results that a session keeps at most, where it remembers them."""


def open_session(
    bundle: Bundle, *, module: torch.nn.Module | None = None, decoder: torch.nn.Module | None = None
) -> TorchSession:
    """A session on the modules that the bundle was exported from; the bundle itself holds graphs only."""
    if module is None:
        raise BackendError(
            "backend 'torch' runs the PyTorch module itself: give --checkpoint FILE (in Python, module=...)"
        )
    facts = bundle.manifest.decoder
    return TorchSession(module, bundle.spec, (decoder, facts) if decoder is not None and facts is not None else None)


class TorchSession:
    """A module stepped by the definition; see ``Session``.

    Args:
        remembers: compute each distinct sample once, however many checks ask for it.
    """

    backend = "torch"
    device = "CPU"
    max_batch: int | None = None

    def __init__(
        self,
        module: torch.nn.Module,
        spec: ModelSpec,
        decoder: tuple[torch.nn.Module, DecoderSpec] | None = None,
        *,
        remembers: bool = False,
    ) -> None:
        self._network: Module = _Remembering(module.eval()) if remembers else module.eval()
        self._spec = spec
        self._decoder: tuple[Module, DecoderSpec] | None = decoder
        if decoder is not None and remembers:
            self._decoder = _Remembering(decoder[0].eval()), decoder[1]
        self._x = self._h = torch.empty(0)
        self._label: torch.Tensor | None = None

    def begin(
        self, x: Array, label: NDArray[np.int64] | None, h: Array | None = None, rows: Array | None = None
    ) -> None:
        self._x = torch.from_numpy(x.astype(np.float32))
        self._h = torch.zeros_like(self._x) if h is None else torch.from_numpy(h.astype(np.float32))
        self._label = None if label is None else torch.from_numpy(label.astype(np.int64))

    @torch.inference_mode()
    def step(self, row: Array, z: Array | None = None) -> None:
        r: dict[str, torch.Tensor] = dict(zip(COLUMNS, torch.from_numpy(np.asarray(row, np.float32)), strict=True))
        x, h = self._x, self._h
        denoised, noise, log_variance = self.denoise(r, x)
        if self._spec.clip_keeps == "eps":
            x = denoised + noise
        self._x = r["x_x"] * x + r["x_d"] * denoised + r["x_h"] * h
        if row[NOISE] != 0:
            assert z is not None, "a row with noise needs z"
            scale = torch.exp(r["v_z"] * log_variance) if log_variance is not None else 1.0
            self._x = self._x + r["x_z"] * scale * torch.from_numpy(z)
        self._h = r["h_x"] * x + r["h_d"] * denoised + r["h_h"] * h

    def denoise(
        self, r: dict[str, torch.Tensor], x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """D, the noise x - D before the clamp, and V of a row, each (B, *shape); V is None without learned variance."""
        channels, clip = self._spec.shape[0], self._spec.clip
        out = self._network_at(r, x)  # (B, C or 2C, ...)
        skipped, predicted = r["c_skip"] * x, r["c_out"] * out[:, :channels]
        denoised = skipped + predicted if clip is None else (skipped + predicted).clamp(-clip, clip)
        noise = (1 - r["c_skip"]) * x - predicted  # without x where the network predicts eps: nothing cancels
        return denoised, noise, out[:, channels:] if self._spec.learned_variance else None

    def _network_at(self, r: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """The network's output with guidance, (B, C or 2C, ...)."""
        x_in = r["c_in"] * x
        c_noise = r["c_noise"].expand(len(x))
        if self._label is None:
            return self._network(x_in, c_noise)
        cond = self._network(x_in, c_noise, self._label)
        if r["w"] == 1:
            return cond
        null = torch.full_like(self._label, self._spec.null_label)
        uncond = self._network(x_in, c_noise, null)
        guided = self._spec.guided_channels or self._spec.shape[0]
        mixed = uncond[:, :guided] + r["w"] * (cond[:, :guided] - uncond[:, :guided])
        return torch.cat([mixed, cond[:, guided:]], dim=1)

    def run(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> Array:
        kept = self._x, self._h, self._label
        self.begin(x, label)
        for index, row in enumerate(rows):
            self.step(row, noise[index % len(noise)])
        result = self.state()[0]
        self._x, self._h, self._label = kept
        return result

    def run_decoded(self, x: Array, label: NDArray[np.int64] | None, rows: Array, noise: Array) -> tuple[Array, Array]:
        latents = self.run(x, label, rows, noise)
        return latents, self.decode(latents)

    @torch.inference_mode()
    def decode(self, x: Array) -> Array:
        if self._decoder is None:
            raise BackendError("backend 'torch' needs the decoder itself: give --vae FOLDER (in Python, decoder=...)")
        module, spec = self._decoder
        image: Array = module(torch.from_numpy(x) / spec.scaling_factor + spec.shift).numpy()
        return image

    def state(self) -> tuple[Array, Array]:
        return self._x.numpy().copy(), self._h.numpy().copy()

    def close(self) -> None:
        self._x = self._h = torch.empty(0)


class _Remembering:
    """A module that computes each distinct sample once; arguments and result are tensors whose first axis is the batch."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.known: dict[bytes, torch.Tensor] = {}
        self.room = REMEMBERED

    def __call__(self, *args: torch.Tensor) -> torch.Tensor:
        keys = [_digest([arg[sample] for arg in args]) for sample in range(len(args[0]))]
        new = [sample for sample, key in enumerate(keys) if key not in self.known]
        made: dict[bytes, torch.Tensor] = {}
        if new:
            out = self.module(*(arg[new] for arg in args))
            made = dict(zip((keys[sample] for sample in new), out, strict=True))
            if out.nbytes <= self.room:
                self.room -= out.nbytes
                self.known |= made
        return torch.stack([made[key] if key in made else self.known[key] for key in keys])


def _digest(parts: Sequence[torch.Tensor]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.contiguous().numpy().tobytes())
    return digest.digest()
