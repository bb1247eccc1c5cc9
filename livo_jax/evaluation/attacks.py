"""Attacks: words before a prompt that bring a harm back.

White box, by the gradient of a model and its defence, under the attacked prompt and, of a defence by tokens, the token:

    min over words of mean over t, eps of | eps_hat(z_t, t, [u; c(words, prompt)]) - aim |^2

z is a target image which shows the harm, drawn by the base. There are two objectives:

    noise        aim is eps, the noise in the target image: UnlearnDiffAtk (Zhang et al. 2024, "To Generate or Not?",
                 equation 5)
    prediction   aim is eps_hat_base(z_t, t, c(harmful prompt)), what the base without a defence predicts for the prompt
                 that says the harm: P4D (Chin et al. 2024, "Prompting4Debugging")

The first two searches go over the whole words of the vocabulary, so that what is found is a text that anyone can type:

    coordinate   greedy coordinate search (Zou et al. 2023, GCG): the gradient by the embedding of each word proposes
                 others, of which `candidates` are tried and the best is kept
    projected    projected steps (Wen et al. 2023, PEZ): embeddings are moved along the gradient, taken at the words
                 that are nearest to them
    continuous   the same steps of embeddings that no word has: nobody can type these, so they are an upper bound

All prompts of a batch are attacked in one compiled program, without a stop between its steps.

Black box, by what a judge reads in the images, so of any method, whatever it is made of:

    queries      hill climbing: a word is changed, images are drawn, and the words are kept that show the most harm
    paraphrases  of other wordings of the harmful prompt (paraphrases.py) that in whose images the most harm is read
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax import diffusion, seeds
from livo_jax.models.weights import split
from livo_jax.training.losses import denoising_error

WHITE = ("coordinate", "projected", "continuous")
SEARCHES = (*WHITE, "queries", "paraphrases")
OBJECTIVES = ("noise", "prediction")
LEAST = 1e-12
JUDGED = 16  # noises by which the words of several restarts are compared


class Budget(NamedTuple):
    """What a search may spend, and what it minimises.

    tokens: words before the prompt. steps, restarts: of the search. noises: (t, eps) that a step looks at, the same
    for all that it compares. candidates: that a step of coordinate tries, of the `likeliest` words of a place. rate:
    how far a step of projected or continuous moves an embedding, in the mean length of a word's. queries: images of
    each prompt that a search by queries looks at, `noises` for each change of a word, restarts included.
    """

    search: str = "coordinate"
    objective: str = "noise"
    tokens: int = 3
    steps: int = 30
    restarts: int = 1
    noises: int = 4
    candidates: int = 32
    likeliest: int = 32
    rate: float = 0.2
    queries: int = 240


class Target(NamedTuple):
    """What an attack is to bring back.

    base: the StableDiffusion without a defence. harmful: a prompt for each attacked one, which says the harm. images:
    [P, H, W, 3] uint8, what the base draws of these.
    """

    base: Any
    harmful: list[str]
    images: np.ndarray


class Texts(NamedTuple):
    """Ids with a gap of K words before the prompts. ids: [P, L] int32. at: where the gap begins; None for none."""

    ids: np.ndarray
    at: int | None


def check_encoders(sd):
    """Raises ValueError for a model of several text encoders, through which no search by gradient goes."""
    if len(sd.tokenizers) > 1:
        raise ValueError(
            f"attacks by gradient go through one text encoder, and this model has {len(sd.tokenizers)}: take"
            " config.attack.search='queries' or 'paraphrases', which attack any model, or measure it by prompt sets"
        )


def whole_words(tokenizer) -> np.ndarray:
    """The ids of tokens that are words of letters alone, and are read as themselves: a text of them keeps its ids."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    read = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.array([i for i, (text, ids) in enumerate(zip(texts, read)) if text.strip().isalpha() and ids == [i]])


def with_gap(sd, texts: list[str], prompts: list[str], filler: str, tokens: int) -> Texts:
    """The ids of texts that hold the attacked prompts, each with `tokens` fillers before its prompt.

    Raises:
        ValueError: a text is too long for so many words more.
    """
    filled = [f"{' '.join([filler] * tokens)} {prompt}" for prompt in prompts]
    texts = [text.replace(prompt, other) if prompt else text for text, prompt, other in zip(texts, prompts, filled)]
    length = sd.text_encoder.config.max_position_embeddings
    whole = sd.tokenizer(texts, verbose=False)["input_ids"]
    if long := [text for text, ids in zip(texts, whole) if len(ids) > length]:
        raise ValueError(
            f"{len(long)} prompts, as {long[0]!r}, are longer than the {length} tokens that the text encoder reads:"
            f" lower config.attack.tokens={tokens}"
        )
    (mark,) = sd.tokenizer(filler, add_special_tokens=False)["input_ids"]
    gap = [mark] * tokens
    at = next((i for i in range(len(whole[0])) if whole[0][i : i + tokens] == gap), None)
    return Texts(sd.tokenize(texts), at)


def find_words(
    sd, value_encoder, statement: str, prompts: list[str], target: Target, budget: Budget, *, seed: int = 0,
    at_once: int = 16,
) -> list[str]:  # fmt: skip
    """The words for each prompt that lead a model to its target. Arguments and errors as of `find`.

    Returns:
        Texts of `budget.tokens` words. `text + " " + prompt` is the attacked prompt, whose ids are those attacked.
    """
    ids = find(sd, value_encoder, statement, prompts, target, budget, seed=seed, at_once=at_once)
    return [sd.tokenizer.decode(row) for row in ids.tolist()]


def find(
    sd, value_encoder, statement: str, prompts: list[str], target: Target, budget: Budget, *, seed: int = 0,
    at_once: int = 16,
) -> np.ndarray:  # fmt: skip
    """What leads a model to the target of each prompt, before the prompt.

    Args:
        sd: a StableDiffusion of one text encoder, with the UNet of the attacked method.
        value_encoder: of the defence, whose token of `statement` is on every image; None where there is none.
        seed: of all that is drawn: the same seed finds the same words.
        at_once: prompts that are attacked together, for memory. One program serves all.

    Returns:
        Ids of words [P, K], K of budget.tokens; of the search "continuous" embeddings [P, K, D] float32.

    Raises:
        ValueError: a model of several text encoders, or prompts that leave no room.
    """
    check_encoders(sd)
    allowed = whole_words(sd.tokenizer)
    filler = sd.tokenizer.decode([int(allowed[0])]).strip()
    texts = [with_gap(sd, prompts, prompts, filler, budget.tokens)]
    if value_encoder is not None:
        read = [value_encoder.text(statement, prompt) for prompt in prompts]
        reads_prompt = all(prompt in text for prompt, text in zip(prompts, read))
        hidden = prompts if reads_prompt else [""] * len(prompts)
        texts.append(with_gap(sd, read, hidden, filler, budget.tokens))
    graphs, params = zip(*(split(m) if m else (None, None) for m in (sd.text_encoder, sd.unet, value_encoder)))
    aim, undefended = make_aim(target.base, sd.schedule, budget.objective)
    search = make_search(graphs, sd, tuple(text.at for text in texts), aim, budget)
    found, at_once = [], min(at_once, len(prompts))
    for start in range(0, len(prompts), at_once):
        rows = np.minimum(np.arange(start, start + at_once), len(prompts) - 1)  # the last batch is filled up
        z = sd.encode(np.asarray(target.images)[rows])
        ids = [text.ids[rows] for text in texts]
        harmful = target.base.tokenize([target.harmful[row] for row in rows])
        key = jax.random.fold_in(seeds.key(seed), start)
        part = search(params, ids, z, (undefended, harmful), jnp.array(allowed), key)
        found.append(np.asarray(part))
    return np.concatenate(found)[: len(prompts)]


def with_new_words(sd, value_encoder, rows) -> tuple:
    """A StableDiffusion and its value encoder that know new words, and their names, which prompts may hold.

    Args:
        rows: [N, D], their embeddings. value_encoder: or None.

    Raises:
        ValueError: a vocabulary of other ids than the embeddings have.
    """
    from transformers import AddedToken

    tokenizer, end = copy.deepcopy(sd.tokenizer), sd.tokenizer.eos_token_id
    if len(tokenizer) != len(embeddings(split(sd.text_encoder)[1])):
        raise ValueError(f"{sd.name} has embeddings that no token has: a new word would get one of these")
    names = [f"<new-{i}>" for i in range(len(rows))]
    tokenizer.add_tokens([AddedToken(name, normalized=False, lstrip=True, rstrip=True) for name in names])

    def extended(module):
        graph, params = split(module)
        module = nnx.merge(graph, add_rows(params, jnp.asarray(rows), first=False))
        if hasattr(module, "config") and hasattr(module.config, "eos_token_id"):  # the end has no more the largest id
            module.config = dataclasses.replace(module.config, eos_token_id=end)
        return module

    sd = copy.copy(sd)
    sd.text_encoder, sd.tokenizer, sd.tokenizers = extended(sd.text_encoder), tokenizer, [tokenizer]
    return sd, value_encoder and extended(value_encoder), names


def find_words_by_queries(ask, words: list[str], prompts: list[str], budget: Budget, *, seed: int = 0) -> list[str]:
    """The words for each prompt in whose images the most harm is read.

    Args:
        ask: ask(prompts) -> [len(prompts)], how much harm is read in the images of each.
        words: to choose from. seed: the same finds the same.

    Returns:
        Texts as find_words has them.
    """
    rng, P, R = np.random.default_rng(seed), len(prompts), budget.restarts
    table, asked = np.array(words), prompts * R

    def score(chosen):
        return np.asarray(ask([f"{' '.join(table[row])} {prompt}" for row, prompt in zip(chosen, asked)]))

    best = rng.integers(len(table), size=(R * P, budget.tokens))
    scores = score(best)
    for _ in range(budget.queries // (budget.noises * R) - 1):
        tried = best.copy()
        tried[np.arange(R * P), rng.integers(budget.tokens, size=R * P)] = rng.integers(len(table), size=R * P)
        found = score(tried)
        better = found >= scores  # of an image without any harm too: the search goes on from elsewhere
        best[better], scores[better] = tried[better], found[better]
    of_restarts = best.reshape(R, P, -1)[scores.reshape(R, P).argmax(0), np.arange(P)]
    return [" ".join(row) for row in table[of_restarts]]


def choose_paraphrases(ask, wordings) -> list[str]:
    """Of each prompt's wordings [P, N] that in whose images the most is read; ask: as find_words_by_queries has it."""
    wordings = np.asarray(wordings)
    scores = np.stack([ask(column.tolist()) for column in wordings.T])
    return wordings[np.arange(len(wordings)), scores.argmax(0)].tolist()


def embeddings(params: dict) -> jax.Array:
    """Those of a text encoder's tokens, [V, D]."""
    return params["embeddings"]["token_embedding"]["embedding"]


def add_rows(params, rows, first: bool):
    """The parameters with more embeddings of tokens, before the others or behind; of what has none as they are."""
    if not params or "embeddings" not in params:
        return params
    table = embeddings(params)
    table = jnp.concatenate([rows.astype(table.dtype), table] if first else [table, rows.astype(table.dtype)])
    tokens = params["embeddings"]["token_embedding"] | {"embedding": table}
    return params | {"embeddings": params["embeddings"] | {"token_embedding": tokens}}


def spread(z, t, eps):
    """Of P targets with M noises each the rows of a batch, P x M of z, t and eps, those of a target side by side."""
    P, M = len(z), len(t)
    return jnp.repeat(z, M, axis=0), jnp.tile(t, P), jnp.tile(eps, (P, 1, 1, 1))


def make_aim(base, schedule, objective: str):
    """What an objective wants predicted.

    Returns:
        aim(target, z, t, eps), arguments as of Objective, -> [P x M, h, w, C], in the units of what the UNet predicts;
        target: (parameters, ids), the second of the harmful prompts [P, L]. And the parameters.
    """

    def of_noise(target, z, t, eps):
        z, t, eps = spread(z, t, eps)
        return diffusion.target(schedule, z, eps, t)

    if objective == "noise":
        return of_noise, ()
    graphs, params = zip(*(split(module) for module in (base.text_encoder, base.unet)))

    def of_base(target, z, t, eps):
        params, ids = target
        text_encoder, unet = (nnx.merge(*pair) for pair in zip(graphs, params))
        cond = jnp.repeat(text_encoder(ids).last_hidden_state, len(t), axis=0)
        z, t, eps = spread(z, t, eps)
        return unet(diffusion.add_noise(schedule, z, eps, t), t, cond)

    return of_base, params


class Objective(NamedTuple):
    """What a search minimises, and by what.

    errors(params, ids, rows, z, t, eps, wanted): [P], of each prompt's target, latents z [P, h, w, C], the mean over M
        noises t [M], eps [M, h, w, C]. params: of the text encoder, the UNet and the value encoder. ids: of the
        prompts, and of what the value encoder reads, whose gaps hold words of the embeddings rows [P, K, D] float32.
        wanted: of make_aim, what is to be predicted.
    gradient(the same): [P, K, D] float32, of the sum of errors by the rows.
    """

    errors: Callable
    gradient: Callable


def make_objective(graphs, sd, places) -> Objective:
    """That of a model and its defence; graphs: of these networks, None for none; places: where the gaps begin."""

    def errors(params, ids, rows, z, t, eps, wanted):
        # Each place gets an embedding of its own: a row more in the table. The end of a text may be its largest id.
        table, first = embeddings(params[0]), sd.text_encoder.config.eos_token_id == 2
        P, K, D = rows.shape
        own = jnp.arange(P * K).reshape(P, K) + (0 if first else len(table))
        ids = [x + (P * K if first else 0) for x in ids]
        ids = [x if at is None else x.at[:, at : at + K].set(own) for x, at in zip(ids, places)]
        params = [add_rows(part, rows.reshape(-1, D), first) for part in params]
        text_encoder, _, value_encoder = (graph and nnx.merge(graph, part) for graph, part in zip(graphs, params))
        cond = text_encoder(ids[0]).last_hidden_state
        if value_encoder is not None:
            u = value_encoder.tokens(ids[1], text_encoder).astype(cond.dtype)
            cond = jnp.concatenate([u, cond], axis=1)
        M = len(t)
        z, t, eps = spread(z, t, eps)
        unet = nnx.merge(graphs[1], params[1])
        predicted = unet(diffusion.add_noise(sd.schedule, z, eps, t), t, jnp.repeat(cond, M, axis=0))
        return denoising_error(predicted, wanted).reshape(P, M).mean(1)

    def gradient(params, ids, rows, *more):
        return jax.grad(lambda rows: errors(params, ids, rows, *more).sum())(rows)

    return Objective(errors, gradient)


def make_search(graphs, sd, places, aim, budget: Budget):
    """The compiled search(params, ids, z, target, allowed, key) -> what `find` returns.

    Arguments as make_objective, make_aim and their functions have them; allowed: ids of the words to choose from.
    """
    objective, K, R = make_objective(graphs, sd, places), budget.tokens, budget.restarts
    make = {"coordinate": coordinate, "projected": projected, "continuous": continuous}[budget.search]
    step, begin, end = make(objective, budget)

    @jax.jit
    def search(params, ids, z, target, allowed, key):
        P, of_start, of_steps, of_end = len(z), *jax.random.split(key, 3)
        ids, z = [jnp.tile(x, (R, 1)) for x in ids], jnp.tile(z, (R, 1, 1, 1))
        target = target[0], jnp.tile(target[1], (R, 1))
        table = embeddings(params[0])[allowed].astype(jnp.float32)
        state = begin(params, allowed[jax.random.randint(of_start, (R * P, K), 0, len(allowed))])

        def compared_by(key, M):
            """Noises, and what is to be predicted in them."""
            t, eps = draw_noises(key, M, sd.schedule, z.shape[1:])
            return t, eps, aim(target, z, t, eps)

        def advance(state, key):
            of_noise, of_step = jax.random.split(key)
            noises = compared_by(of_noise, budget.noises)
            return step(params, ids, z, noises, allowed, table, state, of_step), None

        state, _ = jax.lax.scan(advance, state, jax.random.split(of_steps, budget.steps))
        found = end(state, allowed, table)
        rows = found if budget.search == "continuous" else rows_of(params, found)
        best = objective.errors(params, ids, rows, z, *compared_by(of_end, JUDGED)).reshape(R, P).argmin(0)
        return found.reshape(R, P, *found.shape[1:])[best, jnp.arange(P)]

    return search


def rows_of(params, words) -> jax.Array:
    """The embeddings of words, [..., D] float32."""
    return embeddings(params[0])[words].astype(jnp.float32)


def draw_noises(key, M: int, schedule, shape):
    """t [M] int32, uniform, and eps [M, h, w, C] float32."""
    of_t, of_eps = jax.random.split(key)
    t = jax.random.randint(of_t, (M,), 0, schedule.num_timesteps)
    return t, jax.random.normal(of_eps, (M, *shape))


def coordinate(objective: Objective, budget: Budget):
    """The functions step, begin and end of a greedy coordinate search, whose state is the words [P, K]."""

    def step(params, ids, z, noises, allowed, table, words, key):
        towards = objective.gradient(params, ids, rows_of(params, words), z, *noises)
        scores = -jnp.einsum("pkd,vd->pkv", towards, table)
        likeliest = allowed[jax.lax.top_k(scores, min(budget.likeliest, len(allowed)))[1]]  # [P, K, C]
        of_place, of_word = jax.random.split(key)
        shape, rows = (budget.candidates, len(words)), jnp.arange(len(words))
        place = jax.random.randint(of_place, shape, 0, budget.tokens)
        choice = jax.random.randint(of_word, shape, 0, likeliest.shape[-1])
        tried = jax.vmap(lambda k, c: words.at[rows, k].set(likeliest[rows, k, c]))(place, choice)
        tried = jnp.concatenate([words[None], tried])  # [1 + candidates, P, K]
        found = jax.lax.map(lambda words: objective.errors(params, ids, rows_of(params, words), z, *noises), tried)
        return tried[found.argmin(0), rows]

    return step, lambda params, words: words, lambda words, allowed, table: words


def moved(x, towards, table, budget: Budget):
    """Embeddings after a step against a gradient, of one length for all places."""
    length = jnp.linalg.norm(table, axis=-1).mean()
    return x - budget.rate * length * towards / (jnp.linalg.norm(towards, axis=-1, keepdims=True) + LEAST)


def projected(objective: Objective, budget: Budget):
    """The functions step, begin and end of projected steps, whose state is embeddings [P, K, D]."""

    def nearest(x, allowed, table):
        return allowed[((x[:, :, None] - table) ** 2).sum(-1).argmin(-1)]

    def step(params, ids, z, noises, allowed, table, x, key):
        rows = rows_of(params, nearest(x, allowed, table))
        return moved(x, objective.gradient(params, ids, rows, z, *noises), table, budget)

    return step, rows_of, nearest


def continuous(objective: Objective, budget: Budget):
    """The functions step, begin and end of steps of embeddings [P, K, D], which are the state."""

    def step(params, ids, z, noises, allowed, table, x, key):
        return moved(x, objective.gradient(params, ids, x, z, *noises), table, budget)

    return step, rows_of, lambda x, allowed, table: x
