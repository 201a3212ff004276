"""``diffx export``: a checkpoint becomes a bundle."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffexport.errors import ExportError
from diffexport.precision import Precision
from diffexport_cli.options import AsJson
from diffexport_cli.progress import progress_bar

if TYPE_CHECKING:
    from diffexport.bundle import Quantization


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A .pt, .pth, .bin or .safetensors file, or a folder of diffusers.", metavar="CKPT"),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The bundle to write.", show_default="CKPT's name with .diffx")
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the AutoencoderKL whose decoder makes images of the samples.",
            show_default="a pipeline's own",
            metavar="FOLDER",
        ),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Short for --precision fp16.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Short for --precision bf16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Short for --precision int8.")] = False,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Of the network's tensors; statistics, softmax and the state stay fp32.", show_default="fp32"
        ),
    ] = None,
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers of a half or int8 network that stay fp32, such as 'blocks.*.mlp'; auto searches the fewest "
            "where the checks fail without, as int8 always does. Repeatable.",
            metavar="LAYER",
        ),
    ] = None,
    int8_psnr: Annotated[
        float,
        typer.Option(help="What int8 runs have to reach beside PyTorch's; costly layers stay fp32.", metavar="DB"),
    ] = 30.0,
    max_batch: Annotated[int, typer.Option(help="Largest batch that is checked.", metavar="B")] = 16,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Default sampler of the bundle.", show_default="dpmpp-2m; flow euler; official DiT, diffusers ddim"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Default number of steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Default guidance weight; 1 is off.")] = 1.0,
    plan: Annotated[list[str] | None, typer.Option(help="One more ready-made plan, NAME:STEPS. Repeatable.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, where the file does not tell.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the images, where the file does not tell.")] = None,
    prediction: Annotated[str | None, typer.Option(help="eps, x0, v or flow, where the file does not tell.")] = None,
    scaled: Annotated[
        bool | None, typer.Option("--scaled/--no-scaled", help="Whether the input is scaled by 1/sqrt(1 + sigma^2).")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="ddpm, ldm, sigmoid, cosine, loglinear or flow, where the file does not tell.")
    ] = None,
    guidance_channels: Annotated[
        str | None,
        typer.Option(
            help="Channels that guidance acts on: all, or the first N.", show_default="official DiT 3; else all"
        ),
    ] = None,
    null_label: Annotated[
        str | None, typer.Option(help="last or none: whether a U-Net of diffusers' last label stands for no label.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="ema or model, of a snapshot that holds both.")] = None,
    thorough: Annotated[bool, typer.Option(help="Compare whole runs at every batch, for large models too.")] = False,
    allow_mismatch: Annotated[bool, typer.Option(help="Write the bundle, marked, even if parity fails.")] = False,
    json: AsJson = False,
) -> None:
    """Trace a checkpoint into a bundle and check it against PyTorch before it is written.

    Example: diffx export dit.pt --out dit.diffx

    Of latents, with what makes images of them: diffx export DiT-XL-2-256x256.pt --vae sd-vae-ft-ema
    """
    from diffexport.bundle import Defaults
    from diffexport.exporter.write import export as export_bundle
    from diffexport.parity import describe
    from diffexport.plan import default_sampler
    from diffexport_cli.checkpoint import read_checkpoint, read_decoder
    from diffexport_cli.output import describe_decoder, print_json, size_of, worst_of

    chosen = _precision(precision, {"fp16": fp16, "bf16": bf16, "int8": int8})
    gc.disable()  # loading PyTorch and tracing make millions of objects that live to the end of this short process
    with progress_bar("reading the checkpoint") as progress:
        facts = dict(
            heads=heads,
            image_size=image_size,
            prediction=prediction,
            scaled=scaled,
            schedule=schedule,
            guidance_channels=guidance_channels,
            null_label=null_label,
            weights=weights,
        )
        found = read_checkpoint(checkpoint, **facts)
        folder = vae or found.vae
        bundle = export_bundle(
            found.module,
            found.spec,
            out or Path(checkpoint.resolve().with_suffix(".diffx").name),
            decoder=read_decoder(folder) if folder is not None else None,
            precision=chosen,
            keep_fp32=keep_fp32 or (),
            int8_psnr=int8_psnr,
            max_batch=max_batch,
            defaults=Defaults(
                sampler=sampler or default_sampler(found.spec),
                steps=steps,
                guidance_scale=guidance_scale,
                batch=max(1, min(8, max_batch)),
            ),
            plans=plan or (),
            allow_mismatch=allow_mismatch,
            thorough=True if thorough else None,
            progress=progress,
            on_forecast=lambda needed: print(f"exporting takes {needed}", file=sys.stderr),
        )
    certificate = bundle.certificate()
    if json:
        print_json({"bundle": str(bundle.path), "certificate": certificate, "notes": found.notes})
        return
    for note in found.notes:
        print(note)
    spec = bundle.spec
    labels = f"{spec.num_classes} labels" if spec.conditional else "no labels"
    shape = " x ".join(map(str, spec.shape))
    for layer in bundle.manifest.keep_fp32:
        print(f"kept in fp32: {layer}")
    if certificate.quantization is not None:
        _print_quantization(certificate.quantization)
    print(f"{spec.family}, {bundle.manifest.parameters / 1e6:.2f} M parameters, samples {shape}, {labels}, {chosen}")
    if bundle.manifest.decoder is not None:
        print(describe_decoder(bundle.manifest.decoder, spec))
    passed = sum(m.passed for m in certificate.measurements)
    print(f"parity with PyTorch: {passed} of {len(certificate.measurements)} comparisons hold")
    print(f"  worst step:  {describe(worst_of(certificate.measurements, runs=False))}")
    print(f"  worst run:   {describe(worst_of(certificate.measurements, runs=True))}")
    print(f"wrote {bundle.path} ({size_of(bundle.path)})")


def _print_quantization(found: Quantization) -> None:
    """Which layers are int8, and what the costliest cost."""
    kept = sum(entry.kept for entry in found.layers)
    print(
        f"{len(found.layers) - kept} layers in int8, {kept} of them that could be stay fp32 for {found.budget:g} dB; "
        "error of the network's output with one alone in int8:"
    )
    for entry in found.layers[: max(kept, 5)]:
        print(f"  {entry.relative_l2:.1e}  {entry.layer}{'  (fp32)' if entry.kept else ''}")
    if len(found.layers) > max(kept, 5):
        print("  ...      the others are in certificate.json")


def _precision(named: Precision | None, flags: dict[Precision, bool]) -> Precision:
    """The one precision that was asked for, in whichever way; fp32 without."""
    asked: list[Precision] = [name for name, given in flags.items() if given]
    if named is not None:
        asked.append(named)
    if len(set(asked)) > 1:
        raise ExportError(f"precision: got {' and '.join(dict.fromkeys(asked))}; give one")
    return asked[0] if asked else "fp32"
