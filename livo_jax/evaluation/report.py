"""eval/report.html: one self-contained page."""

import csv
import io
import json
import pathlib
import types

import numpy as np

from livo_jax.evaluation import charts
from livo_jax.evaluation.cases import AUTO, PLAIN
from livo_jax.evaluation.metrics import LOWER_IS_BETTER, document
from livo_jax.files.images import data_uri, png_uri, sheet

TEMPLATE = pathlib.Path(__file__).with_name("report.html.j2")

# Others are called as they are.
LABELS = {"base": "base model", "livo": "LiVO", PLAIN: "the value alone, as it is", AUTO: "where it is found"}

EFFECTS = {"D1": "imbalance", "R": "share of harmful images"}  # what a value is to lower

TOLD = (*EFFECTS, "recognised", "readable")  # differences that the page has

WORST = (  # of the values, what a plot of settings shows beside their effects
    ("subjects recognised, the lowest", "recognised", min),
    ("over-refusal, the highest", "over_refusal", max),
)

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what begins so a spreadsheet may take for a formula


def table(results: list[dict]) -> str:
    """The results as text: a line for each value, split and metric, a column for each method; below a bias's its floor.

    A star is beside a mean that differs from the base's, p_holm below 0.05.
    """
    cells = {(r["value"], r["split"], r["metric"], r["method"]): r for r in results}
    columns = list(dict.fromkeys(method for *_, method in cells))
    width, of_split = (max(len(what[i]) for what in cells) + 2 for i in (0, 1))

    def line(value, split, metric, shown):
        return f"{value:{width}}{split:{of_split}}{metric:23}" + "".join(f"{cell:>25}" for cell in shown)

    def mean(r):
        interval = "[{:.3f}, {:.3f}]".format(*r["ci95"]) if r["ci95"] else "[no interval]"
        return f"{r['mean']:.3f}{'*' if r.get('p_holm', 1) < 0.05 else ''} {interval}"

    lines = [line("value", "split", "metric", columns)]
    for value, split, metric in dict.fromkeys(what[:-1] for what in cells):
        found = [cells.get((value, split, metric, column)) for column in columns]
        lines.append(line(value, split, metric, [mean(r) if r else "" for r in found]))
        if any("floor" in r for r in found if r):
            floors = [f"{r['floor']:.3f}" if r and "floor" in r else "" for r in found]
            lines.append(line(value, split, f"{metric} by chance", floors))
    return "\n".join(lines)


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def as_csv(rows: list[dict]) -> str:
    """Rows as CSV with a header; where a row lacks a column, or has None or nan, its cell is empty.

    A text that a spreadsheet would take for a formula gets an apostrophe before it, as these write it themselves.
    """

    def cell(x):
        if isinstance(x, str) and x.startswith(FORMULA):
            return f"'{x}"
        return "" if isinstance(x, float) and np.isnan(x) else x

    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(x) for name, x in row.items()} for row in rows)
    return stream.getvalue()


def _csv(results: list[dict]) -> bytes:
    """The rows of results.json, a column for each end of the interval."""
    rows = []
    for r in results:
        low, high = r["ci95"] or (None, None)
        rows.append({k: v for k, v in r.items() if k != "ci95"} | {"ci95_low": low, "ci95_high": high})
    return as_csv(rows).encode()


def _of_prompts(numbers: dict) -> list[dict]:
    names = ("method", "value", "split", "metric", "prompt", "number", "images", "floor", "trainings")
    rows = ((*what, prompt, *measured) for what, of in numbers.items() for prompt, measured in of.items())
    return [dict(zip(names, row)) for row in rows]


def _headline(value: str, metric: str, split: str, cells: dict, methods: list[str]) -> str:
    """What happened to a value's metric on a split, in words; `cells`: (value, split, metric) -> {method: row}."""
    effect, known = cells[value, split, metric], cells.get((value, split, "recognised"), {})
    readable = cells.get((value, split, "readable"), {})
    number = {m: f"{r['mean']:.0%}" if metric == "R" else f"{r['mean']:.2f}" for m, r in effect.items()}
    shown = [m for m in methods if m in effect and m != PLAIN]
    text = f"{EFFECTS[metric]} {number[shown[0]]} in images of the {_label(shown[0])}"
    for m in shown[1:] if len(shown) < 4 else [m for m in shown if m == "livo"]:
        text += f", {number[m]} with {_label(m)}"
        text += f", whose subjects are recognised in {known[m]['mean']:.1%}" if m in known else ""
        text += f" ({1 - readable[m]['mean']:.1%} cannot be read)" if m in readable and readable[m]["mean"] < 1 else ""
    if len(shown) > 3:
        best = min(shown, key=lambda m: effect[m]["mean"])
        text += f"; the lowest is {_label(best)}'s, {number[best]}"
        text += f" at {known[best]['mean']:.1%} recognised" if best in known else ""
    return text + "."


def _cost(value: str, cells: dict, methods: list[str]) -> str:
    """What a value costs in words, each method on the split where it costs the most; "" where that is not measured.

    Arguments as `_headline`.
    """
    of_splits = [of for (v, _, metric), of in cells.items() if (v, metric) == (value, "over_refusal")]
    most = {m: max(of[m]["mean"] for of in of_splits) for m in methods if of_splits and m in of_splits[0]}
    others = [m for m in most if m not in ("base", PLAIN)]
    if not others:
        return ""
    told = [f"{most[m]:.1%} with {_label(m)}" for m in others if len(others) < 3 or m == "livo"]
    if len(others) > 2:
        for which, pick in (("lowest", min), ("highest", max)):
            m = pick(others, key=most.get)
            told.append(f"the {which} {most[m]:.1%} with {_label(m)}")
    text = f"images that it should leave alone and changes, on the worst set of prompts: {', '.join(told)}"
    return text + (f" ({most['base']:.1%} of the base model's own cannot be read)." if "base" in most else ".")


def _sweeps(results: list[dict], values: list[str], sweeps) -> dict[str, bytes]:
    """A plot of each sweep, as `write` has them, on one split of each value: effects, and the worst of WORST."""
    cells = {(r["method"], r["value"], r["metric"]): r for r in _held_out_last(results)}
    plots, base = {}, results[0]["method"] if results else None
    for title, points in sweeps if values else ():
        settings = [("", base, ""), *points]
        lines = {
            f"{value}: {metric}": [cells.get((method, value + suffix, metric)) for _, method, suffix in settings]
            for value in values
            for metric in EFFECTS
        }
        for label, metric, worst in WORST:
            lines[label] = []
            for _, method, suffix in settings:
                rows = [cells[key] for value in values if (key := (method, value + suffix, metric)) in cells]
                lines[label].append(worst(rows, key=lambda r: r["mean"], default=None))
        of_base = {name: row["mean"] for name, (row, *_) in lines.items() if row}
        lines = {name: rows for name, (row, *rows) in lines.items() if row and any(rows)}
        if lines:
            plots[title] = charts.sweep(title, [label for label, *_ in points], lines, of_base)
    return plots


def _held_out_last(results: list[dict]) -> list[dict]:
    """Rows in their order, but for those of held-out prompts, which a plot of one split shows where there are any."""
    return sorted(results, key=lambda r: r["split"] == "held_out")


def _plots(results: list[dict], values: list[str], curves, metrics: list[dict], sweeps) -> dict:
    """{heading: {what it shows: SVG}}."""
    labels = {m: _label(m) for m in dict.fromkeys(r["method"] for r in results if r["value"] in values)}
    splits = {s: s.replace("_", " ") for s in dict.fromkeys(r["split"] for r in results if r["metric"] in EFFECTS)}
    plots = {"Ablations": _sweeps(results, values, sweeps), "Effect": {}, "Quality against effect": {}}
    plots |= {"Convergence": {}, "Training": charts.training(metrics)}
    for value, metric in ((v, m) for v in values for m in EFFECTS):
        of_value = [r for r in results if r["value"] == value]
        if not (rows := [r for r in of_value if r["metric"] == metric]):
            continue
        title, last = f"{value}\n{EFFECTS[metric]}, {metric}", _held_out_last(rows)[-1]["split"]
        shown = {split: splits[split] for split in dict.fromkeys(r["split"] for r in rows)}
        plots["Effect"][title] = charts.effects(title, rows, labels, shown)
        on_last = {(r["method"], r["metric"]): r["mean"] for r in of_value if r["split"] == last}
        points = {m: (on_last[m, metric], on_last[m, "recognised"]) for m in labels if (m, "recognised") in on_last}
        if len(points) > 2:
            axes = f"{metric}, {splits[last]}", "subjects recognised"
            plots["Quality against effect"][title] = charts.tradeoff(title, points, labels, *axes)
        for split in dict.fromkeys(r["split"] for r in curves if (r["value"], r["metric"]) == (value, metric)):
            line = [r for r in curves if (r["value"], r["metric"], r["split"]) == (value, metric, split)]
            title = f"{value}\n{EFFECTS[metric]}, {metric}, {splits[split]}"
            for against, unit in {"step": "steps", "seconds": "seconds of training"}.items():
                svg = charts.convergence(title, line, labels, against, unit)
                plots["Convergence"][f"{title}, against {unit}"] = svg
    return {heading: shown for heading, shown in plots.items() if shown}


def _of_attacks(rows) -> dict:
    """{value: {"splits": names, "lines": [(method, cells)]}}: the effect by split, what is recognised, over-refusal."""
    found = {}
    for value in dict.fromkeys(r["value"] for r in rows):
        cells = {(r["method"], r["split"], r["metric"]): r for r in rows if r["value"] == value}
        effect = next(metric for *_, metric in cells if metric in EFFECTS)
        splits = dict.fromkeys(split for _, split, metric in cells if metric == effect)
        harmless = [split for _, split, metric in cells if metric == "over_refusal"]
        lines = []
        for method in dict.fromkeys(method for method, *_ in cells):
            of_splits = [cells.get((method, split, effect)) for split in splits]
            known = [row for split in splits if (row := cells.get((method, split, "recognised")))]
            changed = [row for split in harmless if (row := cells.get((method, split, "over_refusal")))]
            least = min(known, key=lambda row: row["mean"], default=None)
            most = max(changed, key=lambda row: row["mean"], default=None)
            lines.append((method, [*of_splits, least, most]))
        found[value] = {"splits": [*splits], "lines": lines}
    return found


def _row_uri(images: list[np.ndarray]) -> str:
    return png_uri(sheet([images], max(1, 64 // images[0].shape[0])))


def write(
    path,
    *,
    title: str,
    results: list[dict],
    metrics: list[dict],
    pictures: list[dict],
    config: dict,
    numbers: dict = types.MappingProxyType({}),
    differences=(),
    curves=(),
    costs=(),
    sweeps=(),
    judges=(),
    board=None,
    attacks=(),
):
    """Writes the page. It escapes all that it shows, runs no script, and fetches nothing.

    Args:
        results: the rows of results.json; the first method is the base. metrics: the lines of metrics.jsonl.
        pictures: dicts of value, split, prompt, harmful, sides {method: list of [H, W, 3] uint8}, and applied, which of
            these have the value {method: numbers from 1}. Those of harmful prompts are blurred until asked for.
        config: shown at the end.
        numbers: of each prompt, as metrics.rows takes them. differences: the rows of metrics.differences,
            of any schema.
        curves: of trainings, rows of method, step, seconds, value, split, metric, mean.
        costs: rows of method, trained_parameters, training_seconds, images_per_second, of_base.
        sweeps: (title, points) of settings, whose points are (label, method, what follows a value's statement in its
            rows).
        judges: what is pinned of the judges.
        board: what evaluation/board.py's for_page makes of its `tables`; the rows of `agreement`, the `card`, the
            `files` to download, {name: content}, and `further`, the names of judges beside the first.
        attacks: the rows of attacks.json.
    """
    import jinja2

    cells, methods = {}, list(dict.fromkeys(r["method"] for r in results))
    for r in results:
        cells.setdefault((r["value"], r["split"], r["metric"]), {})[r["method"]] = r
    rows = [
        dict(value=v, split=s, metric=m, cells=[of.get(name) for name in methods]) for (v, s, m), of in cells.items()
    ]
    values = list(dict.fromkeys(p["value"] for p in pictures))
    headlines = {}
    for value, split, metric in cells:
        if metric in EFFECTS and value in values:
            text = _headline(value, metric, split, cells, methods)
            headlines.setdefault(value, []).append(f"{split.replace('_', ' ')}: {text}")
    for value, lines in headlines.items():
        if text := _cost(value, cells, methods):
            lines.append(text)
    shown = [
        p | {"sides": {side: (_row_uri(images), len(images)) for side, images in p["sides"].items() if images}}
        for p in pictures
    ]
    documents = {
        "results.json": document(results, judges),
        "differences.json": differences and document(differences, judges),
        "prompts.json": _of_prompts(numbers),
        "curves.json": list(curves),
        "costs.json": list(costs),
        "attacks.json": attacks and document(attacks, judges),
        "training.json": metrics,
        "config.json": config,
    }
    files = {"results.csv": data_uri("text/csv", _csv(results))}
    files |= {
        name: data_uri("application/json", json.dumps(content, indent=2).encode())
        for name, content in documents.items()
        if content
    }
    kinds = {"csv": "text/csv", "json": "application/json"}
    for name, content in board["files"].items() if board else ():
        files[name] = data_uri(kinds.get(name.rpartition(".")[2], "text/plain"), content.encode())
    plots = _plots(results, values, curves, metrics, sweeps)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["label"] = _label
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        methods=methods,
        lower_is_better=LOWER_IS_BETTER,
        rows=rows,
        headlines=headlines,
        images=max((r["images"] for r in results), default=0),
        trainings=max((len(r.get("trainings", ())) for r in results), default=0),
        pictures=shown,
        plots={
            heading: {name.replace("\n", ": "): data_uri("image/svg+xml", svg) for name, svg in of.items()}
            for heading, of in plots.items()
        },
        costs=costs,
        differences=[d for d in differences if d["metric"] in TOLD and d["other"] in methods[1:]],
        files=files,
        board=board,
        attacks=_of_attacks(attacks),
        card=json.dumps(board["card"], indent=2) if board else "",
        config=json.dumps(config, indent=2),
    )
    path.write_text(page, encoding="utf-8")
