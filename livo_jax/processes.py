"""Several processes of one run."""

import contextlib
import linecache
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils

REASON = 2000  # bytes of an error that other processes are told


def say(text: str):
    """Prints, from process 0."""
    if jax.process_index() == 0:
        print(text)


@contextlib.contextmanager
def ending_together():
    """Waits, at its end, until every process is there, and has all of them end with an error where one does.

    One that ended alone would leave the others waiting for it, for minutes. Within, no process waits for another.

    Raises:
        RuntimeError: other processes raised something, and what; one that did raises its own.
    """
    if jax.process_count() == 1:
        yield
        return
    failure, reason = None, b""
    try:
        yield
    except Exception as error:  # of any type: it is raised below, when the others know
        failure, reason = error, f"{type(error).__name__}: {error}".encode()[:REASON]
    padded = np.frombuffer(reason.ljust(REASON, b"\0"), np.uint8)
    reasons = [row.tobytes().rstrip(b"\0") for row in multihost_utils.process_allgather(padded)]
    if failure:
        raise failure
    if any(reasons):
        told = [f"process {i}: {text.decode(errors='replace')}" for i, text in enumerate(reasons) if text]
        raise RuntimeError("\n".join(told))


def is_raised_here(error: Exception) -> bool:
    """Whether an error comes from a raise statement of livo_jax or data_tools, and of no library below them."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    package = frame.f_globals["__name__"].split(".")[0]
    own = package in ("livo_jax", "data_tools", "__main__")
    return own and linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
