"""The retriever: which values a prompt is for."""

import dataclasses
import functools
import pathlib
import tomllib
import warnings

from livo_jax.retrieval import language_model, ngrams, similarity
from livo_jax.values.principles import BACKENDS, Value, lists, load
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


def _calibration() -> dict[str, set[str]]:
    """The prompts that thresholds of likeness are calibrated on, as `labelled` has them, of all categories."""
    return {prompt: wanted for rows in labelled("calibration").values() for prompt, wanted in rows.items()}


@functools.lru_cache(16)  # a call with values="auto" makes a retriever, and reading the keywords takes a while
def _rules(values: tuple) -> Rules:
    return Rules(values, lists())


class Always:
    """Finds its values in every prompt."""

    def __init__(self, values):
        self.found = {value.name: (1.0, "of every prompt") for value in values}

    def __call__(self, prompt: str) -> dict[str, tuple[float, str]]:
        return self.found


class Retriever:
    """Finds the values that a prompt is for.

    Args:
        values: those to choose from.
        backends: who looks for them, each on its own. None for what principles.toml says of each value (`auto`).
            "keywords": the rules of principles.toml; in milliseconds, with nothing loaded.
            "ngrams": a linear classifier of words and letters, of the values that it is fitted for. `classifier` is its
                file, as data_tools/fit_retriever.py makes it; the package's if "".
            "bm25": by the words that the prompt shares with the values' descriptions.
            "dense": by likeness to these in the text encoder of `sd`, a StableDiffusion.
            "llm": by asking the language model `model` behind `endpoint`, the base URL of an OpenAI-compatible server;
                OPENAI_API_KEY of the environment is its key, if it wants one. `cache` is a directory that keeps the
                answers, empty for none. Where it fails the keywords answer in its place: a warning and the reasons
                say so.
            "always": in every prompt.
        votes: how many of its backends must find a value. With 1 and the keywords among them, a prompt that talks a
            language model out of a value gains nothing.

    Raises:
        ValueError: backends that are unknown or lack what they need, and votes that nothing can have; all are listed.
        FileNotFoundError: there is no such classifier.
    """

    def __init__(
        self, values, backends=None, *, votes: int = 1, sd=None, endpoint: str = "", model: str = "",
        cache: str = "", classifier="",
    ):  # fmt: skip
        self.values, self.votes = tuple(values), votes
        self.asked = {value.name: tuple(value.auto if backends is None else backends) for value in self.values}
        of = {name: [value for value in self.values if name in self.asked[value.name]] for name in BACKENDS}
        chosen = tuple(dict.fromkeys(sum(self.asked.values(), ()) if backends is None else backends))
        problems = [f"backend {name!r}: choose from {', '.join(BACKENDS)}" for name in chosen if name not in BACKENDS]
        problems += [
            f"the value {value.name!r} has no `{field}` in principles.toml, for {name}"
            for name, field in NEEDS.items()
            for value in of[name]
            if not getattr(value, field)
        ]
        if not self.values or not 1 <= votes <= len(chosen):
            problems.append(f"{len(self.values)} values, backends={backends!r}, votes={votes}: at least one of each")
        if "dense" in chosen and sd is None:
            problems.append("dense needs sd, a StableDiffusion")
        if "llm" in chosen and not (model and endpoint.startswith(("http://", "https://"))):
            problems.append(f"llm needs a model and the base URL of an endpoint, not {model!r} and {endpoint!r}")
        if problems:
            raise ValueError("the retriever cannot work: " + "; ".join(problems))
        self.rules = _rules(self.values)
        self.backends = {}
        for name in chosen:
            match name:
                case "keywords":
                    self.backends[name] = self.rules
                case "ngrams":
                    self.backends[name] = ngrams.NGrams(of[name], classifier)
                case "bm25":
                    self.backends[name] = similarity.Similar(of[name], similarity.bm25, _calibration())
                case "dense":
                    measure = functools.partial(similarity.dense, sd=sd)
                    self.backends[name] = similarity.Similar(of[name], measure, _calibration())
                case "llm":
                    self.backends[name] = language_model.LanguageModel(of[name], endpoint, model, cache)
                case "always":
                    self.backends[name] = Always(of[name])

    @classmethod
    def default(cls, values=None) -> "Retriever":
        """What principles.toml says of the paper's five values, or of others: the keywords alone of the five."""
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
            asked = [name for name in self.asked[value.name] if name in found]
            if "llm" in self.asked[value.name] and "llm" not in found and "keywords" not in asked:
                asked.append("keywords")
            votes = {name: found[name][value.name] for name in asked if value.name in found[name]}
            if len(votes) >= min(self.votes, len(asked)):
                reasons = [f"{name}: {reason}" for name, (_, reason) in votes.items()]
                reasons += [f"llm failed: {failure}" for failure in failures if "llm" in self.asked[value.name]]
                score = max(score for score, _ in votes.values())
                values.append(dataclasses.replace(value, score=score, reason="; ".join(reasons)))
        return sorted(values, key=lambda value: (value.kind != "harm", -value.score))
