"""One of two processes that run commands together, one after another: python -m tests.runs.pair HOST:PORT,2,NUMBER.

Each line of its input is the arguments of a command. It answers each with a line: what the command printed, and the
error that it ended with. After the line ["die"] its process is killed when it has done a step.
"""

import contextlib
import io
import json
import os
import signal
import sys
from unittest import mock

ANSWER = "answer: "  # what an answer begins with: others print too
DIE = "die"


def run(arguments: list[str]):
    from tests import small_run

    printed, told = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            small_run.run_here(arguments)
        except (Exception, SystemExit) as error:
            told = f"{type(error).__name__}: {error}"
    print(ANSWER + json.dumps([printed.getvalue(), told]), flush=True)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def keep_what_is_compiled():
    """Has each process write to the compilation cache: JAX has the first alone, whose programs others cannot use."""
    from jax._src import compiler, distributed

    write = compiler._cache_write

    def write_too(*given):
        with mock.patch.object(distributed.global_state, "process_id", 0):
            write(*given)

    compiler._cache_write = write_too


def main():
    import jax

    from livo_jax import sharding
    from livo_jax.runs import train

    sys.modules["wandb"] = None  # is not installed
    sharding.join(sys.argv[1])
    keep_what_is_compiled()
    jax.devices()  # as XLA_FLAGS has them: tests.conftest has flags of its own
    for line in sys.stdin:
        arguments = json.loads(line)
        if arguments == [DIE]:
            train.check_finite = die
        else:
            run(arguments)


if __name__ == "__main__":
    main()
