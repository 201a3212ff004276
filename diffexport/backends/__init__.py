"""Backends by name. Importing this package loads no runtime; opening a session loads the one it names."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from diffexport.backends.session import Session
from diffexport.errors import BackendError
from diffexport.telemetry import switch_off

if TYPE_CHECKING:
    from diffexport.bundle import Bundle


switch_off()  # before any module of this package imports a runtime


@dataclass(frozen=True)
class Backend:
    """Where a backend's code is and what it needs.

    Attributes:
        module: the module of this package with a function ``open_session(bundle, **options)``, and a function
            ``unavailable(**fixed)`` where more than a package is needed.
        package: the import name of the runtime.
        install: what to type where it is missing.
        runs: what it runs on, for people.
        fixed: options that make it this backend, where several share a module.
        selftest: its graphs run their golden cases before their first use.
    """

    module: str
    package: str
    install: str
    runs: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    selftest: bool = False

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def problem(self) -> str | None:
        """Why it cannot be used here, and what to do, or None."""
        if not self.installed:
            return f"{self.package} is not installed; {self.install}"
        try:
            module = self.load()
        except (ImportError, OSError) as error:
            return f"cannot be loaded ({error})"
        unavailable = getattr(module, "unavailable", None)
        return cast(str | None, unavailable(**self.fixed)) if unavailable is not None else None

    def load(self) -> ModuleType:
        """Its module, which loads the runtime."""
        return importlib.import_module(f"diffexport.backends.{self.module}")


BACKENDS: dict[str, Backend] = {
    "ort": Backend("onnxruntime", "onnxruntime", "pip install onnxruntime", "ONNX Runtime on the CPU"),
    "ort-cuda": Backend(
        "onnxruntime_gpu",
        "onnxruntime",
        "pip install onnxruntime-gpu",
        "ONNX Runtime on an NVIDIA GPU",
        {"provider": "cuda"},
        selftest=True,
    ),
    "ort-trt": Backend(
        "onnxruntime_gpu",
        "onnxruntime",
        "pip install onnxruntime-gpu",
        "ONNX Runtime on an NVIDIA GPU, by TensorRT",
        {"provider": "tensorrt"},
        selftest=True,
    ),
    "openvino": Backend(
        "openvino", "openvino", "pip install 'diffexport[openvino]'", "OpenVINO on the CPU, fp32, bf16 and int8"
    ),
    "trt": Backend(
        "tensorrt",
        "tensorrt",
        "pip install 'diffexport[trt]'",
        "TensorRT engines on the GPU they were built on",
        {"product": "trt"},
        selftest=True,
    ),
    "trt-rtx": Backend(
        "tensorrt",
        "tensorrt_rtx",
        "pip install 'diffexport[rtx]'",
        "TensorRT engines on RTX GPUs",
        {"product": "trt-rtx"},
        selftest=True,
    ),
    "torch": Backend("torch", "torch", "pip install 'diffexport[export]'", "the PyTorch module itself on the CPU"),
}


def open_session(bundle: Bundle, backend: str, *, selftest: bool | None = None, **options: Any) -> Session:
    """Open a bundle on a backend. The backend that is named is used or an error is raised; none takes its place.

    Args:
        selftest: run each graph's golden cases before its first use; by default where a backend compiles for a GPU.

    Raises:
        BackendError: no such backend or option, its runtime is not installed, or it cannot run here.
    """
    if backend not in BACKENDS:
        close = difflib.get_close_matches(backend, list(BACKENDS), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(BACKENDS)
        raise BackendError(f"backend {backend!r}: there is none of this name; {hint}")
    entry = BACKENDS[backend]
    if not entry.installed:
        raise BackendError(f"backend {backend!r}: {entry.package} is not installed; {entry.install}")
    module = entry.load()
    parameters = inspect.signature(module.open_session).parameters
    takes = [name for name in parameters if name not in ("bundle", *entry.fixed)]
    unknown = sorted(set(options) - set(takes))
    if unknown:
        raise BackendError(f"backend {backend!r} has no option {unknown[0]!r}; it takes {', '.join(takes)}")
    session = cast(Session, module.open_session(bundle, **entry.fixed, **options))
    if not (entry.selftest if selftest is None else selftest):
        return session
    from diffexport.backends.selftest import SelfTested

    return SelfTested(session, bundle)
