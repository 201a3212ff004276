"""``diffx inspect``: what is in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle.", show_default="the only one in this folder")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print manifest and certificate as JSON.")] = False,
) -> None:
    """Show what a bundle holds: the model, its files, its plans, and what was measured of it.

    Example: diffx inspect dit.diffx
    """
    from diffexport.bundle import Bundle
    from diffexport.parity import describe
    from diffexport.schedules import schedule_sigmas
    from diffexport_cli.output import find_bundle, megabytes, print_json, worst_of

    opened = Bundle.open(find_bundle(bundle))
    manifest, spec, certificate = opened.manifest, opened.spec, opened.certificate()
    plans = sorted(name for name in opened.plans() if not name.endswith(".x_scale"))
    if json:
        print_json({"manifest": manifest, "certificate": certificate, "plans": plans})
        return
    sigmas = schedule_sigmas(spec.schedule)
    level = "t" if spec.schedule.kind == "flow" else "sigma"
    guided = "all channels" if spec.guided_channels is None else f"the first {spec.guided_channels} channels"
    names = f": {', '.join(spec.label_names[:10])}" + (", ..." if len(spec.label_names) > 10 else "")
    samplers: dict[str, list[str]] = {}
    for plan in plans:
        name, _, steps = plan.rpartition(".")
        samplers.setdefault(name, []).append(steps)
    facts = {
        "model": f"{spec.family}, {manifest.parameters / 1e6:.2f} M parameters, {manifest.precision}",
        "samples": " x ".join(map(str, spec.shape)),
        "labels": f"{spec.num_classes}{names if spec.label_names else ''}" if spec.conditional else "none",
        "prediction": spec.prediction
        + (", learned variance" if spec.learned_variance else "")
        + (", input scaled by 1/sqrt(1 + sigma^2)" if spec.scaled else "")
        + (f", clipped to +-{spec.clip:g}" if spec.clip else ""),
        "schedule": f"{spec.schedule.kind}, {len(sigmas)} levels, {level} {sigmas[0]:.4g} to {sigmas[-1]:.4g}",
        "guidance": f"on {guided}" if spec.guidable else "none",
        "default run": f"{manifest.defaults.sampler}, {manifest.defaults.steps} steps, "
        f"guidance {manifest.defaults.guidance_scale:g}, batch {manifest.defaults.batch} "
        f"(checked up to {manifest.max_batch})",
        "plans": "; ".join(f"{name} {', '.join(sorted(steps, key=int))}" for name, steps in samplers.items()),
        "parity": f"{len(certificate.measurements)} comparisons with PyTorch on {certificate.backend}, "
        + ("all hold" if certificate.passed else "NOT ALL HOLD"),
        "worst step": describe(worst_of(certificate.measurements, runs=False)),
        "worst run": describe(worst_of(certificate.measurements, runs=True)),
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
    }
    for name, value in facts.items():
        print(f"{name:<12} {value}")
    print(f"{'files':<12}")
    for name, entry in manifest.files.items():
        print(f"  {name:<22} {megabytes(entry.size):>10}   sha256 {entry.sha256[:16]}...")
