"""Training from the cache is training from the images, and a stale cache is refused."""

import json
import os
import shutil

import numpy as np
import pytest

from configs import tiny
from livo_jax import data, sharding
from livo_jax.data.cache import Cache, cache_directory
from livo_jax.data.preferences import Preferences
from livo_jax.files import directories
from livo_jax.runs import cache_latents
from livo_jax.runs.restore import load_base
from livo_jax.runs.train import train_and_evaluate
from tests.data import test_data

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def config(root, tmp_path_factory):
    """Of the small run's model, whose training ends without images, and of pairs of every kind."""
    config = tiny.get_config("smoke")
    config.model, config.random_weights = str(root / "model"), True
    pairs = test_data.make(tmp_path_factory.mktemp("cache") / "preferences", values=test_data.SHOWN)
    config.data.directory, config.sampling.batch_size = str(pairs), 2
    config.data.random_flip, config.data.anchors, config.data.cache = True, 0.0, False
    config.judge, config.log.samples_every, config.mesh.data = "", 0, 1
    return config


@pytest.fixture
def sd(config):
    return load_base(config, sharding.make_mesh(1))


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_the_losses_are_those_of_the_images(config, tmp_path):
    """With second values, named attributes, anchors and mirror images."""
    config = config.copy_and_resolve_references()
    config.data.beside = config.data.attributes = config.data.anchors = 0.5
    train_and_evaluate(config, tmp_path / "images")
    cached = config.copy_and_resolve_references()
    cached.data.cache = True
    train_and_evaluate(cached, tmp_path / "cache")
    assert losses(tmp_path / "cache") == pytest.approx(losses(tmp_path / "images"), rel=1e-3)
    assert len(losses(tmp_path / "cache")) == 2


def test_a_stale_cache_is_refused(config, sd, tmp_path, monkeypatch, caplog):
    """Where pairs cannot be written, it is passed over: the run has its own."""
    preferences = Preferences(config.data.directory)
    fewer = config.copy_and_resolve_references()
    fewer.principles = ("bloody",)
    with pytest.raises(ValueError, match="has pairs for the values .*, the config lists"):
        cache_latents.write(preferences, sd, fewer)
    cache_latents.write(preferences, sd, config)
    Cache(preferences, sd, config)

    def place():
        return cache_directory(preferences, tmp_path, sd, config)

    def warnings():  # another test may have left absl telling more
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert place() == preferences.directory / "cache" and not warnings()
    for name in ("states.npy", "prompts.json", "made_of.json"):
        file = preferences.directory / "cache" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="cache is (.|\n)*: remove it, and training makes another"):
            Cache(preferences, sd, config)
        file.write_bytes(whole)
    more = config.copy_and_resolve_references()
    more.data.anchors = 0.2
    told = r"rewordings: \['beside, each mention'\] there, \['beside, each mention', 'anchors in the words of all"
    with pytest.raises(ValueError, match=told):
        Cache(preferences, sd, more)
    sd.image_size = 64
    sd.vae.encoder.conv_in.bias[...] += 1e-3
    preferences.content_sha256 = "another"
    with pytest.raises(ValueError, match="of another dataset(.|\n)*pairs: (.|\n)*to 32, .*to 64(.|\n)*weights: "):
        Cache(preferences, sd, config, place())
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert place() == tmp_path / "cache"
    assert f"{preferences.directory}/cache is of another dataset, config or model, and cannot be" in warnings()[0]
    with pytest.raises(ValueError, match="has no cache for this run and cannot be written, nor can a cache lie in gs:"):
        cache_directory(preferences, "gs://bucket/run", sd, config)


def test_an_interrupted_cache_is_none_and_neither_is_one_on_a_full_disk(config, sd, monkeypatch):
    preferences = Preferences(config.data.directory)
    shutil.rmtree(preferences.directory / "cache", ignore_errors=True)
    decode, calls = data.decode, []

    def stop(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return decode(*arguments)

    monkeypatch.setattr(data, "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        cache_latents.write(preferences, sd, config)
    with pytest.raises(FileNotFoundError):
        Cache(preferences, sd, config)
    monkeypatch.setattr(data, "decode", decode)

    def full(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"^no space left for .*/\.cache\.partial: "):
        patch.setattr(os, "posix_fallocate", full)
        cache_latents.write(preferences, sd, config)
    lock = directories.held(preferences.directory / ".cache.partial")
    with lock, pytest.raises(FileExistsError, match="another process writes to .*partial: PID [0-9]+ on .*: wait"):
        cache_latents.write(preferences, sd, config)
    cache_latents.write(preferences, sd, config)
    assert not (preferences.directory / ".cache.partial").exists()
    for share in (0.2, 0.0):  # a cache with more prompts than are wanted will do
        config.data.anchors = share
        if share:
            cache_latents.write(preferences, sd, config)
        cache = Cache(preferences, sd, config)
        scene = preferences.blocks[0].scene
        assert any(f"a round {scene}" in prompt for prompt in cache.place)
    assert cache.aligned.shape == (len(preferences.source), 2, 8, 8, 8) and np.isfinite(cache.violating).all()
