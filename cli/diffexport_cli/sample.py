"""``diffx sample``: samples from a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffexport_cli.options import (
    AsJson,
    BundlePath,
    Eta,
    Gam,
    Grid,
    GuidanceInterval,
    GuidanceScale,
    Mu,
    SamplerName,
    Steps,
    plan_options,
)
from diffexport_cli.progress import progress_bar

if TYPE_CHECKING:
    from diffexport.bundle import Bundle, Defaults
    from diffexport.pictures import Array, Frame
    from diffexport.plan import Plan
    from diffexport.spec import ModelSpec


def sample(
    bundle: BundlePath = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="What runs the network; `diffx doctor` lists them.",
            show_default="the fastest here, measured once and remembered",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Labels, by number or name: 3,1,4 or 0-9 or all.", show_default="0, 1, 2, ... in turn"),
    ] = None,
    num: Annotated[int | None, typer.Option(help="How many samples.", show_default="one a label, else 16")] = None,
    per_label: Annotated[
        int | None, typer.Option(help="How many samples of each label; the PNG has a column a label.")
    ] = None,
    sampler: SamplerName = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    grid: Grid = None,
    eta: Eta = None,
    gam: Gam = None,
    mu: Mu = None,
    seed: Annotated[int, typer.Option(help="Seed; it and the index decide a sample.")] = 0,
    first: Annotated[int, typer.Option(help="Index of the first sample.")] = 0,
    batch: Annotated[int | None, typer.Option(help="How many are drawn at once.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the backend.", show_default="all cores")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="What openvino computes in: fp32, or bf16 where the processor has it.",
            show_default="the bundle's",
            metavar="fp32|bf16",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="Of openvino: all threads on one call, or a part of the batch on each thread.",
            show_default="latency",
            metavar="latency|throughput",
        ),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The checkpoint, for the torch backend.")] = None,
    vae: Annotated[
        Path | None, typer.Option(help="The decoder's folder, for the torch backend.", metavar="FOLDER")
    ] = None,
    one_call: Annotated[
        bool, typer.Option(help="Run the whole loop inside the graph, decoder and all, in one call a batch.")
    ] = False,
    latents: Annotated[bool, typer.Option("--latents", help="Leave latents as they are, undecoded.")] = False,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Decode larger images in tiles of so many pixels, in less memory; 0 decodes any image whole.",
            show_default="the bundle's",
            metavar="PIXELS",
        ),
    ] = None,
    selftest: Annotated[
        bool | None,
        typer.Option(
            "--selftest/--no-selftest",
            help="Run the bundle's golden cases before the first sample, and refuse a backend that fails them.",
            show_default="on for GPUs",
        ),
    ] = None,
    allow_fallback: Annotated[
        bool | None, typer.Option("--allow-fallback", help="Of ort-cuda, ort-trt: run on the CPU where the GPU fails.")
    ] = None,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph", help="Launch a step on a GPU as one captured graph.", show_default="on"
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="The PNG to write; a folder (a name that ends in /) gets a file a sample as it is drawn, and the same "
            "command continues there.",
            show_default="the bundle's name with .png",
            metavar="PNG|FOLDER/",
        ),
    ] = None,
    trajectory: Annotated[
        Path | None, typer.Option(help="Write the run itself: a .gif, or a .png strip; twice the evaluations.")
    ] = None,
    npz: Annotated[
        Path | None, typer.Option(help="Write arrays: x (B, C, H, W) float32, labels, and images where decoded.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Draw samples and write them as a PNG, as arrays, or, however many, as a folder of pictures.

    Latents are decoded where the bundle has a decoder.

    Example: diffx sample digits.diffx --labels all --per-label 8 --guidance-scale 2 --seed 0 --out grid.png

    Example: diffx sample digits.diffx --num 10000 --out samples/
    """
    from diffexport.bundle import Bundle
    from diffexport.decoding import tile_of
    from diffexport.errors import DiffexportError
    from diffexport.sample_folder import draw_into
    from diffexport_cli.output import find_bundle, print_json

    opened = Bundle.open(find_bundle(bundle))
    turn, count = _labels(opened.spec, labels, num, per_label)
    options = plan_options(grid=grid, guidance_interval=guidance_interval, eta=eta, gam=gam, mu=mu)
    plan = opened.plan(sampler, steps, guidance_scale, **options)
    if opened.manifest.decoder is None and (latents or tile is not None):
        raise DiffexportError(f"{'--latents' if latents else '--tile'}: {opened.path} has no decoder; leave it out")
    if opened.manifest.decoder is not None:
        tile_of(opened.manifest.decoder, tile)  # a tile that cannot be is said before the work
    run: dict[str, Any] = {"plan": plan, "seed": seed, "first": first, "batch": batch, "one_call": one_call}
    folder = Path(out) if out is not None and (out.endswith("/") or Path(out).is_dir()) else None
    frames = _Frames(opened.spec, plan, trajectory) if trajectory is not None else None
    if folder is not None and (npz is not None or frames is not None):
        raise DiffexportError(f"--out {out}: a folder takes one file a sample; leave out --npz and --trajectory")
    given = {"threads": threads, "precision": precision, "mode": mode}
    given |= {"allow_fallback": allow_fallback, "cuda_graph": cuda_graph}
    why = None
    if backend is None:
        backend, why = _chosen(opened, checkpoint is not None, given)
    settings = _backend_options(opened.spec, backend, checkpoint, vae, selftest=selftest, **given)
    with progress_bar("sampling") as progress, opened.sampler(backend, **settings) as s:
        started, kept = time.perf_counter(), 0
        if folder is not None:
            described = _described(opened.manifest.defaults, sampler, steps, guidance_scale, options)
            run |= {"labels": turn, "num": count, "described": described, "latents": latents, "tile": tile}
            done = draw_into(folder, opened, s, progress=progress, **run)
            seconds, kept, written = time.perf_counter() - started, done.kept, [f"{folder}/"]
        else:
            wanted = None if turn is None else [turn[k % len(turn)] for k in range(count)]
            run |= {
                "num": count if wanted is None else None,
                "on_step": lambda done, total: progress("sampling", done / total),
                "on_state": frames.keep if frames is not None else None,
            }
            if opened.manifest.decoder is not None and not latents:
                x, images = s.images(
                    wanted, tile=tile, on_tile=lambda done, total: progress("decoding", done / total), **run
                )
            else:
                x, images = s.sample(wanted, **run), None
            seconds = time.perf_counter() - started
            picture = f"{opened.manifest.name}.png" if out is None and npz is None and frames is None else out
            columns = len(turn) if turn is not None and per_label else None
            written = _write(opened.spec, x, images, wanted, Path(picture) if picture else None, npz, columns)
            written += [frames.write()] if frames is not None else []
        device = s.session.device
    result: dict[str, Any] = {
        "samples": count - kept,
        "kept": kept,
        "backend": backend,
        "chosen": why,
        "device": device,
        "rows": len(plan),
        "evaluations": plan.evaluations,
        "evaluations_saved": plan.saved,
        "seed": seed,
        "seconds": round(seconds, 4),
        "written": written,
    }
    if json:
        print_json(result)
        return
    saved = f" ({plan.saved} saved by the guidance interval)" if plan.saved else ""
    there = f" ({kept} more were there)" if kept else ""
    print(
        f"{count - kept} samples{there} on {backend} ({device}), "
        f"{plan.evaluations} network evaluations each{saved}, {seconds:.2f} s"
    )
    if why is not None:
        print(f"{backend} was chosen: {why}")
    for path in written:
        print(f"wrote {path}")


class _Frames:
    """The first batch of a run, kept for a picture of it."""

    def __init__(self, spec: ModelSpec, plan: Plan, path: Path) -> None:
        from diffexport.errors import DiffexportError

        self.kind = path.suffix.lower().removeprefix(".")
        if self.kind not in ("gif", "png"):
            raise DiffexportError(f"--trajectory {path}: expected a name that ends in .gif or .png")
        self.spec, self.plan, self.path = spec, plan, path
        self.frames: list[Frame] = []

    def keep(self, row: int, x: Array, denoised: Array) -> None:
        import numpy as np

        from diffexport.pictures import Frame

        if len(self.frames) == row:
            sigma = float(self.plan.sigmas[row])
            scale = 1.0 if self.spec.prediction == "flow" else float(np.hypot(1.0, sigma))
            self.frames.append(Frame(sigma, x / np.float32(scale), denoised))

    def write(self) -> str:
        from diffexport.files import replacing_file, writing
        from diffexport.pictures import save_trajectory

        with writing(self.path), replacing_file(self.path) as work:
            save_trajectory(self.frames, work, self.kind)
        return str(self.path)


def _labels(spec: ModelSpec, text: str | None, num: int | None, per_label: int | None) -> tuple[list[int] | None, int]:
    """The labels that samples have in turn, None for a model without labels, and how many samples there are."""
    from diffexport.errors import ShapeError

    if num is not None and num < 1:
        raise ShapeError(f"--num {num}: expected at least 1")
    if not spec.conditional:
        if text is not None or per_label is not None:
            raise ShapeError("--labels, --per-label: this model has no labels; use --num")
        return None, 16 if num is None else num
    given: list[int | str] = []
    for part in "all" if text is None else text.split(","):
        low, dash, high = part.strip().partition("-")
        if dash and low.isdigit() and high.isdigit():
            given += range(int(low), int(high) + 1)
        else:
            given.append(part.strip())
    if text is None or text.strip() == "all":
        given = list(range(spec.num_classes))
    turn = [spec.label_index(label) for label in given]
    if per_label is not None:
        if per_label < 1 or num is not None:
            raise ShapeError(f"--per-label {per_label}: expected at least 1, and no --num beside it")
        return turn, len(turn) * per_label
    if num is None:
        num = min(spec.num_classes, 16) if text is None else len(turn)
    return turn, num


def _described(
    defaults: Defaults, sampler: str | None, steps: int | None, guidance_scale: float | None, options: dict[str, Any]
) -> str:
    """A plan in words."""
    guidance = defaults.guidance_scale if guidance_scale is None else guidance_scale
    words = [f"{sampler or defaults.sampler}, {steps or defaults.steps} steps, guidance {guidance:g}"]
    return ", ".join(words + [f"{name} {value}" for name, value in options.items()])


def _chosen(bundle: Bundle, with_modules: bool, given: dict[str, Any]) -> tuple[str, str]:
    """The backend that is taken where none is named, and why."""
    from diffexport.choice import choose

    if with_modules:
        return "torch", "--checkpoint names a PyTorch module"
    with progress_bar("choosing a backend"):
        choice = choose(bundle, [name for name, value in given.items() if value is not None])
    return choice.backend, choice.why


def _backend_options(
    spec: ModelSpec, backend: str, checkpoint: Path | None, vae: Path | None, **given: Any
) -> dict[str, Any]:
    from diffexport.errors import BackendError
    from diffexport_cli.checkpoint import read_checkpoint_of, read_decoder

    options = {name: value for name, value in given.items() if value is not None}
    if options.get("threads", 1) < 1:
        raise BackendError(f"--threads {options['threads']}: expected at least 1")
    for flag, path in (("--checkpoint", checkpoint), ("--vae", vae)):
        if path is not None and backend != "torch":
            raise BackendError(f"{flag} {path}: backend {backend!r} runs the bundle; leave it out")
    if checkpoint is not None:
        options["module"] = read_checkpoint_of(checkpoint, spec).module
    if vae is not None:
        options["decoder"] = read_decoder(vae)[0]
    return options


def _write(
    spec: ModelSpec,
    x: Array,
    images: Array | None,
    labels: list[int] | None,
    out: Path | None,
    npz: Path | None,
    columns: int | None,
) -> list[str]:
    """Write what was asked for; the paths, in order."""
    import numpy as np

    from diffexport.files import replacing_file, writing
    from diffexport.pictures import save_samples

    arrays: dict[str, Any] = {"x": x} if labels is None else {"x": x, "labels": np.array(labels, np.int64)}
    if images is not None:
        arrays["images"] = images
    names = [spec.label_name(k) for k in labels] if labels is not None else None
    written = []
    if out is not None:
        with writing(out), replacing_file(out) as work:
            save_samples(x if images is None else images, work, names, columns)
        written.append(str(out))
    if npz is not None:
        with writing(npz), replacing_file(npz) as work, work.open("wb") as file:
            np.savez(file, **arrays)
        written.append(str(npz))
    return written
