"""What an evaluation measures: the prompts, and for each the images of the base and of a method."""

import itertools
from typing import NamedTuple

from livo_jax import values as principles
from livo_jax.evaluation import metrics, prompt_sets
from livo_jax.evaluation.prompt_sets import Prompt
from livo_jax.sampling.requests import Dose, Request, requests_of, with_doses, with_values, without_values
from livo_jax.values import ratio as ratios

PLAIN = "plain"  # the method of images as config.method draws them, without what is studied of it
ALL = "all values"  # the name, or a part of it, where the tokens of all stand together
AUTO = "auto"  # the method of images of config.method where a retriever finds the value, elsewhere of the base


def prompts(config, value=None) -> list[Prompt]:
    """Those of the evaluation: of the value's prompt sets, if the config chooses any.

    Otherwise of its subjects, in the wordings of a harm or, without one, neutral.
    """
    if value and (found := prompt_sets.rows(config, value)):
        return found
    wordings = value.wordings if value and value.kind == "harm" else ("{subject}",)
    return [row for split in ("seen", "held_out") for row in worded(config, subjects(config, split), wordings)]


def subjects(config, *splits: str, name: str = "") -> list[tuple[str, str]]:
    """The (split, subject) of some splits, under another name if one is given."""
    return [(name or split, subject) for split in splits for subject in config.eval[split]]


def worded(config, subjects, wordings, attributes=("",)) -> list[Prompt]:
    """The Prompts of (split, subject) in wordings, which take turns as the attributes do."""
    found = []
    for k, (split, subject) in enumerate(subjects):
        text = wordings[k % len(wordings)].format(subject=subject, attribute=attributes[k % len(attributes)])
        found.append(Prompt(split, subject, principles.phrase(config.eval.template, text)))
    return found


def further_prompts(config, value) -> list[Prompt]:
    """Those of a harm in config.eval.harmful_wordings, of held-out subjects.

    None where prompt sets stand in the place of subjects.
    """
    found, of_subjects = [], value.kind == "harm" and not prompt_sets.names(config, value)
    for split, wordings in config.eval.harmful_wordings.items() if of_subjects else ():
        found += worded(config, subjects(config, "held_out", name=split), wordings)
    return found


def plan(config, values) -> list[tuple]:
    """What is evaluated: (value, Prompt), for each wording of a harm."""
    return [(value, prompt) for value in values for prompt in prompts(config, value) + further_prompts(config, value)]


def name_beside_others(measured: str, name: str) -> str:
    """How a name among the results of one method is told beside those of others: PLAIN and AUTO are of that method."""
    return f"{measured}, {name}" if name in (PLAIN, AUTO) and measured != "livo" else name


def beside_others(measured: str, numbers: dict) -> dict:
    """The numbers of one method, as metrics.rows takes them, by such names."""
    return {(name_beside_others(measured, name), *rest): x for (name, *rest), x in numbers.items()}


class Case(NamedTuple):
    """A prompt's images, to be measured under a value."""

    name: str  # under which the results have it: the value's statement, or that with what is studied of it; or ALL
    method: str  # "base", config.method, PLAIN or AUTO
    value: principles.Value
    split: str
    subject: str
    requests: list[Request]
    target: dict[str, float] | None = None
    groups: tuple = ()  # of a bias, the images by how attributes come to them: see metrics.floor; () for no floor
    stated: dict | None = None  # by the judge's axes what the prompt states beside the value
    beside: principles.Value | None = None  # another bias, whose attributes are measured together with the value's


def images_of(value: principles.Value, config) -> int:
    return config.eval.images_per_prompt if value.kind == "bias" else config.eval.harm_images_per_prompt


def groups_of(value: principles.Value, requests: list[Request], share: float | None, target=None) -> tuple:
    """A Case's groups; () for a harm.

    Args:
        share: of the images to which the value's token is dealt; None where the attributes themselves are.
    """
    if value.kind == "harm":
        return ()
    shares = [*target.values()] if target else [1 / len(value.attributes)] * len(value.attributes)
    if share is None:
        return metrics.quotas(len(requests), shares)
    applied = sum(any(dose.value == value.statement for dose in request.values) for request in requests)
    return metrics.dealt(len(requests), applied, share, shares)


def dealt_to(value: principles.Value, tokens: bool, even: bool) -> float | None:
    """The share, as groups_of takes it, of a method with these settings of Drawing."""
    if tokens:
        return value.keep_probability
    return None if even else 1.0


def cases(config, values, tokens: bool = True, even: bool = False) -> list[Case]:
    """What is measured: each value and, where the config says so, several together, of a method with tokens.

    Of a bias also config.eval.compositions, of a harm config.eval.harmful_wordings. "A + B" is measured under A, on
    prompts in the wordings of the one that is a harm, "A + all values" on those of A; PLAIN is A alone.

    Args:
        tokens, even: as a Method's HAS_TOKENS and EVEN have them.
    """
    found = []

    def add(name, value, rows, stated=None, **methods):
        for prompt, (method, applied) in itertools.product(rows, methods.items()):
            base = prompt.requests(images_of(value, config))
            requests = with_values(base, applied, config.eval.seed) if tokens else everywhere(base, applied)
            groups = groups_of(value, requests, dealt_to(value, tokens, even) if applied else 0.0)
            place = prompt.split, prompt.subject, requests
            found.append(Case(name, method, value, *place, groups=groups, stated=stated))

    for value in values:
        rows, sides = prompts(config, value) + further_prompts(config, value), {"base": [], config.method: [value]}
        add(value.statement, value, rows, **sides)
        of_subjects = value.kind == "bias" and not prompt_sets.names(config, value)
        for split, composition in config.eval.compositions.items() if of_subjects else ():
            stated = composition.to_dict()
            rows = worded(config, subjects(config, "held_out", name=split), [stated.pop("wording")])
            add(value.statement, value, rows, stated, **sides)
    for a, b in itertools.permutations(values, 2) if config.eval.combinations and tokens else ():
        rows = prompts(config, b if (a.kind, b.kind) == ("bias", "harm") else a)
        add(f"{a.statement} + {b.statement}", a, rows, **{"base": [], PLAIN: [a], config.method: [a, b]})
    for value in values if config.eval.combinations and tokens and len(values) > 2 else ():
        sides = {"base": [], PLAIN: [value], config.method: values}
        add(f"{value.statement} + {ALL}", value, prompts(config, value), **sides)
    return found


def of_two(config, values, tokens: bool = True, even: bool = False) -> list[Case]:
    """Cases of how every two biases go together, "A + B", with both applied; their groups are those of A and of B."""
    found, seed = [], config.eval.seed
    for a, b in itertools.combinations([value for value in values if value.kind == "bias"], 2):
        for prompt in prompts(config, a):
            base = prompt.requests(images_of(a, config))
            both = with_values(base, [a, b], seed) if tokens else everywhere(base, [a, b])
            for method, requests in {"base": base, config.method: both}.items():
                shares = [0.0 if method == "base" else dealt_to(value, tokens, even) for value in (a, b)]
                groups = tuple(groups_of(value, requests, share) for value, share in zip((a, b), shares))
                name, place = f"{a.statement} + {b.statement}", (prompt.split, prompt.subject, requests)
                found.append(Case(name, method, a, *place, beside=b, groups=groups))
    return found


def everywhere(requests: list[Request], values) -> list[Request]:
    """The requests, with every value in all of them."""
    return [request._replace(values=tuple(Dose(value.statement) for value in values)) for request in requests]


def left_alone(config, values, together: bool = False) -> list[Case]:
    """Cases of over-refusal: prompts that a value should leave alone, with the value on every image.

    Of a harm these are neutral ones, of a bias those that state an attribute, each subject another; and those of
    config.eval.left_alone_wordings. Or, where config.eval.prompts chooses sets that are left alone, theirs.

    Args:
        together: whether config.eval.combinations also asks for ALL at once, on prompts of the subjects that state an
            attribute of every bias, and no harm. Such a case has the first value in the place of one of its own.
    """
    found, n, of_sets = [], config.eval.left_alone_images, prompt_sets.left_alone(config)
    for value in values if n else ():
        attributes = value.attributes or ("",)
        own = value.wordings[0] if value.kind == "bias" else "{subject}"
        rows = worded(config, subjects(config, "seen", "held_out"), [own], attributes)
        for split, wordings in config.eval.left_alone_wordings.items():
            of_kind = [wording for wording in wordings if ("{attribute}" in wording) == (value.kind == "bias")]
            if of_kind:
                rows += worded(config, subjects(config, "held_out", name=split), of_kind, attributes)
        for prompt in of_sets or rows:
            requests = everywhere(prompt.requests(n), [value])
            place = prompt.split, prompt.subject, requests
            found.append(Case(value.statement, config.method, value, *place, stated=prompt.stated))
    together = together and n and config.eval.combinations and len(values) > 1
    for prompt in rows_that_state_all(config, values) if together else ():
        requests = everywhere(prompt.requests(n), values)
        found.append(Case(ALL, config.method, values[0], prompt.split, prompt.subject, requests))
    return found


def rows_that_state_all(config, values) -> list[Prompt]:
    """Prompts of the seen and held-out subjects that state an attribute of every bias, each another."""
    found = []
    for k, (split, subject) in enumerate(subjects(config, "seen", "held_out")):
        text = subject
        for value in values:
            if value.kind == "bias":
                text = value.wordings[0].format(subject=text, attribute=value.attributes[k % len(value.attributes)])
        found.append(Prompt(split, subject, principles.phrase(config.eval.template, text)))
    return found


def as_chosen(found: list[Case], finds) -> list[Case]:
    """The cases of one value each as a user of AUTO would get them: on a prompt that it is not found for, the base's.

    Args:
        found: cases of config.method; those of several values are left out.
        finds: finds(prompt) -> the values found for it.
    """
    names, chosen = {}, []
    for case in found:
        if case.name != case.value.statement:
            continue
        prompt = case.requests[0].prompt
        if prompt not in names:
            names[prompt] = {value.name for value in finds(prompt)}
        if case.value.name not in names[prompt]:
            requests = without_values(case.requests)
            case = case._replace(requests=requests, groups=groups_of(case.value, requests, 0.0))
        chosen.append(case._replace(method=AUTO))
    return chosen


def of_strengths(config, values, shares) -> list[Case]:
    """Cases of config.eval.strengths, with the value on every image; PLAIN is the strength 1.

    Args:
        shares: shares(value, requests) -> {attribute: share}: a bias's TV is the distance from the base's.
    """
    found = []
    for strength, value in itertools.product(config.eval.strengths, values):
        for prompt in prompts(config, value):
            base = prompt.requests(images_of(value, config))
            target = shares(value, base) if value.kind == "bias" else None
            for method, dose in {"base": 0.0, PLAIN: 1.0, config.method: strength}.items():
                requests = [r._replace(values=(Dose(value.statement, dose),) if dose else ()) for r in base]
                name = f"{value.statement} x {strength:g}"
                found.append(Case(name, method, value, prompt.split, prompt.subject, requests, target))
    return found


def kept(statement: str, probability: float) -> str:
    """The name under which the results have a value that is applied to another share of the images than its own."""
    return f"{statement}, applied to {100 * probability:g}%"


def of_keep_probabilities(config, values) -> list[Case]:
    """Cases of config.eval.keep_probabilities of biases; PLAIN is the value's own."""
    found = []
    biases = [value for value in values if value.kind == "bias"]
    for probability, value in itertools.product(config.eval.keep_probabilities, biases):
        for prompt in prompts(config, value):
            base = prompt.requests(images_of(value, config))
            dealt = [with_doses(r, [(Dose(value.statement), probability)], config.eval.seed) for r in base]
            plain = with_values(base, [value], config.eval.seed)
            sides = {"base": (base, 0.0), PLAIN: (plain, value.keep_probability), config.method: (dealt, probability)}
            for method, (requests, share) in sides.items():
                groups = groups_of(value, requests, share)
                name = kept(value.statement, probability)
                found.append(Case(name, method, value, prompt.split, prompt.subject, requests, groups=groups))
    return found


def rows_of_ratios(config) -> list[Prompt]:
    """The Prompt of each image of a ratio."""
    return [prompt for prompt in prompts(config) for _ in range(config.eval.images_per_prompt)]


def of_ratios(config, values, rates: dict) -> list[Case]:
    """Cases of config.eval.ratios, all values of a ratio applied at once; PLAIN is each alone by keep probability.

    Of an equal ratio also how every two biases go together, "A + B, ratio equal", over all images of a split: one
    prompt's would leave most of so many cells to chance.
    """
    found, n, seed = [], config.eval.images_per_prompt, config.eval.seed
    rows = rows_of_ratios(config)
    base = requests_of([prompt.text for prompt in rows])
    splits = {row.split: [k for k, other in enumerate(rows) if other.split == row.split] for row in rows[::n]}
    for ratio in config.eval.ratios:
        targets = ratios.targets(ratio, rates, list(rates))
        dealt = requests_of([r.prompt for r in base], [[*targets]] * len(base), seed, ratio, rates)
        for a, b in itertools.combinations(targets, 2) if ratio == "equal" else ():
            name, two = f"{a} + {b}, ratio {ratio}", [principles.find(statement, values) for statement in (a, b)]
            sides = {"base": (base, 0.0), config.method: (dealt, None)}
            for (split, places), (method, (requests, share)) in itertools.product(splits.items(), sides.items()):
                own = [requests[k] for k in places]
                # None for the method: cells that are dealt leave nothing to chance.
                groups = () if share is None else tuple(groups_of(value, own, share) for value in two)
                found.append(Case(name, method, two[0], split, "", own, groups=groups, beside=two[1]))
        for statement, target in targets.items():
            value = principles.find(statement, values)
            plain = with_values(base, [value], seed)
            sides = {"base": (base, 0.0), PLAIN: (plain, value.keep_probability), config.method: (dealt, None)}
            for k, (method, (requests, share)) in itertools.product(range(0, len(rows), n), sides.items()):
                name, prompt = f"{statement}, ratio {ratio}", rows[k]
                own = requests[k : k + n]
                groups = groups_of(value, own, share, target)
                found.append(Case(name, method, value, prompt.split, prompt.subject, own, target, groups))
    return found


def arms(value: principles.Value, config) -> dict[str, list[Request]]:
    """The requests that tell what each arm of a bias (ratio.py) shows, of the seen prompts."""
    texts = ["", value.statement]
    if config.data.attributes:
        texts += [principles.attributed(value.statement, attribute) for attribute in value.attributes]
    seen = [prompt.text for prompt in prompts(config) if prompt.split == "seen"]
    doses = {text: (Dose(text),) if text else () for text in texts}
    return {
        text: [Request(prompt, i, doses[text]) for prompt in seen for i in range(config.eval.rate_images)]
        for text in texts
    }
