"""The retriever: which values a prompt is for."""

import dataclasses
import functools
import pathlib
import tomllib
import warnings

from livo_jax.retrieval import language_model, similarity
from livo_jax.values.principles import Value, lists, load
from livo_jax.values.rules import Rules

LABELLED = pathlib.Path(__file__).with_name("retriever_prompts.toml")

PAPERS = ("gender", "race", "nudity", "gore", "zombie")

NEEDS = {"keywords": "keywords", "bm25": "descriptions", "dense": "descriptions", "llm": "descriptions"}


def labelled(part: str) -> dict[str, dict[str, set[str]]]:
    """The prompts of retriever_prompts.toml, by category, and the statements of the values that each is for.

    Args:
        part: "calibration" or "test".
    """
    with open(LABELLED, "rb") as file:
        categories = tomllib.load(file)[part]
    statements = {value.name: value.statement for value in load(PAPERS)}
    return {
        category: {prompt: {statements[name] for name in names} for prompt, names in rows.items()}
        for category, rows in categories.items()
    }


class Retriever:
    """Finds the values that a prompt is for.

    Args:
        values: those to choose from.
        backends: who looks for them, each on its own.
            "keywords": the rules of principles.toml; in milliseconds, with nothing loaded.
            "bm25": by the words that the prompt shares with the values' descriptions.
            "dense": by likeness to these in the text encoder of `sd`, a StableDiffusion.
            "llm": by asking the language model `model` behind `endpoint`, the base URL of an OpenAI-compatible server;
                OPENAI_API_KEY of the environment is its key, if it wants one. `cache` is a directory that keeps the
                answers, empty for none. Where it fails the keywords answer in its place: a warning and the reasons
                say so.
        votes: how many of the backends must find a value. With 1 and the keywords among them, a prompt that talks a
            language model out of a value gains nothing.

    Raises:
        ValueError: backends that are unknown or lack what they need, and votes that nothing can have; all are listed.
    """

    def __init__(
        self, values, backends=("keywords",), *, votes: int = 1, sd=None, endpoint: str = "", model: str = "",
        cache: str = "",
    ):  # fmt: skip
        self.values, self.votes = tuple(values), votes
        problems = [f"backend {name!r}: choose from {', '.join(NEEDS)}" for name in backends if name not in NEEDS]
        problems += [
            f"the value {value.name!r} has no `{field}` in principles.toml, for {name}"
            for name, field in NEEDS.items()
            if name in backends
            for value in self.values
            if not getattr(value, field)
        ]
        if not self.values or not 1 <= votes <= len(set(backends)):
            problems.append(f"{len(self.values)} values, backends={backends!r}, votes={votes}: at least one of each")
        if "dense" in backends and sd is None:
            problems.append("dense needs sd, a StableDiffusion")
        if "llm" in backends and not (model and endpoint.startswith(("http://", "https://"))):
            problems.append(f"llm needs a model and the base URL of an endpoint, not {model!r} and {endpoint!r}")
        if problems:
            raise ValueError("the retriever cannot work: " + "; ".join(problems))
        self.rules = Rules(self.values, lists())
        make = {
            "keywords": lambda: self.rules,
            "bm25": lambda: self._similar(similarity.bm25),
            "dense": lambda: self._similar(functools.partial(similarity.dense, sd=sd)),
            "llm": lambda: language_model.LanguageModel(self.values, endpoint, model, cache),
        }
        self.backends = {name: make[name]() for name in backends}

    def _similar(self, measure) -> similarity.Similar:
        calibration = {prompt: wanted for rows in labelled("calibration").values() for prompt, wanted in rows.items()}
        return similarity.Similar(self.values, measure, calibration)

    @classmethod
    def default(cls, values=None) -> "Retriever":
        """The keywords alone, of the paper's five values or others; without a network or a model."""
        return cls(load(PAPERS) if values is None else values)

    def __call__(self, prompt: str) -> list[Value]:
        """The values that a prompt is for, with score and reason; none leaves its image untouched.

        Returns:
            Harms before biases, the highest score first; [] where there is none.
        """
        found, failures = {}, []
        for name, backend in self.backends.items():
            try:
                found[name] = backend(prompt)
            except (ConnectionError, ValueError) as error:
                if name != "llm":
                    raise
                failures.append(str(error))
                warnings.warn(f"the keywords answer in the place of the language model: {error}", stacklevel=2)
        if failures:
            found.setdefault("keywords", self.rules(prompt))
        values = []
        for value in self.values:
            votes = {name: rows[value.name] for name, rows in found.items() if value.name in rows}
            if len(votes) >= min(self.votes, len(found)):
                reasons = [f"{name}: {reason}" for name, (_, reason) in votes.items()]
                reasons += [f"llm failed: {failure}" for failure in failures]
                score = max(score for score, _ in votes.values())
                values.append(dataclasses.replace(value, score=score, reason="; ".join(reasons)))
        return sorted(values, key=lambda value: (value.kind != "harm", -value.score))
