"""Which settings of each method are best, of comparisons that differ in settings.

    python -m data_tools.rank_trials runs/compare_tuned_trial_*

Each folder is a comparison's workdir (configs/compare_tuned.py). Of each method and folder there is a line, the best
first: what of its config differs between the folders, and the error by which it is ranked. That is a mean over the
method's values of D1 of a bias or R of a harm, plus over-refusal, plus the share of images that are not recognised,
each a mean over splits. 0 is perfect.
"""

import json
import pathlib

import numpy as np
from absl import app

from livo_jax import commands
from livo_jax.evaluation import metrics
from livo_jax.files.settings import flatten

FILES = ("config", "results")  # of a comparison, in WORKDIR/eval
TERMS = {"D1": "effect", "R": "effect", "over_refusal": "over_refusal", "recognised": "unrecognised"}


def errors(rows: list[dict], methods) -> dict[str, dict[str, float]]:
    """How far each of `methods` is from perfect, by the rows of a results.json.

    Returns:
        {method: {"effect", "over_refusal", "unrecognised", "error"}}, means, 0 to 1, over the values that have all
        three: those of several values, or of a keep probability, are left out. "error" is the sum.

    Raises:
        ValueError: no value of a method has all three.
    """
    means = {}  # {(method, value): {term: [of each split]}}
    for row in rows:
        if row["metric"] in TERMS:
            mean = 1 - row["mean"] if row["metric"] == "recognised" else row["mean"]
            of_value = means.setdefault((row["method"], row["value"]), {})
            of_value.setdefault(TERMS[row["metric"]], []).append(mean)
    found = {}
    for method in methods:
        whole = [x for (of, _), x in means.items() if of == method and x.keys() == {*TERMS.values()}]
        if not whole:
            raise ValueError(f"{method}: no value has D1 or R, over_refusal and recognised")
        terms = {name: float(np.mean([np.mean(of_value[name]) for of_value in whole])) for name in whole[0]}
        found[method] = terms | {"error": sum(terms.values())}
    return found


def rank(folders: list) -> list[dict]:
    """The methods of comparisons, as each measured them.

    Returns:
        Rows of {"method", "folder", "settings", "effect", "over_refusal", "unrecognised", "error"}, by method and
        error; settings: {field: value} of what differs between the folders.

    Raises:
        FileNotFoundError: a folder has no eval/results.json or no eval/config.json.
        ValueError: the comparisons are of other methods; and as metrics.rows_of and `errors`.
    """
    configs, found = {}, {}
    for folder in folders:
        config, results = (
            json.loads((pathlib.Path(folder) / "eval" / f"{of}.json").read_text(encoding="utf-8")) for of in FILES
        )
        configs[folder] = {method: flatten(own) for method, own in config["methods"].items()}
        found[folder] = errors(metrics.rows_of(results, folder), configs[folder])
    if len({frozenset(of_folder) for of_folder in configs.values()}) > 1:
        raise ValueError(f"comparisons of other methods cannot be ranked: {', '.join(map(str, folders))}")
    rows = []
    for folder, of_folder in found.items():
        for method, terms in of_folder.items():
            each = [of[method] for of in configs.values()]
            own = configs[folder][method]
            settings = {field: x for field, x in own.items() if any(other.get(field) != x for other in each)}
            rows.append({"method": method, "folder": folder, "settings": settings, **terms})
    return sorted(rows, key=lambda row: (row["method"], row["error"]))


def main(args):
    if not args[1:]:
        raise app.UsageError("name the workdirs of the comparisons")
    rows = rank(args[1:])
    print("| method | workdir | settings | D1 or R | over-refusal | unrecognised | error |", "|---" * 7 + "|", sep="\n")
    for row in rows:
        settings = ", ".join(f"{field}={x}" for field, x in row["settings"].items())
        terms = " | ".join(f"{row[name]:.3f}" for name in ("effect", "over_refusal", "unrecognised", "error"))
        print(f"| {row['method']} | {row['folder']} | {settings} | {terms} |")


if __name__ == "__main__":
    commands.run(main)
