"""Values by a linear classifier of the states in which a model's text encoder holds a prompt.

A prompt's features are the pooled state, and the mean of the states of its tokens: 2 D of a text encoder D wide.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax.models.clip import end_of_text, first_ids
from livo_jax.models.weights import split
from livo_jax.retrieval.linear import ASKED, LinearClassifier, check_known, load

FORMAT = "livo_jax text states 1"
COMMAND = "python -m data_tools.fit_retriever --features=states"
KNOWN = ("states_of_a_text",)


def make_reader(sd):
    """read(prompts) -> [P, 2 D] float32, the features of prompts in the text encoder of a StableDiffusion."""
    graph, params = split(sd.text_encoder)

    @jax.jit
    def read(params, ids):
        encoder = nnx.merge(graph, params)
        L, D = encoder.config.max_position_embeddings, encoder.config.hidden_size  # of the CLIPs, without a T5's
        text, first = encoder(ids), first_ids(ids)[:, :L]
        length = end_of_text(first, encoder.config.towers[0])[:, None] + 1
        own = (jnp.arange(L) < length)[:, :, None]
        mean = (text.last_hidden_state[:, :L, :D] * own).sum(1) / length
        return jnp.concatenate([text.pooled, mean], axis=1).astype(jnp.float32)

    return lambda prompts: np.asarray(read(params, sd.tokenize(prompts)))


class States(LinearClassifier):
    """The classifier of a file that was fitted for the text encoder of `sd`.

    Raises:
        ValueError: the file is damaged, or fitted for other values or another text encoder.
        FileNotFoundError: there is none.
    """

    REASON = "the model's text encoder reads it as such prompts"

    def __init__(self, values, path, sd):
        fitted = load(path, FORMAT, COMMAND, KNOWN)
        super().__init__(values, path, fitted)
        self.read = make_reader(sd)
        check_known(path, fitted, {KNOWN[0]: self.read([ASKED])[0]})

    def products(self, prompt):
        return self.read([prompt])[0] @ self.weights
