"""Attacks: how often a harm is drawn again where words before the prompt are sought for it."""

import functools
import hashlib
import itertools
import json

import jax
import numpy as np

from livo_jax import judges, methods, values
from livo_jax.evaluation import attacks, metrics, report
from livo_jax.evaluation.cases import AUTO, Case, as_chosen, everywhere, left_alone, worded
from livo_jax.evaluation.drawn import Drawn, Sides
from livo_jax.evaluation.prompt_sets import Prompt
from livo_jax.runs.check import fail_with
from livo_jax.runs.evaluate import (  # fmt: skip
    Evaluated,
    as_drawn,
    drawn_directory,
    find_values,
    followed_values,
    is_applied,
    make_sides,
    subjects,
)
from livo_jax.sampling.requests import Request

TARGETS = 4  # images of the base of which the most harmful is the target
NEUTRAL, HARMFUL = "no harm said", "harm said"


def problems(config) -> list[str]:
    """What stands in the way of an attack, and shows without a model."""
    c, found = config.attack, []
    if c.search not in attacks.SEARCHES:
        found.append(f"config.attack.search={c.search!r}: choose from {', '.join(attacks.SEARCHES)}")
    for name in ("tokens", "steps", "restarts", "noises", "candidates", "likeliest", "prompts", "at_once"):
        if c[name] < 1:
            found.append(f"config.attack.{name}={c[name]}: choose at least 1")
    if c.search == "queries" and c.queries < (least := c.noises * c.restarts):
        found.append(f"config.attack.queries={c.queries}: choose at least {least}, attack.noises x attack.restarts")
    if c.rate <= 0:
        found.append(f"config.attack.rate={c.rate}: choose above 0")
    if not config.judge:
        found.append("config.judge is empty: an attack's success is what a judge reads")
    if not harms_of(config):
        text = f"config.principles={config.principles}: an attack is for a harm, and config.method={config.method!r}"
        found.append(f"{text} is for none here")
    if not (*config.eval.seen, *config.eval.held_out):
        found.append("config.eval.seen and config.eval.held_out are empty: there is nothing to attack")
    return found


def check(config):
    """Raises ValueError with all `problems`."""
    fail_with(problems(config))


def harms_of(config) -> list[values.Value]:
    """The harms that the method is for."""
    return [value for value in followed_values(config) if value.kind == "harm"]


def attack(models: methods.Models, config, mesh, workdir) -> list[dict]:
    """Attacks the base and the method of a run.

    Leaves in workdir/eval attacks.json, rows as of results.json, whose splits are of the neutral prompt, the harmful
    one, and the neutral prompt with the words that were found; and attacks_found.json, their token ids.

    Raises:
        ValueError: a config that cannot work, or a model that cannot be attacked.
    """
    check(config)
    judge = judges.load(config, values.load_principles(config), subjects(config))
    drawing = methods.make_method(config).make_drawing(models, mesh, workdir, judge)
    finds = find_values(models, config, workdir) if config.eval.auto and models.value_encoder is not None else None
    numbers, found = measure(models, drawing, config, drawn_directory(config, workdir), mesh, judge, finds)
    results = metrics.rows(numbers)
    if jax.process_index() == 0:
        folder = workdir / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, results, found, config.attack, [judge.pinned])
        print(report.table(results))
        if not is_attacked(config):
            told = f"{config.method} has no gradients to attack by: it was given the words that were found on the base;"
            print(f"{told} --config.attack.search=queries attacks it by its images")
    return results


def write(folder, results: list[dict], found: list[dict], budget, pinned: list):
    """Writes attacks.json and attacks_found.json; `budget`: config.attack. Others as `measure` gives them."""
    (folder / "attacks_found.json").write_text(json.dumps(found, indent=2) + "\n")
    document = metrics.document(results, pinned) | {"attack": budget.to_dict()}
    (folder / "attacks.json").write_text(json.dumps(document, indent=2) + "\n")


def is_attacked(config) -> bool:
    """Whether the method itself is attacked, not by what was found on the base: gradients pass, or none are needed."""
    return isinstance(methods.make_method(config), methods.TrainedMethod) or config.attack.search not in attacks.WHITE


def seek_on_base(sd, config, directory, mesh):
    """Finds the words for the base, for several methods' attacks to share. Arguments as of `measure`."""
    principles = values.load_principles(config)
    judge = judges.load(config, principles, subjects(config))
    base = as_drawn(methods.base(config, sd, mesh), sd, config, principles, judge, directory, mesh)
    for value in harms_of(config):
        seek(base, sd, None, config, value, draw_targets(base, value, prompts_of(config, value)))


def measure(models: methods.Models, drawing: methods.Drawing, config, directory, mesh, judge, finds=None):
    """Attacks the base and, where it can be, the method; measures both, and others by the base's words.

    Args:
        directory: keeps images, readings and words (Drawn). judge: as judges.load makes it for config.
        finds: finds(prompt) -> the values that a retriever finds for it, whose images are then measured too (AUTO).

    Returns:
        The numbers, as metrics.rows takes them, and of each word sought its value, method, prompt and token ids.
    """
    principles = values.load_principles(config)
    sides = make_sides(models.base, drawing, config, principles, judge, directory, mesh)
    harms, cases, found = harms_of(config), [], []
    for value in harms:
        prompts = prompts_of(config, value)
        targets = draw_targets(sides.base, value, prompts)
        words = {"base": seek(sides.base, models.base, None, config, value, targets)}
        words[config.method] = words["base"]
        if is_attacked(config):
            words[config.method] = seek(sides.ours, models.sd, models.value_encoder, config, value, targets, [value])
        found += [
            dict(value=value.statement, method=name, prompt=prompt.text, tokens=tokens_of(models.base, text))
            for name, texts in words.items()
            for (prompt, _), text in zip(prompts, texts)
        ]
        cases += make_cases(config, value, prompts, words)
    if finds:
        cases += as_chosen([case for case in cases if case.method != "base"], finds)
    alone = left_alone(config, harms)
    sides.draw([request for case in cases + alone for request in (*case.requests, *plain_of(case))])
    return numbers_of(sides, principles, judge, cases, alone), found


def seek(drawn: Drawn, sd, value_encoder, config, value, targets, applied=()) -> list[str]:
    """The words for the prompts of a harm, kept beside the images of the model that is attacked.

    Arguments as attacks.find_words has them; `applied`: the values on every image.
    """
    budget = attacks.Budget(**{name: config.attack[name] for name in attacks.Budget._fields})
    neutral = [prompt.text for prompt, _ in prompts_of(config, value)]
    depends_on = {"attack": config.attack.to_dict(), "value": value.statement, "prompts": neutral}
    depends_on["targets"] = hashlib.sha256(targets.tobytes()).hexdigest()
    find = functools.partial(
        attacks.find_words, sd, value_encoder, value.statement, neutral, targets, budget, seed=config.attack.seed,
        at_once=config.attack.at_once,
    )  # fmt: skip
    if budget.search == "queries":
        words = [sd.tokenizer.decode([i]).strip() for i in attacks.whole_words(sd.tokenizer)]
        ask = functools.partial(harm_read, drawn, config, value, neutral, applied)
        find = functools.partial(attacks.find_words_by_queries, ask, words, neutral, budget, seed=config.attack.seed)
    return drawn.keep("words", depends_on, find)


def harm_read(drawn: Drawn, config, value, neutral: list[str], applied, prompts: list[str]) -> np.ndarray:
    """[P], how much of a harm is read in the images of prompts, each of one of the neutral ones in turn.

    All that are of one neutral prompt have its noise, which is none of those that are measured.
    """
    first, n = config.eval.harm_images_per_prompt, config.attack.noises
    rows = zip(prompts, itertools.cycle(neutral))
    requests = [Request(prompt, first + i, noise=own) for prompt, own in rows for i in range(n)]
    read = drawn.judge(drawn.draw_batch(everywhere(requests, applied)))[value.axis]
    return np.nan_to_num(read, nan=0.0).reshape(len(prompts), n).mean(1)


def prompts_of(config, value) -> list[tuple[Prompt, Prompt]]:
    """(neutral, harmful) of config.attack.prompts subjects, the held-out ones first."""
    names = dict.fromkeys([*config.eval.held_out, *config.eval.seen])
    chosen = [(NEUTRAL, name) for name in names][: config.attack.prompts]
    return list(zip(worded(config, chosen, ("{subject}",)), worded(config, chosen, value.wordings)))


def draw_targets(base: Drawn, value, prompts) -> np.ndarray:
    """[P, H, W, 3] uint8, for each harmful prompt that of the base's images in which most harm is read."""
    requests = [[Request(harmful.text, i) for i in range(TARGETS)] for _, harmful in prompts]
    Sides(base, base).draw([request for of_prompt in requests for request in of_prompt])
    read = [[np.nan_to_num(base[r][value.axis], nan=-np.inf) for r in of_prompt] for of_prompt in requests]
    return np.stack([base.image(of_prompt[np.argmax(scores)]) for of_prompt, scores in zip(requests, read)])


def tokens_of(sd, text: str) -> list[int]:
    return sd.tokenizer(text, add_special_tokens=False)["input_ids"]


def make_cases(config, value, prompts, words: dict[str, list[str]]) -> list[Case]:
    """Those of the base and of the method, whose value is on every image, by what the prompt is."""
    found, n = [], config.eval.harm_images_per_prompt
    for name, texts in words.items():
        for (neutral, harmful), text in zip(prompts, texts):
            attacked = f"attacked by {config.attack.search}"
            of_split = {NEUTRAL: neutral.text, HARMFUL: harmful.text, attacked: f"{text} {neutral.text}"}
            for split, prompt in of_split.items():
                # Of one noise all: what an attack costs in the picture shows beside the neutral prompt's own.
                requests = [Request(prompt, i, noise=neutral.text) for i in range(n)]
                requests = requests if name == "base" else everywhere(requests, [value])
                found.append(Case(value.statement, name, value, split, neutral.subject, requests))
    return found


def plain_of(case) -> list[Request]:
    """The base's images of the neutral prompt, of the same noise."""
    return [r._replace(prompt=r.noise or r.prompt, noise="", values=()) for r in case.requests]


def numbers_of(sides, principles, judge, cases: list[Case], alone: list[Case]) -> dict:
    """Numbers as metrics.rows takes them."""
    found = Evaluated(sides)
    for case in cases:
        reading = sides.reading(case.requests)
        of_case = metrics.prompt_metrics(case.value, case.subject, reading, thresholds=judge.thresholds)
        of_case |= {"any": float(of_case["R"] > 0), "distance": sides.distance(case.requests, plain_of(case))}
        found.add(case, of_case)
        if case.method == AUTO:
            found.add(case, {"chosen": float(is_applied(case))})
    for case in alone:
        found.add_over_refusal(case, principles)
    return found.numbers
