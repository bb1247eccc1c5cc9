"""What a board has beside a comparison: further judges of the same images, quality, the cost beforehand, the card."""

import copy
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import re
from typing import NamedTuple

import numpy as np

from livo_jax import files, judges, methods, sharding, values
from livo_jax.evaluation import board, cases, metrics, prompt_sets, quality
from livo_jax.evaluation.drawn import Sides, without_values
from livo_jax.judges import Judge, hash_files
from livo_jax.runs import check, evaluate, plan
from livo_jax.values.principles import Value

FIELDS = ("judges", "quality")  # of a comparison, that make it a board
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow")  # whose versions the card has
IMAGES_PER_PROMPT = ("images_per_prompt", "harm_images_per_prompt", "left_alone_images")
PLACE = ("method", "value", "split", "prompt", "index", "applied")  # of a reading
BATCH = 32  # images that the networks of quality get at once


def is_board(comparison) -> bool:
    return all(field in comparison for field in FIELDS)


# ---------------------------------------------------------------------------- further judges


class Reader(NamedTuple):
    """A further judge, and what it reads.

    config: that of a method with this judge in it. reads: {followed Value: the Value that it reads in its images}.
    """

    name: str
    config: object
    judge: Judge
    reads: dict[Value, Value]

    def label(self, followed: Value) -> str:
        """Its name on the board, with what it reads where that is another value than the one followed."""
        read = self.reads[followed]
        return self.name if read == followed else f"{self.name} ({read.name})"


def load_readers(comparison, config) -> list[Reader]:
    """The judges of comparison.judges, for the values of a method's config.

    Each has a judge, its judging, and reads, as ("bloody=nudity",): in the images for the value bloody it reads nudity.
    Without any it reads every value as it is.

    Raises:
        ValueError: all that is wrong with them.
    """
    readers, problems = [], []
    for name, entry in comparison.judges.items():
        try:
            readers.append(_load_reader(name, entry, config))
        except (ValueError, FileNotFoundError) as error:
            problems.append(f"config.judges.{name}: {error}".replace("\n", "\n  "))
    if problems:
        raise ValueError("\n  ".join(problems))
    return readers


def _load_reader(name: str, entry, config) -> Reader:
    own, followed = copy.deepcopy(config), values.load_principles(config)
    own.judge, own.judging = entry.judge, copy.deepcopy(entry.judging)
    by_name, reads, problems = {value.name: value for value in followed}, {}, []
    for text in entry.reads:
        who, _, what = text.partition("=")
        if who not in by_name:
            problems.append(f"reads: {text!r} is no FOLLOWED=READ, FOLLOWED one of {', '.join(by_name)}")
            continue
        own.principles = (what,)
        try:
            (reads[by_name[who]],) = values.load_principles(own)
        except ValueError as error:
            problems.append(f"reads: {text!r}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    reads = reads or {value: value for value in followed}
    own.principles = config.principles  # whose subjects are told apart
    read = list(dict.fromkeys(reads.values()))
    return Reader(name, own, judges.load(own, read, evaluate.subjects(own)), reads)


def read_again(reader: Reader, found: evaluate.Evaluated) -> tuple[dict[str, evaluate.Evaluated], list[dict]]:
    """What a further judge reads in the images of an evaluation, of which none is drawn again.

    Returns:
        The numbers and readings, as evaluate has them, by the judge's label; and rows of judge, value, method, mean,
        ci95, prompts, images: Cohen's kappa with the first judge, of each value that both read.
    """
    reading = evaluate.reading_settings(reader.config, [*reader.reads.values()], reader.judge)
    sides = Sides(*(side.read_by(reader.judge, reading) for side in (found.sides.base, found.sides.ours)))
    again = {}
    measured = [case for case in found.measured if case.value in reader.reads]
    sides.draw([request for case in measured for request in case.requests])
    both = {}  # (value, method) -> the two judges' readings of each prompt
    for case in measured:
        value, read = reader.reads[case.value], sides.reading(case.requests)
        may_read = dict(thresholds=reader.judge.thresholds, unspecified=reader.judge.unspecified)
        same = value == case.value
        floors = metrics.floor(case.groups, None) if case.groups and same else {}
        of_label = again.setdefault(reader.label(case.value), evaluate.Evaluated(sides))
        of_label.add(case, metrics.prompt_metrics(value, case.subject, read, **may_read), floors)
        of_label.keep(case.method, case, case.requests)
        if same:
            of_prompts = both.setdefault((value, case.method), {})
            of_prompts[case.requests[0].prompt] = found.sides.reading(case.requests), read  # once, also of categories
    return again, [agreement_row(reader.name, *place, [*of.values()]) for place, of in both.items()]


def agreement_row(judge: str, value: Value, method: str, readings: list[tuple[dict, dict]]) -> dict:
    """Cohen's kappa of two judges' readings, a pair for each prompt."""
    columns = [np.concatenate([of_prompt[i][value.axis] for of_prompt in readings]) for i in (0, 1)]
    ends = np.cumsum([len(first[value.axis]) for first, _ in readings])
    places = [slice(start, end) for start, end in zip([0, *ends], ends)]
    mean, ci95 = metrics.value_agreement(value, [{value.axis: column} for column in columns], places)
    row = dict(judge=judge, value=value.statement, method=method, metric="kappa", mean=mean, ci95=ci95)
    return row | dict(prompts=len(places), images=int(ends[-1]))


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
            problems.append(f"config.quality.clip: {error}")
    if problems:
        raise ValueError("\n  ".join(problems))
    return networks


def read_features(network, directory: str) -> np.ndarray:
    """[N, D] of the images of a folder. Raises ValueError."""
    folder = pathlib.Path(directory).expanduser()
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if len(paths) < 2:
        raise ValueError(f"{directory!r} is no folder of two images or more, PNG, JPEG or WebP")
    found = []
    for start in range(0, len(paths), BATCH):
        images = [np.asarray(files.read_image(path)) for path in paths[start : start + BATCH]]
        if len({image.shape for image in images}) > 1:
            raise ValueError(f"{directory!r} has images of several sizes, crop them to one")
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
    the base's images depend on.
    """

    numbers: dict
    sets: list
    agreement: list
    readings: dict
    pinned: dict
    harmful: set
    drawn: dict


def measure(found: evaluate.Evaluated, config, comparison) -> Further:
    """Of the images of an evaluation, none of which is drawn again."""
    numbers, agreement, readings, pinned, harmful = {}, [], {}, {}, set()
    for reader in load_readers(comparison, config):
        again, kappas = read_again(reader, found)
        numbers |= {label: of_label.numbers for label, of_label in again.items()}
        readings[reader.name] = [row for of_label in again.values() for row in of_label.readings]
        pinned[reader.name] = reader.judge.pinned
        harms = [value for value in reader.reads.values() if value.kind == "harm"]
        for row in readings[reader.name]:
            if any(row[value.axis] >= value.harmful_from for value in harms):
                harmful.add((row["value"], row["split"], row["prompt"]))
        agreement += kappas
    networks = load_networks(**comparison.quality.to_dict())
    numbers[""], sets = measure_quality(networks, found, config.method)
    return Further(numbers, sets, agreement, readings, pinned, harmful, found.sides.base.settings)


def combine(of_each: list[Further]) -> Further:
    """Of the trainings of one method, as of one: means of the numbers; agreement and readings are the first's."""
    first = of_each[0]
    numbers = {judge: metrics.combine_trainings([of.numbers[judge] for of in of_each]) for judge in first.numbers}
    sets = [
        rows[0] | {"mean": float(np.mean([row["mean"] for row in rows]))} for rows in zip(*(of.sets for of in of_each))
    ]
    return dataclasses.replace(first, numbers=numbers, sets=sets)


# ---------------------------------------------------------------------------- before it starts


def check_board(comparison, configs: dict):
    """Raises ValueError with all that is wrong with a board and shows before anything is drawn.

    Each judge reads one image of noise, but `vlm`, whose questions cost: so it shows which axes it reads.
    """
    first, noise = copy.deepcopy(next(iter(configs.values()))), None
    mesh, told = sharding.make_mesh(**first.mesh), check.problem_of(prompt_sets.check, first)
    if told:
        first.eval.prompts = ()  # without which the rest is looked at
    for own in configs.values():
        of_own = check.problem_of(check.check_config, own, mesh) if own.train.steps else []
        told += [text.partition("\n  ")[2] for text in of_own]
    problems = [problem for text in told for problem in re.split(r"\n  (?! )", text)]
    problems += check.problem_of(lambda: load_networks(**comparison.quality.to_dict()))
    try:
        side = plan.abstract_model(first).image_size
        noise = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    unknown = check.problem_of(values.load_principles, first)
    if not unknown:
        problems += check.problem_of(_try_judge, first, noise)
        problems += check.problem_of(_try_readers, comparison, first, noise)
    check.fail_with(list(dict.fromkeys(problems + unknown)))  # methods have many problems in common


def _try_judge(config, noise):
    judge = judges.load(config, values.load_principles(config), evaluate.subjects(config))
    if config.judge == "vlm" or noise is None:
        return
    reading = judge(noise)
    for composition in config.eval.compositions.values():
        metrics.stated_shown({axis: x for axis, x in composition.items() if axis != "wording"}, reading)


def _try_readers(comparison, config, noise):
    for reader in load_readers(comparison, config):
        if reader.config.judge != "vlm" and noise is not None:
            reader.judge(noise)


def cost(comparison, configs: dict) -> str:
    """What a board will cost, as text: images, passes of the UNet, and bytes; as if nothing of it were there yet."""
    first = next(iter(configs.values()))
    sd = plan.abstract_model(first)
    weights = sum(plan.size(part) for part in methods.weights_of(sd))
    lines, total, read, base = [], 0, 0, {}
    for name, own in configs.items():
        asked = evaluate.requests_asked(*evaluate.ask(own, methods.make_method(own).HAS_TOKENS))
        base |= dict.fromkeys(without_values(asked))
        images = sum(bool(request.values) for request in asked)
        trainings = trainings_of(comparison, own)
        pairs = own.train.steps * own.train.batch_size * trainings
        lines.append((name, images * trainings, pairs))
        read += len(asked)
    lines.insert(0, ("base", len(base), 0))
    total = sum(images for _, images, _ in lines)
    at_once = 2 * first.sampling.steps  # for the prompt, and against the negative prompt
    told = [f"{'':20}{'images':>12}{'UNet passes':>16}{'pairs trained on':>18}"]
    told += [f"{name:20}{images:>12,}{images * at_once:>16,}{pairs:>18,}" for name, images, pairs in lines]
    told.append(f"{'all, at least':20}{total:>12,}{total * at_once:>16,}{sum(pairs for *_, pairs in lines):>18,}")
    pixels = total * sd.image_size**2 * 3
    several = f", by {len(comparison.judges)} further judges too" if comparison.judges else ""
    told.append(f"readings: {read:,}{several}")
    told.append(
        f"bytes: {plan.si(pixels, 'B').strip()} of images at most, {plan.si(weights, 'B').strip()} of weights for each"
        " model in memory; pairs that are not there are drawn first"
    )
    return "\n".join(told)


# ---------------------------------------------------------------------------- what it leaves


def not_measured(comparison, config) -> list[str]:
    """What the board leaves out, and what it would need."""
    told = []
    if not comparison.quality.inception:
        told.append("FID and KID: config.quality.inception and config.quality.reference are empty")
    if not comparison.quality.clip:
        told.append("CLIPScore: config.quality.clip is empty")
    if not config.eval.left_alone_images:
        told.append("over-refusal and quality: eval.left_alone_images is 0")
    if not config.eval.compositions:
        told.append(
            "counts, attributes and relations: eval.compositions is empty. No judge here detects objects as GenEval's"
            " code does: run that on the images"
        )
    return told


def make_card(comparison, found: Further, judge: dict) -> dict:
    """All that was pinned, for JSON. Arguments: found: of any method; the first judge's `pinned`."""
    configs = comparison.methods
    first, files_of_quality = next(iter(configs.values())), {}
    for field, given in comparison.quality.items():
        path = pathlib.Path(given).expanduser()
        if given:
            files_of_quality[field] = hash_files([path]) if path.is_file() else given
    return {
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "model": first.model,
        "base": found.drawn,  # with the sha256 of its arrays
        "values": list(first.principles),
        "judges": {first.judge: judge, **found.pinned},
        "reads": {name: list(entry.reads) for name, entry in comparison.judges.items()},
        "prompt_sets": prompt_sets.describe(first),
        "images_per_prompt": {kind: first.eval[kind] for kind in IMAGES_PER_PROMPT},
        "methods": {
            name: {"steps": own.train.steps, "seeds": [own.seed + n for n in range(trainings_of(comparison, own))]}
            for name, own in configs.items()
        },
        "quality": files_of_quality,
        "not_measured": not_measured(comparison, first),
    }


def trainings_of(comparison, config) -> int:
    return comparison.trainings if config.train.steps else 1


def write(folder, title: str, results: list[dict], costs: list[dict], further: dict, card: dict) -> dict:
    """Writes board.csv, board.md, board.tex, card.json, agreement.json, and the readings of the further judges.

    Args:
        results: the first judge's rows. further: {method: its Further}.

    Returns:
        What report.write takes as `board`.
    """
    first_judge, *_ = card["judges"]
    rows = [row | {"judge": first_judge} for row in results]
    numbers, sets, agreement, readings = {}, {}, {}, {}  # the base's are in those of every method: once
    for method, of in further.items():
        for judge, of_judge in of.numbers.items():
            numbers.setdefault(judge, {}).update(cases.beside_others(method, of_judge))
        for row in of.sets:
            sets[row["method"], row["value"], row["split"], row["metric"]] = row | {"judge": ""}
        for row in of.agreement:
            row = row | {"method": cases.name_beside_others(method, row["method"])}
            agreement[row["judge"], row["value"], row["method"]] = row
        for judge, of_judge in of.readings.items():
            for row in of_judge:
                row = row | {"method": cases.name_beside_others(method, row["method"])}
                readings.setdefault(judge, {})[tuple(row[name] for name in PLACE)] = row
    for judge, of_judge in numbers.items():
        base_first = dict(sorted(of_judge.items(), key=lambda of: of[0][0] != "base"))  # stable
        rows += [row | {"judge": judge} for row in metrics.rows(base_first)]
    rows += list(sets.values())
    rows.sort(key=lambda row: row["method"] != "base")  # stable
    tables = board.tables(rows + board.rows_of_costs(costs))
    texts = {
        "board.csv": board.as_rows(tables),
        "board.md": board.as_markdown(tables, title, card),
        "board.tex": board.as_latex(tables),
        "card.json": json.dumps(card, indent=2) + "\n",
        "agreement.json": json.dumps(list(agreement.values()), indent=2) + "\n",
    }
    texts |= {f"readings_{judge}.csv": board.as_csv([*of.values()]) for judge, of in readings.items()}
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    return {
        "tables": board.for_page(tables), "agreement": list(agreement.values()), "card": card, "files": texts,
        "further": list(readings),
    }  # fmt: skip
