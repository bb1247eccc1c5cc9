"""What the UNet is conditioned on: the rows of a batch, its value tokens and who sees them."""

import numpy as np

from livo_jax.models.clip import first_ids
from livo_jax.sampling.requests import Request
from livo_jax.values.principles import value_prompt

PROMPT_LAYOUTS = ("padded", "official")


def value_columns(sd, requests: list[Request], slots: tuple[int, int] = (0, 0), reads_prompt=True):
    """What _sample needs of the values of N requests, in V slots for value tokens and R rows for the UNet.

    There are at least `slots`: of values of full strength, and of others, which have a row of their own too.
    reads_prompt: as the value encoder has it.

    Returns:
        A dict of value_prompt_ids [N, V, L] int32, of XL [N, V, 2, L]; visible [N, R, V] bool, whether a row sees a
        token; strength [N, R - 2] float32, of the values with a row of their own; length [N, R] int, how many of its
        text's tokens a row sees.
    """
    full = [[dose for dose in r.values if dose.strength == 1] for r in requests]
    partial = [[dose for dose in r.values if dose.strength not in (0, 1)] for r in requests]
    F, P = (max(least, *map(len, doses)) for least, doses in zip(slots, (full, partial)))
    N, V = len(requests), F + P
    texts, visible, strength = [], np.zeros((N, 2 + P, V), bool), np.zeros((N, P), np.float32)
    for n, request in enumerate(requests):
        slots = dict(enumerate(full[n])) | dict(enumerate(partial[n], F))
        prompt = request.prompt if reads_prompt else ""
        texts += [value_prompt(slots[k].value if k in slots else None, prompt) for k in range(V)]
        visible[n, [0, *range(2, 2 + P)], : len(full[n])] = True
        for p, dose in enumerate(partial[n]):
            visible[n, 2 + p, F + p], strength[n, p] = True, dose.strength
    ids = sd.tokenize(texts)
    length = np.full((N, 2 + P), ids.shape[-1])
    return dict(value_prompt_ids=ids.reshape(N, V, *ids.shape[1:]), visible=visible, strength=strength, length=length)


def official_layout(columns: dict, tokenizer):
    """Cuts what images with a value are conditioned on to n tokens of the prompt, n + 1 of the negative prompt.

    A causal text encoder gives a token the same state whatever follows it: hiding is as good as cutting.
    """
    length = lambda ids: (first_ids(ids) == tokenizer.eos_token_id).argmax(1) + 1
    with_value, n = columns["visible"].any((1, 2)), length(columns["prompt_ids"])
    columns["length"][with_value] = n[with_value, None]
    columns["length"][with_value, 1] += 1
    negative = columns["negative_ids"]
    cut = with_value & (length(negative) > n + 1)
    negative[cut, ..., n[cut]] = tokenizer.eos_token_id  # a negative prompt that is longer ends there
