"""Unified Concept Editing (Gandikota et al. 2024): the UNet's cross-attention reads concepts as others, in closed form.

A harm is erased: its prompts are read as those of its aligned images. A bias is debiased: a subject's prompt is read as
moved towards those that name an attribute, as far as makes its images show the attributes alike.
"""

import dataclasses
import json
import pathlib
import time

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from livo_jax import seeds, sharding, values
from livo_jax.files.directories import replacing
from livo_jax.files.repositories import read_safetensors, write_safetensors
from livo_jax.methods.base import (
    TOKENS,
    TRAINING,
    Drawing,
    Method,
    by_group,
    check_cross_attention,
    drawer,
    quantised_problems,
    weights_of,
    with_unet,
)
from livo_jax.models.clip import first_ids
from livo_jax.models.weights import name_of, put, split
from livo_jax.processes import ending_together
from livo_jax.sampling.generate import settings_of_base
from livo_jax.sampling.requests import Request, without_values
from livo_jax.values.principles import phrase

FILE = "uce.safetensors"


def matrix(C, X, P, regularisation: float) -> np.ndarray:
    """The closed form (equation 7) of W = M W_old, for all layers at once.

    With targets v = x W_old it minimises, for every W_old, in rows of text states,

        sum |c W - x W_old|^2 + sum |p W - p W_old|^2 + regularisation |W - W_old|^2

    Args:
        C, X: [n, D] states to edit, and what each is to be read as. P: [m, D] states that stay.

    Returns:
        M [D, D] float64.
    """
    stay = P.T @ P + regularisation * np.eye(P.shape[1])
    return np.linalg.solve(C.T @ C + stay, C.T @ X + stay)


class Texts:
    """The text encoder's states of texts, each asked for once."""

    def __init__(self, sd, texts):
        texts = list(dict.fromkeys(texts))
        ids = sd.tokenize(texts)
        graph, params = split(sd.text_encoder)
        states = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids).last_hidden_state)(params, ids)
        self.states = dict(zip(texts, sharding.fetch(states).astype(np.float64)))  # [L, D] each
        ends = (first_ids(ids) == sd.tokenizer.eos_token_id).argmax(1)
        self.last = dict(zip(texts, ends - 1))  # the place of the last word

    def whole(self, texts) -> np.ndarray:
        return np.concatenate([self.states[text] for text in texts])

    def tails(self, texts) -> np.ndarray:
        """[T, n, D]: the states of texts with one meaning at each place, from their last words on."""
        n = min(len(self.states[text]) - self.last[text] for text in texts)
        return np.stack([self.states[text][(k := self.last[text]) : k + n] for text in texts])


def _reads_text(path) -> bool:
    return name_of(path).endswith(("attn2.to_k.kernel", "attn2.to_v.kernel"))


def edited(sd, M):
    """The StableDiffusion with W = M W_old in the keys and values of its cross-attention."""
    graph, params = split(sd.unet)

    def edit(path, W):
        return put((M @ sharding.fetch(W).astype(np.float64)).astype(W.dtype), W.sharding) if _reads_text(path) else W

    return with_unet(sd, nnx.merge(graph, jax.tree_util.tree_map_with_path(edit, params)))


def erase(value, sd, config) -> np.ndarray:
    """M that reads the prompts of a harm as those of its aligned images; plain prompts stay."""
    plain, aligned = [*_prompts(config, "{subject}"), ""], _prompts(config, value.aligned)
    harmful = [_prompts(config, wording) for wording in value.wordings]
    texts = Texts(sd, [*sum(harmful, []), *aligned, *plain])
    pairs = [texts.tails(pair) for prompts in harmful for pair in zip(prompts, aligned)]
    C, X = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    return matrix(C, X, texts.whole(plain), config.uce.regularisation)


def debias(value, sd, config, mesh, judge) -> np.ndarray:
    """M that reads a subject's prompts as moved towards its attributes': c + sum_k alpha_k (c_k - c).

    The paper's algorithm 1: the images of each subject tell its shares; where these are off, alpha follows, by the
    subject and attribute; where they are not, it stays. Prompts that state an attribute stay as they are.
    """
    c = config.uce
    wordings = [value.wordings[0].format(attribute=a, subject="{subject}") for a in value.attributes]
    plain, stated = _prompts(config, "{subject}"), [_prompts(config, wording) for wording in wordings]
    stay = [*sum(stated, []), ""]
    texts = Texts(sd, [*plain, *stay])
    tails = [texts.tails(rows) for rows in zip(plain, *stated)]  # of each prompt [1 + K, n, D]
    templates, K = len(config.preferences.templates), len(value.attributes)
    C, P, alpha = np.concatenate([tail[0] for tail in tails]), texts.whole(stay), np.zeros((len(c.subjects), K))

    def moved(tail, alpha):
        return tail[0] + np.einsum("k,knd->nd", alpha, tail[1:] - tail[0])

    rounds = tqdm(range(c.rounds), f"uce: {value.statement}", unit="round", disable=jax.process_index() > 0)
    for _ in rounds:
        X = np.concatenate([moved(tail, a) for tail, a in zip(tails, np.tile(alpha, (templates, 1)))])
        M = matrix(C, X, P, c.regularisation)
        requests = [Request(prompt, i) for prompt in plain for i in range(c.images)]
        other = (config.seed + 1) & seeds.MOST  # not the evaluation's noise
        images = drawer(config, mesh)(edited(sd, M), requests, seed=other)
        read = judge(images)[value.axis].reshape(templates, len(c.subjects), -1)
        shown = np.stack([(read == attribute).sum((0, 2)) for attribute in value.attributes], axis=1)  # [S, K]
        gap = 1 / K - shown / np.maximum(1, shown.sum(1, keepdims=True))
        off = np.abs(gap).max(1) > c.tolerance
        if not off.any():
            break
        alpha[off] += c.step * gap[off]
    return M


def _prompts(config, wording: str) -> list[str]:
    """The prompts of all subjects in this wording, template by template."""
    return [phrase(t, wording.format(subject=s)) for t in config.preferences.templates for s in config.uce.subjects]


def carried_over(file: str, statements: list[str], sd) -> dict[str, np.ndarray]:
    """The matrices of values that another model's UCE has kept in a file.

    Raises:
        ValueError: it is of other values, or of text states of another width.
    """
    _, matrices = read_safetensors(file)
    width = sd.family.states_shape[-1]
    problems = [f"lacks {statement!r}" for statement in statements if statement not in matrices]
    problems += [f"{name!r} is {M.shape}" for name, M in matrices.items() if M.shape != (width, width)]
    if problems:
        raise ValueError(
            f"config.uce.matrices={file!r}: {'; '.join(problems)}; give that of a run with these config.principles and"
            f" text states of width {width}"
        )
    return {statement: matrices[statement] for statement in statements}


class UnifiedConceptEditing(Method):
    """A model for each value, with W = M W_old. Its parameters are those that are edited in all of these models.

    config.uce has the subjects whose prompts are edited, the regularisation, and of a bias: how many rounds there are,
    of how many images of each prompt, the step of alpha, and the tolerance of a share; or in `matrices` the file of an
    edit of another model, which is carried over as it is.
    """

    SECTION = "uce"
    UNREAD, TOGETHER = (*TRAINING, *TOKENS), False

    def problems(self):
        file, found = self.config.uce.matrices, quantised_problems(self.config)
        if file and not pathlib.Path(file).is_file():
            found.append(
                f"config.uce.matrices={file!r}: there is no such file; WORKDIR/{FILE} of another run of uce is one"
            )
        return found

    def make_drawing(self, models, mesh, workdir, judge):
        config, sd = self.config, models.sd
        check_cross_attention(config, sd)
        own = {name: x for name, x in config.uce.items() if name != "matrices"}  # which are in the state
        settings = {"method": "uce", **own, "seed": config.seed, "templates": config.preferences.templates}
        matrices, seconds = self.find_matrices(settings, sd, mesh, workdir, judge)
        edited_by_value = {statement: edited(sd, M) for statement, M in matrices.items()}

        def draw_edited(statement, requests):
            return drawer(config, mesh)(edited_by_value[statement], without_values(requests))

        def draw(requests):
            return by_group(requests, lambda request: request.values[0].value, draw_edited)

        unet = jax.tree_util.tree_leaves_with_path(split(sd.unet)[1])
        trained = len(matrices) * sum(leaf.size for path, leaf in unet if _reads_text(path))
        state = [weights_of(sd), matrices]
        return Drawing(draw, state, settings, trained=trained, seconds=seconds)

    def find_matrices(self, settings: dict, sd, mesh, workdir, judge) -> tuple[dict[str, np.ndarray], float]:
        """M by the values' statements, and the seconds that they took. Each is kept in `workdir` once it is found, for
        the same config and arrays, wherever the model lies."""
        config, file = self.config, workdir / FILE
        found = values.load_principles(config)
        if config.uce.matrices:
            return carried_over(config.uce.matrices, [v.statement for v in found], sd), 0.0
        by = {"sampling": settings_of_base(config.sampling), "judge": config.judge, "judging": config.judging.to_dict()}
        tables = [dataclasses.asdict(value) for value in found]
        facts = {**settings, **by, "values": tables, "arrays": sharding.digest(weights_of(sd))}
        key = json.dumps(facts, default=str)
        facts, matrices = read_safetensors(file) if file.exists() else ({}, {})
        seconds = 0.0
        if facts.get("settings") == key:
            seconds = float(facts["seconds"])
        else:
            matrices = {}
        for value in (v for v in found if v.statement not in matrices):
            start, of_bias = time.perf_counter(), value.kind == "bias"
            M = debias(value, sd, config, mesh, judge) if of_bias else erase(value, sd, config)
            matrices[value.statement], seconds = M, seconds + time.perf_counter() - start
            with ending_together():
                if jax.process_index() == 0:
                    workdir.mkdir(parents=True, exist_ok=True)
                    with replacing(file) as scratch:
                        write_safetensors(matrices, scratch, metadata={"settings": key, "seconds": str(seconds)})
        return {v.statement: matrices[v.statement] for v in found}, seconds
