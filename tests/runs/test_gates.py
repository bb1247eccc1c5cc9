"""Gates of a run: measured when they are asked for, kept with it, exported with it."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import compare_tiny
from livo_jax import sharding, values
from livo_jax.runs import compare, gates
from tests.small_run import arguments, run_here


@pytest.fixture
def tokens_that_tell(monkeypatch):
    """A value encoder that moves anchors by 0.1 and pairs by 0.4."""

    def make_effects(networks):
        def effects(params, frozen, batch, key):
            return jnp.array([250.0, 750.0]), jnp.tile(jnp.where(batch.anchor, 0.1, 0.4), (2, 1))

        return effects

    monkeypatch.setattr(gates, "make_effects", make_effects)


def test_a_finished_run_measures_them_when_asked(root, tmp_path, tokens_that_tell):
    workdir, out = tmp_path / "run", tmp_path / "export"
    file, schedule = workdir / "eval" / "gates.json", "--config.train.schedule=constant"
    results, gated = file.with_name("results.json"), "--config.sampling.gated=True"
    run_here(arguments(root, workdir, schedule))
    assert not file.exists()
    results.parent.mkdir(exist_ok=True)
    results.write_text("[]")
    run_here(arguments(root, workdir, schedule, gated))
    assert not results.exists(), "of images without gates"
    found = json.loads(file.read_text())
    assert {*found} == {"shape equality", "colour equality"}
    for gate in found.values():
        assert gate["timesteps"] == [250, 750] and gate["least_effects"] == pytest.approx([0.2, 0.2])
    of_before = file.stat().st_mtime_ns
    run_here(arguments(root, workdir, schedule, "--mode=export", f"--out={out}"))
    assert json.loads((out / "value_encoder" / "config.json").read_text())["livo"]["gates"] == found
    run_here(arguments(root, workdir, schedule, gated, "--config.train.steps=5", "--config.log.samples_every=5"))
    assert (workdir / "samples" / "step_5.png").exists(), "drawn before there are gates"
    assert file.stat().st_mtime_ns > of_before, "they were of an earlier step"


def test_what_they_need_is_told_before_training(root, tmp_path):
    gated = "--config.sampling.gated=True"
    for name in ("data.anchors", "loss.anchor"):
        with pytest.raises(ValueError, match=f"sampling.gated=True: .* learned of anchors, set config.{name} above 0"):
            run_here(arguments(root, tmp_path, gated, f"--config.{name}=0.0"))
    with pytest.raises(ValueError, match="prompt_layout='official': images that gates leave to the base are 'padded'"):
        run_here(arguments(root, tmp_path, gated, "--config.sampling.prompt_layout=official"))
    with pytest.raises(ValueError, match="config.sampling.gated=True: config.method='negative' does not read it"):
        negative = "--config.method=negative", "--config.train.steps=0", "--mode=evaluate"
        run_here(arguments(root, tmp_path, gated, *negative))
    config = compare_tiny.get_config("smoke")
    config.curve.points, config.methods.livo.sampling.gated = 2, True
    with pytest.raises(ValueError, match="methods.livo.sampling.gated=True: .* set config.curve.points=0"):
        compare.check_comparison(config, compare.configs_of(config))
    config.curve.points = 0
    compare.check_comparison(config, compare.configs_of(config))  # beside methods without gates


def test_pairs_that_do_not_tell_what_they_show_have_no_gate(monkeypatch):
    def rows(*_, only, **settings):
        while True:
            yield types.SimpleNamespace(anchor=np.array([only != "colour equality", False]))

    monkeypatch.setattr(gates, "batches", rows)
    reading = dict(batch_size=2, seed=0, principles=values.load(("shape", "colour")))
    with pytest.raises(ValueError, match="no anchor can be made of the pairs of 'colour equality', which do not tell"):
        gates.check_anchors(None, None, None, **reading)


@pytest.fixture
def measured(monkeypatch):
    """measured(own, left alone) -> gates of tokens that move 64 pairs and 64 anchors so far [64] at either timestep."""

    def measured(own, left_alone):
        anchor = np.arange(128) % 2 == 0
        effects = np.empty((2, 128))
        effects[:, ~anchor], effects[:, anchor] = own, left_alone

        def rows(*_, only, anchors, **settings):
            assert anchors == 0.5 and only in ("shape equality", "colour equality")
            yield types.SimpleNamespace(anchor=anchor)

        monkeypatch.setattr(gates, "batches", rows)
        monkeypatch.setattr(gates, "make_effects", lambda networks: lambda *given: (np.array([250.0, 750.0]), effects))
        monkeypatch.setattr(gates.jax, "jit", lambda function: function)
        monkeypatch.setattr(sharding, "global_batch", lambda mesh, batch: batch)
        monkeypatch.setattr(sharding, "fetch", np.asarray)
        reading = dict(batch_size=128, seed=0, principles=values.load(("shape", "colour")))
        return gates.measure(None, None, None, sharding.make_mesh(1), None, None, None, **reading)

    return measured


def test_a_gate_lies_half_way_from_anchors_to_pairs(measured):
    """From what most anchors stay below to what most pairs are above; outliers of either do not count."""
    own, left_alone = np.full(64, 0.08), np.full(64, 0.02)
    own[:2], left_alone[:2] = 0.001, 0.5
    found = measured(own, left_alone)
    assert [statement for statement, _ in found] == ["shape equality", "colour equality"]
    assert found[0][1].timesteps == (250.0, 750.0)
    np.testing.assert_allclose(found[0][1].least_effects, (0.04, 0.04))


def test_values_that_leave_nothing_alone_have_no_gate(measured):
    with pytest.raises(
        ValueError, match="no further than their anchors: 'shape equality', 'colour equality'. .*gated=F"
    ):
        measured(np.full(64, 0.1), np.full(64, 0.2))
