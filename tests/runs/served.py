"""A process that runs commands one after another: python -m tests.runs.served; with HOST:PORT,2,NUMBER one of two.

Each line of its input is the arguments of a command. It answers each with a line: what the command printed, and the
error that it ended with. After the line ["die"] its process is killed when it has done a step.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from unittest import mock

ANSWER = "answer: "  # what an answer begins with: others print too
DIE = "die"


def start(*together: str, devices: int) -> subprocess.Popen:
    """A process of so many devices."""
    from tests import small_run

    return subprocess.Popen(
        [sys.executable, "-m", "tests.runs.served", *together], cwd=small_run.ROOT,
        env=small_run.environment(devices), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def send(process, arguments: list[str]):
    """Has a process run a command."""
    process.stdin.write(json.dumps(arguments) + "\n")
    process.stdin.flush()


def read_answer(process) -> tuple[str, str]:
    """What the command that was sent printed, and the error that it ended with."""
    told = ""
    while ANSWER not in told:
        told = process.stdout.readline()
        assert told, f"the process ended: {process.wait()}"
    return tuple(json.loads(told.partition(ANSWER)[2]))


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


def miss_the_dead_sooner():
    """Has sharding.join wait ten seconds for a sign of life: processes of one machine are not far."""
    import jax

    initialize = jax.distributed.initialize
    jax.distributed.initialize = lambda **given: initialize(**given | {"heartbeat_timeout_seconds": 10})


def main():
    import jax

    from livo_jax import sharding
    from livo_jax.runs import train

    sys.modules["wandb"] = None  # is not installed
    if sys.argv[1:]:
        miss_the_dead_sooner()
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
