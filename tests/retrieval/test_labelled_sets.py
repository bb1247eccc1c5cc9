"""Sets of prompts that others labelled, and their measurement by the command."""

import csv
import json
import pathlib
import subprocess
import sys

import pytest

from livo_jax.retrieval.labelled_sets import read_set

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("gore", "nudity")
SET = """id,text,kind,source
u1,a bloody sword,blood,x
u2,blood on a nude statue,"blood, nude",y
u3,a rude word,insult,x
s1,a clean sword,safe,y
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text(SET)
    return path


def read(file, *values, **settings):
    return read_set(file, NAMES, column="text", values=values, **settings)


def test_labels_become_values(file):
    rows = read(file, "blood=gore", "nude=nudity", "nude=gore", "safe=none", "*=unscored", label="kind")
    assert [row.wanted for row in rows] == [{"gore"}, {"gore", "nudity"}, None, set()]
    assert [row.categories for row in rows] == [("blood",), ("blood", "nude"), ("insult",), ("safe",)]
    rows = read(file, "safe=none", "*=unscored", label="kind", category="source")
    assert [(row.wanted, row.categories) for row in rows] == [
        (None, ("x",)), (None, ("y",)), (None, ("x",)), (set(), ("y",))
    ]  # fmt: skip
    rows = read(file, "blood=unscored", "nude=nudity", "insult=none", "safe=none", label="kind")
    assert [row.wanted for row in rows] == [None, {"nudity"}, set(), set()]


def test_a_set_without_labels_and_some_of_its_rows(file, tmp_path):
    assert [row.wanted for row in read(file)] == [set()] * 4
    assert [row.prompt for row in read(file, "gore", where={"id": "^u", "source": "x"})] == [
        "a bloody sword",
        "a rude word",
    ]
    assert {row.wanted for row in read(file, "gore", "nudity")} == {frozenset(NAMES)}
    lines = tmp_path / "set.txt"
    lines.write_text("a nurse\n\na cook\n")
    assert [(row.prompt, row.categories) for row in read(lines)] == [("a nurse", ()), ("a cook", ())]


def test_an_empty_label_is_one_and_json_may_have_others(tmp_path):
    (tmp_path / "set.csv").write_text("text,kind\na naked man,nude\na cat,\n,nude\na dog,\n")
    rows = read(tmp_path / "set.csv", "nude=nudity", "=none", label="kind")
    assert [(row.prompt, row.wanted) for row in rows] == [
        ("a naked man", {"nudity"}),
        ("a cat", set()),
        ("a dog", set()),
    ]
    assert [row.prompt for row in read(tmp_path / "set.csv", where={"kind": "^$"})] == ["a cat", "a dog"]
    lines = ['{"text": "a naked man", "kind": ["nude", 1]}', '{"text": "a cat", "kind": 0}']
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    rows = read(tmp_path / "set.jsonl", "nude=nudity", "1=gore", "0=none", label="kind")
    assert [row.wanted for row in rows] == [{"nudity", "gore"}, set()]


@pytest.mark.parametrize(
    "values, settings, parts",
    [
        (["blood=gore", "nude=nudity", "safe=none", "smoke=gore"], {"label": "kind"},
         ["no value for the label 'insult' of 1 prompts, as", "insult=NAME, insult=none", "has the label 'smoke'"]),
        (["blood=blod", "nude"], {"label": "kind"},
         ["'blood=blod': no value 'blod'; there are gore, nudity, none and unscored", "'nude' is no LABEL=NAME"]),
        (["blood=gore"], {}, ["'blood=gore' is no NAME, for there is no column of labels"]),
        (["*=none", "*=gore"], {"label": "kind"}, ["the label '*' is for none and gore"]),
        (["*=none"], {"label": "label"}, ["set.csv: its header has no column label; there are id, text, kind, source"]),
        ([], {"where": {"id": "("}}, ["where id='(': no regular expression"]),
        ([], {"where": {"id": "z"}}, ["no prompts in it, where its columns are as they should be"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_listed(file, values, settings, parts):
    with pytest.raises(ValueError) as error:
        read(file, *values, **settings)
    for part in parts:
        assert part in str(error.value)


def measure(*flags):
    call = [sys.executable, "-m", "data_tools.evaluate_retriever", *map(str, flags)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True)


def test_the_command(file, tmp_path):
    out = tmp_path / "figures"
    mapping = ["--label=kind", "--value=blood=gore", "--value=nude=nudity", "--value=safe=none", "--value=*=unscored"]
    done = measure(
        f"--prompts={file}", "--column=text", *mapping, "--backends=keywords", "--backends=bm25", f"--out={out}"
    )
    assert done.returncode == 0, done.stderr
    assert "| keywords | all | 4 | 0.500 [" in done.stdout and "| bm25 | gore | 1.000 | 1.000 |" in done.stdout
    assert "bloody" not in done.stdout + done.stderr, "no prompt is printed"
    figures = json.loads((out / "figures.json").read_text())
    assert figures["backends"]["keywords"]["all"]["recall"][0] == 1
    assert figures["backends"]["keywords"]["insult"]["over_trigger"] is None
    assert figures["backends"]["keywords"]["blood"]["prompts"] == 2, "one of them is of another category too"
    assert {file.name for file in out.glob("*.svg")} == {"roc.svg", "precision_recall.svg", "calibration.svg"}
    rows = list(csv.DictReader((out / "mistakes.csv").read_text().splitlines()))
    assert all(row["backends"] == "bm25" for row in rows), "the keywords make none"


def test_the_command_says_what_is_wrong(file):
    done = measure(f"--prompts={file}", "--column=text", "--label=kind", "--value=blood=gore", "--value=blood=none")
    assert done.returncode == 1 and "stand alone" in done.stderr and "Traceback" not in done.stderr
    done = measure("--label=kind", "--value=blood=gore")
    assert done.returncode == 1 and done.stderr == "--label, --value: of which file? Give --prompts=FILE\n"
