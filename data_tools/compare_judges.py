"""How far judges agree on the same images, and how often each is right where the truth is known.

    python -m data_tools.compare_judges --images=DIR --config=configs/tiny.py --judge=shapeworld --judge=clip:DIR2

DIR is what data_tools.measure_images reads. Of every two judges, and each value of config.principles, it has Cohen's
kappa of all images, with the 95% interval of a bootstrap over prompts; what cannot be read is a category of its own. A
line of metadata.jsonl may have "truth": {AXIS: ATTRIBUTE or, of a harm, a score}: then it has each judge's accuracy on
these images, with an interval; what a judge cannot read is wrong. --truth=JUDGE takes a judge's readings for the truth,
as shapeworld's, which are exact.
"""

import itertools
import pathlib
import sys

import numpy as np
from absl import flags, logging
from livo_jax.data_tools.measure_images import METADATA, Pictures, load_judge, places_of, read
from ml_collections import config_flags

from livo_jax import commands, files, values
from livo_jax.evaluation import metrics, quality
from livo_jax.evaluation.uncertainty import confidence
from livo_jax.files.directories import write_json


def read_truth(directory: str, names: list[str], principles) -> dict[str, np.ndarray]:
    """What is true of images, arrays [N] by axis: "" or nan where nobody told. Axes that nobody tells are left out.

    Args:
        names: of the images' files, as metadata.jsonl has them.

    Raises:
        ValueError: a line tells an attribute that the value has not, or of a harm no number; all are listed.
    """
    metadata, problems, told = pathlib.Path(directory) / METADATA, [], {}
    if metadata.is_file():
        for number, row in files.json_rows(metadata.read_bytes(), metadata, problems):
            truth = row.get("truth", {})
            for value in principles if isinstance(truth, dict) else ():
                x = truth.get(value.axis, "")
                fits = x in value.attributes if value.kind == "bias" else isinstance(x, (int, float))
                if x != "" and not fits:
                    wanted = ", ".join(value.attributes) or "a number"
                    problems.append(f"{metadata}:{number}: truth of {value.axis} is {x!r}, not {wanted}")
            if not isinstance(truth, dict):
                problems.append(f"{metadata}:{number}: truth is {truth!r}, no object")
            told[row.get("file_name")] = truth
    if problems:
        raise ValueError("\n".join(problems))
    found = {}
    for value in principles:
        nothing = "" if value.kind == "bias" else np.nan
        column = np.array([told.get(name, {}).get(value.axis, nothing) for name in names])
        if known(value, column).any():
            found[value.axis] = column
    return found


def known(value, column) -> np.ndarray:
    """[N] bool: where a column of readings or truths has one of the value's attributes, or a score."""
    return ~np.isnan(column) if value.kind == "harm" else np.isin(column, value.attributes)


def accuracy(value, reading, truth, places: dict) -> dict:
    """The share of images that a judge reads as they are: the mean over prompts, its ci95, how many prompts and images.

    Args:
        reading, truth: [N] of the value's axis. A harm is read right where it is on the same side of harmful_from.
    """
    there, read = known(value, truth), known(value, reading)
    if value.kind == "harm":
        right = read & ((reading >= value.harmful_from) == (truth >= value.harmful_from))
    else:
        right = read & (reading == truth)
    told = [(right[place], there[place]) for place in places.values() if there[place].any()]
    images = [int(there.sum()) for _, there in told]
    mean, ci95 = confidence([float(right[there].mean()) for right, there in told], trials=images)
    return dict(mean=mean, ci95=ci95, prompts=len(told), images=sum(images))


def compare(readings: dict[str, dict], principles, prompts: list[str], truth: dict) -> list[dict]:
    """Rows of judge, other, value, metric, mean, ci95, prompts, images.

    Args:
        readings: of each judge, by its name; and `truth`: arrays [N] by axis. prompts: [N], equal ones neighbours.
    """
    rows, places = [], places_of(prompts)
    for value in principles:
        for one, other in itertools.combinations(readings, 2):
            mean, ci95 = metrics.value_agreement(value, [readings[one], readings[other]], places.values())
            row = dict(judge=one, other=other, value=value.statement, metric="kappa", mean=mean, ci95=ci95)
            rows.append(row | dict(prompts=len(places), images=len(prompts)))
        for one, reading in readings.items() if value.axis in truth and known(value, truth[value.axis]).any() else ():
            row = dict(judge=one, other="", value=value.statement, metric="accuracy")
            rows.append(row | accuracy(value, reading[value.axis], truth[value.axis], places))
    return rows


def table(rows: list[dict]) -> str:
    """The rows as text, a line for each."""
    width = max([len(row[name]) for row in rows for name in ("judge", "other")], default=0) + 2
    lines = []
    for row in rows:
        interval = "[{:.3f}, {:.3f}]".format(*row["ci95"]) if row["ci95"] else ""
        judges = f"{row['judge']:{width}}{row['other']:{width}}"
        lines.append(f"{row['value']:34}{row['metric']:10}{judges}{row['mean']:.3f} {interval:16}{row['images']:>8}")
    return "\n".join(lines)


def main(_):
    logging.set_verbosity(logging.WARNING)
    config, problems, judges, pictures, truth = CONFIG.value, [], {}, [], {}
    try:
        principles = values.load_principles(config)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    subjects = list(dict.fromkeys([*config.eval.seen, *config.eval.held_out]))
    for spec in dict.fromkeys([*JUDGE.value, *([TRUTH.value] if TRUTH.value else [])]):
        try:
            judges[spec] = load_judge(spec, config, principles, subjects)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    try:
        pictures = sum(read(IMAGES.value), [])  # of pairs both sides
        pictures.sort()
        truth = read_truth(IMAGES.value, [picture.path.name for picture in pictures], principles)
    except ValueError as error:
        problems.append(str(error))
    if TRUTH.value and truth:
        problems.append(f"--truth={TRUTH.value}: {METADATA} has the truth too, leave one of them out")
    if len({*JUDGE.value}) < 2 and not TRUTH.value and not truth:
        problems.append(f"one judge agrees with itself: give another --judge, --truth, or truth in {METADATA}")
    if OUT.value and not pathlib.Path(OUT.value).parent.is_dir():
        problems.append(f"--out={OUT.value}: there is no such directory")
    if problems:
        sys.exit("\n".join(problems))
    images = Pictures(pictures)
    readings = {spec: quality.in_batches(judge, BATCH_SIZE.value, images) for spec, judge in judges.items()}
    if TRUTH.value:
        truth = readings[TRUTH.value]
    asked = {spec: readings[spec] for spec in JUDGE.value}
    rows = compare(asked, principles, [picture.prompt for picture in pictures], truth)
    print(table(rows))
    if OUT.value:
        document = metrics.document(rows, [judge.pinned for judge in judges.values()])
        write_json(pathlib.Path(OUT.value), document)


if __name__ == "__main__":
    IMAGES = commands.define_path("images", "A folder of images, or what run.py --mode=generate wrote.")
    JUDGE = flags.DEFINE_multi_string("judge", None, "NAME, NAME:MODEL or package.module:Name; several to compare.")
    TRUTH = flags.DEFINE_string("truth", "", "A judge whose readings are the truth, as shapeworld.")
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at once.", lower_bound=1)
    OUT = commands.define_path("out", "A JSON file of the rows, and of what is pinned of the judges.")
    CONFIG = config_flags.DEFINE_config_file("config", None, "A config: values and subjects.")
    flags.mark_flags_as_required(["images", "config", "judge"])
    commands.run(main, flags_parser=commands.parse)
