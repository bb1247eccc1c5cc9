"""The board: a comparison's numbers as tables of methods, and those as CSV, Markdown and LaTeX."""

import json
import types
from typing import NamedTuple

import numpy as np

from livo_jax.evaluation.metrics import LOWER_IS_BETTER, means_of_trainings
from livo_jax.evaluation.objects import STATED
from livo_jax.evaluation.report import as_csv
from livo_jax.evaluation.uncertainty import confidence, over_trainings

SECTIONS = {  # of the board, in its order: the metrics that it has
    "Harm": ("R", "readable"),
    "Over-refusal": ("over_refusal",),
    "Bias": ("D1", "readable"),
    "Counts, attributes and relations": (STATED,),
    "Quality": ("recognised", "CLIPScore", "FID", "KID"),
    "Cost": ("trained_parameters", "training_seconds", "images_per_second", "of_base"),
}
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "\n": " ", "\r": " ",
})  # fmt: skip
MARKDOWN = str.maketrans({
    "<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ", "\r": " ", **{c: f"\\{c}" for c in "\\|`*_[]#~"}
})  # fmt: skip


class Table(NamedTuple):
    """Numbers of one section, value and judge.

    value, judge: "" where the section has none. columns: (split, metric). lines: by method a row as metrics.rows makes
    them for each column, or None. harmful_from: the least score that R counts; None where that is told nowhere.
    """

    section: str
    value: str
    judge: str
    columns: list[tuple[str, str]]
    lines: dict[str, list[dict | None]]
    harmful_from: float | None = None

    @property
    def title(self) -> str:
        judge = f"read by {self.judge}" if self.judge else ""
        least = "" if self.harmful_from is None else f"R from {self.harmful_from:g}"
        return ", ".join(part for part in (self.section, self.value, judge, least) if part)


def section_of(metric: str, beside=()) -> str | None:
    """The section that has a metric, "R at 0.45" as R; None of those that the board leaves out.

    Of `readable` it is the one that has another of `beside`, the metrics of the same value and judge.
    """
    name = STATED if metric.startswith(STATED) else metric.partition(" at ")[0]
    if name == "readable":
        return next((section for section, (first, *rest) in SECTIONS.items() if name in rest and first in beside), None)
    return next((section for section, metrics in SECTIONS.items() if name in metrics), None)


def rows_of_costs(costs: list[dict]) -> list[dict]:
    """The costs of each method as rows, one for each of them."""
    return [
        dict(method=of["method"], value="", split="", judge="", metric=metric, mean=of[metric], ci95=None)
        for of in costs
        for metric in SECTIONS["Cost"]
    ]


def rows_over_categories(numbers: dict) -> list[dict]:
    """The mean over a set's categories, each counting alike, of what its prompts state: GenEval's overall score.

    Each category has prompts of its own, so the half-widths of their intervals add in quadrature, as in over_trainings.
    There is no p-value: the set and its categories have theirs.

    Args:
        numbers: as metrics.rows takes them.
    """
    of_sets, found = {}, []
    for (method, value, split, metric), of_prompts in numbers.items():
        name, of_category, _ = split.partition(": ")
        if of_category and metric.startswith(STATED):
            of_sets.setdefault((method, value, name, f"{metric}, mean of categories"), []).append(of_prompts)
    for place, categories in of_sets.items():
        if len(categories) < 2:
            continue
        every = [[*of_prompts.values()] for of_prompts in categories]
        shares = [confidence([x.number for x in of], trials=[x.trials(1) for x in of]) for of in every]
        means, ends = (np.array(x) for x in zip(*shares))  # [categories], [categories, 2]
        mean, halves = float(means.mean()), np.linalg.norm(ends - means[:, None], axis=0) / len(means)
        ci95, trainings = [mean - halves[0], mean + halves[1]], np.mean([*map(means_of_trainings, categories)], axis=0)
        if len(trainings) > 1:
            ci95 = over_trainings(mean, ci95, trainings)
        row = dict(zip(("method", "value", "split", "metric"), place), mean=mean, ci95=np.clip(ci95, 0, 1).tolist())
        found.append(row | dict(prompts=sum(map(len, every)), images=sum(x.images for of in every for x in of)))
    return found


def tables(rows: list[dict], least=types.MappingProxyType({})) -> list[Table]:
    """The tables of rows as metrics.rows makes them, each with the name of its `judge`; "" where none read it.

    least: by judge and value, the least score that R counts.
    """
    cells, methods, beside = {}, dict.fromkeys(row["method"] for row in rows), {}
    for row in rows:
        beside.setdefault((row["value"], row["judge"]), set()).add(row["metric"])
    for row in rows:
        if section := section_of(row["metric"], beside[row["value"], row["judge"]]):
            table = cells.setdefault((section, row["value"], row["judge"]), {})
            table.setdefault((row["split"], row["metric"]), {})[row["method"]] = row
    found = []
    for place in sorted(cells, key=lambda place: [*SECTIONS].index(place[0])):  # stable
        columns = cells[place]
        shown = [method for method in methods if any(method in column for column in columns.values())]
        lines = {method: [column.get(method) for column in columns.values()] for method in shown}
        section, value, judge = place
        found.append(Table(*place, [*columns], lines, least.get((judge, value)) if section == "Harm" else None))
    return found


def heading(split: str, metric: str) -> str:
    """Of a column."""
    name = metric.removeprefix(STATED).replace("_", " ")
    return f"{split.replace('_', ' ')}: {name}" if split else name


def number(metric: str, mean: float) -> str:
    if metric in ("trained_parameters", "training_seconds"):
        return f"{mean:,.0f}"
    return f"{mean:.2f}" if abs(mean) >= 10 else f"{mean:.3f}"


def text(row: dict | None) -> tuple[str, str]:
    """The number of a cell, with a star where it differs from the base's, p_holm below 0.05; and its interval."""
    if row is None:
        return "", ""
    star = "*" if row.get("p_holm", 1) < 0.05 else ""
    interval = "[{}, {}]".format(*(number(row["metric"], x) for x in row["ci95"])) if row["ci95"] else ""
    return number(row["metric"], row["mean"]) + star, interval


def for_page(found: list[Table]) -> list[dict]:
    """The tables as report.html shows them, but those of costs, which it has anyway."""
    shown = []
    for table in found:
        lines = [(method, [text(row) for row in cells]) for method, cells in table.lines.items()]
        header = [heading(*column) for column in table.columns]
        shown.append(dict(section=table.section, title=table.title, header=header, lines=lines))
    return [table for table in shown if table["section"] != "Cost"]


def as_rows(found: list[Table]) -> str:
    """CSV, a line for each number."""
    lines = []
    for table in found:
        for method, cells in table.lines.items():
            for (split, metric), row in zip(table.columns, cells):
                if row is None:
                    continue
                low, high = row["ci95"] or (None, None)
                place = dict(section=table.section, judge=table.judge, value=table.value, split=split, metric=metric)
                place["better"] = "lower" if metric.partition(" at ")[0] in LOWER_IS_BETTER else "higher"
                told = {name: row.get(name) for name in ("floor", "p_holm", "prompts", "images")}
                told["harmful_from"] = table.harmful_from if metric == "R" else None
                lines.append(place | dict(method=method, mean=row["mean"], ci95_low=low, ci95_high=high) | told)
    return as_csv(lines)


def as_markdown(found: list[Table], title: str, card: dict) -> str:
    parts = [f"# {title.translate(MARKDOWN)}"]
    for table in found:
        header = ["method", *(heading(*column) for column in table.columns)]
        lines = [
            "|" + "|".join(cell.translate(MARKDOWN) for cell in header) + "|",
            "|---" + "|---:" * len(table.columns) + "|",
        ]
        for method, cells in table.lines.items():
            shown = [" ".join(text(row)).strip() for row in cells]
            lines.append("|" + "|".join(cell.translate(MARKDOWN) for cell in (method, *shown)) + "|")
        parts += [f"## {table.title.translate(MARKDOWN)}", "\n".join(lines)]
    parts.append("\\*: it differs from the base's, p below 0.05 after Holm's correction. In brackets the 95% interval.")
    parts += ["## Card", "~~~~json\n" + json.dumps(card, indent=2) + "\n~~~~"]
    return "\n\n".join(parts) + "\n"


def as_latex(found: list[Table]) -> str:
    r"""Tables for \usepackage{booktabs}, each to be put where you want it."""
    parts = []
    for table in found:
        header = ["method", *(heading(*column) for column in table.columns)]
        lines = [" & ".join(cell.translate(LATEX) for cell in header) + r" \\", r"\midrule"]
        for method, cells in table.lines.items():
            shown = [method.translate(LATEX)]
            for row in cells:
                mean, interval = (part.translate(LATEX) for part in text(row))
                shown.append(rf"{mean} {{\scriptsize {interval}}}" if interval else mean)
            lines.append(" & ".join(shown) + r" \\")
        parts += [
            r"\begin{table}", rf"\caption{{{table.title.translate(LATEX)}}}",
            rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule", *lines, r"\bottomrule",
            r"\end{tabular}", r"\end{table}", "",
        ]  # fmt: skip
    return "\n".join(parts)
