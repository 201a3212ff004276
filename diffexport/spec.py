"""What a model is: the facts that a plan, a graph and a runtime need, and that a state dict does not tell.

Shapes used everywhere: B user batch, C channels, H and W sides; a sample is (C, H, W), or (D,) for points.
"""

from __future__ import annotations

import difflib
import math
from typing import Any, Literal

import msgspec

from diffexport.errors import ShapeError, SpecError
from diffexport.schedules import Schedule

Prediction = Literal["eps", "x0", "v", "flow"]
Variance = Literal["small", "large", "learned"]
Spacing = Literal["trailing", "respaced", "leading", "linspace", "trailing-to-0"]
"""Which steps of N a run of S visits. smalldiffusion's: ``trailing``, every N/S-th from the last, then down to the smallest
level. improved-diffusion's and the official DiT's: ``respaced``. Those of diffusers' schedulers, which end at clean data:
``leading``, every floor(N/S)-th from the first; ``linspace``, evenly from first to last, rounded; ``trailing-to-0``, every
N/S-th from the last."""


MAX_NUMBERS = 1 << 26
"""Of a sample: 3 x 4096 x 4096 and some more."""
MAX_CLASSES = 1_000_000


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The facts of one trained network ``F(x, c_noise, label)``.

    The denoiser is ``D = c_skip*x + c_out*F(c_in*x, c_noise, label)`` (Karras et al. 2022, Eq. 7); the fields
    below decide those coefficients, the range of labels and how guidance is applied.
    """

    family: str
    """What the model is called in messages: "DiT", "official DiT", "U-Net"."""
    shape: tuple[int, ...]
    """Shape of one sample, (C, H, W) or (D,)."""
    prediction: Prediction
    """What the network was trained to predict."""
    schedule: Schedule
    """The noise levels it was trained on."""
    num_classes: int = 0
    """Number of labels; 0 for a model without labels. The null label of guidance is ``num_classes``."""
    has_null: bool = True
    """The network knows a null label beside those; without one there is no guidance. Of no meaning without labels."""
    scaled: bool = False
    """The input is multiplied by 1/sqrt(1 + sigma^2) before the network sees it."""
    noise_input: Literal["sigma", "timestep"] = "sigma"
    """What the network is told about the noise: sigma itself, or the index of the schedule's step."""
    unit_start: bool = False
    """Sampling starts at sqrt(1 + sigma_max^2)*z, as processes that start from unit noise do, not at sigma_max*z."""
    spacing: Spacing = "trailing"
    """Which steps of the schedule a run of fewer steps visits."""
    guided_channels: int | None = None
    """Guidance acts on the first so many channels of the output; None means on all predicted channels."""
    variance: Variance = "small"
    """Noise of DDPM: of the posterior's variance, of beta, or learned; where learned, the output has 2C channels, the
    second half interpolating the log variance between those two (Nichol & Dhariwal 2021, Eq. 15)."""
    clip: float | None = None
    """The denoised estimate is clamped to [-clip, clip]."""
    clip_keeps: Literal["x", "eps"] = "x"
    """What an estimate that is clamped leaves as it was: the state, as in DDPM, or the predicted noise, as in DDIM of
    diffusers, whose state then moves with the estimate: it becomes D + (x - D before the clamp)."""
    label_names: tuple[str, ...] = ()
    """Names of the labels in order, or empty; those of one label may be several, with commas between them."""
    architecture: dict[str, Any] = {}
    """The constructor's arguments, as the checkpoint reader found them; for people, no runtime reads it."""

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 3) or any(side < 1 for side in self.shape):
            raise SpecError(f"shape {self.shape}: expected (C, H, W) or (D,) with every side at least 1")
        if math.prod(self.shape) > MAX_NUMBERS:
            raise SpecError(f"shape {self.shape}: expected at most {MAX_NUMBERS} numbers in a sample")
        if not 0 <= self.num_classes <= MAX_CLASSES:
            raise SpecError(f"num_classes {self.num_classes}: expected 0..{MAX_CLASSES}")
        if not all(text.isprintable() for text in (self.family, *self.label_names)):
            raise SpecError("family, label_names: expected text that can be printed")
        if self.label_names and len(self.label_names) != self.num_classes:
            raise SpecError(f"label_names: got {len(self.label_names)} names for {self.num_classes} classes")
        if self.guided_channels is not None and not 1 <= self.guided_channels <= self.shape[0]:
            raise SpecError(f"guided_channels {self.guided_channels}: expected 1..{self.shape[0]}")
        if (self.prediction == "flow") != (self.schedule.kind == "flow"):
            raise SpecError(
                f"prediction {self.prediction!r} with schedule {self.schedule.kind!r}: "
                "a flow model needs the flow schedule, and only a flow model can use it"
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise SpecError(f"clip {self.clip}: expected a number above 0")

    @property
    def conditional(self) -> bool:
        return self.num_classes > 0

    @property
    def guidable(self) -> bool:
        """Whether guidance is possible."""
        return self.conditional and self.has_null

    @property
    def learned_variance(self) -> bool:
        return self.variance == "learned"

    @property
    def null_label(self) -> int:
        """The label that stands for "no label" in guidance (Ho & Salimans 2022)."""
        return self.num_classes

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the network's output for one sample."""
        return (self.shape[0] * (2 if self.learned_variance else 1), *self.shape[1:])

    def label_index(self, label: int | str) -> int:
        """The index of a label given by index or by name; a name may be one of several with commas between them.

        Raises:
            ShapeError: no label, or more than one, has this index or name.
        """
        if not self.conditional:
            raise ShapeError(f"label {label!r}: this model has no labels; ask for a number of samples instead")
        if isinstance(label, str):
            named = [k for k, names in enumerate(self.label_names) if label == names or label in synonyms(names)]
            if len(named) > 1:
                raise ShapeError(f"label {label!r}: is a name of labels {', '.join(map(str, named))}; give the number")
            if named:
                return named[0]
        try:
            index = int(label)
        except ValueError:
            raise ShapeError(f"label {label!r}: no label has this name; {self._label_hint(str(label))}") from None
        if not 0 <= index < self.num_classes:
            raise ShapeError(f"label {index}: this model has labels 0..{self.num_classes - 1}")
        return index

    def label_name(self, index: int) -> str:
        """The first name of a label, or its number."""
        return synonyms(self.label_names[index])[0] if self.label_names else str(index)

    def _label_hint(self, name: str) -> str:
        if not self.label_names:
            return f"this model's labels have none; use 0..{self.num_classes - 1}"
        known = [part for names in self.label_names for part in synonyms(names)]
        close = difflib.get_close_matches(name, known, n=3)
        if close:
            return f"near it: {', '.join(close)}"
        return f"known: {', '.join(known[:8])}" + (", ..." if len(known) > 8 else "")


class DecoderSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The facts of a decoder of latents: ``image = decoder(x / scaling_factor + shift)``, about -1 .. 1."""

    upscale: int
    """Pixels on a side for each latent."""
    channels: int = 3
    """Of the images."""
    scaling_factor: float = 1.0
    """What latents were multiplied by before the network was trained on them."""
    shift: float = 0.0
    """What was taken from them before that."""
    tile: int | None = None
    """Pixels on a side of the tiles in which larger images are decoded; None where images are decoded whole."""

    def __post_init__(self) -> None:
        if self.upscale < 1 or self.channels < 1 or (self.tile is not None and self.tile < 1):
            raise SpecError(
                f"decoder of upscale {self.upscale}, channels {self.channels}, tile {self.tile}: expected at least 1"
            )
        if self.channels * self.upscale**2 > MAX_NUMBERS:
            raise SpecError(f"decoder of upscale {self.upscale}, channels {self.channels}: expected a smaller image")
        if not (math.isfinite(self.scaling_factor) and self.scaling_factor > 0 and math.isfinite(self.shift)):
            raise SpecError(
                f"decoder of scaling_factor {self.scaling_factor}, shift {self.shift}: expected finite numbers, "
                "the first above 0"
            )


def synonyms(names: str) -> list[str]:
    """The names of one label: "tench, Tinca tinca" has two."""
    return [name.strip() for name in names.split(",")]
