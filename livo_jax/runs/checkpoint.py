"""Checkpoints of a run: Orbax, asynchronous. The step is in the state, and the data order follows from it.

What asks a run to save and end, SIGTERM and Ctrl-C, is here too.
"""

import contextlib
import json
import math
import re
import signal
import threading
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from livo_jax.processes import ending_together
from livo_jax.training.step import norms

FORMAT = 1  # of what a checkpoint holds: {"state": step, params, opt_state, perhaps ema}; 0 had no checksum
PAUSES = 1, 5  # seconds after a read that failed, before it is tried again
MISSING = FileNotFoundError, NotADirectoryError, IsADirectoryError
# By which TensorStore tells of disks, networks, rights and memory; of what it reads it says other things.
PASSING = re.compile("ABORTED|CANCELLED|DEADLINE_EXC|INTERNAL|PERMISSION|RESOURCE_EXH|UNAUTHENTIC|UNAVAILABLE|UNKNOWN")


@jax.jit
def checksum(state: dict) -> jax.Array:
    """Of the bits of 32-bit arrays, uint32: a sum of integers, the same on any mesh. Orbax has none of its data."""
    return sum(jnp.sum(x.view(jnp.uint32), dtype=jnp.uint32) for x in jax.tree.leaves(state))


def chain(error: BaseException) -> list[BaseException]:
    """The error, and what it came from, to the first."""
    found = [error]
    while cause := found[-1].__cause__ or found[-1].__context__:
        found.append(cause)
    return found


def reason(error: BaseException) -> str:
    """In a line: what comes after it is TensorStore's own state."""
    first = chain(error)[-1]
    return f"{type(first).__name__}: {first}".partition("\n")[0].partition(" [source locations=")[0]


def is_damage(error: BaseException) -> bool:
    """Whether an error of a read is certain to be the checkpoint's: after any other it may be read another time."""
    errors = chain(error)
    passing = [one for one in errors if isinstance(one, OSError) and not isinstance(one, MISSING)]
    passing += [one for one in errors if PASSING.match(str(one))]
    return not passing and isinstance(errors[-1], (ValueError, KeyError, *MISSING))


class Checkpoints:
    """The checkpoints/<step>/ folders of a workdir."""

    def __init__(self, workdir: epath.Path, keep: int = 2):
        """Opens them; `keep`: how many stay. Nothing is made before the first is saved."""
        self.directory = workdir / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False, lightweight_initialize=True)
        handlers = {"state": ocp.StandardCheckpointHandler()}
        self.manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def latest_step(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: dict):
        """Starts writing `state`, unless that step is there.

        Raises:
            OSError: the one before could not be written, as on a full disk.
        """
        if step == self.latest_step():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._writing(
            lambda: self.manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state)),
                custom_metadata={"format": FORMAT, "checksum": int(checksum(state))},
            )
        )

    def restore(self, state: dict, set_aside: bool = False, step: int | None = None) -> dict:
        """The newest checkpoint that can be read, in the shapes, dtypes and shardings of `state`.

        Args:
            step: the newest to look at; any if None.
            set_aside: renames newer ones, which are damaged, so that training can write theirs.

        Raises:
            ValueError: the newest is of a newer livo_jax; or none can be read: they are damaged, or hold another
                state: another model's, or another optimizer's.
            OSError: the newest cannot be read now, and is not known to be damaged.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)))
        problems = {}
        steps = [saved for saved in self.manager.all_steps() if step is None or saved <= step]
        for step in sorted(steps, reverse=True):
            place = self.directory / str(step)
            found, restored, error = self._read(step, args)
            if error:
                problems[step] = error
            elif found["format"] > FORMAT:
                raise ValueError(f"{place} has format {found['format']}, newer than ours, {FORMAT}: update livo_jax")
            elif found["format"] > 0 and int(checksum(restored)) != found["checksum"]:
                problems[step] = ValueError("its numbers are not those that were saved")
            elif not all(math.isfinite(norm) for norm in jax.jit(norms)(restored).values()):  # as were saved once
                problems[step] = ValueError("its numbers are not finite")
            else:
                break
        else:
            newest, error = next(iter(problems.items()))
            raise ValueError(
                f"{self.directory / str(newest)} does not fit this run: it is damaged, or was made with another"
                f" config.model, config.train.ema_decay or train_embeddings: {error}"
            ) from error
        for damaged, error in problems.items():
            place = self.directory / str(damaged)
            logging.warning("%s is damaged, step %d is used in its place: %s", place, step, reason(error))
            if set_aside:
                self.set_aside(damaged)
        return restored

    def _read(self, step: int, args):
        """A checkpoint's metadata and state, and None; or what is certainly wrong with it. In every process the same.

        Raises OSError where it cannot be read for another reason, after some tries.
        """
        place = self.directory / str(step)
        for pause in (*PAUSES, None):
            found, restored, error = {}, None, None
            try:
                metadata = self.manager.metadata(step)
                if metadata.init_timestamp_nsecs is None:  # Orbax does not say why
                    written = (place / "_CHECKPOINT_METADATA").read_text(encoding="utf-8")
                    if "init_timestamp_nsecs" in json.loads(written):
                        raise OSError("its metadata could not be read")
                    raise ValueError("its metadata is damaged")
                found = {"format": 0} | metadata.custom_metadata
                if found["format"] <= FORMAT:
                    restored = self.manager.restore(step, args=args)["state"]
            except Exception as problem:  # Orbax and TensorStore raise nearly every type
                error = problem
            failed = multihost_utils.process_allgather(error is not None).any()
            if not multihost_utils.process_allgather(error is not None and not is_damage(error)).any():
                return found, restored, (error or ValueError("another process cannot read it")) if failed else None
            if pause:
                time.sleep(pause)
        error = error or OSError("another process cannot read it")
        raise OSError(
            f"{place} cannot be read now, which is no sign of damage: {reason(error)}. Start the same command again"
            " when it can; to go on from an earlier step, move it to another folder"
        ) from error

    def set_aside(self, step: int):
        """Renames a damaged checkpoint, so that nothing reads it and nothing is lost."""
        names, name, number = {path.name for path in self.directory.iterdir()}, f"{step}.damaged", 1
        while name in names:
            name, number = f"{step}.damaged.{number}", number + 1
        multihost_utils.sync_global_devices("looked")  # in every process the names are those of before
        with ending_together():
            if jax.process_index() == 0:
                (self.directory / str(step)).rename(self.directory / name)
        self.manager.reload()

    def wait(self):
        """Returns when everything is on disk. Raises OSError if it could not be written."""
        self._writing(self.manager.wait_until_finished)

    def close(self):
        self.wait()
        self.manager.close()

    def _writing(self, act):
        try:
            act()
        except Exception as error:  # of many types, and from another thread
            raise OSError(
                f"a checkpoint could not be written to {self.directory}: {error}. Make room there and start the same"
                f" command again: it goes on from step {self.latest_step() or 0}"
            ) from error


class Terminated(BaseException):
    """A signal came."""


class Termination:
    """SIGTERM, Ctrl-C (SIGINT) or a closed terminal (SIGHUP), which ask a run to save and end; as a context manager.

    They are noticed between steps, and end the work within `at_once`. A further Ctrl-C ends the process at once.
    """

    def __init__(self, start: int):
        """`start`: the step that the run begins after."""
        self.start, self.received, self.interruptible, self.before = start, False, False, {}
        self.signal, self.several = signal.SIGTERM, jax.process_count() > 1

    def __enter__(self):
        # With several processes JAX has SIGTERM, and has all of them stop at the step after the last that any has
        # asked about: after 0 if it came before, and after the start if while the step was compiled.
        if self.several:
            self.received = any([multihost_utils.reached_preemption_sync_point(step) for step in (1, self.start)])
        ours = (signal.SIGINT, signal.SIGHUP) if self.several else (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread():
            # What is ignored stays so, as Ctrl-C is in the background of a script, and SIGHUP by nohup.
            ours = [one for one in ours if signal.getsignal(one) is not signal.SIG_IGN]
            self.before = {one: signal.signal(one, self._receive) for one in ours}
        return self

    def __exit__(self, *_):
        for one, handler in self.before.items():
            signal.signal(one, handler)

    def _receive(self, number: int, _):
        self.signal = signal.Signals(number)
        if signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.several:
            signal.raise_signal(signal.SIGTERM)  # to JAX, for all processes
        else:
            self.received = True
        if self.interruptible:
            raise Terminated

    @contextlib.contextmanager
    def at_once(self):
        """Work that may be left where it is."""
        try:
            self.interruptible = not self.several
            yield
        except Terminated:
            pass
        finally:
            self.interruptible = False

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; every process gets the same answer."""
        return self.received or (self.several and multihost_utils.reached_preemption_sync_point(step))
