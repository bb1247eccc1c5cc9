"""Fits the retriever's classifier of words and letters, the backend "ngrams", on labelled prompts.

    python -m data_tools.fit_retriever --sets=data_tools/retriever_sets.toml --folder=DIR --out=ngrams.safetensors

DIR holds the files that the sets name. A set is a table [[set]]:

    file, column, label, category, values, where   as the flags of data_tools/evaluate_retriever.py
    source, licence   where it is from; the card has them
    beginnings        true: the first 2 to 7 words of each prompt for no value are one too, for sets have few short ones
    over_trigger      the share of its prompts for no value in which each value may be found; sets without it do not
                      decide where the thresholds lie

Persons of every title and origin, who are no harm, are added: where harmful prompts alone name them, they would be
taken for one. Each value is told from the prompts for no value. Prompts for other values and unscored ones say nothing
about it, since sets have one label a prompt and harms overlap. A fifth of the prompts is held out: thresholds are of
this fifth, and so are the figures of the card, which the file holds and this prints.

The file is read by Retriever(values, ("ngrams",), classifier=FILE), and by evaluate_retriever with --classifier=FILE.
"""

import hashlib
import json
import pathlib
import sys
import tomllib
import zlib

import numpy as np
from absl import app, flags, logging

from livo_jax import commands, values
from livo_jax.evaluation import detection
from livo_jax.retrieval import ngrams
from livo_jax.retrieval.labelled_sets import Row, read_set
from livo_jax.values.principles import lists
from livo_jax.values.rules import entries

FIELDS = {"file", "column", "label", "category", "values", "where", "source", "licence", "over_trigger", "beginnings"}
PERSONS_OVER_TRIGGER = 0.003
IDENTITIES = (
    "gay", "lesbian", "bisexual", "transgender", "Muslim", "Jewish", "Christian", "Hindu", "Buddhist", "deaf", "blind",
    "disabled", "elderly", "young", "female", "male", "rich", "poor",
)  # fmt: skip
HELD_OUT = 5  # one prompt of so many
STEPS = 200  # of L-BFGS, at most


def beginning(prompt: str) -> str:
    """The first 2 to 7 words of a prompt, how many its hash decides."""
    return " ".join(prompt.split()[: 2 + zlib.crc32(prompt.encode()) % 6])


def persons() -> list[Row]:
    """Prompts for persons of every title, origin and identity, for no value."""
    known = lists()
    people = [noun for name in ("people", "men", "women") for noun in entries(name, known)]
    prompts = []
    for k, noun in enumerate(people):
        origin, identity = known["origins"][k % len(known["origins"])], IDENTITIES[k % len(IDENTITIES)]
        prompts += [f"a {noun}", f"a photo of a {noun}", f"a {origin} {noun}", f"a photo of a {identity} {noun}"]
    return [Row(prompt, (), frozenset()) for prompt in prompts]


def read_sets(path, folder, names) -> list[tuple[dict, list[Row]]]:
    """The tables of a file of sets, each with its prompts. Raises ValueError with all that is wrong with them."""
    try:
        tables = tomllib.loads(pathlib.Path(path).read_text()).get("set", [])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    problems, found = [], []
    for number, table in enumerate(tables, start=1):
        missing, unknown = {"file", "source", "licence"} - table.keys(), table.keys() - FIELDS
        if missing or unknown:
            problems.append(f"{path}: set {number} lacks {sorted(missing)} and has {sorted(unknown)}, which no set has")
            continue
        if not isinstance(table.get("over_trigger", 0), (int, float)) or not 0 <= table.get("over_trigger", 0) < 1:
            problems.append(f"{path}: set {number}: over_trigger={table['over_trigger']!r} is no share below 1")
        settings = {key: table[key] for key in ("column", "label", "category", "values", "where") if key in table}
        try:
            rows = read_set(pathlib.Path(folder) / table["file"], names, **settings)
            if table.get("beginnings"):
                rows += [row._replace(prompt=beginning(row.prompt)) for row in rows if row.wanted == frozenset()]
            found.append((table, rows))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if not problems and not any("over_trigger" in table for table in tables):
        problems.append(f"{path}: no set has over_trigger: thresholds need one at least")
    if problems:
        raise ValueError("\n".join(problems))
    added = {"file": "persons", "source": "data_tools/fit_retriever.py", "licence": "Apache-2.0"}
    return [*found, (added | {"over_trigger": PERSONS_OVER_TRIGGER}, persons())]


def features(prompts: list[str]):
    """The prompts' pieces: a sparse matrix [P, 2^BITS], a piece 1 / sqrt(their number)."""
    from scipy.sparse import csr_matrix

    rows = [ngrams.buckets(prompt) for prompt in prompts]
    numbers = np.array([len(row) for row in rows])
    weights = np.repeat(1 / np.sqrt(np.maximum(numbers, 1)), numbers)
    matrix = csr_matrix(
        (weights, np.concatenate(rows), np.append(0, np.cumsum(numbers))), (len(prompts), 2**ngrams.BITS)
    )
    matrix.sum_duplicates()
    return matrix


def fit(x, y, penalty: float) -> tuple[np.ndarray, float]:
    """The weights and the bias of a logistic regression: least mean log loss and penalty / 2 |weights|^2.

    Args:
        x: a sparse matrix [P, D]. y: [P] bool.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    def loss(parameters):
        weights, bias = parameters[:-1], parameters[-1]
        z = x @ weights + bias
        slope = (expit(z) - y) / len(y)
        value = np.logaddexp(0, np.where(y, -z, z)).mean() + penalty / 2 * weights @ weights
        return value, np.append(x.T @ slope + penalty * weights, slope.sum())

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": STEPS}).x
    return found[:-1], float(found[-1])


def choose_threshold(scores, told: list[tuple[dict, np.ndarray]]) -> float:
    """The least score from which on each set's prompts for no value are found in its over_trigger's share at most.

    Args:
        scores: [P]. told: of sets, each with a mask [P] of its prompts for no value that are held out.
    """
    limits = [
        np.quantile(scores[own], 1 - table["over_trigger"], method="higher")
        for table, own in told
        if "over_trigger" in table
    ]
    return float(np.nextafter(np.float32(max(limits)), np.float32(1)))  # above the last that may not be found


def fit_all(sets: list[tuple[dict, list[Row]]], penalty: float) -> tuple[list[str], np.ndarray, np.ndarray, list, dict]:
    """The names of the sets' values, and their weights, bias, thresholds and figures, as `ngrams.save` takes them.

    Raises ValueError where a value has too few prompts, or too few to be told from.
    """
    scored = [[row for row in rows if row.wanted is not None] for _, rows in sets]
    rows = list(dict.fromkeys((number, row) for number, own in enumerate(scored) for row in own))
    prompts = [row.prompt for _, row in rows]
    held_out = np.array([zlib.crc32(prompt.encode()) % HELD_OUT == 0 for prompt in prompts])
    benign = np.array([not row.wanted for _, row in rows])
    of_set = np.array([number for number, _ in rows])
    told = [(table, held_out & benign & (of_set == number)) for number, (table, _) in enumerate(sets)]
    told = [(table, own) for table, own in told if own.any()]
    names = sorted(set().union(*(row.wanted for _, row in rows)))
    if not names:
        raise ValueError("no prompt of the sets is for a value")
    x, weights, bias, thresholds, figures = features(prompts), [], [], [], {}
    for name in names:
        wanted = np.array([name in row.wanted for _, row in rows])
        fitted, measured = (wanted | benign) & ~held_out, (wanted | benign) & held_out
        if not (wanted & fitted).any() or not (wanted & measured).any():
            raise ValueError(f"{name}: only {wanted.sum()} prompts are for it; a fifth is held out: it needs more")
        own, own_bias = fit(x[fitted], wanted[fitted], penalty)
        own = own.astype(np.float16)  # as the file has it
        scores = 1 / (1 + np.exp(-(x @ own.astype(np.float32) + own_bias)))
        threshold = choose_threshold(scores, told)
        auc, precision = detection.areas(detection.curves(scores[measured], wanted[measured]))
        figures[name] = {
            "fitted_on": int(fitted.sum()), "of_them_for_it": int((wanted & fitted).sum()),
            "held_out": int(measured.sum()), "auc": round(auc, 4), "average_precision": round(precision, 4),
            "threshold": round(threshold, 4),
            "recall": round(float((scores[wanted & held_out] >= threshold).mean()), 4),
            "over_trigger": {table["file"]: round(float((scores[own] >= threshold).mean()), 4) for table, own in told},
        }  # fmt: skip
        weights.append(own)
        bias.append(own_bias)
        thresholds.append(threshold)
    return names, np.stack(weights, axis=1), np.array(bias), thresholds, figures


def digest(name: str) -> str:
    """The SHA-256 of a file of --folder; "" of the persons, who are in none."""
    path = pathlib.Path(FOLDER.value) / name
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def main(_):
    logging.set_verbosity(logging.WARNING)
    try:
        sets = read_sets(SETS.value, FOLDER.value, list(values.read_tables(PRINCIPLES_FILE.value)))
        *classifier, figures = fit_all(sets, PENALTY.value)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    card = {
        "sets": [
            {
                "file": table["file"], "source": table["source"], "licence": table["licence"], "prompts": len(rows),
                "values": table.get("values", []), "where": table.get("where", {}),
                "beginnings": table.get("beginnings", False), "sha256": digest(table["file"]),
            }
            for table, rows in sets
        ],
        "penalty": PENALTY.value,
        "held_out": figures,
    }  # fmt: skip
    ngrams.save(OUT.value, *classifier, card)
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    SETS = commands.define_path("sets", "The file of the sets.")
    FOLDER = commands.define_path("folder", "The folder that their files lie in.")
    OUT = commands.define_path("out", "The safetensors file to write.")
    PRINCIPLES_FILE = commands.define_path("principles_file", "A principles.toml of your own.")
    PENALTY = flags.DEFINE_float("penalty", 1e-6, "Of the weights' squares.", lower_bound=0)
    flags.mark_flags_as_required(["sets", "folder", "out"])
    app.run(main)
