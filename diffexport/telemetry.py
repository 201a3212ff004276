"""What runtimes report about their users is switched off: nothing here uses the network or writes outside its place.

ONNX Runtime keeps a number for the device and a data base of events beside the user's caches as soon as it is imported,
unless a variable of the environment says no; OpenVINO and NNCF keep and send theirs by the package openvino_telemetry,
without which they go on quietly.
"""

from __future__ import annotations

import os
import sys


def switch_off() -> None:
    """To be called before a runtime is imported. A user who wants to report sets ORT_DISABLE_TELEMETRY=0."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # its import fails from now on
