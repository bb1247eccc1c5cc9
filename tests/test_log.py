"""What a run tells of itself: metrics, warnings that come once, a profile."""

import itertools
import json
import re
import time

from etils import epath

from configs import tiny
from livo_jax.log import Log

READY = itertools.repeat(None)  # batches that take no time


def open_log(workdir, step=0):
    return Log(epath.Path(workdir), step, tiny.get_config())


def numbers(**changes):
    return {"loss": 1.0, "active_w": 1.0, "active_l": 1.0} | changes


def feed(log, first, last, loader=READY, **metrics):
    """Logs each fiftieth step."""
    for step in range(first, last + 1, 50):
        log.next(loader)
        log.append(numbers(**metrics))
        log.flush(step, 8, None)


def warnings(caplog, about):
    return [text for record in caplog.records if about in (text := record.getMessage())]


def test_a_dead_hinge_is_told_once(tmp_path, caplog):
    log = open_log(tmp_path)
    feed(log, 50, 100)
    feed(log, 150, 550, active_w=0.0)
    assert not warnings(caplog, "active"), "dead for less than 500 steps"
    feed(log, 600, 2000, active_w=0.0)
    (warning,) = warnings(caplog, "active")
    assert "train/active_w is 0 since step 100" in warning and "config.loss.gamma_1=10.0" in warning
    log.close()


def test_a_starving_loader_is_told_once(tmp_path, caplog):
    log = open_log(tmp_path)
    feed(log, 50, 100, loader=iter(lambda: time.sleep(0.05), 0))
    (warning,) = warnings(caplog, "loader")
    assert re.search("at step 50 training waits for data [0-9]+% of the time", warning)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100] and all(line["train/wait_for_data"] > 0.2 for line in lines)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    log = open_log(tmp_path)
    feed(log, 50, 150)
    log.close()
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole) + '{"step": 200, "train/lo')
    log = open_log(tmp_path, step=100)
    assert file.read_text() == "".join(whole[:2]), "nothing past the step either"
    feed(log, 150, 150)
    log.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [50, 100, 150]
