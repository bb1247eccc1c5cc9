"""Checkpoints of a run: Orbax, asynchronous. The step is in the state, and the data order follows from it."""

import contextlib
import signal
import threading

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

FORMAT = 1  # of what a checkpoint holds: {"state": step, params, opt_state, perhaps ema}; 0 had no checksum


@jax.jit
def checksum(state: dict) -> jax.Array:
    """Of the bits of 32-bit arrays, uint32: a sum of integers, the same on any mesh. Orbax has none of its data."""
    return sum(jnp.sum(x.view(jnp.uint32), dtype=jnp.uint32) for x in jax.tree.leaves(state))


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
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)))
        problems = {}
        steps = [saved for saved in self.manager.all_steps() if step is None or saved <= step]
        for step in sorted(steps, reverse=True):
            place, found, error = self.directory / str(step), {}, None
            try:
                metadata = self.manager.metadata(step)
                if metadata.init_timestamp_nsecs is None:
                    raise ValueError("its metadata cannot be read")
                found = {"format": 0} | metadata.custom_metadata
                if found["format"] <= FORMAT:
                    restored = self.manager.restore(step, args=args)["state"]
            except Exception as problem:  # Orbax and TensorStore raise nearly every type, by what is damaged
                error = problem
            if multihost_utils.process_allgather(error is not None).any():
                problems[place] = error or ValueError("another process cannot read it")
            elif found["format"] > FORMAT:
                raise ValueError(f"{place} has format {found['format']}, newer than ours, {FORMAT}: update livo_jax")
            elif found["format"] > 0 and int(checksum(restored)) != found["checksum"]:
                problems[place] = ValueError("its numbers are not those that were saved")
            else:
                break
        else:
            place, error = next(iter(problems.items()))
            raise ValueError(
                f"{place} does not fit this run: it is damaged, or was made with another config.model,"
                f" config.train.ema_decay or train_embeddings: {error}"
            ) from error
        for damaged, error in problems.items():
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]  # what follows is TensorStore's own state
            logging.warning("%s is damaged, step %d is used in its place: %s", damaged, step, reason)
            if set_aside and jax.process_index() == 0:
                aside = damaged.with_name(f"{damaged.name}.damaged")
                if aside.exists():
                    aside.rmtree()
                damaged.rename(aside)
        if problems and set_aside:
            multihost_utils.sync_global_devices("set aside")
            self.manager.reload()
        return restored

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
    """SIGTERM came."""


class Termination:
    """SIGTERM, which asks a run to save and end; as a context manager, while a run can.

    It is noticed between steps, and ends the work within `at_once`.
    """

    def __init__(self, start: int):
        """`start`: the step that the run begins after."""
        self.start, self.received, self.interruptible = start, False, False

    def __enter__(self):
        # With several processes JAX has the signal, and has all of them stop at the step after the last that any
        # has asked about: after 0 if it came before, and after the start if while the step was compiled.
        if jax.process_count() > 1:
            self.received = any([multihost_utils.reached_preemption_sync_point(step) for step in (1, self.start)])
        self.ours = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self.ours:
            self.before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_):
        if self.ours:
            signal.signal(signal.SIGTERM, self.before)

    def _receive(self, *_):
        self.received = True
        if self.interruptible:
            raise Terminated

    @contextlib.contextmanager
    def at_once(self):
        """Work that may be left where it is."""
        try:
            self.interruptible = True
            yield
        except Terminated:
            pass
        finally:
            self.interruptible = False

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; every process gets the same answer."""
        return self.received or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step))
