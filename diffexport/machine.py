"""What this machine is, as far as compiled code and speed depend on it."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def processor() -> str:
    """The processor's name and, where the system tells, its instruction sets: weights are packed for these."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    found = re.findall(r"^(?:model name|flags|Features|CPU part)\s*: (.*)$", told, re.MULTILINE)
    return " ".join([platform.machine(), *dict.fromkeys(found)])


def processor_name() -> str:
    """The processor's name for people."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.*)$", told, re.MULTILINE)
    return found[1] if found else platform.machine()
