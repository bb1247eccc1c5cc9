"""What the UNet, or the transformer, is conditioned on: the rows of a batch, its value tokens and who sees them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from livo_jax.models.clip import first_ids, widened
from livo_jax.sampling.requests import Request, has_own_row
from livo_jax.value_encoders.gates import gates_table
from livo_jax.values.principles import value_prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ValueColumns:
    """The values of N requests, in V slots for value tokens and R rows for the UNet.

    value_prompt_ids: [N, V, L] int32, of XL and 3 [N, V, 2 or 3, L]. visible: [N, R, V] bool, whether a row sees a
    token. length: [N, R] int, how many tokens of its text a row sees.
    """

    value_prompt_ids: np.ndarray
    visible: np.ndarray
    length: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """N requests as arrays.

    seed_low, seed_high, prompt_hash, index: [N] uint32, of the noise.
    prompt_ids, negative_ids: [N, L] int32, of XL and 3 [N, 2 or 3, L]; the second is None where no request is guided.
    edit_ids: [N, E, ...], of a guidance's edits.
    zeros: [N, 2 + E] bool, the texts whose states are zeros; of models that have such.
    weights: [N, E] float32, of the further rows: strengths of values, or weights of edits.
    guidance_scales: [N] float32, in the place of the call's; None where no request has its own.
    gates: [N, E, 2, K] float32, as value_encoders.gates.shut has them; None where values have none.
    """

    seed_low: np.ndarray
    seed_high: np.ndarray
    prompt_hash: np.ndarray
    index: np.ndarray
    prompt_ids: np.ndarray
    negative_ids: np.ndarray | None
    weights: np.ndarray
    zeros: np.ndarray | None = None
    edit_ids: np.ndarray | None = None
    values: ValueColumns | None = None
    guidance_scales: np.ndarray | None = None
    gates: np.ndarray | None = None

    def take_rows(self, start: int, stop: int) -> "Batch":
        return jax.tree.map(lambda column: column[start:stop], self)


@dataclasses.dataclass
class Conditioning:
    """What the UNet reads for a batch of B images, in R rows an image, those of one image side by side.

    cond: [B R, V n + L, D], a row's value tokens and text. mask: [B R, V n + L] bool, what a row sees; None for all.
    text_embeds: [B R, P], the pooled text of XL and 3, or None. rows: R.
    """

    cond: jax.Array
    mask: jax.Array | None
    text_embeds: jax.Array | None
    rows: int


def merge_rows(x):
    """The first two axes as one."""
    return x.reshape(-1, *x.shape[2:])


def condition(batch: Batch, text_encoder, value_encoder=None) -> Conditioning:
    """Reads the texts of a batch.

    The rows lie side by side so that none leaves its device: the prompt with the values of full strength, with guidance
    the negative prompt, and the first once more with each of the other values; or the prompt, the negative prompt, and
    the edits.
    """
    prompts = [batch.prompt_ids] if batch.negative_ids is None else [batch.prompt_ids, batch.negative_ids]
    texts = jnp.stack(prompts, axis=1)  # [B, G, L], of XL [B, G, 2, L]
    if batch.edit_ids is not None:
        texts = jnp.concatenate([texts, batch.edit_ids], axis=1)  # [B, R, L]
    text = text_encoder(merge_rows(texts))
    cond, text_embeds = text.last_hidden_state, text.text_embeds
    if batch.zeros is not None:
        keep = ~merge_rows(batch.zeros)
        cond, text_embeds = cond * keep[:, None, None], text_embeds * keep[:, None]
    if batch.values is None:
        return Conditioning(cond, None, text_embeds, rows=texts.shape[1])

    columns = batch.values
    B, rows, V = columns.visible.shape
    D = cond.shape[-1]
    value_ids = merge_rows(columns.value_prompt_ids)
    u = widened(value_encoder.tokens(value_ids, text_encoder), D).astype(cond.dtype)  # [B V, n, D]
    visible = jnp.repeat(columns.visible, u.shape[1], axis=2)
    seen = value_encoder.seen(value_ids)
    if seen is not None:  # values may have unequally many tokens
        visible &= seen.reshape(B, 1, -1)
    u = jnp.broadcast_to(u.reshape(B, 1, -1, D), (B, rows, visible.shape[2], D))

    def repeat_prompts(x):
        """[G B, ...] of prompts and negative prompts -> [B, R, ...]."""
        x = x.reshape(B, len(prompts), *x.shape[1:])
        return jnp.concatenate([x, jnp.repeat(x[:, :1], rows - len(prompts), axis=1)], axis=1)

    cond = repeat_prompts(cond)
    if text_embeds is not None:
        text_embeds = repeat_prompts(text_embeds)
        shift = value_encoder.pooled_shift(value_ids, text_encoder)
        if shift is not None:  # by the values that a row sees
            shift = jnp.einsum("brv,bvp->brp", columns.visible, shift.reshape(B, V, -1))
            text_embeds = (text_embeds + shift).astype(text_embeds.dtype)
        text_embeds = merge_rows(text_embeds)
    mask = jnp.arange(cond.shape[2]) < columns.length[:, :, None]
    # [u; c], and a row does not see the values that are not its own: the negative prompt none.
    cond = merge_rows(jnp.concatenate([u, cond], axis=2))
    mask = merge_rows(jnp.concatenate([visible, mask], axis=2))
    return Conditioning(cond, mask, text_embeds, rows)


def value_columns(
    sd, requests: list[Request], slots: tuple[int, int] = (0, 0), text=value_prompt, guided: bool = True, gates=None
) -> tuple[ValueColumns, np.ndarray, np.ndarray | None]:
    """The values of N requests, and the strengths [N, E] float32 and gates of those that have a row of their own.

    There are at least `slots`: of values of full strength, and of others, which have a row of their own too.
    text: (statement, prompt) -> what the value encoder reads. guided: whether there is a row for the negative prompt.
    gates: {statement: Gate} of all values, each of which has a row of its own then; None for none.
    """
    G = 2 if guided else 1
    slots = (0, sum(slots)) if gates else slots
    shown = [[dose for dose in r.values if dose.strength] for r in requests]
    full = [[dose for dose in doses if not has_own_row(dose, bool(gates))] for doses in shown]
    partial = [[dose for dose in doses if has_own_row(dose, bool(gates))] for doses in shown]
    F, P = (max(least, *map(len, doses)) for least, doses in zip(slots, (full, partial)))
    N, V = len(requests), F + P
    texts, visible, strength = [], np.zeros((N, G + P, V), bool), np.zeros((N, P), np.float32)
    for n, request in enumerate(requests):
        doses = dict(enumerate(full[n])) | dict(enumerate(partial[n], F))
        texts += [text(doses[k].value if k in doses else None, request.prompt) for k in range(V)]
        visible[n, [0, *range(G, G + P)], : len(full[n])] = True
        for p, dose in enumerate(partial[n]):
            visible[n, G + p, F + p], strength[n, p] = True, dose.strength
    ids = sd.tokenize(texts)
    length = np.full((N, G + P), sd.family.states_shape[0])
    gates = gates and gates_table([[dose.value for dose in doses] for doses in partial], gates, P)
    return ValueColumns(ids.reshape(N, V, *ids.shape[1:]), visible, length), strength, gates


def cut_to_official_layout(batch: Batch, tokenizer):
    """Cuts what images with a value are conditioned on to n tokens of the prompt, n + 1 of the negative prompt.

    A causal text encoder gives a token the same state whatever follows it: hiding is as good as cutting.
    """
    columns, negative = batch.values, batch.negative_ids
    with_value = columns.visible.any((1, 2))
    n = count_tokens(batch.prompt_ids, tokenizer)
    columns.length[with_value] = n[with_value, None]
    if negative is None:
        return
    columns.length[with_value, 1] += 1
    cut = with_value & (count_tokens(negative, tokenizer) > n + 1)
    negative[cut, ..., n[cut]] = tokenizer.eos_token_id  # a negative prompt that is longer ends there


def count_tokens(ids, tokenizer):
    """How many tokens [N] each text has, from its start to its end."""
    return (first_ids(ids) == tokenizer.eos_token_id).argmax(1) + 1
