"""A workdir: what may be its path, who may write to it, and that it is of one config."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from configs import livo, sdxl, tiny
from configs.baselines import concept_ablation, dpo_unet
from livo_jax.files import directories, settings
from livo_jax.runs import workdir
from livo_jax.runs.checkpoint import Checkpoints
from tests.small_run import ROOT

# What config.json had in the first version: no run lacks it.
FIRST = """
seed model dtype principles judge preferences.scenes preferences.templates preferences.pairs_per_scene
preferences.harm_pairs_per_scene preferences.census_per_scene data.directory data.random_flip loss.alpha loss.beta
loss.gamma_1 loss.gamma_2 loss.timesteps train.steps train.batch_size train.learning_rate train.schedule train.b1
train.b2 train.eps train.weight_decay train.grad_clip sampling.sampler sampling.steps sampling.guidance_scale
sampling.batch_size
""".split()


@pytest.mark.parametrize("name", ["a b", "lr=1e-4", "ü#%&'\"!", "x]", "{y}", "-z"])
def test_a_workdir_of_any_name_is_read_again(name, tmp_path):
    state = {"step": jnp.int32(1), "params": jnp.arange(3.0)}
    checkpoints = Checkpoints(directories.resolve_directory(tmp_path / name))
    checkpoints.save(1, state)
    checkpoints.close()
    restored = Checkpoints(directories.resolve_directory(tmp_path / name)).restore(jax.tree.map(jnp.zeros_like, state))
    assert restored["step"] == 1 and (tmp_path / name / "checkpoints" / "1").exists()


@pytest.mark.parametrize("name", ["lr=[1e-4]", "[", "a*", "b?", "gs://bucket/a[1]", "c\\d"])
def test_a_workdir_that_could_not_be_read_again_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="what is saved there could not be read: choose a path without "):
        directories.resolve_directory(name if "://" in name else tmp_path / name / "run")


def test_a_tilde_is_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert directories.resolve_directory("~/runs/x") == epath.Path(tmp_path / "runs" / "x")


HOLD = """
import sys, time, pathlib
from livo_jax.files import directories
with directories.held(pathlib.Path(sys.argv[1]), "trains in"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_run_at_a_time(tmp_path):
    """The second is told who has it. One that is killed leaves no lock."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"held\n"
        told = f"another process trains in {tmp_path}: PID {run.pid} on .*, since 20.*: wait until it has ended"
        with pytest.raises(FileExistsError, match=told), directories.held(tmp_path):
            pass
        run.kill()
    assert run.returncode == -signal.SIGKILL
    for _ in range(2):
        with directories.held(tmp_path), directories.held(tmp_path / "eval"):
            with pytest.raises(FileExistsError, match=f"PID {os.getpid()} "), directories.held(tmp_path):
                pass


def test_where_there_are_no_locks_one_is_told_of_the_other(tmp_path, monkeypatch, caplog):
    """As in a bucket."""
    monkeypatch.setattr(directories, "is_remote", lambda path: True)
    with directories.held(epath.Path(tmp_path), "trains in"):
        assert not caplog.records
        with directories.held(epath.Path(tmp_path), "trains in"):
            (warning,) = caplog.messages
            assert f"trains in {tmp_path}: PID {os.getpid()} on " in warning
    assert not list(tmp_path.iterdir())


def begun(place, config, **changes):
    """A workdir that a run of an older version began: its config.json has no fields whose change is None."""
    (place / "checkpoints").mkdir(parents=True, exist_ok=True)
    flat = {name: x for name, x in (settings.flatten(json.loads(config.to_json())) | changes).items() if x is not None}
    nested = {}
    for name, x in flat.items():
        *sections, field = name.split(".")
        place_of = nested
        for section in sections:
            place_of = place_of.setdefault(section, {})
        place_of[field] = x
    (place / "config.json").write_text(json.dumps(nested))
    return epath.Path(place)


def test_a_run_from_before_a_field_goes_on(tmp_path, caplog):
    """A field that it lacks is what was done before there was one; one that is gone is told."""
    config = tiny.get_config()
    lacks = dict.fromkeys(["cpu_devices", "data.cache", "loss.form", "value_encoder.kind", "train.remat"])
    place = begun(tmp_path, config, **lacks, **{"train.gone": 3})
    workdir.claim(place, config)
    (warning,) = caplog.messages
    assert "the run was begun with config.train.gone=3: nothing reads that now" in warning
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(config.to_json())
    begun(tmp_path, config, **lacks)
    config.loss.form, config.seed = "dpo", 1
    with pytest.raises(ValueError, match="loss.form: 'livo' there, 'dpo' now\n  config.seed: 0 there, 1 now$"):
        workdir.claim(place, config)


@pytest.mark.parametrize("config", [tiny, livo, sdxl, concept_ablation, dpo_unet], ids=lambda module: module.__name__)
def test_no_new_field_shuts_older_runs_out(config):
    config = config.get_config()
    names = workdir.with_its_rate(settings.flatten(config.to_dict()))
    names = [name for name in names if not name.startswith((*workdir.FREE, config.method))]
    assert not set(names) - {*FIRST, *workdir.BEFORE}, "livo_jax/runs/workdir.py: BEFORE needs what was done without it"


def test_a_rate_is_the_same_by_itself_and_in_the_table_of_all(tmp_path):
    """A run of before the table has its rate alone; what the table says of others changes nothing."""
    config = tiny.get_config()
    rates = {f"train.learning_rates.{trained}": None for trained in config.train.learning_rates}
    place = begun(tmp_path, config, **rates, **{"train.learning_rate": 1.5e-3})
    workdir.claim(place, config)
    config.train.learning_rates.lora = 1.0
    workdir.claim(place, config)
    config.train.learning_rates.full = 1.0
    with pytest.raises(ValueError, match="config.train.learning_rate: 0.0015 there, 1.0 now$"):
        workdir.claim(place, config)


def test_a_run_of_a_comparison_goes_on_in_another_place(tmp_path, caplog):
    """With its pairs and images moved beside it, by a checkout whose model lies elsewhere and is the same."""
    config, there, here = tiny.get_config(), tmp_path / "there", tmp_path / "here"
    for checkout in (there, here):
        (checkout / "model" / "unet").mkdir(parents=True)
        (checkout / "model" / "unet" / "config.json").write_text("{}")
    config.model, config.data.directory = str(there / "model"), "/gone/comparison/preferences"
    config.eval.drawn = "/gone/comparison/drawn"
    place = begun(tmp_path / "run", config)
    config.model, config.data.directory = str(here / "model"), str(tmp_path / "preferences")
    config.eval.drawn = str(tmp_path / "drawn")
    before = (place / "config.json").read_text()
    workdir.check_claim(place, config)
    assert (place / "config.json").read_text() == before and not caplog.messages

    (here / "model" / "unet" / "config.json").write_text("[]")
    config.data.directory = str(tmp_path / "others")
    with pytest.raises(ValueError, match="'preferences' there, 'others' now\n  config.model: '.*there/model' there"):
        workdir.claim(place, config)
    config.data.directory = str(tmp_path / "preferences")
    (there / "model").rename(there / "other")
    workdir.claim(place, config)
    (warning,) = caplog.messages
    assert f"{there / 'model'} is not here: {here / 'model'}, of the same name, is taken for it" in warning
    config.model = str(there / "other")
    with pytest.raises(ValueError, match="config.model: "):
        workdir.claim(place, config)


@pytest.mark.parametrize("content", [b"", b'{"seed": 0, ', b"\xff"])
def test_a_config_that_was_cut_short_is_told(tmp_path, content):
    place = begun(tmp_path, tiny.get_config())
    (tmp_path / "config.json").write_bytes(content)
    for read in (lambda: workdir.claim(place, tiny.get_config()), lambda: workdir.recipe(place)):
        with pytest.raises(ValueError, match="config.json is damaged .*: remove it, and start the run with the config"):
            read()
    (tmp_path / "config.json").unlink()
    workdir.claim(place, tiny.get_config())


def test_more_steps(tmp_path):
    """At a constant rate no step depends on their number."""
    config = livo.get_config()
    place = begun(tmp_path, config)
    config.train.steps += 1
    workdir.claim(place, config)
    config.train.schedule = "cosine"
    begun(tmp_path, config)
    config.train.steps += 1
    with pytest.raises(ValueError, match="train.steps: 15001 there, 15002 now\n.*'cosine'.*config.value_encoder.start"):
        workdir.claim(place, config)
