"""What a run tells of itself: metrics, warnings that come once, a profile."""

import contextlib
import importlib.machinery
import itertools
import json
import re
import sys
import time
import types

import pytest
from etils import epath

from configs import tiny
from livo_jax.runs.log import Log, check_wandb

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
        log.flush(step, 8, None, {"params_norm": 2.0})


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
    assert all(line["train/params_norm"] == 2.0 for line in lines)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_full_disk_is_told(tmp_path):
    log = open_log(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        OSError, match="the metrics of step 50 cannot be written to .*: .*No space left .* Make room ther"
    ):
        feed(log, 50, 50)
    log.close()


def test_a_line_that_is_damaged_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 50}\n\0\0\0\n{"step": 100}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is damaged, take it out: "):
        open_log(tmp_path, step=100)


@pytest.mark.parametrize("key", [True, False])
def test_a_login_at_wandb_is_asked_for(key, monkeypatch):
    """wandb.login as wandb 0.31 has it: of several processes or at no terminal it asks nobody for the key."""

    class Error(Exception):
        pass

    def login(verify):
        if not key:
            raise Error("No API key configured.")
        return True

    wandb = types.ModuleType("wandb")
    wandb.__spec__, wandb.Error, wandb.login = importlib.machinery.ModuleSpec("wandb", None), Error, login
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tiny.get_config()
    check_wandb(config)
    config.log.wandb = "livo"
    told = "config.log.wandb='livo': No API key configured. Run wandb login, set WANDB_API_KEY, or WANDB_MODE=offline"
    with contextlib.nullcontext() if key else pytest.raises(ValueError, match=told):
        check_wandb(config)


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
