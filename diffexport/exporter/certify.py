"""The graphs of an attempt, compared with PyTorch: a certificate, and the golden cases that travel with the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffexport.backends.onnxruntime import OnnxRuntimeSession
from diffexport.bundle import GOLDEN, HALF, Certificate, Defaults, Precision, write_tensors
from diffexport.comparison import Progress, Scope, check_decoder, check_denoiser, compare
from diffexport.golden import golden_cases
from diffexport.spec import ModelSpec

if TYPE_CHECKING:
    from diffexport.backends.torch import TorchSession


@dataclass(frozen=True)
class Certifier:
    """What every attempt to write a bundle is held to.

    Attributes:
        reference: the modules, remembering what they compute, so that another attempt costs none of it.
        decoded: whether they have a decoder.
    """

    reference: TorchSession
    spec: ModelSpec
    decoded: bool
    precision: Precision
    scope: Scope
    defaults: Defaults
    report: Progress

    def certify(self, work: Path) -> Certificate:
        """Compare the graphs in a folder with the modules, every half value rounded, and record the golden cases there."""
        spec, precision = self.spec, self.precision
        candidate = OnnxRuntimeSession(spec, work, rounded=precision in HALF, takes_turns=True)
        comparison = compare(self.reference, candidate, spec, precision, self.scope, self.defaults, self._compared)
        measurements = list(comparison.measurements)
        if self.decoded:
            self._compared("comparing with PyTorch: decoder", 1.0)
            measurements += check_decoder(self.reference, candidate, spec, comparison, precision)
        candidate.close()
        self.report("recording golden cases", 0.95)
        denoised = np.concatenate(comparison.denoised)
        cases = golden_cases(
            self.reference,
            spec,
            comparison.plan,
            comparison.final,
            denoised,
            decoded=self.decoded,
            brief=self.scope.brief,
        )
        write_tensors(work / GOLDEN, cases)
        measurements.append(check_denoiser(work / "denoiser.onnx", spec, comparison, precision))
        passed = all(m.passed for m in measurements)
        return Certificate(
            manifest_sha256="", backend="ort", precision=precision, passed=passed, measurements=measurements
        )

    def _compared(self, what: str, part: float) -> None:
        self.report(what, 0.4 + 0.5 * part)
