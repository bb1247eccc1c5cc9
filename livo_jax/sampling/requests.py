"""Which images are asked for, and with which values: requests, made of prompts and values."""

from collections import Counter
from typing import NamedTuple

from livo_jax import seeds
from livo_jax.retrieval.retriever import Retriever
from livo_jax.value_encoders.base import values_by_prompt
from livo_jax.values import ratio as ratios
from livo_jax.values.arguments import strength_problems
from livo_jax.values.dealing import Dose, applied, choose
from livo_jax.values.principles import Value


class Request(NamedTuple):
    """One image. Its noise, also what a sampler adds at each step, depends on (seed, prompt, index) alone: with and
    without values it is the same.

    seed, guidance_scale, size (height and width in pixels): its own, where a set of prompts tells them; None for those
    of the call.
    """

    prompt: str
    index: int = 0
    values: tuple[Dose, ...] = ()  # none leaves the image to the base
    negative: str = ""
    noise: str = ""  # another prompt whose noise to take
    edits: tuple[tuple[str, float], ...] = ()  # texts, with a weight each, for a guidance of livo_jax.sampling.guidance
    seed: int | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None


def has_own_row(dose: Dose, gated: bool) -> bool:
    """Whether a value is drawn in a row of its own, and not in the prompt's, which those of full strength share."""
    return dose.strength != 0 and (gated or dose.strength != 1)


def with_doses(request: Request, doses: list[tuple[Dose, float]], seed: int) -> Request:
    """The request with those of `choose`'s values that it gets by their shares."""
    return request._replace(values=applied(doses, seed, request.prompt, request.index))


def without_values(requests) -> list[Request]:
    """The requests for the base's images of the same noise."""
    return [request._replace(values=()) for request in requests]


def as_prompts(prompts) -> list[str]:
    """A list of prompts; one alone, as diffusers takes it, is a list of one."""
    return [prompts] if isinstance(prompts, str) else list(prompts)


def requests_of(prompts, values=None, seed: int = 0, ratio=None, rates=None, **options) -> list[Request]:
    """Requests for prompts; the n-th time a prompt occurs, it is its n-th image.

    Args:
        prompts: list of str, or one.
        values: as value_encoders.base.values_by_prompt takes them.
        seed: decides which images a value with a share below 1 is applied to, and which tokens a ratio gives them.
        ratio: which attributes the images should show: "equal", or {attribute: share}, as ratio.targets takes it; in
            the place of the share of the bias values that it is for.
        rates: of the value encoder, as ratio.targets takes them; a run leaves them in eval/rates.json.
        options: of `choose`; without a retriever the default one is made where it is needed.

    Raises:
        ValueError: as many values as prompts are not given, or a ratio that is unknown, for no value, or out of reach.
    """
    seed, prompts = seeds.check(seed), as_prompts(prompts)
    rows = values_by_prompt(values, len(prompts))
    if problems := strength_problems(options.get("strength", 1.0), rows):
        raise ValueError("; ".join(problems))
    if ("auto",) in rows and not options.get("retriever"):
        options["retriever"] = Retriever.default()
    keys = list(zip(prompts, rows))
    doses = {key: choose(*key, **options) for key in dict.fromkeys(keys)}  # a prompt's images are of one choice
    rows = [doses[key] for key in keys]
    if ratio is not None:
        rows = ratios.deal(rows, prompts, ratio, rates, seed)
    seen, requests = Counter(), []
    for prompt, row in zip(prompts, rows):
        requests.append(with_doses(Request(prompt, seen[prompt]), row, seed))
        seen[prompt] += 1
    return requests


def with_values(requests: list[Request], values: list[Value], seed: int) -> list[Request]:
    """The requests, with each value in those that it is applied to: its keep_probability's share."""
    doses = [(Dose(value.statement), value.keep_probability) for value in values]
    return [with_doses(request, doses, seed) for request in requests]
