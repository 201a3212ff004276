"""``diffx bench``: our backends and PyTorch, interleaved."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from diffexport_cli.bench_models import MODELS
from diffexport_cli.options import BundlePath
from diffexport_cli.progress import progress_bar


def bench(
    bundle: BundlePath = None,
    model: Annotated[
        str | None, typer.Option(help=f"Random weights in place of a bundle: {', '.join(MODELS)}.", metavar="NAME")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The bundle's checkpoint, to measure PyTorch beside it.", metavar="CKPT")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also an int8 bundle of the same weights; exported once, into the cache.")
    ] = False,
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

    Each has a process of its own, which waits while another takes its steps. Starts are measured from the call to open to
    the end of the first step, with the runtime's import in them: the first with empty caches, the next with what it left
    there. Memory is the most that was resident of the whole process.

    Example: diffx bench --model DiT-S/2 --batch 1 --chart dit-s.png

    Example: diffx bench digits.diffx --checkpoint digits.pt --int8
    """
    from diffexport.bench import Work, contenders_of
    from diffexport.bench import bench as measure
    from diffexport.bench_report import markdown, save_chart
    from diffexport.bundle import Bundle
    from diffexport.errors import BackendError
    from diffexport.files import replacing_file, writing
    from diffexport_cli.bench_models import int8_bundle, random_model
    from diffexport_cli.checkpoint import read_module_of
    from diffexport_cli.output import find_bundle, print_json

    batches = _batches(batch)
    if seconds <= 0 or (threads is not None and threads < 1):
        raise BackendError("--seconds, --threads: expected more than 0")
    if model is not None and (bundle is not None or checkpoint is not None):
        raise BackendError(f"--model {model}: is measured with random weights; leave out the bundle and --checkpoint")
    if int8 and model is None and checkpoint is None:
        raise BackendError("--int8: is exported from the weights; give --checkpoint CKPT, or --model")
    with progress_bar("opening") as progress:
        if model is not None:
            checkpoint, bundle = random_model(model, lambda what, part: progress(f"exporting {model}: {what}", part))
        opened = Bundle.open(find_bundle(bundle))
        module = functools.partial(read_module_of, checkpoint, opened.spec) if checkpoint is not None else None
        work: Work | None = None
        if module is not None:
            from diffexport.bench_peers import work_of

            work = work_of(module(), opened.spec)
        contenders, notes = contenders_of(opened, module, threads), []
        if int8:
            assert checkpoint is not None
            quantized, note = int8_bundle(checkpoint, opened, lambda what, part: progress(f"int8: {what}", part))
            contenders += contenders_of(quantized, None, threads)
            notes.append(note)
        if only is not None:
            wanted = tuple(name.strip() for name in only.split(","))
            contenders = [contender for contender in contenders if contender.name.startswith(wanted)]
        if not contenders:
            raise BackendError(f"--only {only}: nothing has such a name")
        report = measure(opened, contenders, batches, seconds=seconds, work=work, progress=progress)
        report.notes += notes
    if json:
        print_json(report.as_dict())
    else:
        print(markdown(report), end="")
    if chart is not None:
        with writing(chart), replacing_file(chart) as path:
            save_chart(report, path)
        if not json:
            print(f"\nwrote {chart}")


def _batches(text: str) -> list[int]:
    from diffexport.errors import ShapeError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ShapeError(f"--batch {text}: expected numbers from 1, such as 1,4,16")
    return [int(part) for part in parts]
