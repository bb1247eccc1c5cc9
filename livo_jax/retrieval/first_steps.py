"""Values by what a model begins to draw: its first steps of sampling of a prompt, from a few fixed noises.

Text tells what it says; the model knows what it draws. From each noise it takes the first LOOKED_AT - 1 of STEPS steps
of the prompt, without guidance. Of the last prediction eps there are two kinds of features:

    effects    eps(prompt) - eps(""), [N h w C], of length 1: what the prompt draws, whose direction tells harms
    movements  |eps(value, prompt) - eps(prompt)| / (that + |eps(prompt) - eps("")|), 0 to 1, the mean over the noises,
               which tell biases: a token that was trained to leave a prompt alone hardly moves it

A prompt costs NOISES (LOOKED_AT + 1 + V) evaluations of the UNet for V values: one compiled program for all prompts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax import diffusion, seeds
from livo_jax.models.clip import widened
from livo_jax.models.weights import split
from livo_jax.retrieval.linear import ASKED, LinearClassifier, check_known, load
from livo_jax.value_encoders.base import check_value_encoder
from livo_jax.values.principles import value_prompt

FORMAT = "livo_jax first steps 1"
COMMAND = "python -m data_tools.fit_retriever --features=first_steps"
STEPS, LOOKED_AT = 10, 5  # half-way it is decided what there is, not yet how it looks
NOISES = 4
LEAST = 1e-12
KEPT = 4096  # prompts whose answers are kept: a page asks again when it draws
KNOWN = ("effects_of_a_text", "movements_of_a_text")


def count_evaluations(values: int) -> int:
    """How many rows the UNet evaluates for a prompt and so many values."""
    return NOISES * (LOOKED_AT + 1 + values)


def make_reader(sd, value_encoder, statements):
    """Makes what looks at a prompt's first steps.

    Args:
        sd: a StableDiffusion. value_encoder: whose tokens move its predictions; None for no movements.
        statements: of V values.

    Returns:
        read(prompt) -> effects [NOISES h w C] float32 of length 1, 0 of the empty prompt, and movements [V] float32,
        zeros without a value encoder.

    Raises:
        ValueError: the value encoder was made for another model, or for other values.
    """
    if value_encoder is not None:
        check_value_encoder(sd, value_encoder, statements)
    table = diffusion.sampler_table(sd.scheduler_config, sd.family.SAMPLER, STEPS)
    before = jax.tree.map(lambda column: column[: LOOKED_AT - 1], table)
    t, scale = table.t[LOOKED_AT - 1], table.scale[LOOKED_AT - 1]
    noise = jax.random.normal(seeds.key(0), (NOISES, *sd.latent_shape))
    modules = (sd.text_encoder, sd.unet, value_encoder)
    text_of = value_prompt if value_encoder is None else value_encoder.text
    graphs, params = zip(*(split(module) if module else (None, None) for module in modules))

    @jax.jit
    def look(params, ids, value_ids):
        text_encoder, _, tokens = (graph and nnx.merge(graph, part) for graph, part in zip(graphs, params))
        text = text_encoder(ids)  # of the prompt and of the empty one
        states, embeds = text.last_hidden_state, text.text_embeds
        if sd.zeros_for_empty_prompt:
            states, embeds = states.at[1].set(0), embeds.at[1].set(0)

        def predict(z, t, cond, mask, embeds):
            """The predictions [NOISES, R, h, w, C] float32 in z for R rows of conditioning."""
            unet = nnx.merge(graphs[1], params[1])  # here, as in sampling.generate
            rows = len(cond)
            of_each = [None if x is None else jnp.tile(x, (NOISES, *[1] * (x.ndim - 1))) for x in (cond, mask, embeds)]
            eps = unet(jnp.repeat(z, rows, axis=0), jnp.full(NOISES * rows, t), *of_each, sd.time_ids)
            return eps.astype(jnp.float32).reshape(NOISES, rows, *z.shape[1:])

        def of_prompt(z, t, carried):
            return predict(z, t, states[:1], None, None if embeds is None else embeds[:1])[:, 0], carried

        z = scale * diffusion.sample(of_prompt, noise, before)
        mask = None
        if tokens is not None:  # a row for each value, [u; c]; the prompt and the empty one see no token
            u = widened(tokens.tokens(value_ids, text_encoder), states.shape[-1]).astype(states.dtype)  # [V, n, D]
            seen = tokens.seen(value_ids)
            seen = jnp.ones(u.shape[:2], bool) if seen is None else seen
            rows = jnp.array([0, 1] + [0] * len(u))
            states, embeds = states[rows], None if embeds is None else embeds[rows]
            shift = tokens.pooled_shift(value_ids, text_encoder)
            if shift is not None:
                embeds = embeds.at[2:].add(shift.astype(embeds.dtype))
            mask = jnp.pad(jnp.pad(seen, ((2, 0), (0, 0))), ((0, 0), (0, states.shape[1])), constant_values=True)
            states = jnp.concatenate([jnp.pad(u, ((2, 0), (0, 0), (0, 0))), states], axis=1)
        prompt, empty, *with_values = jnp.unstack(predict(z, t, states, mask, embeds), axis=1)
        effects = prompt - empty
        effect = jnp.sqrt(jnp.square(effects).sum((1, 2, 3)))  # [NOISES]
        # The empty prompt has no effect, and a token may move nothing: that is nought, not nought over nought.
        direction = effects.ravel() / jnp.maximum(jnp.linalg.norm(effect), LEAST)
        if tokens is None:
            return direction, jnp.zeros(len(statements))
        moved = jnp.stack([jnp.sqrt(jnp.square(other - prompt).sum((1, 2, 3))) for other in with_values])
        return direction, (moved / jnp.maximum(moved + effect, LEAST)).mean(1)

    def read(prompt):
        value_ids = sd.tokenize([text_of(statement, prompt) for statement in statements])
        return [np.asarray(x) for x in look(params, sd.tokenize([prompt, ""]), value_ids)]

    return read


class FirstSteps(LinearClassifier):
    """The classifier of a file that was fitted for a model and its value tokens.

    Its weights are those of the effects, and in a last row that of each value's own movement. evaluations: rows that
    the UNet evaluates for a prompt.

    Raises:
        ValueError: the file is damaged, or fitted for other values, another model or other tokens; there is no model,
            or none with the tokens that the file's values need.
        FileNotFoundError: there is none.
    """

    REASON = "the model begins to draw it as such prompts"

    def __init__(self, values, path, sd, value_encoder):
        fitted = load(path, FORMAT, COMMAND, KNOWN)
        super().__init__(values, path, fitted)
        if value_encoder is None and self.weights[-1].any():
            moving = [name for name, weight in zip(self.names, self.weights[-1]) if weight]
            raise ValueError(
                f"{path} tells {', '.join(moving)} by how far the value's trained token moves the model, and there is"
                " no value encoder: give one (value_encoder=), or let others decide (`auto` in principles.toml)"
            )
        self.read = make_reader(sd, value_encoder, [value.statement for value in values])
        effects, movements = self.read(ASKED)
        fitted.known[KNOWN[1]] = fitted.known[KNOWN[1]][[fitted.names.index(name) for name in self.names]]
        if value_encoder is None:
            del fitted.known[KNOWN[1]]
        check_known(path, fitted, dict(zip(KNOWN, (effects, movements))))
        self.products = functools.lru_cache(KEPT)(self.products)
        self.evaluations = count_evaluations(0 if value_encoder is None else len(values))

    def products(self, prompt):
        effects, movements = self.read(prompt)
        return effects @ self.weights[:-1] + movements * self.weights[-1]
