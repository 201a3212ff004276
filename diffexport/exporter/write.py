"""From a module and its spec to a bundle that has been checked against the module before anyone sees it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from diffexport.bundle import (
    CERTIFICATE,
    GOLDEN,
    HALF,
    MANIFEST,
    PLANS,
    SCHEMA,
    SUFFIX,
    WEIGHTS,
    Bundle,
    Certificate,
    Decoder,
    Defaults,
    Manifest,
    Precision,
    Quantization,
    entry_of,
    sha256_of,
    write_json,
    write_tensors,
)
from diffexport.comparison import Progress, scope_of
from diffexport.errors import ExportError, ParityError
from diffexport.files import replacing_folder, scratch_folder, writing
from diffexport.parity import check
from diffexport.plan import default_sampler, ready_plans
from diffexport.spec import DecoderSpec, ModelSpec

if TYPE_CHECKING:
    import torch

    from diffexport.exporter.certify import Certifier
    from diffexport.exporter.compose import Traced
    from diffexport.exporter.forecast import Forecast
    from diffexport.exporter.islands import Coarsening, Halving
    from diffexport.exporter.quantize import Quantizer
    from diffexport.plan import Plan

AUTO = "auto"
"""The word that asks for a search in place of a layer's pattern."""

INT8_PSNR = 30.0
"""PSNR in dB that the runs of an int8 bundle have to reach: the limit and 5 dB for what other runtimes add to it."""

MOST_INT8 = 1 << 31
"""Bytes of fp32 weights that cannot become int8: ONNX Runtime's quantizer keeps them inside one message of protobuf."""


def export(
    module: torch.nn.Module,
    spec: ModelSpec,
    out: str | Path,
    *,
    decoder: tuple[torch.nn.Module, DecoderSpec] | None = None,
    precision: Precision = "fp32",
    keep_fp32: Iterable[str] = (),
    int8_psnr: float = INT8_PSNR,
    max_batch: int = 16,
    defaults: Defaults | None = None,
    plans: Iterable[str] = (),
    allow_mismatch: bool = False,
    thorough: bool | None = None,
    progress: Progress | None = None,
    on_forecast: Callable[[Forecast], None] | None = None,
) -> Bundle:
    """Trace a network, write a bundle, and compare it with PyTorch before it takes its place.

    Args:
        module: the network F, called as ``module(x, c_noise, label)``; without ``label`` where the spec has none.
        spec: what the module is.
        out: the folder to write; ``.diffx`` is its usual suffix.
        decoder: what makes images of the samples, where these are latents, and its spec; called as
            ``decoder(latents)`` with latents (N, C, h, w) of any sides.
        precision: of the network's tensors; what else stays fp32 is told in ``diffexport.exporter.precision``.
        keep_fp32: of a half or int8 network, patterns of layers that stay fp32, such as ``blocks.*.mlp``; "auto" searches
            the fewest where the checks fail without, which int8 always does.
        int8_psnr: the PSNR in dB that every compared run of an int8 bundle has to reach; the layers that cost most stay
            fp32 until it does.
        max_batch: the largest batch to check, and to plan engines for.
        defaults: sampler, steps, guidance and batch of a run that does not say; see ``default_sampler``.
        plans: more ready-made plans, each ``NAME:STEPS``.
        allow_mismatch: write the bundle, marked, even where a parity check fails.
        thorough: compare whole runs at every batch; by default for models up to 10 M parameters.
        progress: called with what is being done.
        on_forecast: called with what the export will take, before it begins.

    Returns:
        The bundle, opened.

    Raises:
        ExportError: the module cannot be traced, or the bundle cannot be written, for one because the disk lacks room.
        ParityError: the bundle differs from the module by more than its precision allows.
    """
    from diffexport.backends.torch import TorchSession
    from diffexport.exporter.certify import Certifier
    from diffexport.exporter.forecast import check_disk, forecast
    from diffexport.exporter.islands import Halving
    from diffexport.probes import default_plan

    if not math.isfinite(int8_psnr):
        raise ExportError(f"int8_psnr {int8_psnr}: expected a number of dB")
    if max_batch < 1:
        raise ExportError(f"max_batch {max_batch}: expected at least 1")
    report = progress or (lambda _what, _part: None)
    out = Path(out)
    defaults = defaults or Defaults(sampler=default_sampler(spec), batch=min(8, max_batch))
    ready = ready_plans(spec, plans)
    defaults.plan(spec)  # a default run that cannot be is said before the work
    if out.exists() and not (out / MANIFEST).is_file():
        raise ExportError(f"{out}: exists and is not a bundle; choose another --out or remove it")

    if decoder is not None and len(spec.shape) != 3:
        raise ExportError(f"decoder: the samples have shape {spec.shape}, expected latents (C, h, w)")

    if precision == "int8" and 4 * parameters_of(module) >= MOST_INT8:
        raise ExportError(
            f"int8: {4 * parameters_of(module) / 1e9:.1f} GB of fp32 weights, which the quantizer holds in one message of"
            " at most 2.1 GB; export in fp16, bf16 or fp32"
        )
    needed = forecast(module, spec, decoder, precision)
    check_disk(out, needed)
    if on_forecast is not None:
        on_forecast(needed)

    def traced() -> Traced:
        report("tracing the network", 0.0)
        return _trace(module, spec, decoder)

    scope = scope_of(parameters_of(module), defaults.batch, max_batch, thorough)
    reference = TorchSession(module, spec, decoder, remembers=True)
    certifier = Certifier(reference, spec, decoder is not None, precision, scope, defaults, report)
    keep, auto = tuple(pattern for pattern in keep_fp32 if pattern != AUTO), AUTO in keep_fp32
    with writing(out, ExportError, "; nothing was left behind"), replacing_folder(out) as work:
        attempts, advice = _Attempts(work, certifier), ""

        if precision == "int8":
            plan = default_plan(spec, defaults, guided=True)
            with scratch_folder(out) as folder:
                spilled = traced().spilled(folder)
                quantizer = _quantizer(module, spilled, folder, plan, keep, report)
                quantizer.measure(lambda what, part: report(what, 0.3 + 0.1 * part))
                more = attempts.fewest_kept(quantizer, report, psnr=int8_psnr)
                keep += more
            quantization = Quantization(budget=int8_psnr, layers=quantizer.layers_beside(more))
            attempts.certificate = msgspec.structs.replace(attempts.certificate, quantization=quantization)
        else:
            attempts.make(traced().lowered(precision, keep))
        if not attempts.certificate.passed and precision in HALF and (auto or not allow_mismatch):
            with scratch_folder(out) as folder:
                halving = Halving(traced().spilled(folder), precision, keep)
                if auto:
                    keep += attempts.fewest_kept(halving, report)
                else:
                    advice = _advice(halving)
        certificate = attempts.certificate
        if not certificate.passed and not allow_mismatch:
            _refuse(certificate, advice)
        write_tensors(work / PLANS, ready)
        listed = (WEIGHTS, *(f"{name}.onnx" for name in attempts.graphs), PLANS, GOLDEN)
        manifest = Manifest(
            schema=SCHEMA,
            name=out.name.removesuffix(SUFFIX),
            model=spec,
            precision=precision,
            keep_fp32=keep,
            parameters=parameters_of(module),
            max_batch=max_batch,
            widest=attempts.widest,
            defaults=defaults,
            source=weights_digest(module),
            files={name: entry_of(work / name) for name in listed},
            tools={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
            decoder=_entry_of_decoder(*decoder) if decoder is not None else None,
        )
        write_json(work / MANIFEST, manifest)
        certificate = msgspec.structs.replace(certificate, manifest_sha256=sha256_of(work / MANIFEST))
        write_json(work / CERTIFICATE, certificate)
    report("done", 1.0)
    return Bundle.open(out)


class _Attempts:
    """Graphs in one folder, one attempt after the other, each compared with PyTorch.

    Attributes:
        widest: of the network; see ``Manifest``.
        graphs, certificate: of the last one.
    """

    widest: int | None
    graphs: list[str]
    certificate: Certificate

    def __init__(self, work: Path, certifier: Certifier) -> None:
        self._work, self._certifier = work, certifier

    def make(self, traced: Traced) -> Certificate:
        """Write what was traced, which is used up, and compare it."""
        from diffexport.exporter.compose import write_graphs

        self.widest = traced.widest
        self.graphs = write_graphs(traced, self._work, self._certifier.precision)
        self.certificate = self._certifier.certify(self._work)
        return self.certificate

    def fewest_kept(self, coarsening: Coarsening, report: Progress, psnr: float = -math.inf) -> tuple[str, ...]:
        """Make what holds every limit, and ``psnr`` in every run, with the fewest layers in fp32; these layers."""
        from diffexport.exporter.islands import fewest_kept

        def holds(kept: Sequence[str]) -> bool:
            found = self.make(coarsening.traced(kept))
            return found.passed and all(m.psnr is None or m.psnr >= psnr for m in found.measurements)

        return fewest_kept(coarsening, holds, lambda what, part: report(what, 0.4 + 0.5 * part))


def _trace(module: torch.nn.Module, spec: ModelSpec, decoder: tuple[torch.nn.Module, DecoderSpec] | None) -> Traced:
    from diffexport.exporter.compose import Traced
    from diffexport.exporter.trace import trace_decoder, trace_network

    network = trace_network(module, spec)
    return Traced(network, spec, (trace_decoder(*decoder, spec.shape[0]), decoder[1]) if decoder is not None else None)


def _quantizer(
    module: torch.nn.Module, spilled: Traced, folder: Path, plan: Plan, keep: Sequence[str], report: Progress
) -> Quantizer:
    """A quantizer of what was traced, calibrated on runs of the module."""
    from diffexport.backends.torch import TorchSession
    from diffexport.exporter.precision import check_patterns
    from diffexport.exporter.quantize import Quantizer, visited_states

    check_patterns(keep, spilled.layers)
    feeds = visited_states(
        TorchSession(module, spilled.spec), spilled.spec, plan, lambda what, part: report(what, 0.1 + 0.1 * part)
    )
    return Quantizer(spilled, folder, feeds, keep, lambda what, part: report(what, 0.2 + 0.1 * part))


def _advice(halving: Halving) -> str:
    """What to try where a half bundle fails its checks, naming the layer that leaves float16."""
    found = halving.overflows() if halving.precision == "fp16" else []
    return "".join(f"; {first}" for first in found[:1]) + f"; --keep-fp32 {AUTO} finds the layers that must stay fp32"


def _entry_of_decoder(module: torch.nn.Module, spec: DecoderSpec) -> Decoder:
    return Decoder(**msgspec.structs.asdict(spec), parameters=parameters_of(module), source=weights_digest(module))


def _refuse(certificate: Certificate, advice: str) -> None:
    try:
        check(certificate.measurements)
    except ParityError as error:
        raise ParityError(
            f"{error}{advice}. No bundle was written; --allow-mismatch writes it all the same, marked"
        ) from None


def parameters_of(module: torch.nn.Module) -> int:
    """How many parameters a module has."""
    return sum(p.numel() for p in module.parameters())


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 over the names, shapes and values of a module's state, which tells whether two checkpoints are the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().contiguous().reshape(-1).numpy()).cast("B"))
    return digest.hexdigest()
