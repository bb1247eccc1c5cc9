"""metrics.jsonl and TensorBoard of a run."""

import json
import pathlib
import time

import numpy as np
from tensorboardX import SummaryWriter


class Log:
    """metrics.jsonl and TensorBoard of a run, and the averages that go into them."""

    def __init__(self, workdir: pathlib.Path, step: int):
        """Opens the logs at `step`; what an interrupted run wrote past it is dropped."""
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        self.tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        self.window = []
        self.restart_clock()

    def restart_clock(self):
        """Starts timing anew, after something that is no training."""
        self.clock, self.timed = time.perf_counter(), 0

    def append(self, metrics: dict[str, float]):
        self.window.append(metrics)
        self.timed += 1

    def flush(self, step: int, batch_size: int, flops: float | None) -> dict:
        """Writes the averages since the last flush, with the speed; returns them."""
        numbers = {f"train/{name}": float(np.mean([m[name] for m in self.window])) for name in self.window[0]}
        if self.timed:
            seconds = (time.perf_counter() - self.clock) / self.timed
            numbers["train/pairs_per_sec"] = batch_size / seconds
            if flops:
                numbers["train/tflops_per_device"] = flops / seconds / 1e12
        self.write(step, numbers)
        self.window = []
        self.restart_clock()
        return numbers

    def write(self, step: int, numbers: dict):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, number in numbers.items():
            self.tensorboard.add_scalar(name, number, step)

    def close(self):
        self.tensorboard.close()
