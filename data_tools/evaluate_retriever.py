"""Measures the retriever on labelled prompts: the project's own, or any set's.

    python -m data_tools.evaluate_retriever
    python -m data_tools.evaluate_retriever --prompts=FILE [--column=prompt] [--label=COLUMN] --value=LABEL=NAME ...

Without --prompts these are the prompts of livo_jax/retrieval/retriever_prompts.toml, for the paper's five values. FILE
is a CSV or TSV with a header, JSON lines, or a text of lines. --value says which values a label of the set is for:

    --label=category --value=sexual=nudity --value=violence=gore --value=safe=none --value="*=unscored"

"none" is for no value. "unscored" is a label that no value of ours is about: its prompts are neither hits nor misses.
"*" is every other label. A row has several labels where there are commas between them. Without --label every prompt is
for the values of --value=NAME, or for none. --where="COLUMN=REGEX" takes some of the rows. --values are the values that
are looked for; without it those of --value, or the harms of the paper.

--backends=auto (what principles.toml says) or such as keywords+ngrams says who looks for them, each time it is given.
ngrams takes --classifier, a file that data_tools/fit_retriever.py made; dense wants --model, a Stable Diffusion; states
and first_steps want --config and --workdir, a run with the files that fit_retriever.py made for it, or
--file=BACKEND=FILE each; llm wants --endpoint and --llm (its key in OPENAI_API_KEY; --cache keeps its answers).

It prints the figures of each category with 95% intervals, and of backends that give scores how well these tell the
prompts apart, and the operating point. --out=DIR gets figures.json, roc.svg, precision_recall.svg,
calibration.svg, and mistakes.csv, the prompts that are got wrong.
"""

import csv
import json
import pathlib
import sys
import time
import warnings

import numpy as np
from absl import flags, logging
from livo_jax.data_tools.fit_retriever import load_models
from ml_collections import config_flags

from livo_jax import commands, values
from livo_jax.evaluation import charts, detection
from livo_jax.retrieval.labelled_sets import NONE, UNSCORED, Row, read_set
from livo_jax.retrieval.retriever import FITTED, PAPERS, Retriever, labelled, run_files

FIGURES = {"recall": "recall", "precision": "precision", "macro_f1": "macro-F1", "over_trigger": "over-trigger"}


def own_rows(part: str) -> list[Row]:
    """The prompts of retriever_prompts.toml."""
    names = {value.statement: value.name for value in values.load(PAPERS)}
    return [
        Row(prompt, (category.replace("_", " "),), frozenset(names[statement] for statement in wanted))
        for category, rows in labelled(part).items()
        for prompt, wanted in rows.items()
    ]


def read_rows() -> list[Row]:
    """The prompts of --prompts. Raises ValueError with all that is wrong with it and the flags about it."""
    problems = [f"--where={text!r} is no COLUMN=REGEX" for text in WHERE.value if "=" not in text]
    if problems:
        raise ValueError("; ".join(problems))
    names = values.read_tables(PRINCIPLES_FILE.value)
    where = dict(text.split("=", 1) for text in WHERE.value)
    return read_set(
        PROMPTS.value, list(names), column=COLUMN.value, label=LABEL.value, values=VALUE.value,
        category=CATEGORY.value, where=where,
    )  # fmt: skip


def choose_values() -> tuple[values.Value, ...]:
    """The values that are looked for."""
    if not PROMPTS.value:
        return values.load(VALUES.value or PAPERS)
    named = [entry.rpartition("=")[2] for entry in VALUE.value]
    chosen = VALUES.value or list(dict.fromkeys(name for name in named if name not in (NONE, UNSCORED)))
    loaded = values.load(chosen or PAPERS, PRINCIPLES_FILE.value)
    return loaded if chosen else tuple(value for value in loaded if value.kind == "harm")


def make_retrievers(chosen) -> dict[str, Retriever]:
    """Those of --backends, by name. Raises ValueError and OSError where one cannot work."""
    settings = {"classifier": CLASSIFIER.value or "", "files": {}}
    backends = list(BACKENDS.value or (["auto"] if PROMPTS.value else ["keywords", "bm25", "keywords+bm25"]))
    if MODEL.value:
        from livo_jax import StableDiffusion

        settings["sd"] = StableDiffusion.from_pretrained(MODEL.value)
        backends += [] if BACKENDS.value else ["dense", "keywords+dense"]
    if CONFIG.value is not None:
        models = load_models(CONFIG.value, WORKDIR.value)
        settings |= {"sd": models.sd, "value_encoder": models.value_encoder}
    if WORKDIR.value:
        settings["files"] |= run_files(WORKDIR.value)
    for entry in FILE.value:
        name, _, file = entry.partition("=")
        if name not in FITTED or not file:
            raise ValueError(f"--file={entry} is no BACKEND=FILE, of {', '.join(FITTED)}")
        settings["files"][name] = file
    if ENDPOINT.value or LLM.value:
        settings |= {"endpoint": ENDPOINT.value or "", "model": LLM.value or "", "cache": CACHE.value}
        backends += [] if BACKENDS.value else ["llm", "keywords+llm"]
    return {
        name: Retriever(chosen, None if name == "auto" else tuple(name.split("+")), **settings) for name in backends
    }


def ask(retriever: Retriever, rows: list[Row]) -> tuple[list[dict], dict[str, list[dict]], int]:
    """What a retriever says of each prompt.

    Returns:
        Of each prompt the values found, {name: reason}; of each backend that gives scores, the score of each value,
        {name: score}; and how often the language model failed.

    Raises:
        UserWarning: the language model cannot be reached.
    """
    scoring = {name: backend.scores for name, backend in retriever.backends.items() if hasattr(backend, "scores")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".* language model")
        warnings.filterwarnings("error", ".* (does not answer|refuses): ")  # nothing would be measured
        found = [{value.name: value.reason for value in retriever(row.prompt)} for row in rows]
    scores = {name: [of_all(row.prompt) for row in rows] for name, of_all in scoring.items()}
    return found, scores, len(caught)


def table(names: list[str], rows: list[Row], found: list[dict]) -> dict[str, dict]:
    """The figures of all prompts and of each category: what `detection.measure` says of those that tell something.

    A prompt may be in several categories. `found` among them is the share of the prompts, unscored ones too, in which a
    value was found.
    """
    wanted = np.array([[name in (row.wanted or ()) for name in names] for row in rows])
    answers = np.array([[name in answer for name in names] for answer in found])
    scored = np.array([row.wanted is not None for row in rows])
    figures = {}
    for category in ("all", *sorted(set().union(*(row.categories for row in rows)))):
        own = np.array([category == "all" or category in row.categories for row in rows])
        figures[category] = {
            "prompts": int(own.sum()),
            "found": detection.share(answers[own].any(1)),
            **detection.measure(wanted[own & scored], answers[own & scored]),
        }
    return figures


def score_figures(names, rows: list[Row], scores: list[dict], thresholds: dict[str, float]) -> dict[str, dict]:
    """Of each value that some of the prompts are for: its curves, what they come to, and its operating point."""
    figures = {}
    for name in names:
        own = [(row, score[name]) for row, score in zip(rows, scores) if name in score]
        own = [(name in row.wanted, score) for row, score in own if row.wanted is not None]
        if not any(wanted for wanted, _ in own) or all(wanted for wanted, _ in own):
            continue  # there is nothing to tell apart
        wanted, of_value = map(np.array, zip(*own))
        points = detection.curves(of_value, wanted)
        bins, error = detection.calibration(np.clip(of_value, 0, 1), wanted)
        auc, precision = detection.areas(points)
        figures[name] = {
            "auc": auc, "average_precision": precision, "calibration_error": error, "threshold": thresholds[name],
            "recall_there": detection.share(of_value[wanted] >= thresholds[name]),
            "false_positives_there": detection.share(of_value[~wanted] >= thresholds[name]),
            "curves": {key: column.tolist() for key, column in points.items()}, "calibration": bins.tolist(),
        }  # fmt: skip
    return figures


def mistakes_of(backends: str, rows: list[Row], found: list[dict], names: list[str]):
    """Yields (backends, mistake, value, category, prompt, reason) of each value that is missed or wrongly found."""
    for row, answer in zip(rows, found):
        for name in names if row.wanted is not None else ():
            if (name in row.wanted) != (name in answer):
                mistake = "missed" if name in row.wanted else "wrongly found"
                yield backends, mistake, name, ", ".join(row.categories), row.prompt, answer.get(name, "")


def show(figure) -> str:
    """A figure with its interval, "–" where there is none."""
    if figure is None:
        return "–"
    mean, interval = figure
    return f"{mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def write(out: pathlib.Path, figures: dict, mistakes: list[tuple]):
    """The files of --out, a folder that is there."""
    (out / "figures.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    with open(out / "mistakes.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("backends", "mistake", "value", "category", "prompt", "reason"), *mistakes])
    roc, precision_recall, calibration = {}, {}, {}
    for backend, of_values in figures["scores"].items():
        for value, row in of_values.items():
            name, points = f"{value}, {backend}", row["curves"]
            roc[name] = points["false_positives"], points["recall"]
            precision_recall[name] = points["recall"], points["precision"]
            calibration[name] = list(zip(*row["calibration"]))[:2]
    for name, lines, axes in (
        ("roc", roc, ("false positives", "recall")),
        ("precision_recall", precision_recall, ("recall", "precision")),
        ("calibration", calibration, ("score", "share of the prompts that are for the value")),
    ):
        if lines:
            (out / f"{name}.svg").write_bytes(charts.shares(lines, *axes))


def main(_):
    logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", ".* is longer than")  # prompts, than what a text encoder reads
    about_prompts = {"label": LABEL.value, "value": VALUE.value, "where": WHERE.value, "category": CATEGORY.value}
    if not PROMPTS.value and (given := [f"--{name}" for name, x in about_prompts.items() if x]):
        sys.exit(f"{', '.join(given)}: of which file? Give --prompts=FILE")
    try:
        if OUT.value:
            pathlib.Path(OUT.value).mkdir(parents=True, exist_ok=True)  # before all is measured
        rows = read_rows() if PROMPTS.value else own_rows(PART.value)
        chosen = choose_values()
        retrievers = make_retrievers(chosen)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    names = [value.name for value in chosen]
    figures, mistakes = {"backends": {}, "scores": {}}, []
    print(f"| backends | category | prompts | found | {' | '.join(FIGURES.values())} |")
    print("|" + "---|" * (4 + len(FIGURES)))
    for backends, retriever in retrievers.items():
        start = time.monotonic()
        try:
            found, scores, failed = ask(retriever, rows)
        except UserWarning as warning:
            sys.exit(str(warning))
        each = 1000 * (time.monotonic() - start) / len(rows)
        print(f"{backends}: {each:.2f} ms a prompt; the language model failed {failed} times", file=sys.stderr)
        if looking := retriever.backends.get("first_steps"):
            print(f"{backends}: {looking.evaluations} evaluations of the UNet a prompt", file=sys.stderr)
        figures["backends"][backends] = table(names, rows, found)
        for category, row in figures["backends"][backends].items():
            cells = " | ".join(show(row[name]) for name in ("found", *FIGURES))
            print(f"| {backends} | {category} | {row['prompts']} | {cells} |")
        for name, of_all in scores.items():
            thresholds = retriever.backends[name].thresholds
            figures["scores"][name] = score_figures(names, rows, of_all, thresholds)
        mistakes += mistakes_of(backends, rows, found, names)
    if any(figures["scores"].values()):
        print("\n| scores of | value | AUC | average precision | calibration error | from | recall | false positives |")
        print("|" + "---|" * 8)
    for backend, of_values in figures["scores"].items():
        for name, row in of_values.items():
            numbers = (row[key] for key in ("auc", "average_precision", "calibration_error", "threshold"))
            cells = " | ".join(f"{x:.3f}" for x in numbers)
            there = f"{show(row['recall_there'])} | {show(row['false_positives_there'])}"
            print(f"| {backend} | {name} | {cells} | {there} |")
    if MISTAKES.value:
        for backends, mistake, name, _, prompt, _ in mistakes:
            print(f"{backends}: {name} {mistake} in {prompt!r}", file=sys.stderr)
    if OUT.value:
        write(pathlib.Path(OUT.value), figures, mistakes)


if __name__ == "__main__":
    PROMPTS = flags.DEFINE_string("prompts", None, "A file of prompts. Default: the project's own.")
    COLUMN = flags.DEFINE_string("column", "prompt", "Its column of the prompts.")
    LABEL = flags.DEFINE_string("label", "", "Its column of the labels.")
    VALUE = flags.DEFINE_multi_string("value", [], "LABEL=NAME: the label is for this value; none; unscored.")
    CATEGORY = flags.DEFINE_string("category", "", "Its column that figures are told by. Default: the labels.")
    WHERE = flags.DEFINE_multi_string("where", [], "COLUMN=REGEX: the rows that are taken.")
    VALUES = flags.DEFINE_list("values", [], "The values that are looked for.")
    PRINCIPLES_FILE = flags.DEFINE_string("principles_file", None, "A principles.toml of your own.")
    BACKENDS = flags.DEFINE_multi_string("backends", [], "auto, or names with + between them.")
    CLASSIFIER = flags.DEFINE_string("classifier", None, "The file of ngrams. Default: the package's.")
    CONFIG = config_flags.DEFINE_config_file("config", None, "Whose model states and first_steps look at.")
    WORKDIR = commands.define_path("workdir", "A run of that config.")
    FILE = flags.DEFINE_multi_string("file", [], "BACKEND=FILE: of ngrams, states or first_steps.")
    OUT = flags.DEFINE_string("out", None, "The folder for figures.json, mistakes.csv and the curves.")
    MODEL = flags.DEFINE_string("model", None, "A Stable Diffusion, directory or hub id: measures dense.")
    ENDPOINT = flags.DEFINE_string("endpoint", None, "An OpenAI-compatible endpoint, https://HOST/v1: measures llm.")
    LLM = flags.DEFINE_string("llm", None, "The language model's name there.")
    CACHE = flags.DEFINE_string("cache", "", "The directory that keeps its answers.")
    PART = flags.DEFINE_enum("part", "test", ["calibration", "test"], "Of the project's own prompts.")
    MISTAKES = flags.DEFINE_bool("mistakes", False, "Prints the prompts that are got wrong, to stderr.")
    commands.run(main, flags_parser=commands.parse)
