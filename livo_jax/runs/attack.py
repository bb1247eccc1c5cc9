"""--mode=attack: how often a harm is drawn again where words before the prompt are sought for it."""

import functools
import json

import jax
import numpy as np

from livo_jax import judges, methods, values
from livo_jax.evaluation import attacks, metrics, report
from livo_jax.evaluation.cases import AUTO, Case, as_chosen, everywhere, left_alone, worded
from livo_jax.evaluation.prompt_sets import Prompt
from livo_jax.runs.check import fail_with
from livo_jax.runs.evaluate import Evaluated, drawn_directory, find_values, is_applied, make_sides, subjects
from livo_jax.sampling.requests import Request

TARGETS = 4  # images of the base of which the most harmful is the target
NEUTRAL, HARMFUL, ATTACKED = "no harm said", "harm said", "attacked"


def problems(config) -> list[str]:
    """What stands in the way of an attack, and shows without a model."""
    c, found = config.attack, []
    if c.search not in attacks.SEARCHES:
        found.append(f"config.attack.search={c.search!r}: choose from {', '.join(attacks.SEARCHES)}")
    for name in ("tokens", "steps", "restarts", "noises", "candidates", "likeliest", "prompts", "at_once"):
        if c[name] < 1:
            found.append(f"config.attack.{name}={c[name]}: choose at least 1")
    if c.rate <= 0:
        found.append(f"config.attack.rate={c.rate}: choose above 0")
    if not config.judge:
        found.append("config.judge is empty: an attack's success is what a judge reads")
    if not any(value.kind == "harm" for value in values.load_principles(config)):
        found.append(f"config.principles={config.principles}: an attack is for a harm, name one")
    if not (*config.eval.seen, *config.eval.held_out):
        found.append("config.eval.seen and config.eval.held_out are empty: there is nothing to attack")
    return found


def check(config):
    """Raises ValueError with all `problems`."""
    fail_with(problems(config))


def attack(models: methods.Models, config, mesh, workdir) -> list[dict]:
    """Attacks the base and, where gradients pass through it, the method; measures both, and others by the base's words.

    Leaves in workdir/eval attacks.json, rows as of results.json, whose splits are of the neutral prompt, the harmful
    one, and the neutral prompt with the words that were found; and attacks_found.json, their token ids.

    Raises:
        ValueError: a config that cannot work, or a model that cannot be attacked.
    """
    check(config)
    principles = values.load_principles(config)
    judge = judges.load(config, principles, subjects(config))
    method = methods.make_method(config)
    drawing = method.make_drawing(models, mesh, workdir, judge)
    directory = drawn_directory(config, workdir)
    sides = make_sides(models.base, drawing, config, principles, judge, directory, mesh)
    harms = [value for value in principles if value.kind == "harm" and value.kind in method.KINDS]
    budget = attacks.Budget(**{name: config.attack[name] for name in attacks.Budget._fields})
    white = isinstance(method, methods.TrainedMethod)
    cases, found = [], []
    for value in harms:
        prompts = prompts_of(config, value)
        targets = draw_targets(sides, value, [harmful.text for _, harmful in prompts])
        neutral = [prompt.text for prompt, _ in prompts]
        seek = functools.partial(
            attacks.find_words, statement=value.statement, prompts=neutral, targets=targets, budget=budget,
            seed=config.attack.seed, at_once=config.attack.at_once,
        )  # fmt: skip
        words = {"base": seek(models.base, None)}
        words[config.method] = seek(models.sd, models.value_encoder) if white else words["base"]
        found += [
            dict(value=value.statement, method=name, prompt=prompt, tokens=tokens_of(models.base, text))
            for name, texts in words.items()
            for prompt, text in zip(neutral, texts)
        ]
        cases += make_cases(config, value, prompts, words)
    if config.eval.auto and models.value_encoder is not None:
        cases += as_chosen([case for case in cases if case.method != "base"], find_values(models, config, workdir))
    alone = left_alone(config, harms)
    sides.draw([request for case in cases + alone for request in (*case.requests, *plain_of(case))])
    numbers = measure(sides, principles, judge, cases, alone)
    results = metrics.rows(numbers)
    if jax.process_index() == 0:
        folder = workdir / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "attacks_found.json").write_text(json.dumps(found, indent=2) + "\n")
        document = metrics.document(results, [judge.pinned]) | {"attack": config.attack.to_dict()}
        (folder / "attacks.json").write_text(json.dumps(document, indent=2) + "\n")
        print(report.table(results))
        if not white:
            print(f"{config.method} has no gradients to attack by: it was given the words that were found on the base")
    return results


def prompts_of(config, value) -> list[tuple[Prompt, Prompt]]:
    """(neutral, harmful) of config.attack.prompts subjects, the held-out ones first."""
    names = dict.fromkeys([*config.eval.held_out, *config.eval.seen])
    chosen = [(NEUTRAL, name) for name in names][: config.attack.prompts]
    return list(zip(worded(config, chosen, ("{subject}",)), worded(config, chosen, value.wordings)))


def draw_targets(sides, value, prompts: list[str]) -> np.ndarray:
    """[P, H, W, 3] uint8, for each harmful prompt that of the base's images in which most harm is read."""
    requests = [[Request(prompt, i) for i in range(TARGETS)] for prompt in prompts]
    sides.draw([request for of_prompt in requests for request in of_prompt])
    read = [np.nan_to_num(sides.reading(of_prompt)[value.axis], nan=-np.inf) for of_prompt in requests]
    return np.stack([sides.base.image(of_prompt[scores.argmax()]) for of_prompt, scores in zip(requests, read)])


def tokens_of(sd, text: str) -> list[int]:
    return sd.tokenizer(text, add_special_tokens=False)["input_ids"]


def make_cases(config, value, prompts, words: dict[str, list[str]]) -> list[Case]:
    """Those of the base and of the method, whose value is on every image, by what the prompt is."""
    found, n = [], config.eval.harm_images_per_prompt
    for name, texts in words.items():
        for (neutral, harmful), text in zip(prompts, texts):
            of_split = {NEUTRAL: neutral.text, HARMFUL: harmful.text, ATTACKED: f"{text} {neutral.text}"}
            for split, prompt in of_split.items():
                # Of one noise all: what an attack costs in the picture shows beside the neutral prompt's own.
                requests = [Request(prompt, i, noise=neutral.text) for i in range(n)]
                requests = requests if name == "base" else everywhere(requests, [value])
                found.append(Case(value.statement, name, value, split, neutral.subject, requests))
    return found


def plain_of(case) -> list[Request]:
    """The base's images of the neutral prompt, of the same noise."""
    return [r._replace(prompt=r.noise or r.prompt, noise="", values=()) for r in case.requests]


def measure(sides, principles, judge, cases: list[Case], alone: list[Case]) -> dict:
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
