"""Contenders with something to be seen in a benchmark, in a module that is quick to import in their processes."""

import os
import signal
import time

from diffexport.backends import open_session


def fast(bundle):
    return open_session(bundle, "ort")


def slow(bundle):
    """Every step takes 20 ms more."""
    session = open_session(bundle, "ort")
    take = session.step

    def step(row, z=None):
        time.sleep(0.02)
        take(row, z)

    session.step = step
    return session


def dying(bundle):
    """Its process is killed when it takes its first turn."""
    session = open_session(bundle, "ort")
    take, begin, begun = session.step, session.begin, []

    def count(*args, **options):
        begun.append(None)
        begin(*args, **options)

    def step(row, z=None):
        if len(begun) > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        take(row, z)

    session.begin, session.step = count, step
    return session


def broken(bundle):
    raise RuntimeError("out of paper")
