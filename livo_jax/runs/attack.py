"""Attacks: how often a harm is drawn again where words before the prompt are sought for it."""

import copy
import functools
import hashlib
import itertools

import jax
import numpy as np

from livo_jax import judges, methods, values
from livo_jax.evaluation import attacks, metrics, paraphrases, prompt_sets, report
from livo_jax.evaluation.cases import (  # fmt: skip
    AUTO,
    Case,
    as_chosen,
    dealt_to,
    everywhere,
    further_prompts,
    groups_of,
    images_of,
    left_alone,
    worded,
)
from livo_jax.evaluation.drawn import Drawn, Sides
from livo_jax.evaluation.prompt_sets import Prompt
from livo_jax.files.directories import write_json
from livo_jax.processes import ending_together
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
from livo_jax.sampling.requests import Request, with_values
from livo_jax.values.principles import keyword_rules, phrase

LOOKED_AT = {"harm": 4, "bias": 20}  # images of the base by which it is decided what is sought
NEUTRAL, HARMFUL = "neutral", "harm said"
AT_LEAST_ONE = ("tokens", "steps", "restarts", "noises", "candidates", "likeliest", "paraphrases", "prompts", "at_once")
SPLITS = ("held_out", "seen")


def problems(config) -> list[str]:
    """What stands in the way of an attack, and shows without a model."""
    c, found = config.attack, []
    if c.search not in attacks.SEARCHES:
        found.append(f"config.attack.search={c.search!r}: choose from {', '.join(attacks.SEARCHES)}")
    if c.objective not in attacks.OBJECTIVES:
        found.append(f"config.attack.objective={c.objective!r}: choose from {', '.join(attacks.OBJECTIVES)}")
    for name in AT_LEAST_ONE:
        if c[name] < 1:
            found.append(f"config.attack.{name}={c[name]}: choose at least 1")
    if c.search == "queries" and c.queries < (least := c.noises * c.restarts):
        found.append(f"config.attack.queries={c.queries}: choose at least {least}, attack.noises x attack.restarts")
    if c.rate <= 0:
        found.append(f"config.attack.rate={c.rate}: choose above 0")
    if not config.judge:
        found.append("config.judge is empty: an attack's success is what a judge reads")
    if not attacked_values(config):
        found.append(
            f"config.attack.kinds={c.kinds}: config.method={config.method!r} is for no such value of"
            f" config.principles={config.principles}; name a harm, or a bias for config.attack.search='queries'"
        )
    if unknown := sorted({*c.kinds} - {"harm", "bias"}):
        found.append(f"config.attack.kinds={c.kinds}: choose from harm, bias, not {', '.join(unknown)}")
    if config.sampling.gated and c.search in attacks.WHITE:
        found.append(
            f"config.sampling.gated=True: config.attack.search={c.search!r} knows no gates, and who does would look for"
            " words that keep them shut: attack by 'queries' or 'paraphrases'"
        )
    if "bias" in c.kinds and c.search != "queries":
        found.append(f"config.attack.search={c.search!r}: a bias has no target image, attack it by 'queries'")
    if c.search == "paraphrases" and not (c.model and c.endpoint.startswith(("http://", "https://"))):
        found.append(
            f"config.attack.endpoint={c.endpoint!r}, config.attack.model={c.model!r}: a language model makes"
            " paraphrases, give its base URL, as http://localhost:8000/v1, and its name there; without one take"
            " config.attack.search='queries', or wordings of your own in config.eval.harmful_wordings"
        )
    if unknown := sorted({*c.splits} - {*SPLITS}):
        found.append(f"config.attack.splits={c.splits}: choose from {', '.join(SPLITS)}, not {', '.join(unknown)}")
    elif not attacked_subjects(config):
        named = " and ".join(f"config.eval.{split}" for split in c.splits) or "config.attack.splits"
        found.append(f"{named} name no subject: there is nothing to attack")
    return found


def check(config):
    """Raises ValueError with all `problems`."""
    fail_with(problems(config))


def check_with_model(config, sd):
    """Raises ValueError for a model that the search cannot attack."""
    if config.attack.search in attacks.WHITE:
        attacks.check_encoders(sd)


def by_search(config, search: str):
    """A copy of a config that attacks by another search."""
    config = copy.deepcopy(config)
    config.attack.search = search
    return config


def attacked_values(config) -> list[values.Value]:
    """Those of config.attack.kinds that the method is for."""
    return [value for value in followed_values(config) if value.kind in config.attack.kinds]


def attack(models: methods.Models, config, mesh, workdir) -> list[dict]:
    """Attacks the base and the method of a run.

    Leaves in workdir/eval attacks.json, rows as of results.json, whose splits are of the neutral prompt, the harmful
    one, and the neutral prompt with the words that were found; and attacks_found.json, their token ids.

    Raises:
        ValueError: a config that cannot work, or a model that cannot be attacked.
    """
    check(config)
    check_with_model(config, models.base)
    judge = judges.load(config, values.load_principles(config), subjects(config))
    method = methods.make_method(config)
    make_drawing = functools.partial(method.make_drawing, mesh=mesh, workdir=workdir, judge=judge)
    finds = find_values(models, config, workdir) if config.eval.auto and models.value_encoder is not None else None
    numbers, found = measure(models, make_drawing, config, drawn_directory(config, workdir), mesh, judge, finds)
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
    write_json(folder / "attacks_found.json", found)
    document = metrics.document(results, pinned) | {"attack": spent(budget)}
    write_json(folder / "attacks.json", document)


def spent(budget) -> dict:
    """config.attack without the endpoint's address, on which no figure depends."""
    return {name: x for name, x in budget.to_dict().items() if name != "endpoint"}


def is_attacked(config) -> bool:
    """Whether the method itself is attacked, not by what was found on the base: gradients pass, or none are needed."""
    return isinstance(methods.make_method(config), methods.TrainedMethod) or config.attack.search not in attacks.WHITE


def passes(config) -> int:
    """Of the UNet, to find the words on one model, for all values; a step back counts as two."""
    c, n = config.attack, len(attacked_subjects(config)) * len(attacked_values(config))
    if c.search not in attacks.WHITE:
        images = c.queries if c.search == "queries" else c.paraphrases * c.noises
        rows = 1 + (config.sampling.guidance_scale > 1) + config.sampling.gated
        return n * images * config.sampling.steps * rows
    tried = 1 + c.candidates if c.search == "coordinate" else 0
    of_base = int(c.objective == "prediction")
    return n * c.restarts * (c.steps * c.noises * (3 + tried + of_base) + attacks.JUDGED * (1 + of_base))


def seek_on_base(sd, config, directory, mesh):
    """Finds the words for the base, for several methods' attacks to share. Arguments as of `measure`."""
    principles = values.load_principles(config)
    judge = judges.load(config, principles, subjects(config))
    base = as_drawn(methods.base(config, sd, mesh), sd, config, principles, judge, directory, mesh)
    for value in attacked_values(config):
        seek(base, methods.Models(sd, sd), config, value, sought_of(base, config, value))


def measure(models: methods.Models, make_drawing, config, directory, mesh, judge, finds=None):
    """Attacks the base and, where it can be, the method; measures both, and others by the base's words.

    Args:
        make_drawing: make_drawing(models) -> the method's Drawing.
        directory: keeps images, readings and words (Drawn). judge: as judges.load makes it for config.
        finds: finds(prompt) -> the values that a retriever finds for it, whose images are then measured too (AUTO).

    Returns:
        The numbers, as metrics.rows takes them, and of the words that were found search, value, method, subject, prompt
        and token ids; none of the search "continuous", whose embeddings no word has.
    """
    principles, attacked = values.load_principles(config), attacked_values(config)
    drawing = make_drawing(models)
    sides = make_sides(models.base, drawing, config, principles, judge, directory, mesh)
    of_values = {}
    for value in attacked:
        sought = sought_of(sides.base, config, value)
        words = {"base": seek(sides.base, methods.Models(models.base, models.base), config, value, sought)}
        words[config.method] = words["base"]
        if is_attacked(config):
            words[config.method] = seek(sides.ours, models, config, value, sought, [value])
        of_values[value] = words
    if config.attack.search == "continuous":
        models, of_values = with_found(models, of_values)
        sides = make_sides(models.base, make_drawing(models), config, principles, judge, directory, mesh)
    cases, found = [], []
    for value, words in of_values.items():
        cases += make_cases(config, value, words)
        found += [
            dict(search=config.attack.search, value=value.statement, method=name, subject=prompt.subject)
            | {"prompt": prompt.text, "tokens": tokens_of(models.base, text)}
            for name, texts in words.items()
            for prompt, text in zip(neutral_prompts(config), texts)
            if config.attack.search != "continuous"
        ]
    if finds:  # a retriever reads words, and embeddings are none
        read = [case for case in cases if case.method != "base" and case.split != "attacked by continuous"]
        cases += as_chosen(read, finds)
    alone = left_alone(config, attacked)
    sides.draw([request for case in cases + alone for request in (*case.requests, *plain_of(case))])
    return numbers_of(sides, principles, judge, cases, alone), found


def with_found(models: methods.Models, of_values: dict) -> tuple[methods.Models, dict]:
    """Models that know a new word for each embedding that was found, and the texts of these in the embeddings' place.

    Args:
        of_values: by value and method embeddings, [P, K, D] each.
    """
    rows = [np.reshape(found, (-1, np.shape(found)[-1])) for words in of_values.values() for found in words.values()]
    base, value_encoder, names = attacks.with_new_words(models.base, models.value_encoder, np.concatenate(rows))
    left = iter(names)
    texts = {
        value: {name: [" ".join(next(left) for _ in of_prompt) for of_prompt in found] for name, found in words.items()}
        for value, words in of_values.items()
    }
    return methods.Models(base, methods.with_unet(base, models.sd.unet), value_encoder), texts


# ---------------------------------------------------------------------------- what is sought


def attacked_subjects(config) -> list[str]:
    """The first config.attack.prompts of config.attack.splits, in their order."""
    names = dict.fromkeys(name for split in config.attack.splits for name in config.eval[split])
    return [*names][: config.attack.prompts]


def neutral_prompts(config) -> list[Prompt]:
    return worded(config, [(NEUTRAL, name) for name in attacked_subjects(config)], ("{subject}",))


def harmful_prompts(config, value) -> list[Prompt]:
    """The neutral prompts in the wordings of a harm."""
    return worded(config, [(HARMFUL, prompt.subject) for prompt in neutral_prompts(config)], value.wordings)


def sought_of(base: Drawn, config, value) -> np.ndarray:
    """Of each neutral prompt what an attack is to bring back.

    Of a harm [P, H, W, 3] uint8, the base's image of the harmful prompt in which most of it is read; of a bias [P], the
    attribute that most of the base's images show. Of paraphrases themselves [P, N], the same for all methods.
    """
    c = config.attack
    if c.search == "paraphrases":
        asked = dict(prompts=[prompt.text for prompt in harmful_prompts(config, value)], count=c.paraphrases)

        def ask():
            with ending_together():  # process 0 asks for all, and if it fails they end with it
                if jax.process_index() == 0:
                    return paraphrases.ask_for_paraphrases(**asked, url=c.endpoint, model=c.model)

        return np.array(base.keep("paraphrases", asked | {"model": c.model, "seed": c.seed}, ask))
    prompts = harmful_prompts(config, value) if value.kind == "harm" else neutral_prompts(config)
    requests = [[Request(prompt.text, i) for i in range(LOOKED_AT[value.kind])] for prompt in prompts]
    Sides(base, base).draw([request for of_prompt in requests for request in of_prompt])
    read = [[base[request][value.axis] for request in of_prompt] for of_prompt in requests]
    if value.kind == "bias":
        return np.array([max(value.attributes, key=of_prompt.count) for of_prompt in read])
    most = [np.argmax(np.nan_to_num(np.array(scores, float), nan=-np.inf)) for scores in read]
    return np.stack([base.image(of_prompt[i]) for of_prompt, i in zip(requests, most)])


def seek(drawn: Drawn, models: methods.Models, config, value, sought, applied=()) -> list:
    """The words for the neutral prompts, or embeddings, kept beside the images of the model that is attacked.

    Args:
        models: models.sd and its value encoder are attacked. sought: as sought_of gives it.
        applied: the values on every image.
    """
    budget = attacks.Budget(**{name: config.attack[name] for name in attacks.Budget._fields})
    prompts = [prompt.text for prompt in neutral_prompts(config)]
    ask = functools.partial(read_sought, drawn, config, value, dict(zip(prompts, sought)), applied)
    if budget.search == "paraphrases":
        find = functools.partial(attacks.choose_paraphrases, ask, sought)
    elif budget.search == "queries":
        words = harmless_words(models.base, config, value)
        find = functools.partial(attacks.find_words_by_queries, ask, words, prompts, budget, seed=config.attack.seed)
    else:
        search = find_embeddings if budget.search == "continuous" else attacks.find_words
        target = attacks.Target(models.base, [prompt.text for prompt in harmful_prompts(config, value)], sought)
        find = functools.partial(
            search, models.sd, models.value_encoder, value.statement, prompts, target, budget, seed=config.attack.seed,
            at_once=config.attack.at_once,
        )  # fmt: skip
    depends_on = {"attack": spent(config.attack), "value": value.statement, "prompts": prompts}
    return drawn.keep("words", depends_on | {"sought": hashlib.sha256(sought.tobytes()).hexdigest()}, find)


def find_embeddings(*arguments, **settings) -> list:
    """attacks.find as lists, for JSON."""
    return attacks.find(*arguments, **settings).tolist()


def harmless_words(sd, config, value) -> list[str]:
    """The words that an attack chooses from; none that states an attribute of a bias, which would be no attack."""
    words = [sd.tokenizer.decode([i]).strip() for i in attacks.whole_words(sd.tokenizer)]
    if value.kind == "harm":
        return words
    rules = keyword_rules((value,))
    subject = attacked_subjects(config)[0]
    texts = [phrase(config.eval.template, f"{word} {subject}") for word in words]
    return [word for word, text in zip(words, texts) if value.name not in rules.rest(text)[1]]


def read_sought(drawn: Drawn, config, value, sought: dict, applied, prompts: list[str]) -> np.ndarray:
    """[P], how much of what is sought is read in the images of prompts, each of one of `sought`'s in turn.

    Of a harm its mean score, of a bias the share of the attribute. All that are of one neutral prompt have its noise,
    which is none of those that are measured.
    """
    first, n = images_of(value, config), config.attack.noises
    rows = list(zip(prompts, itertools.cycle(sought)))
    requests = [Request(prompt, first + i, noise=own) for prompt, own in rows for i in range(n)]
    read = drawn.judge(drawn.draw_batch(everywhere(requests, applied)))[value.axis].reshape(len(prompts), n)
    if value.kind == "bias":
        return np.mean(read == np.array([[sought[own]] for _, own in rows]), axis=1)
    return np.nan_to_num(read, nan=0.0).mean(1)


def tokens_of(sd, text: str) -> list[int]:
    return sd.tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------------------- what is measured


def make_cases(config, value, words: dict[str, list[str]]) -> list[Case]:
    """Those of the base and of the method, by what the prompt is; a harm's value is on every image."""
    found, neutral = [], neutral_prompts(config)
    splits = {NEUTRAL: neutral} | ({HARMFUL: harmful_prompts(config, value)} if value.kind == "harm" else {})
    known = {}  # prompts that nobody seeks: of files, and of templates
    seeks_words = value.kind == "harm" and config.attack.search != "continuous"
    for prompt in prompt_sets.rows(config, value) + further_prompts(config, value) if seeks_words else ():
        known.setdefault(prompt.split, []).append(prompt)
    method = methods.make_method(config)
    tokens = method.HAS_TOKENS and value.kind == "bias"  # dealt out to its share of the images, as users get it
    for name, texts in words.items():
        whole = config.attack.search == "paraphrases"
        attacked = [own._replace(text=text if whole else f"{text} {own.text}") for text, own in zip(texts, neutral)]
        for split, prompts in (splits | {f"attacked by {config.attack.search}": attacked} | known).items():
            for prompt, own in zip(prompts, prompts if split in known else neutral):
                # Of one noise all: what an attack costs in the picture shows beside the neutral prompt's own.
                requests = prompt.requests(images_of(value, config))
                requests = [r._replace(noise="" if prompt is own else own.text) for r in requests]
                groups = groups_of(value, requests, 0.0)
                if name != "base":
                    deal = functools.partial(with_values, seed=config.eval.seed) if tokens else everywhere
                    requests = deal(requests, [value])
                    groups = groups_of(value, requests, dealt_to(value, method.HAS_TOKENS, method.EVEN))
                found.append(Case(value.statement, name, value, split, own.subject, requests, groups=groups))
    return found


def plain_of(case) -> list[Request]:
    """The base's images of the neutral prompt, of the same noise."""
    return [r._replace(prompt=r.noise or r.prompt, noise="", values=()) for r in case.requests]


def numbers_of(sides, principles, judge, cases: list[Case], alone: list[Case]) -> dict:
    """Numbers as metrics.rows takes them."""
    found = Evaluated(sides)
    for case in cases:
        of_case = metrics.prompt_metrics(case.value, case.subject, sides.reading(case.requests), **judge.may_read)
        of_case["distance"] = sides.distance(case.requests, plain_of(case))
        if case.value.kind == "harm":
            of_case["any"] = float(of_case["R"] > 0)
        if case.method == AUTO:
            of_case["chosen"] = float(is_applied(case))
        found.add(case, of_case, metrics.floor(case.groups, None))
    for case in alone:
        found.add_over_refusal(case, principles)
    return found.numbers
