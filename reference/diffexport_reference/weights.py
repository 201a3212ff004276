"""Files of weights: what they hold, read without running code, as a sound float32 state dict.

Messages here leave out the file's name; ``checkpoints`` puts it in front.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffexport.errors import CheckpointError, SpecError

State = dict[str, Tensor]

DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Attention of diffusers' first releases, which published files still have, by what diffusers calls it now."""

PREFIXES = ("module.", "ema_model.", "_orig_mod.")
"""What DistributedDataParallel, averaging and torch.compile put before every name."""

WEIGHT_SETS = {"ema": ("ema",), "model": ("model", "state_dict")}
"""Where a snapshot of training keeps its weights, by the name that chooses them; the first one found is preferred."""


def read_content(path: Path) -> dict[str, Any]:
    """What a file holds: a state dict, or a dict around one. Tensors stay on disk until they are used.

    Raises:
        CheckpointError: the file is missing, damaged, or would run code.
    """
    if path.is_dir():
        raise CheckpointError("is a folder; give a file of weights")
    if not path.exists():
        raise CheckpointError("no such file")
    if not path.is_file():
        raise CheckpointError("is a pipe or a device; expected a file")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(str(error))) from error
    except Exception as error:  # PyTorch and safetensors have a different exception for every kind of damage
        raise CheckpointError(f"cannot be read, damaged or cut short ({_first_line(error)})") from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"holds {a(type(content).__name__)}, expected a state dict: save model.state_dict()")
    return dict(content)


def _read_safetensors(path: Path) -> Any:
    import safetensors.torch

    return safetensors.torch.load_file(path)


def _read_pickle(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise CheckpointError("is empty")
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_archive(path)
    with path.open("rb") as file:
        if not zipped and file.read(2) == b"PK":
            raise CheckpointError("cannot be read, cut short: the end of its archive is missing")
    # snapshots of the official DiT keep their options; a Namespace holds plain values and runs nothing
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about storages of old files and TorchScript; what matters is raised
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _check_archive(path: Path) -> None:
    """PyTorch stores its archives as they are; what is compressed in one could unfold to any size.

    Raises:
        CheckpointError: an entry is compressed, or all together claim more bytes than the file has.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(f"refused: {packed[0]} in it is compressed, which torch.save does not do; save it again")
    claimed, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if claimed > size:
        raise CheckpointError(f"refused: its archive claims {claimed} bytes, the file has {size}")


def _refusal(message: str) -> str:
    named = re.search(r"(?:GLOBAL|class|function) <?(?:class |function |built-in function )?'?([\w.]+)", message)
    if named is None or "Unsupported operand" in message:
        return "cannot be read, damaged or not a PyTorch file"
    return (
        f"refused: reading it could run code (it asks for {named[1]}); "
        "save the state dict alone: torch.save(model.state_dict(), ...)"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def a(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0] in 'aeioAEIOM' else 'a'} {noun}"


def select_state(content: Mapping[str, Any], weights: str | None) -> tuple[dict[str, Any], list[str]]:
    """The state dict of a file without its wrappings, and notes about what was taken and what was cut off.

    Args:
        weights: "ema" or "model", for a snapshot of training that holds both; averaged weights without.

    Raises:
        CheckpointError: there is none.
        SpecError: the weights asked for are not there.
    """
    notes: list[str] = []
    if any(isinstance(value, Tensor) for value in content.values()):
        if weights is not None:
            raise SpecError(f"--weights {weights}: this file holds one set of weights; leave it out")
        state = dict(content)
    else:
        state = _choose(content, weights, notes)
    return _strip(state, notes), notes


def _choose(content: Mapping[str, Any], weights: str | None, notes: list[str]) -> dict[str, Any]:
    found: dict[str, Mapping[str, Any]] = {}
    for name, keys in WEIGHT_SETS.items():
        for key in keys:
            if isinstance(content.get(key), Mapping) and content[key]:
                found.setdefault(name, content[key])
    if not found:
        keys_there = ", ".join(list(content)[:5]) or "nothing"
        raise CheckpointError(f"holds {keys_there}; expected a state dict, alone or under ema, model or state_dict")
    if weights is not None and weights not in found:
        raise SpecError(f"--weights {weights}: this file holds {' and '.join(found)}")
    chosen = weights or next(iter(found))
    others = [name for name in found if name != chosen]
    notes.append(f"took the weights {chosen!r}" + (f"; --weights {others[0]} takes the others" if others else ""))
    return dict(found[chosen])


def _strip(state: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Without the prefixes that all names share; of a file that holds an average beside its source, the average."""
    averaged = {key: value for key, value in state.items() if key.startswith("ema_model.")}
    if averaged and len(averaged) < len(state):
        notes.append(f"took the {len(averaged)} tensors under 'ema_model.', left {len(state) - len(averaged)} others")
        state = averaged
    while state:
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        notes.append(f"removed the prefix {prefix!r} of all names")
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


MAX_GROWTH = 4
"""How many times the bytes of its storages a state dict may take in float32; eight-bit floats take four."""

SLACK = 1 << 26
"""Bytes that a state dict may take beyond that, for small files with weights that are tied."""


def sound_state(state: Mapping[str, Any]) -> State:
    """The tensors in float32, each checked to be finite floats that are really in the file.

    What is float32 already is not copied.

    Raises:
        CheckpointError: names the first tensor that is not; or tensors share storage so that they would take many times
            as much memory as the file.
    """
    tensors = [value for value in state.values() if isinstance(value, Tensor) and value.layout == torch.strided]
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    taken = 4 * sum(t.numel() for t in tensors if not (t.dtype == torch.float32 and t.is_contiguous()))
    if taken > MAX_GROWTH * sum(stored.values()) + SLACK and all(_fits(t) for t in tensors):
        raise CheckpointError(f"its tensors would take {taken} bytes, and are stored in {sum(stored.values())}")
    return {name: _sound(name, value) for name, value in state.items()}


def _fits(value: Tensor) -> bool:
    """Whether a tensor has no more numbers than its storage."""
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _sound(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{name} is {a(type(value).__name__)}, expected a tensor")
    if value.layout != torch.strided or value.is_quantized or not value.is_floating_point():
        raise CheckpointError(f"{name} is of type {value.dtype}, expected floats")
    shape = tuple(value.shape)
    if value.is_meta:
        raise CheckpointError(f"{name} was saved without values, on the meta device")
    if value.numel() == 0:
        raise CheckpointError(f"{name} is empty, of shape {shape}")
    stored = value.untyped_storage().nbytes()
    if not _fits(value):
        raise CheckpointError(f"{name} claims the shape {shape}, of which the file holds {stored} bytes")
    weights: Tensor = value.detach().to(torch.float32).contiguous()
    low, high = weights.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):  # NaN comes through as both
        raise CheckpointError(f"{name} holds NaN or infinite values; the training went wrong, or the file is damaged")
    return weights


def check_names(noun: str, expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError with the first tensors that are missing, not expected, or of another shape."""
    missing = [name for name in expected if name not in got]
    unexpected = [name for name in got if name not in expected]
    reshaped = [name for name in expected if name in got and got[name] != expected[name]]
    problems = name_problems(missing, unexpected)
    if reshaped:
        name = reshaped[0]
        problems.append(f"{name} has shape {got[name]}, expected {expected[name]}{_and_more(reshaped, 1)}")
    if problems:
        raise CheckpointError(f"looks like {a(noun)}, but {'; '.join(problems)}")


def name_problems(missing: list[str], unexpected: list[str]) -> list[str]:
    """What is missing and what is not expected, the first few of each by name."""
    return [
        f"{', '.join(names[:_SHOWN])}{_and_more(names, _SHOWN)} {'is' if len(names) == 1 else 'are'} {what}"
        for names, what in ((missing, "missing"), (unexpected, "not expected"))
        if names
    ]


_SHOWN = 3
"""Names of tensors in a message."""


def _and_more(names: list[str], shown: int) -> str:
    return f" (and {len(names) - shown} more)" if len(names) > shown else ""
