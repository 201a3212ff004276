"""Backends by name. Importing this package loads no runtime; opening a session loads the one it names."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from diffexport.backends.session import Session
from diffexport.errors import BackendError

if TYPE_CHECKING:
    from diffexport.bundle import Bundle


@dataclass(frozen=True)
class Backend:
    """Where a backend's code is and what it needs.

    Attributes:
        module: the module of this package with a function ``open_session(bundle, **options)``.
        package: the import name of the runtime.
        install: what to type where it is missing.
        runs: what it runs on, for people.
    """

    module: str
    package: str
    install: str
    runs: str

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


BACKENDS: dict[str, Backend] = {
    "ort": Backend("onnxruntime", "onnxruntime", "pip install onnxruntime", "ONNX Runtime on the CPU"),
    "openvino": Backend(
        "openvino", "openvino", "pip install 'diffexport[openvino]'", "OpenVINO on the CPU, fp32, bf16 and int8"
    ),
    "torch": Backend("torch", "torch", "pip install 'diffexport[export]'", "the PyTorch module itself on the CPU"),
}


def open_session(bundle: Bundle, backend: str, **options: Any) -> Session:
    """Open a bundle on a backend. The backend that is named is used or an error is raised; none takes its place.

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
    module = importlib.import_module(f"diffexport.backends.{entry.module}")
    takes = [name for name in inspect.signature(module.open_session).parameters if name != "bundle"]
    unknown = sorted(set(options) - set(takes))
    if unknown:
        raise BackendError(f"backend {backend!r} has no option {unknown[0]!r}; it takes {', '.join(takes)}")
    return cast(Session, module.open_session(bundle, **options))
