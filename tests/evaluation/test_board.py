"""The board's tables, and the files that they become."""

import csv
import io

import numpy as np
import pytest

from livo_jax.evaluation import board, metrics

EVIL = "a_b & 5% <script>|\\x|"


def rows():
    row = dict(value="v", split="held_out", metric="R", judge="one", ci95=[0.25, 0.75], prompts=4, images=40)
    found = [row | dict(method="base", mean=0.5), row | dict(method=EVIL, mean=0.25, p_holm=0.01)]
    found.append(row | dict(method="base", metric="R at 0.45", judge="two", mean=0.125, ci95=None))
    found += [row | dict(method="base", metric=metric, mean=1.0) for metric in ("S", "stated count", "FID")]
    costs = dict(method=EVIL, trained_parameters=12345, training_seconds=6.4, images_per_second=70.0, of_base=0.9)
    return found + board.rows_of_costs([costs])


def test_a_table_is_of_a_section_a_value_and_a_judge():
    """In the order of the sections; S is none of the board's, and a method without numbers there has no line."""
    found = board.tables(rows())
    assert [table.title for table in found] == [
        "Harm, v, read by one", "Harm, v, read by two", "Counts, attributes and relations, v, read by one",
        "Quality, v, read by one", "Cost",
    ]  # fmt: skip
    assert found[0].columns == [("held_out", "R")] and [*found[0].lines] == ["base", EVIL]
    assert [*found[1].lines] == ["base"] and [board.heading(*column) for column in found[2].columns] == [
        "held out: count"
    ]
    (cells,) = found[-1].lines.values()
    assert [board.text(cell)[0] for cell in cells] == ["12,345", "6", "70.00", "0.900"]
    assert [table["title"] for table in board.for_page(found)] == [table.title for table in found[:-1]]


def test_the_share_that_can_be_read_stands_beside_what_is_read_and_r_says_from_what_it_counts():
    """So that D1 1 of faces that nobody could read is not taken for a result."""
    row = dict(split="seen", judge="one", ci95=None, prompts=1, images=4, method="base", mean=0.25)
    found = [row | dict(value=value, metric=metric) for value, metric in (
        ("harm", "R"), ("harm", "readable"), ("bias", "D1"), ("bias", "readable"), ("a + b", "readable"),
    )]  # fmt: skip
    harm, bias = board.tables(found, {("one", "harm"): 0.5, ("one", "bias"): 1.0})
    assert harm.title == "Harm, harm, read by one, R from 0.5" and bias.title == "Bias, bias, read by one"
    assert harm.columns == [("seen", "R"), ("seen", "readable")] and bias.columns[1] == ("seen", "readable")
    lines = list(csv.DictReader(io.StringIO(board.as_rows([harm, bias]))))
    assert [(line["metric"], line["harmful_from"], line["better"]) for line in lines] == [
        ("R", "0.5", "lower"), ("readable", "", "higher"), ("D1", "", "lower"), ("readable", "", "higher"),
    ]  # fmt: skip


def test_a_sets_categories_count_alike_as_genevals_tasks_do():
    """Its authors' summary: the share of correct images of each task, and of these the mean, however many prompts."""
    rng, trainings = np.random.default_rng(0), 2
    right = {f"geneval: {task}": rng.random((prompts, 4)) < rate for task, prompts, rate in (
        ("single_object", 12, 0.95), ("counting", 4, 0.3), ("position", 7, 0.05),
    )}  # fmt: skip
    numbers = {}
    for split, of_task in right.items():
        shares = [metrics.Measured(float(share), 4) for share in of_task.mean(1)]
        numbers["base", "v", split, "stated objects"] = {f"{split} {k}": x for k, x in enumerate(shares)}
        numbers["base", "v", "geneval", "stated objects"] = {"whole": shares[0]}
        numbers["base", "v", split, "R"] = {"a": shares[0]}
    numbers["base", "v", "overt: one", "stated objects"] = {"alone": shares[0]}
    (row,) = board.rows_over_categories(numbers)
    assert (row["split"], row["metric"]) == ("geneval", "stated objects, mean of categories")
    assert row["mean"] == pytest.approx(np.mean([of_task.mean() for of_task in right.values()]))
    assert (row["prompts"], row["images"]) == (23, 92) and "p_value" not in row
    of_tasks = [r for r in metrics.rows(numbers) if r["split"] in right and r["metric"] == "stated objects"]
    for end, width in zip((0, 1), np.abs(np.array(row["ci95"]) - row["mean"])):
        widths = [r["ci95"][end] - r["mean"] for r in of_tasks]
        assert width == pytest.approx(np.sqrt(np.sum(np.square(widths))) / 3) and width < np.abs(widths).max()
    assert board.section_of(row["metric"]) == "Counts, attributes and relations"
    assert board.heading("geneval", row["metric"]) == "geneval: objects, mean of categories"
    several = {what: {
        prompt: x._replace(images=8, trainings=(x.number, x.number / trainings)) for prompt, x in of_prompts.items()
    } for what, of_prompts in numbers.items()}  # fmt: skip
    (wider,) = board.rows_over_categories(several)
    assert np.ptp(wider["ci95"]) > np.ptp(row["ci95"]) and 0 <= wider["ci95"][0] < row["mean"] < wider["ci95"][1] <= 1


def test_files_of_a_board_have_its_numbers_and_nothing_of_a_name_is_markup():
    found = board.tables(rows())
    lines = list(csv.DictReader(io.StringIO(board.as_rows(found))))
    assert [(line["section"], line["judge"], line["better"], line["mean"]) for line in lines[:3]] == [
        ("Harm", "one", "lower", "0.5"), ("Harm", "one", "lower", "0.25"), ("Harm", "two", "lower", "0.125"),
    ]  # fmt: skip
    assert lines[1]["method"] == EVIL and (lines[1]["ci95_low"], lines[2]["ci95_low"]) == ("0.25", "")

    text = board.as_markdown(found, "t", {"model": "x"})
    assert "|a\\_b &amp; 5% &lt;script&gt;\\|\\\\x\\||0.250\\* \\[0.250, 0.750\\]|" in text and '"model": "x"' in text
    latex = board.as_latex(found)
    assert (
        r"a\_b \& 5\% \textless{}script\textgreater{}|\textbackslash{}x| & 0.250* {\scriptsize [0.250, 0.750]} \\"
        in latex
    )
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == len(found)
