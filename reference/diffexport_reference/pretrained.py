"""Folders of diffusers: a network with its configuration, or a whole pipeline with its scheduler and label names.

The modules are diffusers' own classes, built from ``config.json`` alone: no code of the folder runs and nothing is fetched.
The weights are read and checked here, as those of every other checkpoint are; diffusers itself would fill what is missing
with random numbers. Needs the extra ``[diffusers]``.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from diffexport.bundle import MAX_JSON
from diffexport.errors import BackendError, CheckpointError, SpecError
from diffexport.files import read_regular
from diffexport.schedules import DEFAULT_SCHEDULES, schedule_sigmas
from diffexport.spec import ModelSpec
from diffexport_reference.facts import SPEC_FLAGS, Facts, check_flags, facts_beside, guided
from diffexport_reference.scheduler import PROCESS, scheduler_facts
from diffexport_reference.weights import DEPRECATED, check_names, read_content, sound_state

Json = dict[str, Any]

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
STEM = "diffusion_pytorch_model"
"""What diffusers calls a file of weights, before its variant and suffix."""


class Network(nn.Module):
    """A network of diffusers, called as module(x, c_noise, label), or module(x, c_noise) without labels.

    Args:
        network: called as network(x, timestep, class_labels=label).
        channels: of its output, those that count.
    """

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        self.channels = channels

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        out: Tensor = self.network(x, c_noise, class_labels=label, return_dict=False)[0]
        return out if out.shape[1] == self.channels else out[:, : self.channels]  # (B, C or 2C, H, W)


@dataclass(frozen=True)
class Pretrained:
    """A kind of network that diffusers saves."""

    name: str
    """What it is called in messages."""
    class_name: str
    """Its class in diffusers."""
    read: Callable[[Json, Facts], Facts]
    """Fields of the spec from the configuration and the given facts: ``shape``, ``num_classes``, ``has_null``."""
    drops_variance: bool
    """Whether its pipeline cuts a learned variance off for a scheduler that has no use for one."""
    process: Facts
    """Fields of the spec where no scheduler is saved with it."""


@dataclass(frozen=True)
class Layout:
    """Where the parts of a model lie.

    Attributes:
        network: the folder with the network's ``config.json`` and weights.
        scheduler: the scheduler's configuration, or None.
        vae: the folder of an image decoder, or None.
        label_names: ``id2label`` of the pipeline, in order, or empty.
    """

    network: Path
    scheduler: Path | None = None
    vae: Path | None = None
    label_names: tuple[str, ...] = ()


def read_folder(path: Path, flags: Facts) -> tuple[nn.Module, ModelSpec, list[str], Path | None]:
    """The module of a folder, its spec, notes about what was taken, and the folder of its image decoder or None.

    Raises:
        BackendError: diffusers is not installed.
        CheckpointError: parts that are missing, damaged, or of no network that is known here.
        SpecError: facts that are missing or cannot be.
    """
    path = path.resolve()
    layout = find_parts(path)
    config = _json(layout.network / CONFIG)
    kind = _kind(config)
    if importlib.util.find_spec("diffusers") is None:
        raise BackendError(f"reading a {kind.class_name} needs diffusers; pip install 'diffexport[export,diffusers]'")
    beside = facts_beside(path)
    facts = {**beside, **flags}
    notes = [f"took {', '.join(beside)} from {path.with_suffix('.json').name}"] if beside else []
    if layout.scheduler is not None:
        known = scheduler_facts(_json(layout.scheduler))
        notes.append(f"took the process from {layout.scheduler.parent.name}/{SCHEDULER}: {_described(known)}")
    else:
        known = {**facts, **kind.process}
    if known.get("prediction") == "flow":
        raise SpecError("--prediction flow: a flow model of diffusers is not supported; supported: eps, x0, v")
    missing = [flag for name, flag in SPEC_FLAGS.items() if name not in known]
    if missing:
        raise SpecError(f"no {SCHEDULER} beside its {CONFIG}: give {', '.join(missing)}, or the folder of the pipeline")
    if layout.scheduler is None:
        source = "of the published DiT" if "schedule" in kind.process else "that the flags give"
        notes.append(f"found no {SCHEDULER}: took the process {source}: {_described(known)}")
    network = _build(kind, config)
    config = dict(network.config)  # the same with defaults filled in
    known |= kind.read(config, facts)
    channels = int(config["out_channels"] or config["in_channels"])
    known["variance"] = _variance(kind, known, int(known["shape"][0]), channels)
    told = {"heads": None, "image_size": known["shape"][-1]}
    check_flags(flags, {**known, **told} | ({} if "has_null" in known else {"null_label": None}))
    _load(kind, network, layout.network, notes)
    if layout.label_names:
        known["label_names"] = layout.label_names
    elif "label_names" in facts:
        known["label_names"] = facts["label_names"]
    spec = ModelSpec(
        family=kind.name,
        architecture={"class": kind.class_name, **_plain(config)},
        **{name: value for name, value in known.items() if name in ModelSpec.__struct_fields__},
    )
    module = Network(network, spec.output_shape[0]).eval().requires_grad_(False)
    return module, guided(spec, facts), notes, layout.vae


def _described(known: Facts) -> str:
    schedule, clip = known["schedule"], known.get("clip")
    return (
        f"{known['prediction']} on {len(schedule_sigmas(schedule))} {schedule.kind} levels, {known['spacing']} steps, "
        + (f"estimates clamped to +-{clip:g}" if clip else "nothing clamped")
    )


def find_parts(path: Path) -> Layout:
    """The parts of a pipeline's folder, or of a network's folder inside or outside of one.

    Raises:
        CheckpointError: the folder is neither.
    """
    if not (path / INDEX).is_file():
        if not (path / CONFIG).is_file():
            raise CheckpointError(
                f"is a folder without {INDEX} or {CONFIG}; give a folder of diffusers, or the file of weights inside it"
            )
        around = path.parent / INDEX
        beside = path / SCHEDULER
        if not beside.is_file() and around.is_file():
            whole = find_parts(path.parent)
            if whole.network == path:
                return whole
        return Layout(path, scheduler=beside if beside.is_file() else None)
    index = _json(path / INDEX)
    part = next((name for name in ("transformer", "unet") if name in index), None)
    if part is None:
        parts = ", ".join(name for name in index if not name.startswith("_")) or "none"
        raise CheckpointError(f"is a pipeline of {parts}; expected a transformer or a unet in its {INDEX}")
    # the first releases kept all parts in the pipeline's own folder
    network, scheduler = (path / name if (path / name).is_dir() else path for name in (part, "scheduler"))
    return Layout(
        network,
        scheduler=scheduler / SCHEDULER if (scheduler / SCHEDULER).is_file() else None,
        vae=path / "vae" if "vae" in index and (path / "vae" / CONFIG).is_file() else None,
        label_names=_label_names(index.get("id2label")),
    )


def _label_names(id2label: object) -> tuple[str, ...]:
    """Names in the order of their labels; empty for a pipeline without them."""
    if not id2label:
        return ()
    try:
        names = {int(k): name for k, name in msgspec.convert(id2label, dict[str, str]).items()}
    except ValueError as error:
        raise CheckpointError(f"{INDEX}: id2label: {error}") from error
    if sorted(names) != list(range(len(names))):
        raise CheckpointError(
            f"{INDEX}: id2label names {len(names)} labels, expected 0..{len(names) - 1} without a gap"
        )
    return tuple(names[k] for k in range(len(names)))


def _json(path: Path) -> Json:
    try:
        return msgspec.json.decode(read_regular(path, MAX_JSON), type=Json)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is no JSON object ({error})") from error


def _kind(config: Json) -> Pretrained:
    name = config.get("_class_name")
    legacy = (
        name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    )  # as the published DiT is saved
    for kind in KINDS:
        if name == kind.class_name or (legacy and kind is DIT):
            return kind
    known = ", ".join(kind.class_name for kind in KINDS)
    raise CheckpointError(f"{CONFIG} is of class {name!r}, which is not supported; supported: {known}")


def _build(kind: Pretrained, config: Json) -> Any:
    """The network without values, on the meta device, but for what it computes itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that diffusers looks for and does not find
        import diffusers
        from accelerate import init_empty_weights

        cls = getattr(diffusers, kind.class_name)
        takes = set(inspect.signature(cls.__init__).parameters) - {"self"}
        try:
            with init_empty_weights():
                network = cls(**{name: value for name, value in config.items() if name in takes})
        except Exception as error:  # what a constructor makes of numbers that do not fit
            reason = (str(error).strip().splitlines() or [""])[0][:160]
            raise CheckpointError(
                f"{CONFIG} describes no {kind.class_name} ({type(error).__name__}: {reason})"
            ) from error
    return network


def _load(kind: Pretrained, network: nn.Module, folder: Path, notes: list[str]) -> None:
    """Put the folder's weights into a network, without copying what is float32."""
    computed = {name for name, _ in network.named_buffers()} - set(network.state_dict())
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    stored = {name: value for name, value in _weights(folder, notes).items() if name not in computed}
    state = sound_state(_renamed(stored, expected))
    check_names(kind.name, expected, {name: tuple(value.shape) for name, value in state.items()})
    network.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in (*network.parameters(), *network.buffers())), "a tensor without a value"


def _weights(folder: Path, notes: list[str]) -> Json:
    """What the folder's files of weights hold: safetensors before pickles, whole before variants, one file or shards."""
    for suffix in ("safetensors", "bin"):
        names = sorted(p.name for p in folder.glob(f"{STEM}*.{suffix}*") if "-of-" not in p.name)
        plain = [name for name in (f"{STEM}.{suffix}", f"{STEM}.{suffix}.index.json") if name in names]
        for name in (*plain, *names):
            if not plain:
                notes.append(f"took the variant {name}")
            return _shards(folder, name) if name.endswith(".index.json") else read_content(folder / name)
    raise CheckpointError(f"{folder.name} holds no weights: expected {STEM}.safetensors or .bin, whole or in shards")


def _shards(folder: Path, index: str) -> Json:
    try:
        where = msgspec.convert(_json(folder / index).get("weight_map"), dict[str, str])
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{index}: weight_map: {error}") from error
    content: Json = {}
    for name in sorted(set(where.values())):
        if name != Path(name).name:
            raise CheckpointError(f"{index}: names {name!r}, expected a file beside it")
        try:
            content |= read_content(folder / name)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
    return content


def _renamed(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> Json:
    """Names of the first releases as diffusers calls them now, where that is a name it expects."""

    def now(name: str) -> str:
        block, _, tail = name.rpartition(".")
        block, _, layer = block.rpartition(".")
        renamed = f"{block}.{DEPRECATED.get(layer, layer)}.{tail}"
        return renamed if name not in expected and renamed in expected else name

    return {now(name): value for name, value in stored.items()}


def _variance(kind: Pretrained, known: Facts, channels: int, out_channels: int) -> str:
    """The spec's variance: the scheduler's, or what the number of channels that come out says."""
    said = known.get("variance")
    if out_channels == channels and said != "learned":
        return str(said or "small")
    if out_channels == 2 * channels and (said == "learned" or kind.drops_variance):
        return str(said or "learned")
    told = f"a scheduler of variance {said!r}" if said else "its scheduler"
    fits = 2 * channels if said == "learned" else channels
    raise SpecError(f"{CONFIG}: in_channels {channels} and out_channels {out_channels} with {told}; expected {fits}")


def _shape(config: Json, facts: Facts) -> tuple[int, int, int]:
    side = config["sample_size"] if config["sample_size"] is not None else facts.get("image_size")
    if side is None:
        raise SpecError(f"{CONFIG} says no sample_size: give --image-size N")
    height, width = (side, side) if isinstance(side, int) else side
    return int(config["in_channels"]), int(height), int(width)


def _read_dit(config: Json, facts: Facts) -> Facts:
    return {"shape": _shape(config, facts), "num_classes": config["num_embeds_ada_norm"]}


def _read_unet(config: Json, facts: Facts) -> Facts:
    for name, supported in (("time_embedding_type", "positional"), ("class_embed_type", None)):
        if config[name] != supported:
            raise SpecError(f"{CONFIG}: {name} {config[name]!r} is not supported; supported: {supported!r}")
    rows = config["num_class_embeds"]
    if rows is None:
        return {"shape": _shape(config, facts), "num_classes": 0}
    if "null_label" not in facts:
        raise SpecError(
            f"{CONFIG} says num_class_embeds {rows}: give --null-label last where the last one stands for no label, "
            "as guidance needs, or --null-label none"
        )
    null = facts["null_label"] == "last"
    return {"shape": _shape(config, facts), "num_classes": rows - null, "has_null": null}


def _plain(config: Json) -> Json:
    return {name: value for name, value in config.items() if isinstance(value, int | float | str | list | tuple)}


DIT = Pretrained(
    name="diffusers DiT",
    class_name="DiTTransformer2DModel",
    read=_read_dit,
    drops_variance=True,
    process={**PROCESS, "prediction": "eps", "schedule": DEFAULT_SCHEDULES["ddpm"], "spacing": "leading"},
)
UNET = Pretrained(
    name="diffusers U-Net",
    class_name="UNet2DModel",
    read=_read_unet,
    drops_variance=False,
    process={**PROCESS, "spacing": "leading"},
)
KINDS = (DIT, UNET)
