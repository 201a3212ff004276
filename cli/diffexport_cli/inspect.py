"""``diffx inspect``: what is in a bundle, or in an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from diffexport.engines.record import TensorInfo


def inspect(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="The bundle, or an engine in it.", show_default="the only one in this folder"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print manifest and certificate, or record, as JSON.")] = False,
) -> None:
    """Show what a bundle holds: the model, its files, its plans, what was measured of it; or what an engine is.

    Example: diffx inspect dit.diffx
    """
    from diffexport.bundle import Bundle
    from diffexport.engines.record import engines_of, is_engine
    from diffexport.parity import describe
    from diffexport.schedules import schedule_sigmas
    from diffexport_cli.output import describe_decoder, find_bundle, megabytes, print_json, worst_of

    if bundle is not None and is_engine(bundle):
        _inspect_engine(bundle, json)
        return
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
        "decoder": describe_decoder(manifest.decoder, spec).removeprefix("decoder, ") if manifest.decoder else "none",
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
    engines, problems = engines_of(opened)
    for engine in engines:
        key = engine.record.key
        print(
            f"engine       {engine.path}: {key.product} {key.version}, {','.join(key.targets)}, "
            f"batch {','.join(map(str, key.profiles))}, {megabytes(engine.record.engine.size)}"
        )
    for problem in problems:
        print(f"engine       {problem}")


def _inspect_engine(path: Path, json: bool) -> None:
    """What an engine's record says, and what its own header does; no GPU is needed."""
    from diffexport.engines.header import check_header, read_header
    from diffexport.engines.network import TYPES, share
    from diffexport.engines.record import read_engine
    from diffexport_cli.output import megabytes, print_json

    engine = read_engine(path)
    engine.check_file()
    check_header(engine)
    record, header = engine.record, read_header(engine.file)
    key, network = record.key, record.network
    if json:
        print_json({"engine": str(engine.file), "record": record, "header": header})
        return

    def tensors(infos: Sequence[TensorInfo]) -> str:
        return ", ".join(f"{t.name} ({' x '.join(map(str, t.shape))}) {t.dtype}" for t in infos)

    work = sum(network.multiply_adds.values())
    facts = {
        "graph": f"{key.graph}, sha256 {key.graph_sha256[:16]}..., weights {key.weights_sha256[:16]}...",
        "built by": f"{key.product} {key.version} for {', '.join(key.targets)}, in {record.build_seconds:.1f} s, "
        f"peak memory {megabytes(record.peak_memory)}",
        "file": f"{megabytes(record.engine.size)}, sha256 {record.engine.sha256[:16]}..., as recorded",
        "header": f"version {header.version}, {', '.join(header.targets)}" if header else "none that is known",
        "batches": ", ".join(map(str, key.profiles)),
        "precision": f"{key.precision}: {share(network, key.precision):.1%} of {2e-9 * work:.3g} GFLOP an evaluation "
        f"in {TYPES[key.precision]}" + (", TF32" if key.tf32 else ""),
        "inputs": tensors(network.inputs),
        "outputs": tensors(network.outputs),
    }
    for name, value in facts.items():
        print(f"{name:<12} {value}")
    print("layers")
    for kind, types in network.layers.items():
        print(f"  {kind:<22} " + ", ".join(f"{count} {dtype}" for dtype, count in types.items()))
