"""The command lines: what they say of flags, files and errors, and how a CPU is divided."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import app, flags

from livo_jax import commands, values
from tests import small_run
from tests.small_run import ROOT

CORES = len(os.sched_getaffinity(0))


def test_a_file_that_makes_no_config_is_told():
    command = [sys.executable, "run.py", "--config=tests/kinds.py", "--workdir=x"]
    process = subprocess.run(command, cwd=ROOT, env=small_run.environment(), capture_output=True, text=True)
    told = process.stderr.strip()
    assert told.endswith("--config=tests/kinds.py: it has no function get_config() that returns a ConfigDict"), told


def as_they_are(argv: list[str]) -> list[str]:
    """A parser of flags that reads none."""
    flags.FLAGS.mark_as_parsed()
    return argv


def test_only_what_is_raised_on_purpose_is_told_without_a_traceback(monkeypatch):
    def own(argv):
        values.load(["nothing"])

    def library(argv):
        np.zeros(3).reshape(2)

    def usage(argv):
        raise app.UsageError("needs --out=DIR")

    monkeypatch.setattr(sys, "argv", ["run.py"])
    for main, told in ((own, "no value 'nothing'"), (usage, "needs --out=DIR\n--help lists the flags")):
        with pytest.raises(SystemExit, match=told):
            commands.run(main, flags_parser=as_they_are)
    with pytest.raises(ValueError, match="cannot reshape"):
        commands.run(library, flags_parser=as_they_are)
    with pytest.raises(SystemExit, match="3"):
        commands.run(lambda argv: 3, flags_parser=as_they_are)  # a command's status


def test_ctrl_c_and_a_full_disk_are_told_without_a_traceback(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    def full(argv):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")

    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit, match="130"):
        commands.run(interrupted, flags_parser=as_they_are)
    assert capsys.readouterr().err == "\nended by Ctrl-C\n"
    with pytest.raises(SystemExit, match="No space left on device. Free some space, and run the same command again"):
        commands.run(full, flags_parser=as_they_are)


def test_what_nobody_reads_any_more_ends_no_work():
    read, write = os.pipe()
    with os.fdopen(write, "w", buffering=1) as stream:
        commands.drop_unread(stream)
        print("heard", file=stream)
        os.close(read)
        print("not heard", file=stream)
        print("nor this", file=stream, flush=True)


@pytest.mark.parametrize("xla_flags, devices", [("", min(2, CORES)), (small_run.DEVICES.format(3), 3)])
def test_a_cpu_counts_as_the_devices_of_the_config(xla_flags, devices):
    """One for each core, unless XLA_FLAGS tells."""
    code = "from livo_jax import commands; commands.divide_cpu(2); import jax; print(jax.device_count())"
    environment = os.environ | {"XLA_FLAGS": xla_flags}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.stdout == f"{devices}\n", process.stderr


@pytest.mark.parametrize("given", [["--config=configs/tiny.py:smoke"], ["--config", "configs/tiny.py:smoke"]])
def test_a_config_is_found_from_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *_, found = commands.find_configs(["run.py", *given])
    assert found.endswith("/configs/tiny.py:smoke") and pathlib.Path(found.split("=")[-1].split(":")[0]).is_file()
    with pytest.raises(SystemExit, match="--config=nowhere.py: there is no such file"):
        commands.find_configs([given[0].split("=")[0], "nowhere.py"])


def test_what_the_system_says_of_a_path_is_told_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit, match="Not a directory.*file/below"):
        commands.run(lambda argv: (file / "below").mkdir(), flags_parser=as_they_are)
