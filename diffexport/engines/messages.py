"""TensorRT's messages, of which the errors are kept for our own."""

from __future__ import annotations

from typing import Any


def error_log(trt: Any) -> Any:
    """A logger that prints nothing and keeps the first line of each error in ``errors``."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg.strip().splitlines()[0])

        def why(self) -> str:
            """What it said first since it was asked last."""
            said = self.errors[0] if self.errors else "without a reason"
            self.errors.clear()
            return said

    return ErrorLog()
