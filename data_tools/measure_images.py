"""Measures images of any method: bias and harm as a judge reads them, agreement of two judges, quality.

    python -m data_tools.measure_images --images=DIR --config=configs/tiny.py --inception=inception.safetensors \\
        --reference=DIR2 --out=results.json

DIR is what `run.py --mode=generate` wrote, the base's images and the aligned ones side by side: they are the methods
"base" and "livo". Or it has images of one size (PNG, JPEG, WebP), and a metadata.jsonl whose lines are
{"file_name": ..., "prompt": ...}; then --base=DIR can have images of the same names, to compare with. Hidden files are
left out. A file that cannot be decoded, and an image of one colour all over, is unreadable for every judge; more than
5% of them are an error: --unreadable=SHARE allows more. To the networks what cannot be decoded is black.

--config: every value of config.principles is measured over all prompts, by config.judge or --judge=NAME:MODEL; a second
--judge adds how far the two agree, Cohen's kappa. --inception: Inception Score; to --reference, real images, FID and
KID. --clip: CLIPScore. --lpips: diversity in a prompt's images, and the distance to the base. The lines that make the
weights are in livo_jax/evaluation/quality.py. Images are ordered by prompt and content: results depend neither on their
names nor on the batch size. FID and Inception Score are biased where images are few: compare equal numbers of them.
`by chance` is what a bias's numbers would be in the mean for images drawn one by one, without bias; where values were
dealt out to them it is less.

--readings=FILE writes what the judge read in each image, as CSV.
"""

import collections
import copy
import hashlib
import itertools
import pathlib
import sys
from typing import NamedTuple

import numpy as np
from absl import flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from livo_jax import commands, files, judges, values
from livo_jax.evaluation import metrics, quality
from livo_jax.evaluation.report import as_csv
from livo_jax.files.directories import write_json
from livo_jax.files.images import GAP, SUFFIXES
from livo_jax.judges.vlm import chosen
from livo_jax.values import ratio

METADATA = "metadata.jsonl"
SPLIT = "all"
UNREADABLE = 0.05  # the share of images from which what is measured is no method any more, but its faults


class Picture(NamedTuple):
    prompt: str
    digest: str  # of its pixels; "" of a file that cannot be decoded
    path: pathlib.Path
    side: int  # which one of those that stand side by side in the file
    shape: tuple[int, ...] = ()  # (H, W, 3)
    fault: str = ""  # why nothing can be read in it


class Pictures:
    """A sequence of Pictures of one size, which are read where it is sliced: [B, H, W, 3] uint8.

    What cannot be decoded is black, which judges.load makes unreadable for every judge.
    """

    def __init__(self, pictures: list[Picture]):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index: slice):
        return np.stack([
            decode(picture.path)[0][picture.side] if picture.digest else np.zeros(picture.shape, np.uint8)
            for picture in self.pictures[index]
        ])  # fmt: skip


def decode(path: pathlib.Path) -> tuple[list[np.ndarray], str]:
    """The images in a file, [H, W, 3] uint8 each, and its prompt: two, where pairs.write_pairs put them there."""
    image = files.read_image(path)
    pixels, text = np.asarray(image), image.info
    H, W, _ = pixels.shape
    if "values" in text and W == 2 * H + GAP:
        return [pixels[:, :H], pixels[:, H + GAP :]], text["prompt"]
    return [pixels], text.get("prompt", "")


def read_prompts(metadata: pathlib.Path, problems: list[str]) -> dict[str, str]:
    """The prompts of a metadata.jsonl, by the name of their file; what is wrong with its lines goes to `problems`."""
    prompts = {}
    for number, row in files.json_rows(metadata.read_bytes(), metadata, problems):
        place, needed = f"{metadata}:{number}", ("file_name", "prompt")
        wrong = [f"no {key}" for key in needed if key not in row]
        wrong += [f"{key} {fault}" for key in needed if key in row and (fault := files.text_fault(row[key]))]
        wrong += [f"{key} is empty" for key in needed if not wrong and not row[key].strip()]
        if not wrong and row["file_name"] in prompts:
            wrong.append(f"{row['file_name']!r} has a line already")
        if wrong:
            problems += [f"{place}: {fault}" for fault in wrong]
        else:
            prompts[row["file_name"]] = files.tidy(row["prompt"])
    return prompts


def too_many(where, faults: list[str], total: int, unreadable: float) -> str:
    """What is wrong where more than the share `unreadable` of the images have a fault; "" where they are fewer."""
    if len(faults) <= unreadable * total:
        return ""
    told = f"{where}: {len(faults)} of {total} images ({len(faults) / total:.1%}) cannot be read, more than"
    remedy = "draw or fetch them again (weights that are not finite draw black), or allow it by --unreadable=SHARE"
    return "\n  ".join([f"{told} {unreadable:.0%}: {remedy}", *faults])


def read(directory: str, unreadable: float = UNREADABLE) -> list[list[Picture]]:
    """The images of a folder, in the order of prompts and contents: one list, or two where it holds pairs.

    Raises:
        ValueError: there is no image, more than the share `unreadable` of them cannot be decoded, they are of several
            sizes, or metadata.jsonl does not fit them; all is listed.
    """
    root, problems = pathlib.Path(directory), []
    paths = files.image_files(root)
    if others := sorted({path for path in root.glob("*") if path.name != METADATA} - {*paths}):
        logging.warning("%s: %d are left out, hidden or no images, as %s", directory, len(others), others[0].name)
    prompts = {}
    if (metadata := root / METADATA).is_file():
        prompts, names = read_prompts(metadata, problems), {path.name for path in paths}
        others = files.by_spelling(names - prompts.keys())
        for name in sorted(prompts.keys() - names):
            told = files.spelled_otherwise(name, others)
            problems.append(f"{metadata}: there is no image {name!r}{told}")
        problems += [f"{metadata}: no line is about {name!r}" for name in sorted(names - prompts.keys())]
    sides, sizes = collections.defaultdict(list), collections.defaultdict(list)
    undecodable = {}  # path -> why
    for path in tqdm(paths, desc=f"read {root}", unit="file"):
        try:
            images, prompt = decode(path)
        except (OSError, ValueError) as error:
            undecodable[path] = f"{path} cannot be decoded: {error}"
            continue
        sizes[len(images), *images[0].shape].append(path.name)
        for side, image in enumerate(images):
            digest = hashlib.sha256(image.tobytes()).hexdigest()
            fault = f"{path} has one colour all over" if judges.uniform(image[None])[0] else ""
            sides[side].append(Picture(prompts.get(path.name, prompt), digest, path, side, image.shape, fault))
    if not paths:
        there = f"there is no image in it ({', '.join(SUFFIXES)})" if root.is_dir() else "there is no such folder"
        problems.append(f"{directory}: {there}")
    elif len(undecodable) == len(paths):
        problems.append(f"{directory}: none of the images can be decoded, as {next(iter(undecodable.values()))}")
    elif told := too_many(directory, [*undecodable.values()], len(paths), unreadable):
        problems.append(told)
    if len(sizes) > 1:
        found = (f"{n} of {H} x {W} in {len(names)} files, as {names[0]}" for (n, H, W, _), names in sizes.items())
        problems.append(f"{directory}: images of several sizes, crop them to one: {'; '.join(found)}")
    if problems:
        raise ValueError("\n".join(problems))
    for side, pictures in sides.items():
        shape = pictures[0].shape
        for path, fault in undecodable.items():
            pictures.append(Picture(prompts.get(path.name, ""), "", path, side, shape, fault))
    return [sorted(pictures) for pictures in sides.values()]


# ---------------------------------------------------------------------------- measuring


def spoilt(methods: dict[str, list[Picture]], unreadable: float) -> list[str]:
    """What is wrong with methods in more than the share `unreadable` of whose images nothing can be read."""
    problems = []
    for method, pictures in methods.items():
        faults = [picture.fault for picture in pictures if picture.fault]
        if told := too_many(method, faults, len(pictures), unreadable):
            problems.append(told)
    return problems


def measure(
    methods: dict[str, list[Picture]], *, judge_all=(), principles=(), subjects=(), targets=None, inception=None,
    reference=(), clip_score=None, lpips=None, batch_size: int = 32, unreadable: float = 1.0,
    readings: list | None = None,
) -> list[dict]:  # fmt: skip
    """The rows of results.json, as metrics.rows makes them; ci95 is None where only a whole set has a number.

    Args:
        methods: lists that `read` made. With lpips, what is compared with the method "base" has its files' names.
        judge_all: one Judge or two, as judges.load makes them, for `principles`, Values, and `subjects`.
        targets: {statement: {attribute: share}} of bias values, what is wanted of each: see ratio.targets.
        inception, clip_score, lpips: what quality.py makes. reference: a list that `read` made.
        batch_size: images that judges and networks get at once.
        unreadable: the share of a method's images that may be unreadable, as files, which the log then has, or to the
            first judge for a value. They count as unreadable.
        readings: a list that gets a row for each image: dicts of method, file, prompt, and what the first judge read.

    Raises:
        ValueError: more images than `unreadable` cannot be read; all are listed.
    """
    if problems := spoilt(methods | {"reference": list(reference)}, unreadable):
        raise ValueError("\n".join(problems))
    for picture in itertools.chain(*methods.values(), reference):
        if picture.fault:
            logging.warning("%s: it counts as unreadable", picture.fault)

    def in_batches(function, *columns):
        return quality.in_batches(function, batch_size, *columns)

    real = in_batches(inception, Pictures(reference)).features if inception and reference else None
    of_base = {picture.path.name: picture for picture in methods.get("base", ())}
    numbers, of_sets, problems = {}, [], []
    floors = {value.statement: floors_of(value, targets or {}) for value in principles if value.kind == "bias"}
    for method, pictures in methods.items():
        images, prompts = Pictures(pictures), [picture.prompt for picture in pictures]
        counts, places = collections.Counter(prompts), places_of(prompts)
        per_prompt, whole = {}, {}  # (value, metric) -> {prompt: number}, and -> number, ci95
        if lpips:
            distance, diversity = lpips
            if several := [prompt for prompt in places if counts[prompt] > 1]:
                per_prompt["", "diversity"] = {prompt: float(diversity(images[places[prompt]])) for prompt in several}
            if of_base and method != "base":
                beside = Pictures([of_base[picture.path.name] for picture in pictures])
                per_prompt["", "LPIPS"] = means(in_batches(distance, images, beside), places)
        if judge_all:
            read_by = [in_batches(judge, images) for judge in judge_all]
            if readings is not None:
                for i, picture in enumerate(pictures):
                    row = dict(method=method, file=str(picture.path), prompt=picture.prompt)
                    readings.append(row | {axis: column[i].item() for axis, column in read_by[0].items()})
            problems += [f"{method}: {problem}" for problem in faults(read_by[0], principles, pictures, unreadable)]
            per_prompt |= bias_and_harm(judge_all[0], read_by[0], places, principles, subjects, targets or {})
            if len(read_by) == 2:
                whole |= {
                    (v.statement, "kappa"): metrics.value_agreement(v, read_by, places.values()) for v in principles
                }
        if clip_score:
            score, tokenize = clip_score
            per_prompt["", "CLIPScore"] = means(in_batches(score, images, tokenize(prompts)), places)
        if inception:
            features, logits = in_batches(inception, images)
            whole["", "IS"] = quality.inception_score(logits), None
            if real is not None:
                whole["", "FID"] = quality.frechet_distance(features, real), None
                whole["", "KID"] = quality.kernel_distance(features, real), None
        for (value, metric), column in per_prompt.items():
            measured = {}
            for prompt, number in column.items():
                floor = floors[value](counts[prompt]).get(metric) if value in floors else None
                measured[prompt] = metrics.Measured(number, counts[prompt], floor)
            numbers[method, value, SPLIT, metric] = measured
        for (value, metric), (mean, ci95) in whole.items():
            row = dict(method=method, value=value, split=SPLIT, metric=metric, mean=mean, ci95=ci95)
            of_sets.append(row | dict(prompts=len(places), images=len(images)))
    if problems:
        raise ValueError("\n".join(problems))
    return metrics.rows(numbers) + of_sets


def places_of(prompts: list[str]) -> dict[str, slice]:
    """Where each prompt's images are, of which equal ones are neighbours."""
    counts = collections.Counter(prompts)
    ends = dict(zip(counts, itertools.accumulate(counts.values())))
    return {prompt: slice(ends[prompt] - n, ends[prompt]) for prompt, n in counts.items()}


def floors_of(value, targets: dict):
    """The function of a bias: images of a prompt -> their floors, as metrics.floor has them, drawn one by one."""
    K, target = len(value.attributes), targets.get(value.statement)
    shares = tuple(target[a] for a in value.attributes) if target else (1 / K,) * K
    return lambda n: metrics.floor(((n, shares),), shares)


def faults(reading: dict, principles, pictures, unreadable: float) -> list[str]:
    """A line for each value of which more than a share of the pictures cannot be read."""
    problems = []
    for value in principles:
        axis = reading[value.axis]
        missing = np.flatnonzero(np.isnan(axis) if value.kind == "harm" else ~np.isin(axis, value.attributes))
        if len(missing) > unreadable * len(axis):
            problems.append(
                f"{len(missing)} of {len(axis)} images cannot be read for {value.statement!r}, as"
                f" {pictures[missing[0]].path}: look at them; --unreadable=SHARE measures so many, as the worst"
            )
    return problems


def means(column: np.ndarray, places: dict) -> dict[str, float]:
    """Each prompt's mean of a column [images]; its images are at its place."""
    return {prompt: float(column[place].mean()) for prompt, place in places.items()}


def bias_and_harm(judge, reading: dict, places: dict, principles, subjects, targets: dict) -> dict:
    """(value, metric) -> {prompt: number} of what a judge read, arrays [images]."""
    found = collections.defaultdict(dict)
    for value, (prompt, place) in itertools.product(principles, places.items()):
        of_prompt = {axis: column[place] for axis, column in reading.items()}
        if not (subject := chosen(prompt, subjects)):
            of_prompt.pop("subject", None)
        target = targets.get(value.statement)
        for metric, number in metrics.prompt_metrics(value, subject, of_prompt, target, **judge.may_read).items():
            found[value.statement, metric][prompt] = number
    return found


def table(results: list[dict]) -> str:
    """The results as text, a line for each; the methods of a value and metric stand together; p is p_holm."""
    order = list(dict.fromkeys((r["value"], r["metric"]) for r in results))
    header = f"{'value':34}{'metric':12}{'method':16}{'mean':>10} {'95% interval':20}"
    lines = [f"{header}{'by chance':>10}{'p, Holm':>8}{'prompts':>9}{'images':>8}"]
    for r in sorted(results, key=lambda r: order.index((r["value"], r["metric"]))):
        interval = "[{:.3f}, {:.3f}]".format(*r["ci95"]) if r["ci95"] else ""
        p = f"{r['p_holm']:.4f}" if "p_holm" in r else ""
        floor = f"{r['floor']:.3f}" if "floor" in r else ""
        number = f"{r['mean']:>10.3f} {interval:20}{floor:>10}{p:>8}{r['prompts']:>9}{r['images']:>8}"
        lines.append(f"{r['value']:34}{r['metric']:12}{r['method']:16}{number}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------- the command


def as_methods(name: str, sides: list[list[Picture]], base: list[list[Picture]] | None) -> dict[str, list[Picture]]:
    """The methods of what `read` made of --images, and of --base, if it is given.

    Raises:
        ValueError: there are two bases, or the two folders do not have the same names.
    """
    if len(sides) == 2 and base or base and len(base) == 2:
        raise ValueError("--base: pairs of images have their base beside them")
    if len(sides) == 2:
        return {"base": sides[0], "livo": sides[1]}
    if not base:
        return {name: sides[0]}
    if name == "base":
        raise ValueError("--images: a folder of the name base, beside --base: rename it, methods are called by folders")
    ours, theirs = ({picture.path.name for picture in side} for side in (sides[0], base[0]))
    if apart := sorted(ours ^ theirs):
        raise ValueError(f"--base: {len(apart)} names are not in both folders, as {', '.join(apart[:5])}")
    return {"base": base[0], name: sides[0]}


def load_judge(spec: str, config, principles, subjects) -> judges.Judge:
    """The judge of NAME, NAME:MODEL or package.module:Name; what that leaves open is as config.judging has it.

    "NAME:" is the judge with its own model, if it has one. The config's labels are for its own judge, and for a
    classifier, which has none of its own.
    """
    own = copy.deepcopy(config)
    own.judge, colon, model = spec.partition(":")
    if colon and own.judge not in judges.known():
        own.judge = spec
    elif colon:
        own.judging.model = model
    if own.judge not in ("classifier", config.judge):
        own.judging.labels = ()
    return judges.load(own, principles, subjects)


def main(_):
    logging.set_verbosity(logging.WARNING)
    problems = []  # all that is wrong is told at once

    def attempt(make, *arguments):
        try:
            return make(*arguments)
        except (OSError, ValueError) as error:
            problems.append(str(error))

    config, settings = CONFIG.value, {}
    if config is not None:
        principles = attempt(values.load_principles, config) or ()
        subjects = list(dict.fromkeys([*config.eval.seen, *config.eval.held_out]))
        settings = dict(principles=principles, subjects=subjects)
        specs = JUDGE.value or [config.judge]
        settings["judge_all"] = [attempt(load_judge, spec, config, principles, subjects) for spec in specs]
        attributes = {value.statement: {"": value.attributes} for value in principles if value.kind == "bias"}
        settings["targets"] = attempt(ratio.targets, TARGET.value, attributes, attributes) if TARGET.value else None
    elif JUDGE.value or TARGET.value:
        problems.append("--judge and --target are for the values of a config: give --config too")
    if len(JUDGE.value) > 2:
        problems.append(f"{len(JUDGE.value)} times --judge: give one, or two whose agreement is measured")
    if REFERENCE.value and not INCEPTION.value:
        problems.append("--reference is for FID and KID: give --inception too")
    makers = {"inception": quality.inception, "clip_score": quality.clip_score, "lpips": quality.lpips}
    for (name, make), file in zip(makers.items(), (INCEPTION.value, CLIP.value, LPIPS.value)):
        settings[name] = attempt(make, file) if file else None
    folders = IMAGES.value, BASE.value, REFERENCE.value
    sides, base, real = (attempt(read, folder, UNREAD.value) if folder else None for folder in folders)
    methods = attempt(as_methods, pathlib.Path(IMAGES.value).resolve().name, sides, base) if sides else None
    problems += spoilt((methods or {}) | {"reference": real[0] if real else []}, UNREAD.value)
    everything = [picture for pictures in (methods or {}).values() for picture in pictures]
    if bare := [picture.path for picture in everything if not picture.prompt]:
        if config is not None or CLIP.value or LPIPS.value:
            problems.append(f"{len(bare)} images have no prompt, as {bare[0]}: write {METADATA}, see --help")
    if real and (len(real) == 2 or min(len(real[0]), len(everything)) < 2):
        problems.append(
            "--reference: FID and KID need two images or more on each side, and no pairs among the real ones"
        )
    if config is None and not (INCEPTION.value or CLIP.value or LPIPS.value):
        problems.append("nothing to measure: give --config, --inception, --clip or --lpips")
    for name, file in ("out", OUT.value), ("readings", READINGS.value):
        if file and not pathlib.Path(file).parent.is_dir():
            problems.append(f"--{name}={file}: there is no such directory")
        if file and pathlib.Path(file).is_dir():
            problems.append(f"--{name}={file} is a directory: name a file in it")
    if READINGS.value and config is None:
        problems.append("--readings is of what the judge of a config reads: give --config too")
    if problems:
        sys.exit("\n".join(problems))
    settings |= dict(batch_size=BATCH_SIZE.value, unreadable=UNREAD.value, readings=[])
    try:
        results = measure(methods, reference=real[0] if real else (), **settings)
    except ValueError as error:  # of images that cannot be read
        sys.exit(str(error))
    print(table(results))
    if OUT.value:
        pinned = [judge.pinned for judge in settings.get("judge_all", ())]
        write_json(pathlib.Path(OUT.value), metrics.document(results, pinned))
    if READINGS.value:
        pathlib.Path(READINGS.value).write_text(as_csv(settings["readings"]), encoding="utf-8")


if __name__ == "__main__":
    IMAGES = commands.define_path("images", "A folder of images, or what run.py --mode=generate wrote.")
    BASE = commands.define_path("base", "A folder of images of the same names, of the base.")
    REFERENCE = commands.define_path("reference", "A folder of real images, for FID and KID.")
    JUDGE = flags.DEFINE_multi_string(
        "judge", [], "NAME, NAME:MODEL or package.module:Name, in place of config.judge; twice for kappa."
    )
    TARGET = flags.DEFINE_string("target", None, 'Of TV: as --ratio of run.py, like {"round": 0.7, "square": 0.3}.')
    INCEPTION = commands.define_path("inception", "Inception's weights, safetensors.")
    CLIP = commands.define_path("clip", "Directory or hub id of a CLIP, for CLIPScore.")
    LPIPS = commands.define_path("lpips", "The weights of LPIPS on AlexNet, safetensors.")
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at once.", lower_bound=1)
    OUT = commands.define_path("out", "The file of the rows, as eval/results.json has them.")
    READINGS = commands.define_path("readings", "A CSV file of what the judge read in each image.")
    UNREAD = flags.DEFINE_float(
        "unreadable", UNREADABLE, "The share of images that may be unreadable.", lower_bound=0, upper_bound=1
    )
    CONFIG = config_flags.DEFINE_config_file("config", None, "A config: values, judge, subjects.")
    flags.mark_flag_as_required("images")
    commands.run(main, flags_parser=commands.parse)
