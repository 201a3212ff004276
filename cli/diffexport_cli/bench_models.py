"""The models that ``diffx bench --model`` measures: random weights, kept in the cache as a checkpoint and its bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffexport.errors import SpecError

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DiT-S/2": ("OfficialDiT", {"hidden_size": 384, "depth": 12, "num_heads": 6}),
    "DiT-B/2": ("OfficialDiT", {"hidden_size": 768, "depth": 12, "num_heads": 12}),
    "DiT-XL/2": ("OfficialDiT", {"hidden_size": 1152, "depth": 28, "num_heads": 16}),
    "unet-cifar": ("Unet", {"in_dim": 32, "in_ch": 3, "out_ch": 3}),
}
"""Class and what its constructor is told."""


def random_model(name: str, progress: Callable[[str, float], None]) -> tuple[Path, Path]:
    """The files of a checkpoint and of its bundle, from the cache; made where they are not there yet.

    Raises:
        SpecError: no such model, or the cache cannot be written.
    """
    import torch

    import diffexport
    from diffexport.cache import cached, key_of, put

    if name not in MODELS:
        raise SpecError(f"--model {name!r}: there is none of this name; known: {', '.join(MODELS)}")
    checkpoint, bundle = (f"{name.replace('/', '-')}.{ending}" for ending in ("pt", "diffx"))
    key = key_of("random", name, MODELS[name], diffexport.__version__, torch.__version__, _exporter())

    def write(work: Path) -> None:
        from diffexport_cli.checkpoint import read_checkpoint

        _write_random(name, work / checkpoint)
        found = read_checkpoint(work / checkpoint)
        diffexport.export(found.module, found.spec, work / bundle, progress=progress)

    folder = cached("bench", key) or put("bench", key, write)
    if folder is None:
        raise SpecError("the cache cannot be written; $DIFFX_CACHE names another folder")
    return folder / checkpoint, folder / bundle


def _exporter() -> str:
    """What stands for the exporter's version: the contents of its modules."""
    import diffexport

    digest = hashlib.sha256()
    for path in sorted(Path(diffexport.__file__).parent.glob("exporter/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _write_random(name: str, path: Path) -> None:
    import torch

    from diffexport.schedules import DEFAULT_SCHEDULES
    from diffexport.spec import ModelSpec
    from diffexport_reference.checkpoints import save_checkpoint
    from diffexport_reference.model import CondEmbedderLabel
    from diffexport_reference.official_dit import OfficialDiT
    from diffexport_reference.unet import Unet

    torch.manual_seed(0)
    model_class, args = MODELS[name]
    unet = model_class == "Unet"
    module: Any = Unet(**args, cond_embed=CondEmbedderLabel(512, 10)) if unet else OfficialDiT(**args)
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)  # what starts at zero would hide what comes before it
    facts: dict[str, Any] = {"family": "U-Net", "num_classes": 10}
    if not unet:
        facts = {
            "family": "official DiT",
            "num_classes": 1000,
            "variance": "learned",
            "guided_channels": 3,
            "noise_input": "timestep",
            "unit_start": True,
            "spacing": "respaced",
        }
    spec = ModelSpec(
        shape=module.input_dims, prediction="eps", scaled=True, schedule=DEFAULT_SCHEDULES["ddpm"], **facts
    )
    save_checkpoint(path, model_class=model_class, args=args, spec=spec, state_dict=module.state_dict(), training={})
