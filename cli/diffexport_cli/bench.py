"""``diffx bench``: our backends and PyTorch, interleaved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffexport_cli.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from diffexport.bundle import Bundle
    from diffexport.spec import ModelSpec

MODELS = ("DiT-S/2", "DiT-B/2", "DiT-XL/2", "unet-cifar")


def bench(
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle.", show_default="the only one in this folder")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"Random weights in place of a bundle: {', '.join(MODELS)}.", metavar="NAME")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The bundle's checkpoint, to measure PyTorch beside it.", metavar="CKPT")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batches.", metavar="B,B,...")] = "1,4,16",
    only: Annotated[
        str | None, typer.Option(help="Names of what to measure, by their beginning: openvino,PyTorch eager.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds that each batch is measured.")] = 20.0,
    threads: Annotated[int | None, typer.Option(help="Threads of ort and openvino.", show_default="all cores")] = None,
    chart: Annotated[Path | None, typer.Option(help="Write a bar chart as PNG.", metavar="PNG")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON in place of a table.")] = False,
) -> None:
    """Measure how fast a bundle runs here: every backend, and PyTorch eager and compiled, in turn in one run.

    Example: diffx bench --model DiT-S/2 --batch 1 --chart dit-s.png

    Example: diffx bench digits.diffx --checkpoint digits.pt
    """
    from diffexport.bench import bench as measure
    from diffexport.bench import contenders_of
    from diffexport.bench_report import markdown, save_chart
    from diffexport.bundle import Bundle
    from diffexport.errors import BackendError
    from diffexport.files import replacing_file, writing
    from diffexport_cli.checkpoint import read_checkpoint_of
    from diffexport_cli.output import find_bundle, print_json

    batches = _batches(batch)
    if seconds <= 0 or (threads is not None and threads < 1):
        raise BackendError("--seconds, --threads: expected more than 0")
    if model is not None and (bundle is not None or checkpoint is not None):
        raise BackendError(f"--model {model}: is measured with random weights; leave out the bundle and --checkpoint")
    with progress_bar("opening") as progress:
        module: torch.nn.Module | None = None
        if model is not None:
            opened, module = _random(model, lambda what, part: progress(f"exporting {model}: {what}", 0.3 * part))
        else:
            opened = Bundle.open(find_bundle(bundle))
            module = read_checkpoint_of(checkpoint, opened.spec).module if checkpoint is not None else None
        gflop = None
        if module is not None:
            from diffexport.bench_peers import gflop_of

            gflop = gflop_of(module.eval(), opened.spec)
        contenders = contenders_of(opened, module, threads)
        if only is not None:
            wanted = tuple(name.strip() for name in only.split(","))
            contenders = [contender for contender in contenders if contender.name.startswith(wanted)]
        if not contenders:
            raise BackendError(f"--only {only}: nothing has such a name")
        report = measure(opened, contenders, batches, seconds=seconds, gflop=gflop, progress=progress)
    if json:
        print_json(report.as_dict())
    else:
        print(markdown(report), end="")
    if chart is not None:
        with writing(chart), replacing_file(chart) as work:
            save_chart(report, work)
        if not json:
            print(f"\nwrote {chart}")


def _batches(text: str) -> list[int]:
    from diffexport.errors import ShapeError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ShapeError(f"--batch {text}: expected numbers from 1, such as 1,4,16")
    return [int(part) for part in parts]


def _random(name: str, progress: Callable[[str, float], None]) -> tuple[Bundle, torch.nn.Module]:
    """A model with random weights, and its bundle from the cache, exported where it is not there yet."""
    import torch

    import diffexport
    from diffexport.bundle import Bundle
    from diffexport.cache import cached, key_of, put
    from diffexport.errors import SpecError

    if name not in MODELS:
        raise SpecError(f"--model {name!r}: there is none of this name; known: {', '.join(MODELS)}")
    torch.manual_seed(0)
    module, spec = _built(name)
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)  # what starts at zero would hide what comes before it
    module.eval()
    key = key_of("random", name, diffexport.__version__, torch.__version__, _sources())
    file = f"{name.replace('/', '-')}.diffx"

    def write(work: Path) -> None:
        diffexport.export(module, spec, work / file, progress=progress)

    folder = cached("bench", key) or put("bench", key, write)
    if folder is None:
        raise SpecError("the cache cannot be written; $DIFFX_CACHE names another folder")
    return Bundle.open(folder / file), module


def _sources() -> str:
    """What stands for the exporter's version: the contents of its modules."""
    import hashlib

    import diffexport

    digest = hashlib.sha256()
    for path in sorted(Path(diffexport.__file__).parent.glob("exporter/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _built(name: str) -> tuple[torch.nn.Module, ModelSpec]:
    from diffexport.schedules import DEFAULT_SCHEDULES
    from diffexport.spec import ModelSpec
    from diffexport_reference.model import CondEmbedderLabel
    from diffexport_reference.official_dit import OfficialDiT
    from diffexport_reference.unet import Unet

    facts: dict[str, Any] = {"prediction": "eps", "scaled": True, "schedule": DEFAULT_SCHEDULES["ddpm"]}
    if name == "unet-cifar":
        module: torch.nn.Module = Unet(32, 3, 3, cond_embed=CondEmbedderLabel(512, 10))
        return module, ModelSpec(family="U-Net", shape=(3, 32, 32), num_classes=10, **facts)
    width, depth, heads = {"DiT-S/2": (384, 12, 6), "DiT-B/2": (768, 12, 12), "DiT-XL/2": (1152, 28, 16)}[name]
    module = OfficialDiT(hidden_size=width, depth=depth, num_heads=heads)
    facts |= {"variance": "learned", "guided_channels": 3, "noise_input": "timestep", "unit_start": True}
    return module, ModelSpec(
        family="official DiT", shape=(4, 32, 32), num_classes=1000, spacing="respaced", clip=None, **facts
    )
