"""``diffx train``: a data set becomes a checkpoint."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffexport.errors import BackendError, DiffexportError
from diffexport_cli.options import AsJson

if TYPE_CHECKING:
    from diffexport.schedules import Schedule
    from diffexport_reference.train import Progress


def train(
    data: Annotated[
        str,
        typer.Argument(help="digits, swissroll, tree, a folder of images, or a .npz or .npy file.", metavar="DATA"),
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.", metavar="CKPT")],
    model: Annotated[str, typer.Option(help="dit, unet, mlp (points), or ideal (the data itself, exact).")] = "dit",
    width: Annotated[int | None, typer.Option(help="Width of the network; by default 128, and 64 for a U-Net.")] = None,
    depth: Annotated[
        int | None, typer.Option(help="Blocks, or hidden layers of an MLP; by default 4, and 2 a level of a U-Net.")
    ] = None,
    heads: Annotated[int, typer.Option(help="Attention heads of a DiT.")] = 4,
    patch_size: Annotated[int, typer.Option(help="Side of a DiT's patches, in pixels.")] = 2,
    channel_mult: Annotated[str, typer.Option(help="Width of each level of a U-Net, in units of --width.")] = "1,2,2",
    prediction: Annotated[str, typer.Option(help="eps, x0, v or flow.")] = "v",
    scaled: Annotated[
        bool | None,
        typer.Option(
            "--scaled/--no-scaled", help="Scale the input by 1/sqrt(1 + sigma^2); by default, but not for flow."
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="loglinear (the default), ddpm, ldm, sigmoid, cosine, or flow (with --prediction flow)."),
    ] = None,
    schedule_start: Annotated[
        float | None, typer.Option(help="Smallest sigma, t or beta, by schedule; each has a default.")
    ] = None,
    schedule_end: Annotated[
        float | None, typer.Option(help="Largest sigma, t or beta, by schedule; each has a default.")
    ] = None,
    levels: Annotated[int, typer.Option(help="Noise levels of the schedule.")] = 1000,
    noise_density: Annotated[
        str | None,
        typer.Option(help="What noise is trained on: cosine (most near sigma 1; for images) or schedule (all alike)."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Batches to train on; by default 3000.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data, in place of --steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a step, over all processes.")] = 128,
    lr: Annotated[float, typer.Option(help="Largest learning rate; it falls to 0 along a cosine.")] = 2e-3,
    warmup: Annotated[int, typer.Option(help="Steps until the learning rate is reached.")] = 100,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights, which are what is kept.")] = 0.999,
    label_dropout: Annotated[float, typer.Option(help="Part of the labels replaced by none, for guidance.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    half: Annotated[bool, typer.Option("--half", help="Store the weights as float16.")] = False,
    image_size: Annotated[
        int | None, typer.Option(help="Resize the digits, or resize and crop the images of a folder, to this side.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="nchw or nhwc, where an array's shape leaves it open.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch; by default its own choice.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between states that a killed run continues from.")] = 500,
    log: Annotated[Path | None, typer.Option(help="File for a log of JSON lines.", metavar="FILE")] = None,
    restart: Annotated[
        bool, typer.Option("--restart/--resume", help="Begin again, or continue where a killed run was saved.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Train a model on a data set, and write a checkpoint with averaged weights and its whole configuration.

    The same command continues a run that was killed. In several processes, on GPUs or CPUs:
    accelerate launch --multi_gpu --num_processes 2 $(which diffx) train ...

    Example: diffx train digits --model dit --out digits.pt
    """
    if importlib.util.find_spec("torch") is None:
        raise BackendError("training needs PyTorch; pip install 'diffexport[train]'")
    from diffexport_reference.recipe import TrainConfig
    from diffexport_reference.train import train as train_model

    config = TrainConfig(
        data=data,
        model=_one_of("--model", model, ("dit", "unet", "mlp", "ideal")),
        width=width,
        depth=depth,
        heads=heads,
        patch_size=patch_size,
        channel_mult=_whole_numbers("--channel-mult", channel_mult),
        prediction=_one_of("--prediction", prediction, ("eps", "x0", "v", "flow")),
        scaled=prediction != "flow" if scaled is None else scaled,
        schedule=_schedule(
            schedule or ("flow" if prediction == "flow" else "loglinear"), schedule_start, schedule_end, levels
        ),
        noise_density=None
        if noise_density is None
        else _one_of("--noise-density", noise_density, ("schedule", "cosine")),
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        ema=ema,
        label_dropout=label_dropout,
        seed=seed,
        half=half,
        image_size=image_size,
        layout=None if layout is None else _one_of("--layout", layout, ("nchw", "nhwc")),
    )
    with _training_bar(data) as progress:
        result = train_model(
            config,
            out,
            log=log,
            threads=threads,
            save_every=save_every,
            restart=restart,
            command=_command_line(),
            progress=progress,
        )
    if not result.main:
        return
    if json:
        from diffexport_cli.output import print_json

        print_json(result)
        return
    size = out.stat().st_size / 1e6
    print(
        f"{result.spec.family}, {result.parameters / 1e6:.2f} M parameters, {result.steps} steps in {result.seconds:.0f} s"
    )
    if result.resumed_from:
        print(f"continued from step {result.resumed_from}")
    if result.loss is not None:
        print(f"loss {result.loss:.4f}")
    print(f"wrote {out} ({size:.1f} MB)")


@contextlib.contextmanager
def _training_bar(what: str) -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr with step, loss and the time that is left; nothing where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"training on {what}", total=None, loss="-")

        def show(now: Progress) -> None:
            bar.update(task, total=now.steps, completed=now.step, loss=f"{now.loss:.4f}")

        yield show


def _schedule(kind: str, start: float | None, end: float | None, levels: int) -> Schedule:
    from diffexport.schedules import DEFAULT_SCHEDULES, Schedule

    own = DEFAULT_SCHEDULES[_one_of("--schedule", kind, tuple(DEFAULT_SCHEDULES))]
    if kind == "cosine" and (start is not None or end is not None):
        raise DiffexportError("--schedule cosine: has no start and end; leave out --schedule-start and --schedule-end")
    return Schedule(
        kind=own.kind,
        N=levels,
        start=own.start if start is None else start,
        end=own.end if end is None else end,
    )


def _one_of(option: str, value: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise DiffexportError(f"{option} {value}: expected one of {', '.join(known)}")
    return value


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise DiffexportError(f"{option} {text}: expected whole numbers of at least 1, such as 1,2,2")
    return numbers


def _command_line() -> str:
    """What the user typed, ready for a shell."""
    import shlex
    import sys

    return shlex.join(["diffx", *sys.argv[1:]])
