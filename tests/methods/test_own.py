"""Methods and value encoders of a user's own code."""

import jax
import pytest

from configs import tiny
from livo_jax import methods, sharding
from livo_jax.export import export
from livo_jax.runs import fields
from livo_jax.training.batch import draw_noise
from livo_jax.training.objective import split_models
from livo_jax.training.optimizer import learning_rate
from tests.documented import example


def test_a_method_of_the_users_own_that_trains(small, tmp_path, monkeypatch):
    """The page's, with a value encoder of its own kind: a token that is the scaled mean of the states of its text."""
    (tmp_path / "own.py").write_text("""
import jax.numpy as jnp
from flax import nnx
from livo_jax import sharding
from livo_jax.value_encoders import TrainableTokens

class Scaled(TrainableTokens):
    def __init__(self, config):
        self.config, self.scale = config, nnx.Param(jnp.ones(()))

    def tokens(self, ids, text_encoder):
        return self.scale[...] * text_encoder(ids).last_hidden_state.mean(1, keepdims=True).astype(jnp.float32)

    @classmethod
    def make(cls, config, sd):
        return cls(sd.text_encoder.config)

    @classmethod
    def start(cls, config, sd, mesh):
        return sharding.replicate(cls.make(config, sd), mesh)

    @classmethod
    def files(cls):
        return []

    @classmethod
    def from_pretrained(cls, path_or_hub_id, *, sd=None, sharding=None):
        raise FileNotFoundError(path_or_hub_id)

""")
    (tmp_path / "gentle.py").write_text(example("evaluation.md", "class Gentle(LiVO):"))
    monkeypatch.syspath_prepend(tmp_path)
    sd, _, _, batch = small
    config, mesh = tiny.get_config("smoke"), sharding.make_mesh(1)
    config.value_encoder.kind, config.train.learning_rate, config.train.train_embeddings = "own:Scaled", 1e-2, True
    config.method = "gentle:Gentle"
    assert not fields.problems(config)
    method = methods.make_method(config)
    networks, params, frozen = split_models(sd, method.start(sd, mesh), with_vae=True)
    frozen = sharding.on_mesh(frozen, mesh)  # who drew with the model before may have left it on all devices
    noise = draw_noise(jax.random.key(0), (8, *sd.latent_shape), config.loss.timesteps)
    losses = [method.make_loss(networks), methods.LiVO(config).make_loss(networks)]
    (own, _), (livo, metrics) = jax.jit(lambda *given: [loss(*given) for loss in losses])(params, frozen, batch, noise)
    assert own == pytest.approx(float(livo) * (0.5 + float(metrics["active_w"])))
    with pytest.raises(ValueError, match="kind='own:Scaled': pipelines know full, lora, token"):
        export.export(tmp_path / "out", sd, method.start(sd, mesh), config)
    config.train.learning_rate = 0.0
    with pytest.raises(ValueError, match="kind='own:Scaled': config.train.learning_rates has none for it"):
        learning_rate(config)
