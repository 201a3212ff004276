"""What is trained: a configuration, and the network, arguments and facts that it means for a data set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from torch import nn

from diffexport.errors import DiffexportError
from diffexport.schedules import DEFAULT_SCHEDULES, Array, Schedule
from diffexport.spec import ModelSpec, Prediction
from diffexport_reference.data import Layout, LoadedData

Model = Literal["dit", "unet", "mlp", "ideal"]
Density = Literal["schedule", "cosine"]
DEFAULT_STEPS = 3000
DEFAULT_SIZES: dict[Model, tuple[int, int]] = {"dit": (128, 4), "unet": (64, 2), "mlp": (128, 4), "ideal": (1, 1)}
"""Width and depth of each model."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights. Two runs of one configuration on one machine end with the same ones."""

    data: str
    """A name or path as ``load_data`` takes it."""
    model: Model = "dit"
    width: int | None = None
    """Width of the network (channels of the U-Net's first level); None takes the model's own."""
    depth: int | None = None
    """Blocks of a DiT, residual blocks a level of a U-Net, hidden layers of an MLP; None takes the model's own."""
    heads: int = 4
    patch_size: int = 2
    channel_mult: tuple[int, ...] = (1, 2, 2)
    """Width of each level of a U-Net, in units of ``width``."""
    prediction: Prediction = "v"
    scaled: bool = True
    schedule: Schedule = DEFAULT_SCHEDULES["loglinear"]
    noise_density: Density | None = None
    """How often each level of the schedule is trained on; see ``level_weights``. None takes the model's own."""
    steps: int | None = None
    epochs: int | None = None
    """Either of the two; 3,000 steps without."""
    batch_size: int = 128
    """Samples a step, over all processes."""
    lr: float = 2e-3
    """Largest learning rate, reached after ``warmup`` steps and taken to 0 along a cosine."""
    warmup: int = 100
    weight_decay: float = 0.0
    ema: float = 0.999
    """Decay of the averaged weights that are kept; smaller in the first steps."""
    label_dropout: float = 0.1
    """How often a label is replaced by the null label of guidance."""
    seed: int = 0
    half: bool = False
    """Store the weights as float16."""
    image_size: int | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        require(self.steps is None or self.epochs is None, "steps and epochs: give one of the two")
        for name in ("width", "depth", "steps", "epochs", "heads", "patch_size", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} {value}: expected at least 1")
        require(self.warmup >= 0, f"warmup {self.warmup}: expected 0 or more steps")
        require(math.isfinite(self.lr) and self.lr > 0, f"lr {self.lr}: expected a number above 0")
        require(0 <= self.weight_decay < math.inf, f"weight decay {self.weight_decay}: expected 0 or more")
        require(0 <= self.ema < 1, f"ema {self.ema}: expected a decay in [0, 1)")
        require(0 <= self.label_dropout < 1, f"label dropout {self.label_dropout}: expected 0 or more, below 1")
        require(self.seed >= 0, f"seed {self.seed}: expected 0 or more")
        if self.prediction == "flow":
            require(not self.scaled, "scaled: a flow model's input is never scaled")
            require(self.noise_density != "cosine", "noise density cosine: not for a flow model; leave it out")


@dataclass(frozen=True)
class Network:
    """A fresh module, with what a checkpoint has to say of it."""

    module: nn.Module
    model_class: str
    args: dict[str, Any]
    spec: ModelSpec


def build_network(config: TrainConfig, data: LoadedData) -> tuple[TrainConfig, Network]:
    """The network that a configuration means for a data set, with random weights, and the configuration with every
    default filled in.

    Raises:
        DiffexportError: this model cannot be trained on this data.
    """
    config = _resolve(config, data)
    points = len(data.shape) == 1
    if config.model == "mlp" and not points:
        raise DiffexportError(f"model mlp: is for points (D,), and {data.name} has {data.shape}; use dit or unet")
    if config.model in ("dit", "unet") and points:
        raise DiffexportError(f"model {config.model}: is for images, and {data.name} has points {data.shape}; use mlp")
    return config, _BUILDERS[config.model](config, data)


def _resolve(config: TrainConfig, data: LoadedData) -> TrainConfig:
    """The configuration with every None that has a default replaced by it."""
    width, depth = DEFAULT_SIZES[config.model]
    steps = config.steps or DEFAULT_STEPS
    if config.epochs is not None:
        steps = math.ceil(config.epochs * len(data.samples) / config.batch_size)
    even = config.prediction == "flow" or len(data.shape) == 1
    return dataclasses.replace(
        config,
        width=config.width or width,
        depth=config.depth or depth,
        steps=steps,
        epochs=None,
        noise_density=config.noise_density or ("schedule" if even else "cosine"),
    )


def level_weights(sigmas: Array, density: Density) -> Array:
    """How often each level is drawn in training, (N,), sum 1.

    "schedule" draws all alike, as smalldiffusion. "cosine" draws as a cosine schedule would, with density
    1/(2 cosh(ln sigma)) over ln sigma: Nichol & Dhariwal 2021 in the variable of Kingma & Gao 2023, Table 1.
    """
    weights: Array = np.ones_like(sigmas)
    if density == "cosine" and len(sigmas) > 1:
        log_sigma = np.log(sigmas)
        weights = np.gradient(log_sigma) / np.cosh(log_sigma)
    weights /= weights.sum()
    return weights


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain numbers, strings and lists."""
    plain: dict[str, Any] = msgspec.to_builtins(dataclasses.asdict(config))
    return plain


def require(holds: bool, message: str) -> None:
    """Raise DiffexportError with ``message`` unless it holds."""
    if not holds:
        raise DiffexportError(message)


def _dit(config: TrainConfig, data: LoadedData) -> Network:
    from diffexport_reference.dit import DiT

    width, depth = _sizes(config)
    channels, height, side = data.shape
    if height != side:
        raise DiffexportError(f"model dit: needs square images, and {data.name} has {height}x{side}; give --image-size")
    if side % config.patch_size:
        raise DiffexportError(f"patch size {config.patch_size}: does not divide the side of the images, {side}")
    if width % config.heads or width % 4:
        raise DiffexportError(f"width {width}: not a multiple of {config.heads} heads, or not of 4")
    args = {
        "in_dim": side,
        "channels": channels,
        "patch_size": config.patch_size,
        "depth": depth,
        "head_dim": width // config.heads,
        "num_heads": config.heads,
    }
    embedders = _embedders(config, data, width)
    module = _modified(DiT, config)(**args, **embedders)
    return Network(module, "DiT", args | _named(embedders, data), _spec("DiT", config, data))


def _unet(config: TrainConfig, data: LoadedData) -> Network:
    from diffexport_reference.unet import Unet

    width, depth = _sizes(config)
    channels, height, side = data.shape
    if height != side:
        raise DiffexportError(
            f"model unet: needs square images, and {data.name} has {height}x{side}; give --image-size"
        )
    if width % 32:
        raise DiffexportError(f"width {width}: a U-Net needs a multiple of 32, the groups of its norms")
    args = {
        "in_dim": side,
        "in_ch": channels,
        "out_ch": channels,
        "ch": width,
        "ch_mult": config.channel_mult,
        "num_res_blocks": depth,
    }
    embedders = _embedders(config, data, 4 * width)
    module = _modified(Unet, config)(**args, **embedders)
    return Network(module, "Unet", args | _named(embedders, data), _spec("U-Net", config, data))


def _mlp(config: TrainConfig, data: LoadedData) -> Network:
    from diffexport_reference.model import ConditionalMLP, TimeInputMLP

    width, depth = _sizes(config)
    args: dict[str, Any] = {"dim": data.shape[0], "hidden_dims": (width,) * depth}
    if data.num_classes:
        args["num_classes"] = data.num_classes
        module = _modified(ConditionalMLP, config)(**args, dropout_prob=config.label_dropout)
        return Network(module, "ConditionalMLP", args, _spec("conditional MLP", config, data))
    return Network(_modified(TimeInputMLP, config)(**args), "TimeInputMLP", args, _spec("MLP", config, data))


def _ideal(config: TrainConfig, data: LoadedData) -> Network:
    from diffexport_reference.model import IdealDenoiser

    module = IdealDenoiser([data.samples[i] for i in range(len(data.samples))])
    config = dataclasses.replace(config, prediction="eps", scaled=False)
    unlabelled = dataclasses.replace(data, labels=None, label_names=())
    return Network(module, "IdealDenoiser", {}, _spec("ideal denoiser", config, unlabelled))


_BUILDERS: dict[Model, Callable[[TrainConfig, LoadedData], Network]] = {
    "dit": _dit,
    "unet": _unet,
    "mlp": _mlp,
    "ideal": _ideal,
}


def _sizes(config: TrainConfig) -> tuple[int, int]:
    assert config.width is not None
    assert config.depth is not None
    return config.width, config.depth


def _modified(base: type, config: TrainConfig) -> Callable[..., nn.Module]:
    """The class with the modifiers of its prediction and scaling, which say what its loss is."""
    from diffexport_reference.model import PredFlow, PredV, PredX0, Scaled

    modifiers = {"x0": PredX0, "v": PredV, "flow": PredFlow}
    made: Any = modifiers[config.prediction](base) if config.prediction in modifiers else base
    return Scaled(made) if config.scaled else made


def _embedders(config: TrainConfig, data: LoadedData, width: int) -> dict[str, nn.Module]:
    from diffexport_reference.model import CondEmbedderLabel, SigmaEmbedderSinCos, TimestepEmbedder

    flow = config.prediction == "flow"
    embedders: dict[str, nn.Module] = {"sig_embed": TimestepEmbedder(width) if flow else SigmaEmbedderSinCos(width)}
    if data.num_classes:
        embedders["cond_embed"] = CondEmbedderLabel(width, data.num_classes, config.label_dropout)
    return embedders


def _named(embedders: dict[str, nn.Module], data: LoadedData) -> dict[str, Any]:
    """The embedders as plain data, the way checkpoints say them."""
    return {"sig_embed": type(embedders["sig_embed"]).__name__, "num_classes": data.num_classes}


def _spec(family: str, config: TrainConfig, data: LoadedData) -> ModelSpec:
    return ModelSpec(
        family=family,
        shape=data.shape,
        prediction=config.prediction,
        schedule=config.schedule,
        num_classes=data.num_classes,
        scaled=config.scaled,
        label_names=data.label_names,
    )
