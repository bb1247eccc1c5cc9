"""LiVO (Wang et al. 2024), and what else trains a value encoder: config.loss.form says by which loss.

The value's token stands before the prompt's, and the model stays as it is.
"""

import functools

import jax

from livo_jax import value_encoders
from livo_jax.methods.base import Drawing, Models, TrainedMethod, drawer, weights_of
from livo_jax.models.weights import count, split
from livo_jax.training.objective import make_loss
from livo_jax.training.optimizer import but_embeddings
from livo_jax.value_encoders.base import READING, check_value_encoder
from livo_jax.value_encoders.gates import as_json, gates_of_config


class LiVO(TrainedMethod):
    """Value tokens of a value encoder."""

    HAS_TOKENS = True

    def problems(self):
        c = self.config.sampling
        if not c.gated or c.prompt_layout == "padded":
            return []
        return [f"config.sampling.prompt_layout={c.prompt_layout!r}: images that gates leave to the base are 'padded'"]

    @property
    def compares_pairs(self):
        return self.config.loss.form in ("dpo", "ipo")

    @property
    def passes(self):
        if self.config.loss.form != "sft":
            return super().passes
        return 1, 2 if self.config.loss.anchor else 1, 1, 1

    def make_module(self, sd):
        return value_encoders.make(self.config, sd)

    def start(self, sd, mesh):
        value_encoder = value_encoders.start(self.config, sd, mesh)
        check_value_encoder(sd, value_encoder)
        return value_encoder

    def make_loss(self, networks):
        return make_loss(networks, self.config)

    def models(self, sd, module):
        return Models(sd, sd, module)

    def make_drawing(self, models, mesh, workdir, judge):
        value_encoder = models.value_encoder
        params = split(value_encoder)[1]
        draw = functools.partial(drawer(self.config, mesh), models.sd, value_encoder=value_encoder)
        # Only what is not its kind's default: images that were drawn before keep their folder.
        own = {name: getattr(value_encoder, name) for name in (*READING, "alone")}
        own = {name: x for name, x in own.items() if x != getattr(type(value_encoder), name)}
        settings = {"method": "value tokens"} | own
        if self.config.sampling.gated:
            settings["gates"] = as_json(gates_of_config(value_encoder, self.config).items())
        return Drawing(draw, [weights_of(models.sd), params], settings, trained=self.count_trained(params))

    def count_trained(self, params) -> int:
        """How many parameters training moves."""
        if self.config.train.train_embeddings:
            return count(params)
        moved = jax.tree.map(lambda trained, part: part if trained else None, but_embeddings(params), params)
        return count(moved)
