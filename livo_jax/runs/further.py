"""What a board measures of one method beside the comparison: further judges of the same images, and quality."""

import copy
import dataclasses
import functools
import itertools
import pathlib
import re
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from livo_jax import files, judges, values
from livo_jax.evaluation import metrics, objects, prompt_sets, quality
from livo_jax.evaluation.drawn import Sides
from livo_jax.judges import Judge
from livo_jax.runs import check, evaluate
from livo_jax.sampling.requests import without_values
from livo_jax.values.principles import Value

FAR_BELOW = 0.1  # of harmful_from: a judge whose highest score is below it has another scale
BATCH = 32  # real images that Inception gets at once


# ---------------------------------------------------------------------------- further judges


class Reader(NamedTuple):
    """A further judge, and what it reads.

    config: that of a method with this judge in it. reads: {followed Value: the Value that it reads in its images}.
    states: {a composition, or a set that is left alone: {axis: what it should read in its images}}; nothing of a set is
    what each of its rows states.
    """

    name: str
    config: object
    judge: Judge
    reads: dict[Value, Value]
    states: dict[str, dict]

    def label(self, followed: Value) -> str:
        """Its name on the board, with what it reads where that is another value than the one followed."""
        read = self.reads.get(followed, followed)
        return self.name if read.name == followed.name else f"{self.name} ({read.name})"

    def stated(self, case) -> dict:
        """{axis: what it should read} in the images of a case; {} where it should read nothing."""
        name = case.split if case.split in self.states else case.split.partition(": ")[0]  # of a category its set
        if name not in self.states:
            return {}
        return self.states[name] or case.stated or {}


def load_readers(comparison, config) -> list[Reader]:
    """The judges of comparison.judges, for the values of a method's config.

    Each has a judge, its judging, and reads, as ("bloody=nudity",): in the images for the value bloody it reads nudity.
    Without any it reads every value as it is, or, where it has states, none. These are what it should read in the
    images of compositions, by its axes, as {"with_a_hat": {"hat": "green"}}, and {"geneval": {}} has it read what the
    rows of the set geneval state. harmful_from, where it is not 0, is the least score of its own that is harmful,
    whatever the value says.

    Raises:
        ValueError: all that is wrong with them.
    """
    readers, problems = [], []
    for name, entry in comparison.judges.items():
        try:
            readers.append(_load_reader(name, entry, config))
        except (ValueError, FileNotFoundError) as error:
            problems += [f"config.judges.{name}: {text}" for text in check.apart(str(error))]
    if problems:
        raise ValueError("\n  ".join(problems))
    return readers


def _load_reader(name: str, entry, config) -> Reader:
    if name == config.judge or not re.fullmatch(r"\w+", name):
        raise ValueError("name it by letters, digits and _, and not as the first judge")
    own, followed = copy.deepcopy(config), values.load_principles(config)
    own.judge, own.judging = entry.judge, copy.deepcopy(entry.judging)
    by_name, reads, problems = {value.name: value for value in followed}, {}, []
    for text in (entry.reads,) if isinstance(entry.reads, str) else entry.reads:
        who, _, what = text.partition("=")
        if who not in by_name:
            problems.append(f"reads: {text!r} is no FOLLOWED=READ, FOLLOWED one of {', '.join(by_name)}")
            continue
        if not what:
            problems.append(f"reads: {text!r} lacks =READ, the value that it reads there, as {who}={who}")
            continue
        own.principles = (what,)
        try:
            (reads[by_name[who]],) = values.load_principles(own)
        except ValueError as error:
            problems.append(f"reads: {text!r}: {error}")
    states = entry.get("states", ConfigDict()).to_dict()
    if not states:
        reads = reads or {value: value for value in followed}
    problems += problems_of_states(states, config)
    if problems:
        raise ValueError("\n".join(problems))
    if least := entry.get("harmful_from", 0.0):
        if least < 0 or all(value.kind == "bias" for value in reads.values()):
            raise ValueError(f"harmful_from={least!r}: choose a score above 0 of a harm that it reads, or leave it out")
        scale = {"highest": 1.0} if least <= 1 else {}  # of most judges
        reads = {
            followed: dataclasses.replace(value, harmful_from=least, **scale) if value.kind == "harm" else value
            for followed, value in reads.items()
        }
    own.principles = config.principles  # whose subjects are told apart
    read = list(dict.fromkeys(reads.values()))
    judge = judges.load(own, read, evaluate.subjects(own))
    if unread := objects.unread([*stated_objects(states, config).values()], judge):
        raise ValueError("\n".join(f"states: {text}" for text in unread))
    return Reader(name, own, judge, reads, states)


def stated_objects(states: dict, config) -> dict[str, dict]:
    """What objects images should have, by the composition or the prompt of a set that states them."""
    found = {name: stated[objects.OBJECTS] for name, stated in states.items() if objects.OBJECTS in stated}
    for prompt in prompt_sets.left_alone(config):
        if prompt.stated and prompt.split in states:
            found[prompt.text] = prompt.stated[objects.OBJECTS]
    return found


def problems_of_states(states: dict, config) -> list[str]:
    """What is wrong with a judge's states, whatever judge it is."""
    sets = [name for name, chosen in config.eval.prompt_sets.items() if chosen.get("include")]
    problems = []
    for name, stated in states.items():
        if name not in (*config.eval.compositions, *sets):
            problems.append(
                f"states: of config.eval.compositions there is no {name}, nor is it a set of config.eval.prompt_sets"
                " whose rows state objects (include)"
            )
        elif objects.OBJECTS in stated:
            problems += [f"states: {name}: {fault}" for fault in objects.faults(stated[objects.OBJECTS])]
    return problems


def read_again(reader: Reader, found: evaluate.Evaluated) -> tuple[dict[str, evaluate.Evaluated], dict]:
    """What a further judge reads in the images of an evaluation, of which none is drawn again.

    Returns:
        The numbers and readings, as evaluate has them, by the judge's label; and what `agreement` takes.
    """
    reading = evaluate.reading_settings(reader.config, [*reader.reads.values()], reader.judge)
    sides = Sides(*(side.read_by(reader.judge, reading) for side in (found.sides.base, found.sides.ours)))
    again = {}
    asked = [(case, reader.reads.get(case.value)) for case in found.measured]
    for case in found.alone:  # in which it reads no value, but what their prompts state
        of_base = case._replace(method="base", requests=without_values(case.requests))
        asked += [(of_base, None), (case, None)]
    asked = [(case, value) for case, value in asked if value or reader.stated(case)]
    sides.draw([request for case, _ in asked for request in case.requests])
    for case, value in asked:
        read = sides.reading(case.requests)
        of_label = again.setdefault(reader.label(case.value), evaluate.Evaluated(sides))
        of_label.keep(case.method, case, case.requests)
        if stated := reader.stated(case):
            of_label.add(case, objects.stated_shown(stated, read))
        if not value:
            continue
        floors = metrics.floor(case.groups, None) if value.name == case.value.name else {}
        of_label.add(case, metrics.prompt_metrics(value, case.subject, read, **reader.judge.may_read), floors)
    # Not where another value is on beside: a prompt's images of that would stand for those of the value alone.
    alone = [(case, value) for case, value in asked if value and case.name == case.value.statement]
    return again, by_prompt(alone, sides)


def by_prompt(asked: list, sides: Sides) -> dict:
    """The readings of cases and the Values that are read in them, as `agreement` takes a judge's."""
    found = {}
    for case, value in asked:
        place = case.value.statement, case.method, value.name
        _, of_prompts = found.setdefault(place, (value, {}))
        of_prompts[case.requests[0].prompt] = sides.reading(case.requests)  # once, also of categories
    return found


def agreement(judges_read: dict[str, dict]) -> list[dict]:
    """Cohen's kappa of any two judges, where both read one value in the same images.

    Args:
        judges_read: by judge {(statement of the followed value, method, name of the value read): (the Value read,
            {prompt: its images' readings})}.

    Returns:
        Rows of judge, other, value (the one followed), reads, method, metric, mean, ci95, prompts, images.
    """
    rows = []
    for (other, first), (judge, second) in itertools.combinations(judges_read.items(), 2):
        for place in (place for place in second if place in first):
            (value_of_first, a), (value, b) = first[place], second[place]
            columns = [{value.axis: np.concatenate([of[prompt][value.axis] for prompt in b])} for of in (a, b)]
            ends = np.cumsum([len(of_prompt[value.axis]) for of_prompt in b.values()])
            places = [slice(start, end) for start, end in zip([0, *ends], ends)]
            least = value_of_first.harmful_from, value.harmful_from
            mean, ci95 = metrics.value_agreement(value, columns, places, least)
            followed, method, _ = place
            row = dict(judge=judge, other=other, value=followed, reads=value.statement, method=method, metric="kappa")
            rows.append(row | dict(mean=mean, ci95=ci95, prompts=len(places), images=int(ends[-1])))
    return rows


# ---------------------------------------------------------------------------- quality


class Networks(NamedTuple):
    """Those of comparison.quality that are there.

    features: Inception's function of images, and reference, those [N, D] of the real images. score, tokenize: CLIP's.
    """

    features: object = None
    reference: np.ndarray | None = None
    score: object = None
    tokenize: object = None


@functools.lru_cache(maxsize=1)  # of all methods the same
def load_networks(inception: str, reference: str, clip: str) -> Networks:
    """Those of files and folders, none where they are empty.

    Raises:
        ValueError: they are missing, of another kind, or images of several sizes; all is listed.
    """
    networks, problems = Networks(), []
    if bool(inception) != bool(reference):
        problems.append("config.quality.inception and .reference: FID needs both, the network and real images")
    elif inception:
        try:
            network = quality.inception(pathlib.Path(inception).expanduser())
            networks = networks._replace(features=network, reference=read_features(network, reference))
        except (ValueError, FileNotFoundError) as error:
            problems.append(f"config.quality.inception, .reference: {error}")
    if clip:
        try:
            score, tokenize = quality.clip_score(clip)
            networks = networks._replace(score=score, tokenize=tokenize)
        except (ValueError, FileNotFoundError) as error:
            problems += [f"config.quality.clip: {text}" for text in check.apart(str(error))]
    if problems:
        raise ValueError("\n  ".join(problems))
    return networks


def read_features(network, directory: str) -> np.ndarray:
    """[N, D] of the images of a folder. Raises ValueError."""
    paths = files.image_files(directory)
    if len(paths) < 2:
        raise ValueError(f"{directory!r} is no folder of two images or more, PNG, JPEG or WebP")
    found, sizes = [], {}
    for start in range(0, len(paths), BATCH):
        images = []
        for path in paths[start : start + BATCH]:
            try:
                images.append(np.asarray(files.read_image(path)))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            sizes.setdefault(images[-1].shape, path)
        if len(sizes) > 1:
            told = "; ".join(f"{path.name} has {H} x {W}" for (H, W, _), path in sizes.items())
            raise ValueError(f"{directory!r} has images of several sizes, crop them to one: {told}")
        found.append(quality.in_batches(network, BATCH, np.stack(images)).features)
    return np.concatenate(found)


def measure_quality(networks: Networks, found: evaluate.Evaluated, method: str) -> tuple[dict, list[dict]]:
    """Of the images of prompts that every value should leave alone: CLIPScore of each prompt; FID and KID of a split.

    Returns:
        Numbers as metrics.rows takes them, and rows of whole splits, which have no interval.
    """
    numbers, features = {}, {}
    for case in found.alone:
        for side, requests in {"base": without_values(case.requests), method: case.requests}.items():
            images = np.stack([found.sides.of(request).image(request) for request in requests])
            place = side, case.name, case.split
            if networks.features:
                features.setdefault(place, []).append(np.asarray(networks.features(images).features))
            if networks.score:
                prompt = requests[0].prompt
                scores = networks.score(images, networks.tokenize([prompt] * len(images)))
                measured = metrics.Measured(float(np.mean(scores)), len(images))
                numbers.setdefault((*place, "CLIPScore"), {})[prompt] = measured
    rows = []
    for (side, value, split), of_prompts in features.items():
        images = np.concatenate(of_prompts)
        place = dict(method=side, value=value, split=split)
        for metric, distance in {"FID": quality.frechet_distance, "KID": quality.kernel_distance}.items():
            row = place | dict(metric=metric, mean=distance(images, networks.reference), ci95=None)
            rows.append(row | dict(prompts=len(of_prompts), images=len(images)))
    return numbers, rows


# ---------------------------------------------------------------------------- of one method


@dataclasses.dataclass
class Further:
    """What a board measures of one method beside the comparison.

    numbers: by a judge's label, "" for quality, as metrics.rows takes them. sets, agreement: rows. readings: rows, and
    pinned, by judge. harmful: the (value, split, prompt) in whose images a judge read a harm. drawn: the settings that
    the base's images depend on. harmful_from: by a judge's label and the followed value's statement, the least score
    that it calls harmful.
    """

    numbers: dict
    sets: list
    agreement: list
    readings: dict
    pinned: dict
    harmful: set
    drawn: dict
    harmful_from: dict


def measure(found: evaluate.Evaluated, config, comparison) -> Further:
    """Of the images of an evaluation, none of which is drawn again."""
    numbers, readings, pinned, harmful, least = {}, {}, {}, set(), {}
    judges_read = {config.judge: by_prompt([(case, case.value) for case in found.measured], found.sides)}
    for reader in load_readers(comparison, config):
        again, judges_read[reader.name] = read_again(reader, found)
        numbers |= {label: of_label.numbers for label, of_label in again.items()}
        readings[reader.name] = [row for of_label in again.values() for row in of_label.readings]
        pinned[reader.name] = reader.judge.pinned
        harms = {followed: value for followed, value in reader.reads.items() if value.kind == "harm"}
        for row in readings[reader.name]:
            if any(row[value.axis] >= value.harmful_from for value in harms.values()):
                harmful.add((row["value"], row["split"], row["prompt"]))
        for followed, value in harms.items():
            least[reader.label(followed), followed.statement] = value.harmful_from
            warn_of_scale(reader.name, value, [row[value.axis] for row in readings[reader.name]])
    networks = load_networks(**comparison.quality.to_dict())
    numbers[""], sets = measure_quality(networks, found, config.method)
    return Further(numbers, sets, agreement(judges_read), readings, pinned, harmful, found.sides.base.settings, least)


def warn_of_scale(judge: str, value: Value, scores: list[float]):
    """Tells where no score of a harm is anywhere near the least that is harmful: the judge may have another scale."""
    read = [score for score in scores if not np.isnan(score)]
    if read and 0 < max(read) < FAR_BELOW * value.harmful_from:
        logging.warning(
            "config.judges.%s reads at most %.3g of %s, which is harmful from %g: if its scale is another, set"
            " config.judges.%s.harmful_from", judge, max(read), value.axis, value.harmful_from, judge,
        )  # fmt: skip


def combine(of_each: list[Further]) -> Further:
    """Of the trainings of one method, as of one: means of the numbers; agreement and readings are the first's."""
    first = of_each[0]
    numbers = {judge: metrics.combine_trainings([of.numbers[judge] for of in of_each]) for judge in first.numbers}
    sets = [
        rows[0] | {"mean": float(np.mean([row["mean"] for row in rows]))} for rows in zip(*(of.sets for of in of_each))
    ]
    return dataclasses.replace(first, numbers=numbers, sets=sets)
