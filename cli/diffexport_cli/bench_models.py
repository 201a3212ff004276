"""What ``diffx bench`` makes and keeps in the cache: models of random weights and their bundles, and int8 bundles."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffexport.errors import SpecError

if TYPE_CHECKING:
    from diffexport.bundle import Bundle

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DiT-S/2": ("OfficialDiT", {"hidden_size": 384, "depth": 12, "num_heads": 6}),
    "DiT-B/2": ("OfficialDiT", {"hidden_size": 768, "depth": 12, "num_heads": 12}),
    "DiT-XL/2": ("OfficialDiT", {"hidden_size": 1152, "depth": 28, "num_heads": 16}),
    "unet-cifar": ("Unet", {"in_dim": 32, "in_ch": 3, "out_ch": 3}),
}
"""Class and what its constructor is told."""


def random_model(name: str, progress: Callable[[str, float], None], **changes: Any) -> tuple[Path, Path]:
    """The files of a checkpoint and of its bundle, from the cache; made where they are not there yet.

    Args:
        changes: what the constructor is told in place of the model's own.

    Raises:
        SpecError: no such model, or the cache cannot be written.
    """
    import torch

    import diffexport
    from diffexport.cache import key_of

    if name not in MODELS:
        raise SpecError(f"--model {name!r}: there is none of this name; known: {', '.join(MODELS)}")
    model_class, args = MODELS[name][0], MODELS[name][1] | changes
    checkpoint, bundle = (f"{name.replace('/', '-')}.{ending}" for ending in ("pt", "diffx"))
    key = key_of("random", name, args, diffexport.__version__, torch.__version__, _exporter())

    def write(work: Path) -> None:
        from diffexport_cli.checkpoint import read_checkpoint

        _write_random(model_class, args, work / checkpoint)
        found = read_checkpoint(work / checkpoint)
        diffexport.export(found.module, found.spec, work / bundle, progress=progress)

    folder = _kept(key, write)
    return folder / checkpoint, folder / bundle


def int8_bundle(checkpoint: Path, bundle: Bundle, progress: Callable[[str, float], None]) -> tuple[Bundle, str]:
    """The int8 bundle of a checkpoint, exported as a bundle of it was, and how much of it is int8, in a sentence.

    Raises:
        SpecError: the cache cannot be written.
    """
    import torch

    import diffexport
    from diffexport.cache import key_of
    from diffexport_cli.checkpoint import read_module_of

    manifest = bundle.manifest
    file = f"{manifest.name}-int8.diffx"

    def write(work: Path) -> None:
        diffexport.export(
            read_module_of(checkpoint, bundle.spec),
            bundle.spec,
            work / file,
            precision="int8",
            max_batch=manifest.max_batch,
            defaults=manifest.defaults,
            progress=progress,
        )

    key = key_of("int8", bundle.digest, diffexport.__version__, torch.__version__, _exporter())
    made = diffexport.Bundle.open(_kept(key, write) / file)
    certificate = made.certificate()
    assert certificate.quantization is not None
    layers = certificate.quantization.layers
    worst = min(m.psnr for m in certificate.measurements if m.psnr is not None)
    return made, (
        f"Int8: {sum(not layer.kept for layer in layers)} of {len(layers)} layers that can be; its runs are within "
        f"{worst:.1f} dB of PyTorch's."
    )


def _kept(key: str, write: Callable[[Path], None]) -> Path:
    """An entry of the cache, made where it is not there yet."""
    from diffexport.cache import cached, put

    folder = cached("bench", key) or put("bench", key, write)
    if folder is None:
        raise SpecError("the cache cannot be written; $DIFFX_CACHE names another folder")
    return folder


def _exporter() -> str:
    """What stands for the exporter's version: the contents of its modules."""
    import diffexport

    digest = hashlib.sha256()
    for path in sorted(Path(diffexport.__file__).parent.glob("exporter/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _write_random(model_class: str, args: dict[str, Any], path: Path) -> None:
    import torch

    from diffexport.schedules import DEFAULT_SCHEDULES
    from diffexport.spec import ModelSpec
    from diffexport_reference.checkpoints import save_checkpoint
    from diffexport_reference.model import CondEmbedderLabel
    from diffexport_reference.official_dit import OfficialDiT
    from diffexport_reference.unet import Unet

    torch.manual_seed(0)
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
