"""Checkpoints: a file becomes the bare network, ready to be traced, with everything that is known of it.

Read are diffexport's own checkpoints, bare state dicts of the models in ``families`` (.pt, .pth, .bin, .safetensors),
and snapshots of training of the official DiT. What a state dict does not tell comes from flags or from a JSON file
beside it (dit.pt, dit.json) with the keys of ``Given``; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from diffexport.errors import CheckpointError, SpecError
from diffexport.files import replacing_file
from diffexport.schedules import DEFAULT_SCHEDULES, Schedule
from diffexport.spec import ModelSpec, Prediction
from diffexport_reference.families import Args, Family, Shapes, by_class, recognise
from diffexport_reference.weights import State, read_content, select_state, sound_state

FORMAT = "diffexport.checkpoint"
VERSION = 1


class Given(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a state dict does not tell. Flags win over the file beside it."""

    heads: int | None = None
    image_size: int | None = None
    prediction: Prediction | None = None
    scaled: bool | None = None
    schedule: Schedule | str | None = None
    """A schedule, or the name of one of DEFAULT_SCHEDULES."""
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for flag in ("heads", "image_size"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise SpecError(f"{FLAGS[flag]} {value}: expected at least 1")
        if isinstance(self.schedule, str) and self.schedule not in DEFAULT_SCHEDULES:
            raise SpecError(f"--schedule {self.schedule}: expected one of {', '.join(DEFAULT_SCHEDULES)}")

    def facts(self) -> dict[str, Any]:
        """The facts that are given, the schedule as numbers."""
        facts = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        if isinstance(self.schedule, str):
            facts["schedule"] = DEFAULT_SCHEDULES[self.schedule]
        return facts


FLAGS = {
    "heads": "--heads",
    "image_size": "--image-size",
    "prediction": "--prediction",
    "scaled": "--scaled/--no-scaled",
    "schedule": "--schedule",
}
SPEC_VALUES = {
    "prediction": "--prediction eps|x0|v|flow",
    "scaled": "--scaled or --no-scaled",
    "schedule": f"--schedule {'|'.join(DEFAULT_SCHEDULES)}",
}
FLOW_FACTS = {"scaled": False, "schedule": DEFAULT_SCHEDULES["flow"]}
"""What a flow model leaves no choice about."""


@dataclass(frozen=True)
class Checkpoint:
    """A network F with its facts, and what a person should know of how it was read."""

    module: nn.Module
    """Called as module(x, c_noise, label), or module(x, c_noise) without labels; float32, in eval mode, without gradients."""
    spec: ModelSpec
    notes: tuple[str, ...] = ()


def load_checkpoint(
    path: str | Path,
    *,
    heads: int | None = None,
    image_size: int | None = None,
    prediction: str | None = None,
    scaled: bool | None = None,
    schedule: str | Schedule | None = None,
    weights: str | None = None,
) -> tuple[nn.Module, ModelSpec]:
    """The module and spec of a checkpoint; see ``read_checkpoint``."""
    found = read_checkpoint(
        path,
        heads=heads,
        image_size=image_size,
        prediction=prediction,
        scaled=scaled,
        schedule=schedule,
        weights=weights,
    )
    return found.module, found.spec


def read_checkpoint(
    path: str | Path,
    *,
    heads: int | None = None,
    image_size: int | None = None,
    prediction: str | None = None,
    scaled: bool | None = None,
    schedule: str | Schedule | None = None,
    weights: str | None = None,
) -> Checkpoint:
    """Read a checkpoint. Weights that are float32 stay mapped from the file, so do not overwrite it in place.

    Args:
        heads, image_size, prediction, scaled, schedule: facts that a bare state dict does not tell.
        weights: "ema" or "model", of a snapshot that holds both; "ema" without.

    Raises:
        CheckpointError: a file that is missing, damaged, unsafe, or of no model that is known here.
        SpecError: facts that are missing (all of them are named), or that contradict the file.
    """
    path = Path(path)
    flags = {"heads": heads, "image_size": image_size, "prediction": prediction, "scaled": scaled, "schedule": schedule}
    try:
        given = _given({name: value for name, value in flags.items() if value is not None})
        content = read_content(path)
        if content.get("format") == FORMAT:
            return _read_own(content, given.facts(), weights)
        state, notes = select_state(content, weights)
        return _read_bare(path, state, given.facts(), notes)
    except (CheckpointError, SpecError) as error:
        raise type(error)(f"{path}: {error}") from error


def save_checkpoint(
    path: str | Path,
    *,
    model_class: str,
    args: Mapping[str, Any],
    spec: ModelSpec,
    state_dict: Mapping[str, Tensor],
    training: Mapping[str, Any],
) -> None:
    """Write diffexport's own checkpoint, whole or not at all.

    Args:
        model_class: a class of ``families``: DiT, Unet, TimeInputMLP, ConditionalMLP, IdealDenoiser, OfficialDiT.
        args: its constructor's arguments, plain data, with ``num_classes`` and ``sig_embed`` for the embedders.
        state_dict: weights, float32 or float16.
        training: how it was trained, plain data.

    Raises:
        CheckpointError: the file cannot be written.
    """
    by_class(model_class)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": {"class": model_class, "args": _plain(args)},
        "spec": _plain(msgspec.to_builtins(spec)),
        "state_dict": {name: value.detach().cpu().clone() for name, value in state_dict.items()},
        "training": _plain(training),
    }
    try:
        with replacing_file(Path(path)) as work:
            torch.save(content, work)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error


def _plain(value: Any) -> Any:
    """As JSON would give it back: what a reader that runs no code can read."""
    return json.loads(json.dumps(value))


def _given(facts: Mapping[str, Any]) -> Given:
    try:
        return msgspec.convert({**facts}, Given)
    except msgspec.ValidationError as error:
        raise SpecError(f"facts {', '.join(facts)}: {error}") from error


def _read_own(content: Mapping[str, Any], flags: Mapping[str, Any], weights: str | None) -> Checkpoint:
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"is of version {content.get('version')} of the format, this diffexport reads {VERSION}; update diffexport"
        )
    if weights is not None:
        raise SpecError(f"--weights {weights}: this file holds one set of weights; leave it out")
    try:
        model_class, stored_args = content["model"]["class"], dict(content["model"]["args"])
        spec = msgspec.convert(content["spec"], ModelSpec)
        stored = dict(content["state_dict"])
    except (KeyError, TypeError, ValueError, msgspec.ValidationError, SpecError) as error:
        raise CheckpointError(f"is damaged: {type(error).__name__}: {error}") from error
    family = by_class(model_class)
    told: dict[str, Any] = {name: getattr(spec, name) for name in SPEC_VALUES}
    told |= {ask.flag: stored_args.get(ask.arg) for ask in family.asks}
    told.setdefault("image_size", spec.shape[-1] if len(spec.shape) == 3 else None)
    _check_flags(flags, told)
    state = sound_state(stored)
    shapes = Shapes({name: tuple(value.shape) for name, value in state.items()})
    args = family.read(shapes, _given({k: v for k, v in told.items() if k in ("heads", "image_size")}).facts())
    for name, value in args.items():
        if name in stored_args and isinstance(value, int | str) and value != stored_args[name]:
            raise CheckpointError(f"{name} is {stored_args[name]} in its arguments and {value} in its weights")
    module = _module(family, args, shapes, state)
    if (module.input_dims, args.get("num_classes", 0)) != (spec.shape, spec.num_classes):
        raise CheckpointError(
            f"its spec says shape {spec.shape} and {spec.num_classes} labels, "
            f"its weights {module.input_dims} and {args.get('num_classes', 0)}"
        )
    return Checkpoint(module, msgspec.structs.replace(spec, architecture=_architecture(family, args)))


def _read_bare(path: Path, stored: Mapping[str, Any], flags: Mapping[str, Any], notes: list[str]) -> Checkpoint:
    family = recognise(stored)
    state = sound_state(stored)
    shapes = Shapes({name: tuple(value.shape) for name, value in state.items()})
    facts = {**_facts_beside(path, flags, notes), **flags}
    args = family.read(shapes, facts)
    _check_flags(flags, {**facts, **_told(family, args)})
    known = {**facts, **family.facts}
    if known.get("prediction") == "flow":
        known = {**FLOW_FACTS, **known}
    missing = [f"{FLAGS[ask.flag]} {ask.values(shapes)}" for ask in family.asks if args[ask.arg] is None]
    missing += [values for name, values in SPEC_VALUES.items() if name not in known]
    if missing:
        raise SpecError(
            f"the weights of {_a(family.name)} do not tell everything; give {', '.join(missing)} "
            f"(or the same keys in {path.with_suffix('.json').name})"
        )
    module = _module(family, args, shapes, state)
    shape: tuple[int, ...] = module.input_dims
    guided = family.facts.get("guided_channels")
    fields = {name: value for name, value in known.items() if name in ModelSpec.__struct_fields__}
    fields["guided_channels"] = None if guided is None else min(guided, shape[0])
    spec = ModelSpec(
        family=family.name,
        shape=shape,
        num_classes=args.get("num_classes", 0),
        learned_variance=bool(args.get("learn_sigma", False)),
        architecture=_architecture(family, args),
        **fields,
    )
    return Checkpoint(module, spec, tuple(notes))


def _told(family: Family, args: Args) -> dict[str, Any]:
    """What the weights alone say of the facts that flags can give; None for what the model does not have."""
    told: dict[str, Any] = {name: family.facts[name] for name in SPEC_VALUES if name in family.facts}
    asked = {ask.flag for ask in family.asks}
    if "heads" not in asked:
        told["heads"] = None
    if "image_size" not in asked:
        told["image_size"] = args.get("in_dim", args.get("input_size"))
    return told


def _check_flags(flags: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Raise SpecError where a flag contradicts what the checkpoint says itself."""
    for name, value in flags.items():
        if name in FLAGS and told.get(name) != value:
            said = "has no such thing" if told.get(name) is None else f"says {_say(told[name])}"
            raise SpecError(f"{FLAGS[name]} {_say(value)}: this checkpoint {said}; leave the flag out")


def _say(value: Any) -> str:
    return (
        f"{value.kind} ({value.start:g} to {value.end:g}, N {value.N})" if isinstance(value, Schedule) else str(value)
    )


def _facts_beside(path: Path, flags: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Facts of the JSON file beside a checkpoint; keys that it does not know are somebody else's."""
    beside = path.with_suffix(".json")
    if beside == path or not beside.is_file():
        return {}
    try:
        facts = msgspec.json.decode(beside.read_bytes(), type=Given).facts()
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SpecError(f"{beside.name} beside it: {error}") from error
    used = [name for name in facts if name not in flags]
    if used:
        notes.append(f"took {', '.join(used)} from {beside.name}")
    return facts


def _module(family: Family, args: Args, shapes: Shapes, state: State) -> Any:
    """The network with these weights, which are not copied."""
    with torch.device("meta"):
        module = family.build(args, shapes)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in state.items()}
    wrong = {
        "is missing": sorted(expected.keys() - got.keys()),
        "is not expected": sorted(got.keys() - expected.keys()),
        "has another shape than expected": [n for n in sorted(expected) if n in got and got[n] != expected[n]],
    }
    found = [
        f"{names[0]} {what}"
        + (f" ({got[names[0]]}, expected {expected[names[0]]})" if names[0] in got and names[0] in expected else "")
        + (f", and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in wrong.items()
        if names
    ]
    if found:
        raise CheckpointError(f"looks like {_a(family.name)}, but {'; '.join(found)}")
    module.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers())), "a buffer without a value"
    return module.eval().requires_grad_(False)


def _architecture(family: Family, args: Args) -> dict[str, Any]:
    return {"class": family.model_class, **args}


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiouM' else 'a'} {name}"
