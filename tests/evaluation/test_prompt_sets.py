import hashlib
import json

import pytest

from configs import livo, tiny
from livo_jax import StableDiffusion, judges, methods, sharding, values
from livo_jax.evaluation import cases, metrics, prompt_sets
from livo_jax.evaluation.prompt_sets import Prompt
from livo_jax.runs import evaluate
from livo_jax.sampling.requests import Request


def choose(name, file, *prompts, **fields):
    """A smoke config whose set `name` lies at `file`."""
    config = tiny.get_config("smoke")
    config.eval.prompts = prompts
    config.eval.prompt_sets[name].update(file=str(file), repo="", **fields)
    return config


def read(config, name, seed=0):
    return [(prompt.subject, prompt.text) for prompt, _ in prompt_sets.read(name, config.eval.prompt_sets[name], seed)]


def test_the_layout_of_the_authors(tmp_path):
    """Further fields, as those of their retriever, are left aside; each prompt is there once."""
    lines = [{"prompt": "a kind person", "value": "gender equality"}, {"prompt": " a lawyer"}, {"prompt": "a lawyer"}]
    (tmp_path / "career.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    config = choose("livo_career", tmp_path / "career.jsonl")
    assert read(config, "livo_career") == [("", "a kind person"), ("", "a lawyer")]


def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(tmp_path):
    text = '\ufeffid,prompt,n\r\n1,"A bathroom, with\r\na sink",2\r\n2,"a ""cat""",3\r\n\r\n3,Zwölf Bäume,4\r\n'
    (tmp_path / "coco.csv").write_bytes(text.encode())
    found = read(choose("own", tmp_path / "coco.csv"), "own")
    assert found == [("", "A bathroom, with\na sink"), ("", 'a "cat"'), ("", "Zwölf Bäume")]


def test_subjects_come_from_a_template_or_a_column(tmp_path):
    (tmp_path / "x.csv").write_text("profession,sentence\nengineer,an engineer at work\nbaker,two bakers\n")
    config = choose("stable_bias", tmp_path / "x.csv")
    wanted = [("engineer", "Photo portrait of an engineer"), ("baker", "Photo portrait of a baker")]
    assert read(config, "stable_bias") == wanted
    config.eval.prompt_sets.stable_bias.update(template="", column="sentence", subject="profession")
    assert read(config, "stable_bias") == [("engineer", "an engineer at work"), ("baker", "two bakers")]


def test_a_limit_chooses_by_the_seed_in_the_order_of_the_file(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(f'{{"prompt": "{n:03}"}}\n' for n in range(100)))
    config = choose("own", tmp_path / "x.jsonl", limit=20)
    first = read(config, "own")
    assert len(set(first)) == 20 and first == sorted(first) == read(config, "own") != read(config, "own", seed=1)
    config.eval.prompt_sets.own.limit = 1000
    assert len(read(config, "own")) == 100


def test_a_file_of_the_hub_comes_from_its_cache(tmp_path, monkeypatch):
    """Without a network a cached dataset will do; another is refused."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder, commit = tmp_path / "datasets--AIML-TUDA--i2p", "0" * 40
    (folder / "snapshots" / commit).mkdir(parents=True)
    rows = "prompt,categories,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\na scream,violence,5,7,512,448\n"
    (folder / "snapshots" / commit / "i2p_benchmark.csv").write_text(rows)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    config = tiny.get_config("smoke")
    config.eval.prompts = ("harm=i2p",)
    assert read(config, "i2p") == [("", "a scream")]
    config.eval.prompt_sets.i2p.repo = "nobody/absent"
    with pytest.raises(ValueError, match="no 'i2p_benchmark.csv' of the dataset 'nobody/absent'"):
        prompt_sets.check(config)


def test_all_problems_are_told_at_once_with_file_and_line(tmp_path):
    (tmp_path / "own.jsonl").write_bytes(
        b'{"prompt": "a cat"}\n{"prompt": \n["a"]\n{"prompt": "\xff"}\n{"text": "a", "n": 1}\n'
        b'{"prompt": " "}\n{"prompt": 3}'
    )
    (tmp_path / "coco.csv").write_text("caption,id\na cat,1\na dog,2\n")
    (tmp_path / "copro.csv").write_bytes(b"id,prompt\n1,a cat\n2,\n3\n4,\xe9t\xe9\n")
    (tmp_path / "wino.csv").write_text("occupation\n")
    config = choose(
        "own", tmp_path / "own.jsonl", "bias=own", "harm=livo_career", "shape=livo_bloody", "bloody=heim",
        "colour=wino_bias", "gender=own", "bias=nothing", "own", "harm=livo_nudity", "harm=i2p",
    )  # fmt: skip
    for name, file in (
        ("livo_career", "coco.csv"),
        ("livo_bloody", "copro.csv"),
        ("heim", "x.csv"),
        ("wino_bias", "wino.csv"),
    ):
        config.eval.prompt_sets[name].file = str(tmp_path / file)
    config.eval.prompt_sets.livo_nudity.file = "nudity.parquet"
    config.eval.prompt_sets.i2p.update(repo="", template="a photo")
    with pytest.raises(ValueError) as error:
        prompt_sets.check(config)
    told = str(error.value)
    for problem in (
        "own.jsonl:2: not JSON", "own.jsonl:3: not a JSON object", "own.jsonl:4: not UTF-8",
        "own.jsonl:5: no column prompt; there are text, n", "own.jsonl:7: prompt is 3",
        "coco.csv: its header has no column prompt; there are caption, id", "copro.csv:4: prompt is None",
        "copro.csv:5: not UTF-8", "x.csv is missing", "wino.csv: no prompts in it",
        "'gender=own' is no WHO=SET, WHO one of bias, harm, left_alone, shape", "'bias=nothing'", "'own' is no",
        "ends in one of .csv, .tsv, .jsonl, .txt", "i2p.template='a photo'",
    ):  # fmt: skip
        assert problem in told, problem
    assert not any(place in told for place in ("coco.csv:3", "own.jsonl:1:", "own.jsonl:6:", "copro.csv:3:"))


PUBLISHED = (  # the columns of I2P as papers on concept erasure draw it, in little
    ",prompt,categories,hard,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height\n"
    '0,"a storm, at sea","violence, shocking",0,4261553411,7,512,448\n'
    "1,,hate,0,5,7,512,512\n"
    "2,a duel,violence,1,6,12.5,512,512\n"
    '3,"a storm, at sea",hate,0,8,7,512,512\n'
)


def test_a_set_tells_how_each_prompt_is_drawn_and_its_categories(tmp_path):
    """The first of equal texts counts; each category is measured too, on the images of the whole set."""
    (tmp_path / "i2p.csv").write_text(PUBLISHED)
    config = choose("i2p_erasing", tmp_path / "i2p.csv", "harm=i2p_erasing", sha256="")
    shape, _, bloody = values.load(config.principles)
    storm = Prompt("i2p_erasing", "", "a storm, at sea", 4261553411, 7.0, (448, 512))
    duel = Prompt("i2p_erasing", "", "a duel", 6, 12.5, (512, 512))
    found = {"": [], "shocking": [], "violence": []}
    for prompt in cases.prompts(config, bloody):
        found[prompt.category].append(prompt._replace(category="", split="i2p_erasing"))
        assert prompt.split == (f"i2p_erasing: {prompt.category}" if prompt.category else "i2p_erasing")
    assert found == {"": [storm, duel], "shocking": [storm], "violence": [storm, duel]}
    assert storm.requests(2)[1] == Request(storm.text, 1, seed=4261553411, guidance_scale=7.0, size=(448, 512))
    assert len({prompt.text for _, prompt in evaluate.first_prompts(config) if prompt.seed}) == 1, "of the whole set"
    measured = cases.cases(config, (bloody,))
    requests = {request for case in measured for request in case.requests if case.method == "base"}
    assert len(requests) == 2 * config.eval.harm_images_per_prompt

    (tmp_path / "bad.csv").write_text(PUBLISHED.replace("4261553411,7", "-3,7000").replace("512,512", "512,0"))
    config.eval.prompt_sets.i2p_erasing.file = str(tmp_path / "bad.csv")
    with pytest.raises(ValueError) as error:
        prompt_sets.check(config)
    for problem in ("bad.csv:2: evaluation_seed is '-3'", "bad.csv:2: evaluation_guidance is '7000'",
                    "bad.csv:4: sd_image_height is '0'"):  # fmt: skip
        assert problem in str(error.value)
    config.eval.prompt_sets.i2p_erasing.width = ""
    with pytest.raises(ValueError, match="name both, or none"):
        prompt_sets.check(config)


def test_the_prompts_that_unlearn_diff_atk_starts_from_are_drawn_as_its_code_does(tmp_path):
    """By row but for the guidance, which it leaves aside."""
    header = "Unnamed: 0,prompt,categories,hard,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height"
    (tmp_path / "nudity.csv").write_text(f'{header}\n21,"a duel, at sea",shocking,1,932309623,7,512,448\n')
    config = choose("unlearn_diff_atk", tmp_path / "nudity.csv", "harm=unlearn_diff_atk")
    ((prompt, categories),) = prompt_sets.read("unlearn_diff_atk", config.eval.prompt_sets.unlearn_diff_atk)
    assert prompt == Prompt("unlearn_diff_atk", "", "a duel, at sea", 932309623, None, (448, 512))
    assert categories == ("shocking",)


def test_a_row_without_a_category_stays_and_a_seed_that_is_none_is_told(tmp_path):
    """Only a row without a prompt is left out."""
    lines = ["prompt,kind,seed", "a duel,violence,1", "a storm,,2", ",violence,3"]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    config = choose("own", tmp_path / "own.csv", "harm=own", category="kind", seed="seed")
    found = prompt_sets.read("own", config.eval.prompt_sets.own)
    assert [(prompt.text, prompt.seed, categories) for prompt, categories in found] == [
        ("a duel", 1, ("violence",)), ("a storm", 2, ()),
    ]  # fmt: skip
    (tmp_path / "own.csv").write_text("\n".join([*lines, "a knife,violence,", "a fight,,seven", "a fire,,1.5"]))
    with pytest.raises(ValueError) as error:
        prompt_sets.check(config)
    assert "invalid literal" not in str(error.value) and "own.csv:4" not in str(error.value)
    for line, given in (5, "''"), (6, "'seven'"), (7, "'1.5'"):
        told = f"own.csv:{line}: seed is {given}: a seed is a whole number, 0 to 9223372036854775807: fill it in or"
        assert told in str(error.value)


def test_another_file_than_the_one_of_the_checksum_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,image,category\na duel,0.jpg,Violence\n")
    config = choose("copro", tmp_path / "x.csv", "harm=copro")
    ours, theirs = hashlib.sha256((tmp_path / "x.csv").read_bytes()).hexdigest(), config.eval.prompt_sets.copro.sha256
    with pytest.raises(ValueError) as error:
        prompt_sets.check(config)
    assert all(
        told in str(error.value) for told in (ours, theirs, "github.com/Visualignment/SafetyDPO", "copro.sha256=")
    )
    config.eval.prompt_sets.copro.sha256 = ours
    prompt_sets.check(config)
    (told,) = prompt_sets.describe(config)
    assert (told["sha256"], told["prompts"], told["licence"]) == (ours, 1, "MIT")


def test_sets_of_prompts_that_every_value_should_leave_alone(tmp_path):
    """In the place of those that are made of subjects; numbers of JSON are numbers."""
    (tmp_path / "own.jsonl").write_text('{"prompt": "a red rose", "seed": 3}\n{"prompt": "a knife", "seed": 4}\n')
    config = choose("own", tmp_path / "own.jsonl", "left_alone=own", seed="seed")
    found = values.load(config.principles)
    alone = cases.left_alone(config, found)
    assert [(case.value, case.split, case.requests[0].prompt, case.requests[0].seed) for case in alone] == [
        (value, "own", *told) for value in found for told in (("a red rose", 3), ("a knife", 4))
    ]
    assert cases.prompts(config, found[0])[0].split == "seen", "what is measured is as without"


def test_a_values_own_sets_come_before_those_of_its_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a cook"}\n')
    (tmp_path / "b.csv").write_text("prompt\na duel\n")
    config = choose("own", tmp_path / "a.jsonl", "bias=own", "colour=livo_career", "colour=own")
    config.eval.prompt_sets.livo_career.file = str(tmp_path / "b.csv")
    shape, colour, bloody = values.load(config.principles)
    assert cases.prompts(config, shape) == [Prompt("own", "", "a cook")]
    assert cases.prompts(config, colour) == [Prompt("livo_career", "", "a duel"), Prompt("own", "", "a cook")]
    subjects = [prompt.subject for prompt in cases.prompts(config, bloody)]
    assert subjects == [*config.eval.seen, *config.eval.held_out], "the subjects, as without sets"
    assert livo.get_config().eval.prompts == () and livo.get_config().eval.prompt_sets.own.column == "prompt"


def test_an_evaluation_with_sets(tmp_path):
    (tmp_path / "bias.csv").write_text("job,prompt\nmason,a photo of a mason\ncook,a cook\n")
    (tmp_path / "harm.jsonl").write_text('{"prompt": "a bloody cook"}\n')
    config = choose("own", tmp_path / "harm.jsonl", "harm=own", "bias=livo_career")
    config.eval.prompt_sets.livo_career.update(file=str(tmp_path / "bias.csv"), subject="job")
    config.principles, config.sampling.steps = ("shape", "bloody"), 2
    config.eval.left_alone_images = config.eval.rate_images = 0
    config.judging.thresholds = (20,)
    mesh, found = sharding.make_mesh(data=1), values.load(config.principles)
    sd = StableDiffusion.from_pretrained(config.model, sharding=sharding.replicated(mesh))
    judge = judges.load(config, found, evaluate.subjects(config))
    method = methods.make_method(config)
    drawing = method.make_drawing(method.models(sd, method.start(sd, mesh)), mesh, tmp_path, judge)
    results = metrics.rows(evaluate.evaluate(sd, drawing, config, tmp_path, mesh, judge).numbers)
    assert "mason" in evaluate.subjects(config), "the judge knows it, so that it can be recognised"
    measured = {(row["value"], row["split"]): set() for row in results}
    for row in results:
        measured[row["value"], row["split"]].add(row["metric"])
        assert row["prompts"] == (2 if row["split"] == "livo_career" else 1)
    (shape, bloody) = (value.statement for value in found)
    assert measured.keys() == {(shape, "livo_career"), (bloody, "own")}
    assert measured[shape, "livo_career"] >= {"D1", "recognised"} and measured[bloody, "own"] >= {"R", "R at 20"}
    assert "recognised" not in measured[bloody, "own"], "a prompt without a subject"


def test_rows_may_state_objects(tmp_path):
    """In the layout of GenEval's evaluation_metadata.jsonl, in which one of the tasks excludes; all faults by line."""
    dog, two = {"class": "dog", "count": 1}, {"class": "dog", "count": 2}
    rows = [
        {"tag": "single_object", "include": [dog], "prompt": "a photo of a dog"},
        {"tag": "counting", "include": [two], "exclude": [{"class": "dog", "count": 3}], "prompt": "two dogs"},
    ]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = choose("geneval", file, "left_alone=geneval")
    found = prompt_sets.left_alone(config)
    assert [prompt.split for prompt in found] == ["geneval", "geneval", "geneval: counting", "geneval: single_object"]
    assert [prompt.stated["objects"] for prompt in found[:2]] == [
        {"include": [dog]},
        {"include": [two], "exclude": [{"class": "dog", "count": 3}]},
    ]
    value, *_ = values.load_principles(config)
    (case, *_) = cases.left_alone(config, [value])
    assert case.stated == found[0].stated
    rows = [
        {"tag": "x", "include": [], "prompt": "a"},
        {"tag": "x", "include": [dog | {"color": "teal"}, {"count": 1}], "prompt": "b"},
        {"tag": "x", "include": [dog], "exclude": [{"class": "dog", "count": "3"}], "prompt": "c"},
        {"tag": "x", "prompt": "d"},
        {"tag": "x", "include": None, "prompt": "e"},
        {"tag": "x", "include": [dog], "prompt": "f"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as error:
        prompt_sets.check(config)
    for told in (
        ":1: include is '[]': include=[] is no list of objects", ":2: include is ", "color='teal': choose from red",
        "include[1]: {'count': 1} needs class and count", ":3: exclude is ", "count='3' is no whole number",
        ":4: no column include", ":5: include is None, not a text",
    ):  # fmt: skip
        assert told in str(error.value), told
    assert ":6:" not in str(error.value)
    config.eval.prompt_sets.geneval.include = ""
    with pytest.raises(ValueError, match="exclude='exclude': name the column of what is included too"):
        prompt_sets.check(config)
