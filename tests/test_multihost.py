"""Several processes train as one does: two with four devices each against one with eight."""

import shutil
import signal
import socket
import time

import numpy as np
import pytest

from tests import small_run

# eps: a key's bias has no gradient but rounding, which Adam would make as large as any.
RUN = ("--config.train.steps=4", "--config.checkpoint.every=2", "--config.train.ema_decay=0.9",
       "--config.train.eps=1e-3")  # fmt: skip
SHARDED = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.shard_frozen=True")
ENDLESS = ("--config.train.steps=100000", "--config.checkpoint.every=100000", "--config.train.schedule=constant")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(root):
    """The run of one process with eight devices."""
    small_run.finish(small_run.start(root, root / "alone", *RUN, devices=8))
    return root / "alone"


def start_two(root, workdirs, *flags):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        small_run.start(root, workdir, f"--distributed=localhost:{port},2,{i}", *flags, devices=4)
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


@pytest.mark.parametrize("mesh", [(), SHARDED], ids=["data", "sharded"])
def test_two_processes_train_as_one(root, alone, tmp_path, mesh):
    """And one process goes on with what two have begun."""
    workdir = tmp_path / "two"
    first, second = start_two(root, (workdir, workdir), *RUN, *mesh)
    out = small_run.finish(first)
    assert f"{workdir} is trained" in out and "is trained" not in small_run.finish(second), "process 0 alone prints"
    assert_close(workdir, alone)

    shutil.rmtree(workdir / "checkpoints" / "4")
    assert "at step 2\n" in small_run.finish(small_run.start(root, workdir, *RUN, devices=8))
    assert_close(workdir, alone)


def test_a_workdir_that_is_not_shared_is_refused(root, tmp_path):
    for process in start_two(root, (tmp_path / "a", tmp_path / "b"), *RUN):
        _, err = process.communicate(timeout=120)
        assert process.returncode not in (0, None)
        assert "is not shared: processes [1] do not see what process 0 writes there" in err


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


def test_sigterm_to_one_process_stops_both_at_the_same_step(root, tmp_path):
    processes = start_two(root, (tmp_path / "run",) * 2, *ENDLESS)
    wait_for_steps(tmp_path / "run", processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [128 + signal.SIGTERM] * 2, outputs
    (step,) = (p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"SIGTERM: step {step} is saved" in outputs[0][0]
    assert small_run.metrics(tmp_path / "run")[-1]["step"] == int(step)
