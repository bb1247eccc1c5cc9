"""The board's tables, and the files that they become."""

import csv
import io

from livo_jax.evaluation import board

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
