"""An object in a process of its own, whose methods are called from here; it takes no processor time while it waits."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from diffexport.errors import BackendError, DiffexportError

GRACE = 3.0


class Worker:
    """An object that another process makes and holds.

    Args:
        make: makes the object, there; it is pickled on its way.
        environment: what the process has in its environment beside what this one has.
    """

    def __init__(self, make: Callable[[], object], environment: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, dict(environment or {})), daemon=True)
        with theirs, _interrupts_held():  # Ctrl-C reaches this process alone, which ends the others
            self._process.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, method: str) -> Any:
        """What a method returns, there.

        Raises:
            BackendError: it raised, or its process died. The worker is ended.
        """
        try:
            self._pipe.send(method)
            well, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            well, answer = False, _death(self._process.exitcode)
        if not well:
            self.end()
            raise BackendError(answer)
        return answer

    def end(self) -> None:
        """End the process; one that still works after ``GRACE`` seconds is killed. A second call does nothing."""
        self._pipe.close()
        self._process.join(GRACE)
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, make: Callable[[], object], environment: dict[str, str]) -> None:
    """Answer until the other end is closed, as it is where that process ends in whatever way."""
    os.environ.update(environment)
    held: object = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            method = pipe.recv()
            try:
                held = make() if held is None else held
                answer = True, getattr(held, method)()
            except DiffexportError as error:
                answer = False, str(error)
            except Exception as error:
                answer = False, f"{type(error).__name__}: {error}"
            pipe.send(answer)


def _death(status: int | None) -> str:
    if status is None or status >= 0:
        return f"its process ended by itself, with status {status}"
    name = signal.Signals(-status).name
    return f"its process was ended by {name}" + (", as for want of memory" if name == "SIGKILL" else "")


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back SIGINT from this thread, and for good from a process that is started meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would let SIGINT through again if it were started with the process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
