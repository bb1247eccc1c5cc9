"""The retriever: which values a prompt is for."""

import dataclasses
import functools
import pathlib
import tomllib
import warnings

from livo_jax.retrieval import first_steps, language_model, ngrams, similarity, states
from livo_jax.values.principles import BACKENDS, Value, keyword_rules, load

LABELLED = pathlib.Path(__file__).with_name("retriever_prompts.toml")

PAPERS = ("gender", "race", "nudity", "gore", "zombie")

FITTED = ("ngrams", "states", "first_steps")  # backends that a file is fitted for, by data_tools/fit_retriever.py

NEEDS = {"keywords": "keywords", "bm25": "descriptions", "dense": "descriptions", "llm": "descriptions"}


def run_file(backend: str) -> pathlib.Path:
    """Where in a run's directory the file of a fitted backend lies."""
    return pathlib.Path("retriever") / f"{backend}.safetensors"


def without_file(name: str) -> str:
    """What is wrong where a fitted backend has no file."""
    return f"{name} needs a file that is fitted for this model: python -m data_tools.fit_retriever --features={name}"


def run_files(workdir, values=()) -> dict[str, pathlib.Path]:
    """The files of fitted backends that a run has. Raises ValueError where `auto` of a value names one without."""
    files = {name: pathlib.Path(workdir) / run_file(name) for name in FITTED}
    files = {name: file for name, file in files.items() if file.is_file()}
    asked = {name for value in values for name in value.auto} & {"states", "first_steps"}
    if problems := [without_file(name) for name in sorted(asked - files.keys())]:
        raise ValueError(f"{workdir}: {'; '.join(problems)} --workdir={workdir} writes it")
    return files


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
            "ngrams": a linear classifier of words and letters, of the values that it is fitted for; of a file, as
                data_tools/fit_retriever.py makes it, or the package's.
            "states": one of the states in which the text encoder of `sd` holds the prompt; of a file.
            "first_steps": one of what `sd` begins to draw, and of how far the tokens of `value_encoder` move that; of a
                file. It costs evaluations of the UNet, as first_steps.count_evaluations says.
            "bm25": by the words that the prompt shares with the values' descriptions.
            "dense": by likeness to these in the text encoder of `sd`.
            "llm": by asking the language model `model` behind `endpoint`, the base URL of an OpenAI-compatible server;
                OPENAI_API_KEY of the environment is its key, if it wants one. `cache` is a directory that keeps the
                answers, empty for none. Where it fails the keywords answer in its place: a warning and the reasons
                say so.
            "always": in every prompt.
        sd: a StableDiffusion. value_encoder: one of livo_jax.value_encoders.
        files: {backend: file} of the fitted ones, as `run_files` finds those of a run. classifier: that of ngrams.
        votes: how many of its backends must find a value. With 1 and the keywords among them, a prompt that talks a
            language model out of a value gains nothing.

    Raises:
        ValueError: backends that are unknown or lack what they need, and votes that nothing can have; all are listed.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self, values, backends=None, *, votes: int = 1, sd=None, endpoint: str = "", model: str = "",
        cache: str = "", classifier="", value_encoder=None, files=None,
    ):  # fmt: skip
        self.values, self.votes = tuple(values), votes
        files = {"ngrams": classifier, **(files or {})}
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
        problems += [
            f"{name} needs sd, a StableDiffusion"
            for name in ("dense", "states", "first_steps")
            if name in chosen and sd is None
        ]
        problems += [without_file(name) for name in ("states", "first_steps") if name in chosen and not files.get(name)]
        if "llm" in chosen and not (model and endpoint.startswith(("http://", "https://"))):
            problems.append(f"llm needs a model and the base URL of an endpoint, not {model!r} and {endpoint!r}")
        if problems:
            raise ValueError("the retriever cannot work: " + "; ".join(problems))
        self.rules = keyword_rules(self.values)
        self.backends = {}
        for name in chosen:
            match name:
                case "keywords":
                    self.backends[name] = self.rules
                case "ngrams":
                    self.backends[name] = ngrams.NGrams(of[name], files[name])
                case "states":
                    self.backends[name] = states.States(of[name], files[name], sd)
                case "first_steps":
                    self.backends[name] = first_steps.FirstSteps(of[name], files[name], sd, value_encoder)
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
