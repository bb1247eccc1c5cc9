"""What a run tells of itself: metrics.jsonl, TensorBoard, Weights & Biases, and warnings."""

import hashlib
import importlib.util
import json
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
from absl import logging

from livo_jax.files.directories import is_remote, replacing

DEAD_FOR = 500  # steps without a live hinge after which that is said
STARVED = 0.2  # share of time spent waiting for data from which that is said


def check_wandb(config):
    """Raises ValueError where config.log.wandb names a project, and the runs of this user would not reach it.

    At a terminal it asks for the key, as wandb does. WANDB_MODE=offline and disabled want none.
    """
    if not config.log.wandb or jax.process_index() > 0:
        return
    if not importlib.util.find_spec("wandb"):
        raise ValueError(f"config.log.wandb={config.log.wandb!r}: wandb is not installed: pip install wandb")
    import wandb

    try:
        wandb.login(verify=False)  # whether there is a key; no node of a cluster need reach the server now
    except wandb.Error as error:
        raise ValueError(
            f"config.log.wandb={config.log.wandb!r}: {error} Run wandb login, set WANDB_API_KEY, or WANDB_MODE=offline"
        ) from error


def read_metrics(workdir) -> list[dict]:
    """The rows of metrics.jsonl, none where there is no such file.

    A last line that a kill or a full disk cut short is none. Raises ValueError that names any other that is damaged.
    """
    file = workdir / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is damaged, take it out: {error}") from error
    return rows


def without_torch(module: str):
    """Imports a module that would import PyTorch wherever it is installed: seconds, and memory, for nothing here."""
    if "torch" in sys.modules:
        importlib.import_module(module)
        return
    sys.modules["torch"] = None  # so that importing it fails
    try:
        importlib.import_module(module)
    finally:
        del sys.modules["torch"]


class Log:
    """The logs of a run, written by process 0, and the averages that go into them; a context manager."""

    def __init__(self, workdir, step: int, config):
        """Opens the logs at `step`; what an interrupted run wrote past it is dropped."""
        self.workdir, self.path, self.config, self.lines = workdir, workdir / "metrics.jsonl", config, []
        self.active, self.warned = jax.process_index() == 0, set()
        self.alive = dict.fromkeys(("train/active_w", "train/active_l"), step)  # the last step with a live hinge
        self.window = []
        self.restart_clock()
        # Event files and profiles cannot grow in a bucket: they are written here and copied there.
        local = tempfile.mkdtemp() if is_remote(workdir) else workdir
        self.local = pathlib.Path(local) / "tensorboard"
        if not self.active:
            return
        without_torch("tensorboardX")
        # In this thread: SummaryWriter's own dies of a full disk without a word, and then the run waits for it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        if self.path.exists():
            self.lines = [json.dumps(row) + "\n" for row in read_metrics(workdir) if row["step"] <= step]
            with replacing(self.path) as scratch:  # on a full disk the old one stays whole
                scratch.write_text("".join(self.lines), encoding="utf-8")
        self.local.mkdir(parents=True, exist_ok=True)
        self.tensorboard = EventsWriter(str(self.local / "events"))
        self.add_event(step + 1, session_log=SessionLog(status=SessionLog.START))  # what was past the step is hidden
        self.wandb = None
        if config.log.wandb:
            import wandb

            self.wandb = wandb.init(
                project=config.log.wandb, name=workdir.name, config=config.to_dict(), dir=self.local.parent,
                id=hashlib.sha256(str(workdir).encode()).hexdigest()[:16], resume="allow",
            )  # fmt: skip

    def restart_clock(self):
        """Starts timing anew, after something that is no training."""
        self.clock, self.timed, self.waited = time.perf_counter(), 0, 0.0

    def append(self, metrics: dict[str, float]):
        self.window.append(metrics)
        self.timed += 1

    def next(self, iterator):
        """The iterator's next batch; how long that takes is the metric wait_for_data."""
        start = time.perf_counter()
        batch = next(iterator)
        self.waited += time.perf_counter() - start
        return batch

    def flush(self, step: int, batch_size: int, flops: float | None, of_state: dict[str, float]) -> dict:
        """Writes the averages since the last flush, with the speed and what is told of the state; returns them."""
        averages = {name: float(np.mean([m[name] for m in self.window])) for name in self.window[0]}
        numbers = {f"train/{name}": number for name, number in (averages | of_state).items()}
        if self.timed:
            total = time.perf_counter() - self.clock
            numbers["train/pairs_per_sec"] = batch_size * self.timed / total
            numbers["train/wait_for_data"] = self.waited / total
            if flops:
                numbers["train/tflops_per_device"] = flops * self.timed / total / 1e12
        self.write(step, numbers)
        self.warn(step, numbers)
        self.window = []
        self.restart_clock()
        return numbers

    def write(self, step: int, numbers: dict):
        """Writes numbers by their names. Raises OSError where metrics.jsonl or TensorBoard's file cannot be written."""
        if not self.active:
            return
        from tensorboardX import summary

        self.lines.append(json.dumps({"step": step, **numbers}) + "\n")
        try:
            if is_remote(self.workdir):
                self.path.write_text("".join(self.lines), encoding="utf-8")  # what is in a bucket cannot grow
            else:
                with self.path.open("a") as file:
                    file.write(self.lines[-1])
            for name, number in numbers.items():
                self.add_event(step, summary=summary.scalar(name, number))
            self.tensorboard.flush()
        except OSError as error:
            raise OSError(
                f"the metrics of step {step} cannot be written to {self.workdir}: {error}. Make room there, and start"
                " the same command again: it goes on from the newest checkpoint"
            ) from error
        if self.wandb:
            self.wandb.log(numbers, step=step)
        self.publish()

    def add_event(self, step: int, **content):
        """Adds to TensorBoard's file."""
        from tensorboardX.proto.event_pb2 import Event

        self.tensorboard.write_event(Event(wall_time=time.time(), step=step, **content))

    def warn(self, step: int, numbers: dict):
        """Says once what the numbers mean where they mean trouble."""
        for name in self.alive:
            if numbers.get(name, 1) > 0:  # livo's; other losses have no hinge to die
                self.alive[name] = step
            elif step - self.alive[name] >= DEAD_FOR:
                gamma = "gamma_1" if name.endswith("w") else "gamma_2"
                self.once(
                    name,
                    f"{name} is 0 since step {self.alive[name]}: no pair misses its margin, so this hinge teaches"
                    f" nothing. Raise config.loss.{gamma}={self.config.loss[gamma]}, or stop here",
                )
        if (share := numbers.get("train/wait_for_data", 0)) > STARVED:
            self.once(
                "wait_for_data",
                f"at step {step} training waits for data {share:.0%} of the time (train/wait_for_data): train from a"
                " cache (config.data.cache=True), or give the loader more cores",
            )

    def once(self, key: str, warning: str):
        if self.active and key not in self.warned:
            self.warned.add(key)
            logging.warning(warning)

    def start_profile(self):
        """Records what the devices do until stop_profile, for TensorBoard and XProf."""
        if self.active:
            jax.profiler.start_trace(str(self.local))

    def stop_profile(self):
        if self.active:
            jax.profiler.stop_trace()
            self.publish()

    def publish(self):
        """Copies what cannot be written there to a workdir in a bucket."""
        if not is_remote(self.workdir):
            return
        self.tensorboard.flush()
        for file in self.local.rglob("*"):
            if file.is_file():
                copy = self.workdir / "tensorboard" / str(file.relative_to(self.local))
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())

    def close(self, failed: bool = False):
        """Closes the logs, as those of a run that an error ended if it `failed`."""
        if not self.active:
            return
        try:
            self.tensorboard.close()
        except OSError:
            if not failed:  # else that is told already
                raise
        self.publish()
        if self.wandb:
            self.wandb.finish(exit_code=int(failed))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close(failed=kind not in (None, SystemExit))
