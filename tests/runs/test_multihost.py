"""Several processes train and evaluate as one does."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import tiny
from tests import small_run

# eps: a key's bias has no gradient but rounding, which Adam would make as large as any.
RUN = ("--config.train.steps=2", "--config.checkpoint.every=1", "--config.train.ema_decay=0.9",
       "--config.train.eps=1e-3")  # fmt: skip
SHARDED = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.shard_frozen=True")
# The embedded world's own model, whose pictures the judge can read; few of them.
MODEL = tiny.get_config().model
EVALUATED = ("--mode=evaluate", f"--config.model={MODEL}", f"--config.value_encoder.start={MODEL}/text_encoder",
             "--config.random_weights=False", "--config.judge=shapeworld", "--config.principles=('shape',)",
             "--config.sampling.batch_size=4", "--config.eval.left_alone_images=1",
             "--config.eval.rate_images=1")  # fmt: skip
ENDLESS = ("--config.train.steps=100000", "--config.checkpoint.every=100000", "--config.train.schedule=constant")


def alone(workdir, root, *flags, devices):
    """The run of one process."""
    small_run.finish(small_run.start(root, workdir, *flags, devices=devices))
    return workdir


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_two(root, workdirs, *flags, devices=1):
    port = free_port()
    return [
        small_run.start(root, workdir, f"--distributed=localhost:{port},2,{i}", *flags, devices=devices)
        for i, workdir in enumerate(workdirs)
    ]


def assert_close(workdir, alone):
    """Equal but for the order in which numbers are added."""
    for ours, theirs in zip(small_run.metrics(workdir), small_run.metrics(alone), strict=True):
        for name, number in theirs.items():
            np.testing.assert_allclose(ours[name], number, rtol=1e-3, atol=1e-3, err_msg=f"{name}, {theirs['step']}")
    ours, theirs = small_run.final(workdir), small_run.final(alone)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-3, atol=1e-4, err_msg=name)


def test_two_processes_train_as_one(root, tmp_path):
    """By rows and sharded, beside one that divides rows alone. And one process goes on with what two have begun."""
    workdir, whole = tmp_path / "two", alone(tmp_path / "one", root, *RUN, devices=8)
    first, second = start_two(root, (workdir, workdir), *RUN, *SHARDED, devices=4)
    out = small_run.finish(first)
    assert f"{workdir} is trained" in out and "is trained" not in small_run.finish(second), "process 0 alone prints"
    assert_close(workdir, whole)

    shutil.rmtree(workdir / "checkpoints" / "2")
    assert "at step 1\n" in small_run.finish(small_run.start(root, workdir, *RUN, devices=8))
    assert_close(workdir, whole)


def test_two_processes_evaluate_as_one(root, tmp_path):
    """The same numbers of the same images."""
    workdir, whole = tmp_path / "two", alone(tmp_path / "one", root, *EVALUATED, devices=2)
    first, second = start_two(root, (workdir, workdir), *EVALUATED)
    assert "report: " in small_run.finish(first) and "report: " not in small_run.finish(second)
    ours, theirs = (json.loads((place / "eval" / "results.json").read_text())["rows"] for place in (workdir, whole))
    assert {(row["method"], row["metric"]) for row in ours} >= {("base", "D1"), ("livo", "D1"), ("livo", "recognised")}
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for one, other in zip(ours, theirs):
        # Bytes of an image may differ by one.
        assert one.pop("mean") == pytest.approx(other.pop("mean"), abs=1e-3), one
        assert one.pop("ci95") == pytest.approx(other.pop("ci95"), abs=1e-3)
        assert one == other

    def drawn(place):
        return sorted(file.name for file in place.glob("eval/drawn/*/*.png"))

    assert drawn(workdir) == drawn(whole) and drawn(whole)


def test_a_workdir_that_is_not_shared_is_refused(root, tmp_path):
    for process in start_two(root, (tmp_path / "a", tmp_path / "b"), *RUN):
        _, err = process.communicate(timeout=120)
        assert process.returncode not in (0, None)
        assert "is not shared: processes [1] do not see what process 0 writes there" in err


BEGIN = """
import sys
from etils import epath
from configs import tiny
from livo_jax import sharding
from livo_jax.runs.train import train_and_evaluate
sharding.join(sys.argv[1])
sys.modules["wandb"] = None  # is not installed
for project, place in (("livo", "run"), ("", "file/run")):
    config = tiny.get_config("smoke")
    config.log.wandb = project
    try:
        train_and_evaluate(config, epath.Path(sys.argv[2]) / place)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_what_one_process_finds_wrong_ends_both(tmp_path):
    """Process 0 alone looks for a login, and makes the workdir: the other would wait for it."""
    (tmp_path / "file").touch()
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN, f"localhost:{port},2,{i}", tmp_path],
            cwd=small_run.ROOT, env=small_run.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [small_run.finish(process).splitlines() for process in processes]
    first, second = ([line for line in output if "Error: " in line] for output in outputs)  # Gloo has lines of its own
    assert first[0].startswith("ValueError: config.log.wandb='livo': wandb is not installed")
    assert first[1].startswith("NotADirectoryError: ") and f"{tmp_path}/file/run" in first[1]
    assert second == [f"RuntimeError: process 0: {told}" for told in first]


def wait_for_steps(workdir, processes):
    file = workdir / "metrics.jsonl"
    while not (file.exists() and len(file.read_text().splitlines()) > 3):
        assert [p.poll() for p in processes] == [None, None], processes[0].communicate()
        time.sleep(0.1)


def test_a_process_that_dies_ends_the_other(root, tmp_path):
    processes = start_two(root, (tmp_path / "run",) * 2, *ENDLESS)
    wait_for_steps(tmp_path / "run", processes)
    processes[1].kill()
    processes[1].communicate()
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode not in (0, None)
    assert "unhealthy" in err or "Connection closed by peer" in err, err


def test_ctrl_c_in_one_process_stops_both_at_the_same_step(root, tmp_path):
    """It hands on a SIGTERM, by which JAX stops all."""
    processes = start_two(root, (tmp_path / "run",) * 2, *ENDLESS)
    wait_for_steps(tmp_path / "run", processes)
    processes[1].send_signal(signal.SIGINT)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [128 + signal.SIGTERM, 128 + signal.SIGINT], outputs
    (step,) = (p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"SIGTERM: step {step} is saved" in outputs[0][0]
    assert small_run.metrics(tmp_path / "run")[-1]["step"] == int(step)
