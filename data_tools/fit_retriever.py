"""Fits the retriever's classifiers on labelled prompts: the backends ngrams, states and first_steps.

    python -m data_tools.fit_retriever --sets=data_tools/retriever_sets.toml --folder=DIR --out=ngrams.safetensors
    python -m data_tools.fit_retriever --features=states --config=configs/livo.py --workdir=RUN --sets=... --folder=DIR
    python -m data_tools.fit_retriever --features=first_steps --config=configs/livo.py --workdir=RUN --sets=... ...

--features: ngrams are words and letters; states, how the model's text encoder reads a prompt; first_steps, what the
model begins to draw of it, and how far the run's value tokens move that. The last two are of the model of --config, and
of the tokens in --workdir, a run; without a run states take the model alone.

DIR holds the files that the sets name. A set is a table [[set]]:

    file, column, label, category, values, where   as the flags of data_tools/evaluate_retriever.py
    source, licence   where it is from; the card has them
    beginnings        true: the first 2 to 7 words of each prompt for no value are one too, for sets have few short ones
    over_trigger      the share of its prompts that are not for a value in which it may be found; sets without it do not
                      decide where the thresholds lie

Of ngrams persons of every title and origin, who are no harm, are added: where harmful prompts alone name them, they
would be taken for one. A harm is told from the prompts for no harm: prompts for another harm and unscored ones say
nothing about it, since sets have one label a prompt and harms overlap. A bias is told from all prompts that are not for
it. A fifth of the prompts is held out: thresholds are of this fifth, and so are the figures of the card, which the file
holds and this prints.

--out is the file to write: without it that of the run, WORKDIR/retriever/FEATURES.safetensors, where generate, the demo
and evaluate_retriever look for it. Elsewhere Retriever(values, (FEATURES,), files={FEATURES: FILE}) reads it.
"""

import hashlib
import json
import pathlib
import sys
import tomllib
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from livo_jax import commands, values
from livo_jax.evaluation import detection
from livo_jax.retrieval import first_steps, linear, ngrams, states
from livo_jax.retrieval.labelled_sets import Row, read_set
from livo_jax.retrieval.linear import Fitted
from livo_jax.retrieval.retriever import run_file
from livo_jax.values.principles import lists
from livo_jax.values.rules import entries

FIELDS = dict.fromkeys(("file", "column", "label", "category", "source", "licence"), str)  # of a set
FIELDS |= {"values": list, "where": dict, "over_trigger": float, "beginnings": bool}
KIND = {str: "text", list: "list of texts", dict: "table of texts", float: "number", bool: "true or false"}
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


def is_a(x, kind: type) -> bool:
    """Whether what a set's field is, is of its kind."""
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    return isinstance(x, (int, float) if kind is float else kind) and all(isinstance(part, str) for part in parts)


def read_sets(path, folder, names, with_persons: bool) -> list[tuple[dict, list[Row]]]:
    """The tables of a file of sets, each with its prompts, and the persons.

    Raises ValueError with all that is wrong with them.
    """
    try:
        tables = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8-sig")).get("set", [])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    problems, found = [], []
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{path}: each set is a table, [[set]]")
    for number, table in enumerate(tables, start=1):
        missing, unknown = {"file", "source", "licence"} - table.keys(), table.keys() - FIELDS.keys()
        if missing or unknown:
            problems.append(f"{path}: set {number} lacks {sorted(missing)} and has {sorted(unknown)}, which no set has")
            continue
        wrong = [f"{name}={x!r} is no {KIND[FIELDS[name]]}" for name, x in table.items() if not is_a(x, FIELDS[name])]
        if wrong:
            problems.append(f"{path}: set {number}: {', '.join(wrong)}")
            continue
        if not 0 <= table.get("over_trigger", 0) < 1:
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
    if not with_persons:
        return found
    added = {"file": "persons", "source": "data_tools/fit_retriever.py", "licence": "Apache-2.0"}
    return [*found, (added | {"over_trigger": PERSONS_OVER_TRIGGER}, persons())]


def count_pieces(prompts: list[str]):
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


def fit_scaled(x, y, penalty: float) -> tuple[np.ndarray, float]:
    """As `fit`, of dense features, each brought to mean 0 and deviation 1 so that the penalty means as much for all."""
    mean, deviation = x.mean(0), np.maximum(x.std(0), 1e-6)
    weights, bias = fit((x - mean) / deviation, y, penalty)
    weights = (weights / deviation).astype(np.float32)
    return weights, bias - float(mean @ weights)


def fit_along(x, y, penalty: float) -> tuple[np.ndarray, float]:
    """As `fit_scaled`, of effects and a movement [P, E + 1]: prompts are too few for as many weights.

    Two are fitted: of the effects along the difference of their means, and of the movement.
    """
    effects, movement = x[:, :-1], x[:, -1]
    along = effects[y].mean(0) - effects[~y].mean(0)
    along /= np.linalg.norm(along)
    (of_effects, of_movement), bias = fit_scaled(np.stack([effects @ along, movement], axis=1), y, penalty)
    return np.append(along * of_effects, of_movement).astype(np.float32), bias


def fit_pieces(x, y, penalty: float) -> tuple[np.ndarray, float]:
    """As `fit`; the weights float16, as the file of ngrams has them."""
    weights, bias = fit(x, y, penalty)
    return weights.astype(np.float16), bias


def read_ngrams(prompts, chosen, models):
    """The features of prompts, by the number of the value that they are for, [P, D]; and those of ASKED, by name."""
    x = count_pieces(prompts)
    return (lambda number: x), {}


def read_states(prompts, chosen, models):
    """As `read_ngrams`."""
    read = states.make_reader(models.sd)
    x = np.concatenate([read([prompt]) for prompt in prompts])
    return (lambda number: x), {states.KNOWN[0]: read([states.ASKED])[0]}


def read_first_steps(prompts, chosen, models):
    """As `read_ngrams`."""
    read = first_steps.make_reader(models.sd, models.value_encoder, [value.statement for value in chosen])
    effects, movements = map(
        np.stack, zip(*(read(prompt) for prompt in tqdm(prompts, desc="first steps", unit="prompt")))
    )
    # A harm's token knows the wordings that it was trained on, and moves little where the harm is said otherwise.
    movements *= [value.kind == "bias" for value in chosen]
    known = dict(zip(first_steps.KNOWN, read(first_steps.ASKED)))
    return (lambda number: np.column_stack([effects, movements[:, number]])), known


class Kind(NamedTuple):
    """A kind of features: what the file is called by, who reads and who fits them, and with which penalty."""

    format: str
    read: Callable
    fit: Callable
    penalty: float


KINDS = {
    "ngrams": Kind(ngrams.FORMAT, read_ngrams, fit_pieces, 1e-6),
    "states": Kind(states.FORMAT, read_states, fit_scaled, 1e-2),
    "first_steps": Kind(first_steps.FORMAT, read_first_steps, fit_along, 1e-3),
}


def choose_threshold(scores, wanted, told: list[tuple[dict, np.ndarray]]) -> float:
    """The score from which on each set's prompts are found in its over_trigger's share at most.

    The least such; but where all prompts for the value have more, what is halfway to them in log-odds.

    Args:
        scores: [P]. wanted: [P] bool, prompts for the value that are held out. told: of sets, each with a mask [P] of
            its prompts that are held out and not for it.
    """
    from scipy.special import expit, logit

    limits = [
        np.quantile(scores[own], 1 - table["over_trigger"], method="higher")
        for table, own in told
        if "over_trigger" in table
    ]
    least = float(np.nextafter(np.float32(max(limits)), np.float32(1)))  # above the last that may not be found
    return max(least, float(expit((logit(least) + logit(scores[wanted].min())) / 2)))


def fit_all(sets: list[tuple[dict, list[Row]]], known: dict[str, values.Value], kind: Kind, penalty, models) -> Fitted:
    """The classifier of the sets' values; its card has the figures alone.

    Args:
        known: the values by their names. models: of a run, for the kinds that need them.

    Raises ValueError where a value has too few prompts, or too few to be told from.
    """
    scored = [[row for row in rows if row.wanted is not None] for _, rows in sets]
    rows = list(dict.fromkeys((number, row) for number, own in enumerate(scored) for row in own))
    prompts = [row.prompt for _, row in rows]
    held_out = np.array([zlib.crc32(prompt.encode()) % HELD_OUT == 0 for prompt in prompts])
    of_set = np.array([number for number, _ in rows])
    names = sorted(set().union(*(row.wanted for _, row in rows)))
    if not names:
        raise ValueError("no prompt of the sets is for a value")
    harms = {name for name in names if known[name].kind == "harm"}
    of_value, problems = {}, []
    for name in names:
        wanted = np.array([name in row.wanted for _, row in rows])
        against = np.array([not row.wanted & (harms if name in harms else {name}) for _, row in rows])
        told = [(table, held_out & against & (of_set == number)) for number, (table, _) in enumerate(sets)]
        told = [(table, own) for table, own in told if own.any()]
        parts = (wanted & ~held_out, wanted & held_out, against & ~held_out)
        if not all(part.any() for part in parts) or not any("over_trigger" in table for table, _ in told):
            problems.append(
                f"{name}: {wanted.sum()} prompts are for it, and it is told from {against.sum()}; a fifth of both is"
                " held out, of sets with over_trigger too: it needs more"
            )
        of_value[name] = wanted, against, told
    if problems:
        raise ValueError("; ".join(problems))
    features, asked = kind.read(prompts, [known[name] for name in names], models)
    weights, bias, thresholds, figures = [], [], [], {}
    for number, (name, (wanted, against, told)) in enumerate(of_value.items()):
        x = features(number)
        fitted, measured = (wanted | against) & ~held_out, (wanted | against) & held_out
        own, own_bias = kind.fit(x[fitted], wanted[fitted], penalty)
        scores = 1 / (1 + np.exp(-(x @ own.astype(np.float32) + own_bias)))
        threshold = choose_threshold(scores, wanted & held_out, told)
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
    return Fitted(tuple(names), np.stack(weights, axis=1), np.array(bias), np.array(thresholds), figures, asked)


def digest(name: str) -> str:
    """The SHA-256 of a file of --folder; "" of the persons, who are in none."""
    path = pathlib.Path(FOLDER.value) / name
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def choose_out() -> pathlib.Path:
    """The file to write. Raises ValueError where the flags name none."""
    if OUT.value:
        return pathlib.Path(OUT.value)
    if not WORKDIR.value:
        raise ValueError("--out=FILE or --workdir=RUN says which file to write")
    return pathlib.Path(WORKDIR.value) / run_file(FEATURES.value)


def load_models(config, workdir):
    """The Models of a run, or those of the model alone. Raises ValueError and OSError as they are loaded."""
    from livo_jax import methods, sharding
    from livo_jax.runs import restore

    mesh = sharding.make_mesh(**config.mesh)
    if workdir:
        return restore.restore_run(config, workdir, mesh)
    sd = restore.load_base(config, mesh)
    return methods.Models(sd, sd)


def main(_):
    logging.set_verbosity(logging.WARNING)
    kind, models, model = KINDS[FEATURES.value], None, {}
    penalty = kind.penalty if PENALTY.value is None else PENALTY.value
    try:
        out = choose_out()
        if not 0 <= penalty < np.inf:
            raise ValueError(f"--penalty={penalty}: choose a finite number, 0 or above")
        if out.is_dir():
            raise ValueError(f"--out={out} is a folder: name a file in it")
        out.parent.mkdir(parents=True, exist_ok=True)  # before minutes of fitting
        if FEATURES.value != "ngrams" and CONFIG.value is None:
            raise ValueError(f"--features={FEATURES.value} needs --config, whose model reads the prompts")
        tables = values.read_tables(PRINCIPLES_FILE.value)
        sets = read_sets(SETS.value, FOLDER.value, list(tables), with_persons=FEATURES.value == "ngrams")
        known = {value.name: value for value in values.load(list(tables), PRINCIPLES_FILE.value)}
        if FEATURES.value != "ngrams":
            models = load_models(CONFIG.value, WORKDIR.value)
            model = {"model": models.sd.name}
        fitted = fit_all(sets, known, kind, penalty, models)
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
        "penalty": penalty,
        "held_out": fitted.card,
        **model,
    }  # fmt: skip
    linear.save(out, kind.format, fitted._replace(card=card))
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    FEATURES = flags.DEFINE_enum("features", "ngrams", list(KINDS), "What of a prompt is looked at.")
    CONFIG = config_flags.DEFINE_config_file("config", None, "Whose model reads the prompts: states, first_steps.")
    WORKDIR = commands.define_path("workdir", "A run of that config, whose value tokens are looked at.")
    SETS = commands.define_path("sets", "The file of the sets.")
    FOLDER = commands.define_path("folder", "The folder that their files lie in.")
    OUT = commands.define_path("out", "The safetensors file to write. Default: the run's.")
    PRINCIPLES_FILE = commands.define_path("principles_file", "A principles.toml of your own.")
    PENALTY = flags.DEFINE_float("penalty", None, "Of the weights' squares. Default: the features' own.", lower_bound=0)
    flags.mark_flags_as_required(["sets", "folder"])
    commands.run(main, flags_parser=commands.parse)
