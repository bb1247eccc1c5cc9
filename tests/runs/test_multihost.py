"""Several processes train and evaluate as one does."""

import json
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from configs import tiny
from tests import small_run
from tests.runs import served
from tests.runs.served import DIE, read_answer, send

# One program for runs of any length. eps: a key's bias has no gradient but rounding, which Adam would make as large as
# any.
STEP = ("--config.train.schedule=constant", "--config.train.ema_decay=0.9", "--config.train.eps=1e-3")
RUN = (*STEP, "--config.train.steps=2", "--config.checkpoint.every=1")
SHARDED = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.shard_frozen=True")
# The embedded world's own model, whose pictures the judge can read; few of them.
MODEL = tiny.get_config().model
EVALUATED = ("--mode=evaluate", f"--config.model={MODEL}", f"--config.value_encoder.start={MODEL}/text_encoder",
             "--config.random_weights=False", "--config.judge=shapeworld", "--config.principles=('shape',)",
             "--config.sampling.batch_size=2", "--config.eval.left_alone_images=1",
             "--config.eval.rate_images=1")  # fmt: skip
ENDLESS = (*STEP, *SHARDED, "--config.train.steps=100000", "--config.checkpoint.every=100000")


def start_pair() -> list:
    """Two processes of two devices, which run what they are sent."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [served.start(f"localhost:{port},2,{i}", devices=2) for i in range(2)]


@pytest.fixture(scope="module")
def pair():
    """One pair for all tests: a start costs each process seconds."""
    processes = start_pair()
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def run_two(pair, root):
    """run_two(workdir, flags) has the pair run the small run's command: the answers of both."""

    def run_two(workdirs, *flags):
        for process, workdir in zip(pair, workdirs):
            send(process, small_run.arguments(root, workdir, *flags))
        return [read_answer(process) for process in pair]

    return run_two


@pytest.fixture
def alone(root, capfd):
    """alone(workdir, flags) is what the same command prints in this process, on one device."""

    def alone(workdir, *flags) -> str:
        small_run.run_here(small_run.arguments(root, workdir, "--config.mesh.data=1", *flags))
        return capfd.readouterr().out

    return alone


def assert_close(workdir, alone):
    """Equal but for the order in which numbers are added."""
    for ours, theirs in zip(small_run.metrics(workdir), small_run.metrics(alone), strict=True):
        for name, number in theirs.items():
            np.testing.assert_allclose(ours[name], number, rtol=1e-3, atol=1e-3, err_msg=f"{name}, {theirs['step']}")
    ours, theirs = small_run.final(workdir), small_run.final(alone)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-3, atol=1e-4, err_msg=name)


def test_two_processes_train_as_one(run_two, alone, tmp_path):
    """By rows and sharded, beside one that divides nothing. And one process goes on with what two have begun."""
    workdir, whole = tmp_path / "two", tmp_path / "one"
    alone(whole, *RUN)
    (out, error), (other, other_error) = run_two((workdir, workdir), *RUN, *SHARDED)
    assert not error and not other_error
    assert f"{workdir} is trained" in out and "is trained" not in other, "process 0 alone prints"
    assert_close(workdir, whole)

    shutil.rmtree(workdir / "checkpoints" / "2")
    assert "at step 1\n" in alone(workdir, *RUN)
    assert_close(workdir, whole)


def test_two_processes_evaluate_as_one(run_two, alone, tmp_path):
    """The same numbers of the same images."""
    workdir, whole = tmp_path / "two", tmp_path / "one"
    alone(whole, *EVALUATED)
    (out, error), (other, other_error) = run_two((workdir, workdir), *EVALUATED)
    assert not error and not other_error
    assert "report: " in out and "report: " not in other
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


def test_a_workdir_that_is_not_shared_is_refused(run_two, tmp_path):
    for _, error in run_two((tmp_path / "a", tmp_path / "b"), *RUN):
        assert "is not shared: processes [1] do not see what process 0 writes there" in error


def test_what_one_process_finds_wrong_ends_both(run_two, tmp_path):
    """Process 0 alone looks for a login, and makes the workdir: the other would wait for it."""
    (tmp_path / "file").touch()
    (_, first), (_, second) = run_two([tmp_path / "run"] * 2, "--config.log.wandb=livo")
    told = "ValueError: the config cannot work:\n  config.log.wandb='livo': wandb is not installed"
    assert first.startswith(told)
    assert second == f"RuntimeError: process 0: {first}"
    (_, first), (_, second) = run_two([tmp_path / "file" / "run"] * 2)
    assert first.startswith("NotADirectoryError: ") and f"{tmp_path}/file/run" in first
    assert second == f"RuntimeError: process 0: {first}"


def wait_for_steps(workdir, processes):
    file = workdir / "metrics.jsonl"
    while not (file.exists() and len(file.read_text().splitlines()) > 3):
        assert [p.poll() for p in processes] == [None, None]
        time.sleep(0.1)


def test_ctrl_c_in_one_process_stops_both_at_the_same_step(pair, root, tmp_path):
    """It hands on a SIGTERM, by which JAX stops all."""
    for process in pair:
        send(process, small_run.arguments(root, tmp_path / "run", *ENDLESS))
    wait_for_steps(tmp_path / "run", pair)
    pair[1].send_signal(signal.SIGINT)
    (out, first), (_, second) = map(read_answer, pair)
    assert (first, second) == (f"SystemExit: {128 + signal.SIGTERM}", f"SystemExit: {128 + signal.SIGINT}")
    (step,) = (p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"SIGTERM: step {step} is saved" in out
    assert small_run.metrics(tmp_path / "run")[-1]["step"] == int(step)


def test_a_process_that_dies_ends_the_other(pair, root, tmp_path):
    """The last test: nothing can follow."""
    send(pair[1], [DIE])
    for process in pair:
        send(process, small_run.arguments(root, tmp_path / "run", *ENDLESS))
    assert pair[1].wait() == -signal.SIGKILL
    told, _ = pair[0].communicate(timeout=60)
    assert "unhealthy" in told or "Connection closed by peer" in told, told
