"""Processes that a test interrupts."""

import signal


def hear_interrupts() -> None:
    """For ``preexec_fn``: a background job of a shell, and all that it starts, is deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
