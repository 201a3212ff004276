"""Checkpoints: a file becomes the bare network, ready to be traced, with everything that is known of it.

Read are diffexport's own checkpoints, bare state dicts of the models in ``families`` (.pt, .pth, .bin, .safetensors),
snapshots of training of the official DiT, and the folders of diffusers in ``pretrained``. What a state dict does not tell
comes from flags or from a JSON file beside it (dit.pt, dit.json) with the keys of ``facts.Given``; nothing is guessed.
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
from diffexport.files import replacing_file, writing
from diffexport.spec import ModelSpec, Variance
from diffexport_reference.facts import (
    FLAGS,
    FLOW_FACTS,
    SPEC_FLAGS,
    Facts,
    Given,
    check_flags,
    facts_beside,
    given_facts,
    guided,
)
from diffexport_reference.families import Args, Family, Shapes, by_class, lacks, recognise
from diffexport_reference.weights import State, a, check_names, read_content, select_state, sound_state

_VARIANCES: dict[bool | None, Variance] = {None: "small", False: "large", True: "learned"}
"""What an official DiT's ``learn_sigma`` means for DDPM; other families have no such choice."""

FORMAT = "diffexport.checkpoint"
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A network F with its facts, and what a person should know of how it was read."""

    module: nn.Module
    """Called as module(x, c_noise, label), or module(x, c_noise) without labels; float32, in eval mode."""
    spec: ModelSpec
    notes: tuple[str, ...] = ()
    vae: Path | None = None
    """The folder of the image decoder that came with it."""


def load_checkpoint(path: str | Path, *, weights: str | None = None, **facts: Any) -> tuple[nn.Module, ModelSpec]:
    """The module and spec of a checkpoint; see ``read_checkpoint``."""
    found = read_checkpoint(path, weights=weights, **facts)
    return found.module, found.spec


def read_checkpoint(path: str | Path, *, weights: str | None = None, **facts: Any) -> Checkpoint:
    """Read a checkpoint. Weights that are float32 stay mapped from the file, so do not overwrite it in place.

    Args:
        path: a file, or a folder of diffusers.
        weights: "ema" or "model", of a snapshot that holds both; "ema" without.
        facts: what the checkpoint does not tell, each a field of ``facts.Given``: heads, image_size, prediction, scaled,
            schedule, null_label; and guidance_channels, "all" or how many.

    Raises:
        BackendError: a folder of diffusers, which is not installed.
        CheckpointError: a file that is missing, damaged, unsafe, or of no model that is known here.
        SpecError: facts that are missing (all of them are named), or that contradict the file.
    """
    path = Path(path)
    if unknown := sorted(set(facts) - set(Given.__struct_fields__)):
        raise TypeError(f"read_checkpoint() takes no {unknown[0]!r}; facts are {', '.join(Given.__struct_fields__)}")
    try:
        flags = given_facts(facts)
        if path.is_dir():
            return _read_folder(path, flags, weights)
        content = read_content(path)
        if content.get("format") == FORMAT:
            return _read_own(content, flags, weights)
        state, notes = select_state(content, weights)
        return _read_bare(path, state, flags, notes)
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
        "spec": _plain(_told(spec)),
        "state_dict": {name: value.detach().cpu().clone() for name, value in state_dict.items()},
        "training": _plain(training),
    }
    save_whole(content, Path(path))


def save_whole(content: Any, path: Path) -> None:
    """``torch.save`` that leaves the old file or the new one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with writing(path, CheckpointError), replacing_file(path) as work, work.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(
                error.__context__, OSError
            ):  # of a full disk PyTorch itself says no more than "unexpected pos"
                raise error.__context__ from None
            raise


def _told(spec: ModelSpec) -> dict[str, Any]:
    """The facts that are not the default ones, so that a field added later does not make the file unreadable."""
    plain = ModelSpec(family="", shape=spec.shape, prediction=spec.prediction, schedule=spec.schedule)
    needed = {field.name for field in msgspec.structs.fields(ModelSpec) if field.required}
    told = msgspec.to_builtins(spec)
    return {
        name: value for name, value in told.items() if name in needed or getattr(spec, name) != getattr(plain, name)
    }


def _plain(value: Any) -> Any:
    """As JSON would give it back: what a reader that runs no code can read."""
    return json.loads(json.dumps(value))


def _read_folder(path: Path, flags: Facts, weights: str | None) -> Checkpoint:
    from diffexport_reference.pretrained import read_folder

    if weights is not None:
        raise SpecError(f"--weights {weights}: this folder holds one set of weights; leave it out")
    module, spec, notes, vae = read_folder(path, flags)
    return Checkpoint(module, spec, tuple(notes), vae)


def _read_own(content: Mapping[str, Any], flags: Facts, weights: str | None) -> Checkpoint:
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"is of version {content.get('version')} of the format, this diffexport reads {VERSION}; update diffexport"
        )
    if weights is not None:
        raise SpecError(f"--weights {weights}: this file holds one set of weights; leave it out")
    try:
        family = by_class(content["model"]["class"])
        stored_args, stored_state = dict(content["model"]["args"]), dict(content["state_dict"])
        spec = msgspec.convert(content["spec"], ModelSpec)
    except (KeyError, TypeError, ValueError, SpecError) as error:
        raise CheckpointError(f"is damaged ({type(error).__name__}: {error})") from error
    side = spec.shape[-1] if len(spec.shape) == 3 else None
    heads = next((stored_args.get(ask.arg) for ask in family.asks if ask.flag == "heads"), None)
    fixed: Facts = {"heads": heads, "image_size": side, "null_label": None}
    check_flags(flags, {**{name: getattr(spec, name) for name in SPEC_FLAGS}, **fixed})
    try:
        module, args = _make(family, sound_state(stored_state), given_facts({"heads": heads, "image_size": side}))
    except SpecError as error:
        raise CheckpointError(f"is damaged ({error})") from error
    told = {name: value for name, value in args.items() if name in stored_args and isinstance(value, int | str)}
    told |= {"shape": module.input_dims, "num_classes": args.get("num_classes", 0)}
    for name, value in told.items():
        said = getattr(spec, name, stored_args.get(name))
        if value != said:
            raise CheckpointError(f"is damaged: it says {name} {said}, its weights say {value}")
    return Checkpoint(module, guided(msgspec.structs.replace(spec, architecture=args), flags))


def _read_bare(path: Path, stored: Mapping[str, Any], flags: Facts, notes: list[str]) -> Checkpoint:
    try:
        family = recognise(stored)
    except CheckpointError as error:
        if (path.parent / "config.json").is_file():
            raise CheckpointError(f"{error}; a config.json lies beside it: give the folder {path.parent}") from error
        raise
    beside = facts_beside(path)
    facts = {**beside, **flags}
    if used := [name for name in beside if name not in flags]:
        notes.append(f"took {', '.join(used)} from {path.with_suffix('.json').name}")
    known = {**(FLOW_FACTS if facts.get("prediction") == "flow" else {}), **facts, **family.facts}
    module, args = _make(family, sound_state(stored), facts, known, path)
    asked = {ask.flag for ask in family.asks}
    side = module.input_dims[-1] if len(module.input_dims) == 3 else None
    told = {"heads": args.get("num_heads") if "heads" in asked else None, "image_size": side, "null_label": None}
    check_flags(flags, {**known, **told})
    if known["prediction"] == "flow" and known["scaled"]:
        raise SpecError("--scaled: the input of a flow model is never scaled; leave it out")
    if "guided_channels" in known:
        known["guided_channels"] = min(known["guided_channels"], module.input_dims[0])
    spec = ModelSpec(
        family=family.name,
        shape=module.input_dims,
        num_classes=args.get("num_classes", 0),
        variance=_VARIANCES[args.get("learn_sigma")],
        architecture=args,
        **{name: value for name, value in known.items() if name in ModelSpec.__struct_fields__},
    )
    return Checkpoint(module, guided(spec, facts), tuple(notes))


def _make(
    family: Family, state: State, facts: Facts, known: Facts | None = None, path: Path | None = None
) -> tuple[Any, Args]:
    """The network with these weights, which are not copied, and its arguments as plain data.

    Raises:
        SpecError: facts are missing; all of them are named, also those of the spec that are not in ``known``.
        CheckpointError: the weights are not those of the family.
    """
    shapes = Shapes({name: tuple(value.shape) for name, value in state.items()})
    try:
        args = family.read(shapes, facts)
    except CheckpointError as error:
        if problems := lacks(family, shapes):
            raise CheckpointError(f"looks like {a(family.name)}, but {problems}") from error
        raise
    missing = [f"{FLAGS[ask.flag]} {ask.values(shapes)}" for ask in family.asks if args[ask.arg] is None]
    missing += [flag for name, flag in SPEC_FLAGS.items() if known is not None and name not in known]
    if missing:
        where = f" (or the same in {path.with_suffix('.json').name} beside it)" if path is not None else ""
        raise SpecError(f"weights of {a(family.name)} do not tell everything: give {', '.join(missing)}{where}")
    with torch.device("meta"):
        module: Any = family.build(args, shapes)
    check_names(family.name, {name: tuple(value.shape) for name, value in module.state_dict().items()}, shapes)
    module.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers())), "a buffer without a value"
    return module.eval().requires_grad_(False), {"class": family.model_class, **args}
