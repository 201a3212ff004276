"""Verification of a bundle, any time after its export, with the checkpoint or without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffexport.backends import open_session
from diffexport.bundle import Bundle, Measurement, Tensors
from diffexport.comparison import Progress, check_decoder, compare, scope_of
from diffexport.engines.header import check_header
from diffexport.engines.record import engines_of, stale
from diffexport.errors import BackendError, BundleError, DiffexportError, EngineError, PlanError
from diffexport.golden import check_golden, check_other_graphs
from diffexport.parity import coarsest, describe, holds, severity
from diffexport.plan import make_plan, ready_plans
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: what, "files" or "golden cases on ort".
        passed: whether it holds.
        detail: the figure behind it, or what is wrong.
    """

    name: str
    passed: bool
    detail: str


def verify(
    path: str | Path,
    backends: Sequence[str] = ("ort",),
    *,
    module: torch.nn.Module | None = None,
    spec: ModelSpec | None = None,
    decoder: torch.nn.Module | None = None,
    options: Mapping[str, Any] | None = None,
    thorough: bool = False,
    progress: Progress | None = None,
) -> list[Finding]:
    """Check a bundle: files, certificate, plans, golden cases on each backend, and the module where it is given.

    Args:
        backends: which to run the golden cases on.
        module, spec: the checkpoint that the bundle should be of; compared as at export.
        decoder: the decoder that the bundle should hold, compared likewise.
        options: of the backends; results of one that computes in a coarser ``precision`` are held to that one's limits.
        thorough: compare whole runs at every batch, as export does for small models.

    Returns:
        What was checked, in order. It stops at files that differ from the manifest, since nothing after that means much.

    Raises:
        BundleError: there is no bundle at all.
        BackendError: a backend that was named does not exist or is not installed.
    """
    report = progress or (lambda _what, _part: None)
    report("checking files", 0.0)
    if not Path(path).is_dir():
        Bundle.open(path)  # says what is there instead
    try:
        bundle = Bundle.open(path)
    except BundleError as error:
        return [Finding("files", False, str(error))]
    total = sum(entry.size for entry in bundle.manifest.files.values())
    findings = [Finding("files", True, f"{len(bundle.manifest.files)} files, {total / 1e6:.1f} MB, match the manifest")]
    findings += [_certificate(bundle), _plans(bundle), *_engines(bundle)]
    for index, backend in enumerate(backends):
        report(f"golden cases on {backend}", 0.1 + 0.3 * index / len(backends))
        findings.append(golden_finding(bundle, backend, module, decoder, **(options or {})))
    findings.append(_other_graphs(bundle))
    if module is not None and spec is not None:
        findings += _against(bundle, module, spec, decoder, thorough, lambda what, part: report(what, 0.4 + 0.6 * part))
    report("done", 1.0)
    return findings


def _certificate(bundle: Bundle) -> Finding:
    try:
        certificate = bundle.certificate()
    except BundleError as error:
        return Finding("certificate", False, str(error))
    failed = [m for m in certificate.measurements if not m.passed]
    if failed or not certificate.passed:
        return Finding("certificate", False, f"exported with --allow-mismatch: {_worst(failed)}")
    precision = bundle.manifest.precision
    broken = [m for m in certificate.measurements if not holds(m, precision)]
    if broken:
        return Finding(
            "certificate", False, f"says passed of what is beyond the limits of {precision}: {_worst(broken)}"
        )
    if not certificate.measurements or certificate.precision != precision:
        return Finding("certificate", False, f"is not one of a bundle in {precision}; export the model again")
    return Finding(
        "certificate",
        True,
        f"{len(certificate.measurements)} comparisons at export; {_worst(certificate.measurements)}",
    )


def _plans(bundle: Bundle) -> Finding:
    """The ready-made plans are those of the manifest's schedule."""
    try:
        plans = bundle.plans()
        missing = sorted(ready_plans(bundle.spec).keys() - plans.keys())
    except (BundleError, PlanError) as error:
        return Finding("plans", False, str(error))
    if missing:
        return Finding("plans", False, f"plan {missing[0]} is missing; export again")
    names = [name for name in plans if not name.endswith(".x_scale")]
    for name in names:
        try:
            wrong = not _follows(bundle.spec, plans, name)
        except (PlanError, KeyError, ValueError) as error:
            return Finding("plans", False, f"plan {name} cannot be checked ({error}); export again")
        if wrong:
            return Finding("plans", False, f"plan {name} is not the one of this model's schedule; export again")
    return Finding("plans", True, f"{len(names)} plans follow from the schedule")


def _engines(bundle: Bundle) -> list[Finding]:
    """Each engine is the file that its record describes, built from this bundle's graph and weights."""
    engines, problems = engines_of(bundle)
    for engine in engines:
        outdated = stale(bundle, engine)
        try:
            engine.check_file()
            check_header(engine)
        except EngineError as error:
            problems.append(str(error))
        if outdated:
            problems.append(f"{engine.path}: {outdated}; build again with `diffx build`")
    if problems:
        return [Finding("engines", False, problems[0])]
    if not engines:
        return []
    return [Finding("engines", True, f"{len(engines)} engines are as recorded, of these graphs and weights")]


def _follows(spec: ModelSpec, plans: Tensors, name: str) -> bool:
    sampler, _, steps = name.rpartition(".")
    plan = make_plan(spec, sampler, int(steps))
    pairs = (plans[name], plan.rows), (plans[f"{name}.x_scale"], np.array([plan.x_scale]))
    return all(a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in pairs)


def _other_graphs(bundle: Bundle) -> Finding:
    """The graphs that no backend of this package samples with: they are there for people's own programs."""
    name, manifest = "golden cases of the other graphs", bundle.manifest
    try:
        measurements = check_other_graphs(
            bundle.path, bundle.spec, bundle.golden(), manifest.precision, manifest.decoder
        )
    except DiffexportError as error:
        return Finding(name, False, str(error))
    return _finding(name, measurements)


def golden_finding(
    bundle: Bundle,
    backend: str,
    module: torch.nn.Module | None = None,
    decoder: torch.nn.Module | None = None,
    **options: Any,
) -> Finding:
    """The golden cases on one backend, with options of its own; see ``verify``."""
    name = f"golden cases on {backend}" + "".join(f", {option} {value}" for option, value in options.items())
    precision = coarsest(bundle.manifest.precision, options.get("precision") or "fp32")
    if backend == "torch":
        options |= {"module": module, "decoder": decoder}
    session = open_session(bundle, backend, selftest=False, **options)
    try:
        measurements = check_golden(session, bundle.spec, bundle.golden(), precision, bundle.manifest.decoder)
    except (DiffexportError, KeyError, ValueError) as error:
        if isinstance(error, BackendError):
            raise
        return Finding(name, False, f"{type(error).__name__}: {error}")
    finally:
        session.close()
    return _finding(name, measurements)


def _against(
    bundle: Bundle,
    module: torch.nn.Module,
    spec: ModelSpec,
    decoder: torch.nn.Module | None,
    thorough: bool,
    progress: Progress,
) -> list[Finding]:
    """The bundle is of this module: same facts, same weights, same results."""
    from diffexport.backends.torch import TorchSession

    manifest = bundle.manifest
    told = [name for name in spec.__struct_fields__ if name != "architecture"]
    differing = [name for name in told if getattr(spec, name) != getattr(manifest.model, name)]
    facts = (
        Finding("facts of the checkpoint", True, "are those of the manifest")
        if not differing
        else Finding(
            "facts of the checkpoint",
            False,
            f"{differing[0]}: the checkpoint says {getattr(spec, differing[0])!r}, "
            f"the bundle {getattr(manifest.model, differing[0])!r}",
        )
    )
    findings = [facts, _source("weights of the checkpoint", module, manifest.source)]
    if decoder is not None and manifest.decoder is None:
        findings.append(Finding("weights of the decoder", False, "the bundle has no decoder"))
    elif decoder is not None and manifest.decoder is not None:
        findings.append(_source("weights of the decoder", decoder, manifest.decoder.source))
    if spec.shape != manifest.model.shape or spec.num_classes != manifest.model.num_classes:
        return findings
    scope = scope_of(manifest.parameters, manifest.defaults.batch, manifest.max_batch, whole=thorough or None)
    session = open_session(bundle, "ort")
    try:
        pair = (decoder, manifest.decoder) if decoder is not None and manifest.decoder is not None else None
        reference = TorchSession(module, spec, pair, remembers=True)
        compared = compare(reference, session, spec, manifest.precision, scope, manifest.defaults, progress)
        if pair is not None:
            compared.measurements += check_decoder(reference, session, spec, compared, manifest.precision)
    finally:
        session.close()
    return [*findings, _finding("results beside PyTorch's", compared.measurements)]


def _source(name: str, module: torch.nn.Module, digest: str) -> Finding:
    from diffexport.exporter.write import weights_digest

    same = weights_digest(module) == digest
    return Finding(name, same, "are those exported" if same else "are not those that were exported")


def _finding(name: str, measurements: Sequence[Measurement]) -> Finding:
    failed = [m for m in measurements if not m.passed]
    if failed:
        return Finding(name, False, f"{len(failed)} of {len(measurements)} differ: {_worst(failed)}")
    return Finding(name, True, f"{len(measurements)} comparisons; {_worst(measurements)}")


def _worst(measurements: Sequence[Measurement]) -> str:
    if not measurements:
        return "no measurement was kept"
    return "worst " + describe(max(measurements, key=severity))
