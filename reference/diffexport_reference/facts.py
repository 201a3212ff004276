"""What a state dict does not tell about its model, and where a user says it: flags, or a JSON file beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec

from diffexport.bundle import MAX_JSON
from diffexport.errors import SpecError
from diffexport.files import read_regular
from diffexport.schedules import DEFAULT_SCHEDULES, Schedule
from diffexport.spec import ModelSpec, Prediction

Facts = dict[str, Any]

FLAGS = {
    "heads": "--heads",
    "image_size": "--image-size",
    "prediction": "--prediction",
    "scaled": "--scaled/--no-scaled",
    "schedule": "--schedule",
    "null_label": "--null-label",
    "guidance_channels": "--guidance-channels",
}
SPEC_FLAGS = {
    "prediction": f"--prediction {'|'.join(get_args(Prediction))}",
    "scaled": "--scaled or --no-scaled",
    "schedule": f"--schedule {'|'.join(DEFAULT_SCHEDULES)}",
}
"""The facts that no tensor tells, each a field of the spec, with their possible values."""

FLOW_FACTS: Facts = {"scaled": False, "schedule": DEFAULT_SCHEDULES["flow"]}
"""What a flow model leaves no choice about."""


class Given(msgspec.Struct, frozen=True):
    """The facts as a user gives them; None for what was not given."""

    heads: int | None = None
    image_size: int | None = None
    prediction: str | None = None
    scaled: bool | None = None
    schedule: Schedule | str | None = None
    """A schedule, or the name of one of DEFAULT_SCHEDULES."""
    null_label: str | None = None
    """"last" where the last of a network's labels stands for no label, "none" where none does."""
    guidance_channels: int | str | None = None
    """How many channels guidance acts on, or "all"."""
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for flag, number in (("--heads", self.heads), ("--image-size", self.image_size)):
            if number is not None and number < 1:
                raise SpecError(f"{flag} {number}: expected at least 1")
        if self.guidance_channels not in (None, "all") and not str(self.guidance_channels).isdigit():
            raise SpecError(f"--guidance-channels {self.guidance_channels}: expected all, or a number of channels")
        for flag, value, known in (
            ("--prediction", self.prediction, get_args(Prediction)),
            ("--schedule", self.schedule, tuple(DEFAULT_SCHEDULES)),
            ("--null-label", self.null_label, ("last", "none")),
        ):
            if isinstance(value, str) and value not in known:
                raise SpecError(f"{flag} {value}: expected one of {', '.join(known)}")


def given_facts(values: Mapping[str, Any]) -> Facts:
    """Checked facts, without those that are None, a schedule's name as its numbers.

    Raises:
        SpecError: a value that cannot be.
    """
    try:
        given = msgspec.convert(dict(values), Given)
    except msgspec.ValidationError as error:
        raise SpecError(f"facts of the model: {error}") from error
    facts = {name: value for name in Given.__struct_fields__ if (value := getattr(given, name)) is not None}
    if isinstance(given.schedule, str):
        facts["schedule"] = DEFAULT_SCHEDULES[given.schedule]
    return facts


def facts_beside(path: Path) -> Facts:
    """The facts in the JSON file beside a checkpoint; keys that are not in ``Given`` are somebody else's.

    Raises:
        SpecError: it is no JSON object, or holds a value that cannot be.
    """
    beside = path.with_suffix(".json")
    if beside == path or not beside.is_file():
        return {}
    try:
        return given_facts(msgspec.json.decode(read_regular(beside, MAX_JSON), type=dict[str, Any]))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, SpecError) as error:
        raise SpecError(f"{beside.name} beside it: {error}") from error


def guided(spec: ModelSpec, facts: Facts) -> ModelSpec:
    """The spec with guidance on the channels that were asked for, if any were.

    Raises:
        SpecError: the model cannot be guided, or has fewer channels.
    """
    asked = facts.get("guidance_channels")
    if asked is None:
        return spec
    channels = spec.shape[0] if asked == "all" else int(asked)
    if not spec.guidable:
        raise SpecError(f"--guidance-channels {asked}: this model cannot be guided; leave it out")
    if not 1 <= channels <= spec.shape[0]:
        raise SpecError(
            f"--guidance-channels {asked}: this model has {spec.shape[0]}; expected 1..{spec.shape[0]} or all"
        )
    return msgspec.structs.replace(spec, guided_channels=None if channels == spec.shape[0] else channels)


def check_flags(flags: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Raise SpecError where a flag contradicts what a checkpoint tells itself; None stands for what it cannot have."""
    for name, value in flags.items():
        if name in told and told[name] != value:
            says = "has no such thing" if told[name] is None else f"says {_say(told[name])}"
            raise SpecError(f"{FLAGS[name]} {_say(value)}: this checkpoint {says}; leave the flag out")


def _say(value: Any) -> str:
    if isinstance(value, Schedule):
        return f"{value.kind} ({value.start:g} to {value.end:g}, N {value.N})"
    return str(value)
