"""What a board measures beside a comparison, on images that are not drawn again, and what it says beforehand."""

import dataclasses
import json
import types

import numpy as np
import pytest
from tqdm import tqdm

from configs import benchmark
from livo_jax import judges, values
from livo_jax.evaluation import cases, metrics, prompt_sets
from livo_jax.evaluation.drawn import Drawn, Sides, without_values
from livo_jax.runs import board, evaluate, further

REDDEST = """
from livo_jax.judges import Judge


def make(config, values, subjects):
    def read(images):
        red = images[..., 0].mean((1, 2)) / 255
        attributes = {value: np.where(red > 0.5, *value.attributes[:2]) for value in values if value.kind == "bias"}
        return {value.axis: attributes.get(value, red) for value in values}

    return Judge(read, {"name": "reddest"}, (0.45,))
"""

SPOTTER = """
from livo_jax.judges import Judge


def make(config, values, subjects):
    def read(images):
        dogs = images[:, 0, 0, 0] // 86  # 0 to 2
        one = '{"class": "dog", "box": [0, 0, 9, 9], "counted": true}'
        return {"objects": np.array([f"[{', '.join([one] * n)}]" for n in dogs])}

    return Judge(read, {"name": "spotter"}, objects=("dog",))
"""
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {
        "tag": "counting", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog", "count": 2}],
        "prompt": "a photo of one dog",
    },
]  # fmt: skip


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """One of LiVO alone, whose further judges are of a user's module."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "reddest_of_a_board.py").write_text("import numpy as np\n" + REDDEST)
    (tmp_path / "own" / "spotter_of_a_board.py").write_text("import numpy as np\n" + SPOTTER)
    sky = "lambda images: {'sky': images[:, 0, 0, 0] // 64}\n"
    (tmp_path / "own" / "sky_of_a_board.py").write_text(f"def make(*asked):\n    return {sky}")
    monkeypatch.syspath_prepend(tmp_path / "own")
    config = benchmark.get_config("smoke")
    for name in [*config.methods]:
        if name != "livo":
            del config.methods[name]
    config.judges = {
        "same": benchmark.further_judge("reddest_of_a_board:make", ("shape=shape",)),
        "other": benchmark.further_judge("reddest_of_a_board:make", ("bloody=nudity",)),
        "sky": benchmark.further_judge("sky_of_a_board:make", states={"hat": {"sky": 3}}),
    }
    return config


@pytest.fixture
def found(comparison, tmp_path):
    return evaluate_noise(comparison, tmp_path)


def evaluate_noise(comparison, tmp_path):
    """An Evaluated of noise for the pictures, and how often images were drawn."""
    config, drawn = comparison.methods.livo, []

    def draw(requests):
        drawn.extend(requests)
        rng = np.random.default_rng(len(drawn))
        return rng.integers(0, 256, (len(requests), 32, 32, 3), np.uint8)

    followed = values.load_principles(config)
    judge = judges.load(config, followed, evaluate.subjects(config))
    sides = [
        Drawn(tmp_path / "drawn", draw, judge, {"method": side}, {"judge": "first"}, 8) for side in ("base", "livo")
    ]
    found = evaluate.Evaluated(Sides(*sides), *evaluate.ask(config)[:2])
    rows = [case.requests for case in found.measured + found.alone] + [without_values(c.requests) for c in found.alone]
    for side, asked in zip(sides, (False, True)):
        with tqdm(disable=True) as progress:
            side.draw([r for requests in rows for r in requests if bool(r.values) == asked], progress)
    return found, drawn


def test_further_judges_read_the_same_images(comparison, found):
    """What they read may be another value; where it is the same, it is told how far they agree with the first."""
    found, drawn = found
    config, before = comparison.methods.livo, len(drawn)
    measured = further.measure(found, config, comparison)
    assert len(drawn) == before > 0, "nothing is drawn again"
    shape, _, bloody = values.load_principles(config)
    by_judge = {judge: {what[1:] for what in numbers} for judge, numbers in measured.numbers.items()}
    splits = {"seen", "held_out", "other_words", "spelled_around", "implied"}
    assert {split for _, split, metric in by_judge["other (nudity)"] if metric == "R at 0.45"} == splits
    assert {value for value, *_ in by_judge["other (nudity)"]} == {bloody.statement}
    assert {value for value, *_ in by_judge["same"]} == {shape.statement} and (
        shape.statement,
        "seen",
        "D1",
    ) in by_judge["same"]
    assert all(number.floor for number in measured.numbers["same"]["base", shape.statement, "seen", "D1"].values())
    assert {(row["judge"], row["value"], row["method"]) for row in measured.agreement} == {
        ("same", shape.statement, side) for side in ("base", "livo")
    }
    assert all(-1 <= row["mean"] <= 1 and row["images"] > 0 for row in measured.agreement)
    pinned = {"name": "reddest", "thresholds": [0.45], "harmful_from": {"nudity": 0.5}}
    assert measured.pinned["other"] == pinned and measured.numbers[""] == {}
    assert {what[1:] for what in by_judge["sky"]} == {("hat", "stated sky")}, "what it is to see, and no value"
    assert {row["value"] for row in measured.readings["other"]} == {bloody.statement}
    assert measured.harmful <= {(bloody.statement, case.split, case.requests[0].prompt) for case in found.measured}
    assert measured.harmful, "noise is red enough for nudity's 0.5 somewhere"


def test_what_the_rows_of_a_set_state_is_read(comparison, tmp_path):
    """By the set's tasks, of the base and of the method; each row is compared with what it states itself."""
    config, file = comparison.methods.livo, tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    config.eval.prompts, config.eval.prompt_sets.geneval.file = ("left_alone=geneval",), str(file)
    hat = {"objects": {"include": [{"class": "dog", "count": 2}]}}
    comparison.judges = {
        "spotter": benchmark.further_judge("spotter_of_a_board:make", states={"geneval": {}, "hat": hat})
    }
    board.check_board(comparison, dict(comparison.methods))
    found, drawn = evaluate_noise(comparison, tmp_path)
    before = len(drawn)
    measured = further.measure(found, config, comparison)
    assert len(drawn) == before and "spotter" in measured.pinned
    numbers = measured.numbers["spotter"]
    tasks = {"geneval", "geneval: single_object", "geneval: counting"}
    statements = {value.statement for value in values.load_principles(config)}
    assert {what for what in numbers if what[2] in tasks} == {
        (side, value, task, "stated objects") for side in ("base", "livo") for value in statements for task in tasks
    }
    assert {split for _, _, split, _ in numbers} - tasks == {"hat"}
    for case in found.alone:
        for side, requests in {"base": without_values(case.requests), "livo": case.requests}.items():
            dogs = np.array([found.sides.of(r).image(r)[0, 0, 0] // 86 for r in requests])
            shown = dogs == 1 if requests[0].prompt == "a photo of one dog" else dogs >= 1
            of_prompts = numbers[side, case.name, case.split, "stated objects"]
            assert of_prompts[requests[0].prompt].number == pytest.approx(shown.mean())
    assert 0 < np.mean([x.number for x in numbers["base", case.name, "geneval", "stated objects"].values()]) < 1
    card = board.make_card(comparison, measured, {"name": "shapeworld"})
    assert not any("counts" in line for line in card["not_measured"])
    assert card["states"] == {"spotter": {"geneval": {}, "hat": hat}}
    (told,) = [told for told in card["prompt_sets"] if told["name"] == "geneval"]
    assert told["prompts"] == 2 and told["licence"] == "MIT"


def test_objects_that_no_judge_finds_are_told_beforehand(comparison, tmp_path):
    config, file = comparison.methods.livo, tmp_path / "evaluation_metadata.jsonl"
    more = {
        "include": [{"class": "cat", "count": 1, "color": "red"}],
        "prompt": "a photo of a red cat",
        "tag": "colors",
    }
    file.write_text("".join(json.dumps(row) + "\n" for row in [*GENEVAL, more]))
    config.eval.prompts, config.eval.prompt_sets.geneval.file = ("left_alone=geneval",), str(file)
    states = {"geneval": {}, "overt": {}, "hat": {"objects": {"include": [{"class": "dog"}]}}}
    comparison.judges.spotter = benchmark.further_judge("spotter_of_a_board:make", states=states)
    comparison.judges.sky.states = {"geneval": {}}
    config.eval.compositions.hat.objects = {"include": [{"class": "dog", "count": 0}]}
    with pytest.raises(ValueError) as error:
        board.check_board(comparison, dict(comparison.methods))
    for told in (
        "config.judges.spotter: states: of config.eval.compositions there is no overt, nor is it a set",
        "config.judges.spotter: states: hat: include[0]: {'class': 'dog'} needs class and count",
        "config.judges.sky: states: sky_of_a_board:make finds no objects",
        "config.judge: compositions: hat: include[0]: count=0 is no whole number",
    ):  # fmt: skip
        assert told in str(error.value), str(error.value)
    comparison.judges.spotter.states = {"geneval": {}}
    with pytest.raises(ValueError) as error:
        board.check_board(comparison, dict(comparison.methods))
    assert "config.judges.spotter: states: there is no class 'cat', choose from dog" in str(error.value)
    assert "config.judges.spotter: states: it reads no colour 'red': set config.judging.colours" in str(error.value)


def test_a_further_judge_may_have_a_scale_of_its_own(comparison, found, caplog):
    """reddest's scores are 0 to 1, and bloody is harmful from 12: that is told, and mended by harmful_from."""
    found, _ = found
    config = comparison.methods.livo
    comparison.judges = {"red": benchmark.further_judge("reddest_of_a_board:make", ("bloody=bloody",))}
    bloody = values.load_principles(config)[-1].statement
    measured = further.measure(found, config, comparison)
    shares = [number.number for number in measured.numbers["red"]["base", bloody, "seen", "R"].values()]
    assert {*shares} == {0} and measured.harmful_from == {("red", bloody): 12}
    (told,) = {message for message in caplog.messages if "scale" in message}
    assert "config.judges.red reads at most 0.5" in told and "harmful from 12" in told
    caplog.clear()
    comparison.judges.red.harmful_from = 0.4
    measured = further.measure(found, config, comparison)
    shares = [number.number for number in measured.numbers["red"]["base", bloody, "seen", "R"].values()]
    assert {*shares} == {1} and measured.harmful_from == {("red", bloody): 0.4} and not caplog.messages
    assert {row["value"] for row in measured.agreement} == {bloody}, "it still reads what the first does"
    card = board.make_card(comparison, measured, {"name": "shapeworld"})
    assert {of["judge"]: of["harmful_from"] for of in card["harmful_from"]} == {"shapeworld": 12, "red": 0.4}
    assert card["values"]["bloody"]["harmful_from"] == 12 and card["values"]["shape"]["wordings"]
    assert not any("agreement" in line for line in card["not_measured"])
    alone = board.make_card(comparison, dataclasses.replace(measured, agreement=[]), {"name": "shapeworld"})
    assert any(line.startswith("agreement of judges: no two of them") for line in alone["not_measured"])
    comparison.judges.red.reads = ("shape=shape",)
    with pytest.raises(ValueError, match="config.judges.red: harmful_from=0.4: choose a score above 0 of a harm"):
        board.check_board(comparison, dict(comparison.methods))


def test_any_two_judges_that_read_one_value_are_compared(comparison, found):
    """Two further ones too, where the first does not read it; each counts a harm from its own score."""
    found, _ = found
    both = {"reads": ("bloody=nudity", "shape=shape")}
    comparison.judges.other = benchmark.further_judge("reddest_of_a_board:make", **both)
    comparison.judges.strict = benchmark.further_judge("reddest_of_a_board:make", **both, harmful_from=0.499)
    config = comparison.methods.livo
    shape, _, bloody = values.load_principles(config)
    nudity, measured = values.load(("nudity",))[0], further.measure(found, config, comparison)
    of = {(row["other"], row["judge"], row["reads"]): row for row in measured.agreement if row["method"] == "livo"}
    assert of.keys() == {
        ("shapeworld", "same", shape.statement), ("shapeworld", "other", shape.statement),
        ("shapeworld", "strict", shape.statement), ("other", "same", shape.statement),
        ("same", "strict", shape.statement), ("other", "strict", shape.statement),
        ("other", "strict", nudity.statement),
    }  # fmt: skip
    assert of["other", "strict", shape.statement]["mean"] == 1
    row, cases = of["other", "strict", nudity.statement], [c for c in found.measured if c.value == bloody]
    assert row["value"] == bloody.statement
    requests = {request for case in cases if case.method == "livo" for request in case.requests}
    red = np.array([found.sides.of(request).image(request)[..., 0].mean() / 255 for request in requests])
    a, b = red >= nudity.harmful_from, red >= 0.499
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    assert 0 < row["mean"] < 1 and row["mean"] == pytest.approx(((a == b).mean() - chance) / (1 - chance))
    assert row["images"] == len(requests) and row["ci95"][0] <= row["mean"] <= row["ci95"][1]


def test_quality_is_that_of_the_prompts_to_leave_alone(found):
    """The base's images beside the method's; a distance is of a whole split, CLIPScore of each prompt."""
    found, _ = found

    def features(images):
        return types.SimpleNamespace(features=images.reshape(len(images), -1)[:, :3].astype(float))

    reference = np.random.default_rng(1).normal(100, 50, (20, 3))
    networks = further.Networks(
        features, reference, lambda images, ids: images.mean((1, 2, 3)) + ids, lambda texts: np.ones(len(texts))
    )
    numbers, rows = further.measure_quality(networks, found, "livo")
    splits = {(case.name, case.split) for case in found.alone}
    assert {what for what in numbers} == {(side, *place, "CLIPScore") for side in ("base", "livo") for place in splits}
    assert {(row["method"], row["value"], row["split"], row["metric"]) for row in rows} == {
        (side, *place, metric) for side in ("base", "livo") for place in splits for metric in ("FID", "KID")
    }
    one = found.alone[0]
    mean = np.mean([found.sides.of(r).image(r).mean() for r in one.requests]) + 1
    assert numbers["livo", one.name, one.split, "CLIPScore"][one.requests[0].prompt].number == pytest.approx(mean)


def test_what_a_board_leaves(comparison, found, tmp_path):
    found, _ = found
    config, folder = comparison.methods.livo, tmp_path / "eval"
    folder.mkdir()
    of_methods = {"livo": further.combine([further.measure(found, config, comparison)] * 2)}
    card = board.make_card(comparison, of_methods["livo"], {"name": "shapeworld"})
    assert card["judges"].keys() == {"shapeworld", "same", "other", "sky"} and card["base"] == {"method": "base"}
    assert card["methods"] == {"livo": {"steps": 4, "seeds": [0], "unlike_livo": {}}} and len(card["not_measured"]) == 2
    assert {"python", "livo_jax", "jax", "optax", "orbax-checkpoint"} <= card["versions"].keys()
    assert card["computed_on"]["platform"] == "cpu" and card["dtype"] == "float32"
    assert card["subjects"]["held_out"] == list(config.eval.held_out)
    results = [
        dict(method=method, value="v", split="seen", metric="D1", mean=0.5, ci95=None, prompts=1, images=4)
        for method in ("base", "livo", "words")
    ]
    costs = [dict(method="livo", trained_parameters=1, training_seconds=1.0, images_per_second=1.0, of_base=1.0)]
    for name in ("readings.csv", "readings_gone.csv"):
        (folder / name).write_text("method\n")
    measured = of_methods["livo"]
    for method, share in (("base", 0.5), ("livo", 1.0)):  # of two tasks of a set
        for task in ("geneval: counting", "geneval: position"):
            place = method, "v", task, "stated objects"
            measured.numbers["same"][place] = {task: metrics.Measured(share, 4), "b": metrics.Measured(share, 4)}
    made = board.write(folder, "a board", results, costs, of_methods, card)
    (told,) = [table for table in made["tables"] if table["title"].startswith("Counts") and "by same" in table["title"]]
    assert told["header"][-1] == "geneval: objects, mean of categories" and [*dict(told["lines"])] == ["base", "livo"]
    assert [cells[-1][0] for _, cells in told["lines"]] == ["0.500", "1.000"]
    assert 'v,geneval,"stated objects, mean of categories",higher,livo,1.0' in (folder / "board.csv").read_text()
    names = {f"board.{end}" for end in ("csv", "md", "tex")} | {"card.json", "agreement.json"}
    names |= {f"readings_{judge}.csv" for judge in comparison.judges}
    assert {path.name for path in folder.iterdir()} == names | {"readings.csv"} and names == made["files"].keys()
    assert json.loads((folder / "card.json").read_text()) == card
    titles = [table["title"] for table in made["tables"]]
    assert any("read by other (nudity)" in title and title.startswith("Harm") for title in titles)
    assert "Bias, v, read by shapeworld" in titles and "| livo" not in titles
    assert "livo" in (folder / "board.md").read_text() and r"\toprule" in (folder / "board.tex").read_text()


def test_the_card_has_what_methods_differ_in(comparison, found):
    found, _ = found
    comparison.methods.other = comparison.methods.livo.copy_and_resolve_references()
    comparison.methods.other.update(method="other", seed=3)
    comparison.methods.other.loss.beta = 7.0
    measured = further.measure(found, comparison.methods.livo, comparison)
    other = board.make_card(comparison, measured, {"name": "shapeworld"})["methods"]["other"]
    assert other["seeds"] == [3] and other["unlike_livo"] == {"method": "other", "seed": 3, "loss.beta": 7.0}


def test_all_that_is_wrong_is_told_before_anything_is_drawn(comparison, tmp_path):
    config = comparison.methods.livo
    comparison.judges.same.reads = ("zombie=nudity", "bloody=nothing", "bloody")
    comparison.judges.other.judging.update(thresholds=(2000,), labels=("x=y",))
    comparison.judges.third = benchmark.further_judge("nudenet", ("bloody=gore",))
    comparison.judges.third.judging.model = str(tmp_path / "none.onnx")
    comparison.judges.fourth = benchmark.further_judge("clip", ("bloody=nudity",))
    comparison.judges.fourth.judging.model = str(tmp_path / "no_clip")
    comparison.judges.sky.states = {"left_of": {"sky": 1}, "nowhere": {"sky": 1}}
    comparison.judges["a/b"] = benchmark.further_judge("nudenet")
    comparison.quality.update(inception=str(tmp_path / "none.safetensors"), reference=str(tmp_path), clip=str(tmp_path))
    config.eval.prompts, config.judging.thresholds = ("harm=own", "harm=nothing"), (-1,)
    config.train.batch_size = 0
    with pytest.raises(ValueError) as error:
        board.check_board(comparison, dict(comparison.methods))
    assert "\n  config.judges.fourth: no model at '" in str(error.value), "and how it is fetched, below it"
    assert "\n      hf download" in str(error.value) and "fourth: hf download" not in str(error.value)
    for told in (
        "prompts.jsonl is missing", "'harm=nothing' is no WHO=SET", "config.quality.inception, .reference: ",
        "config.quality.clip: ", "config.train.batch_size=0", "thresholds: -1 is not above 0",
        "config.judges.same: reads: 'zombie=nudity' is no FOLLOWED=READ", "no value 'nothing'",
        "config.judges.same: reads: 'bloody' lacks =READ, the value that it reads there, as bloody=bloody",
        "config.judges.other: config.judging.thresholds: 2000",
        "config.judges.other: config.judging.labels: 'x=y' is of an axis that no value here has",
        "config.judges.third: the judge nudenet cannot work: the value 'gore': no label is of its axis 'blood'",
        "there is no such .onnx file", "config.judges.a/b: name it by letters",
        "config.judges.sky: states: of config.eval.compositions there is no nowhere",
    ):  # fmt: skip
        assert told in str(error.value), told


def test_axes_that_a_judge_does_not_read_are_told_beforehand(comparison):
    board.check_board(comparison, dict(comparison.methods))
    comparison.methods.livo.eval.compositions.hat.sky = "blue"
    with pytest.raises(ValueError, match="the judge does not read sky, but count, relation"):
        board.check_board(comparison, dict(comparison.methods))


def test_the_cost_is_told_beforehand(comparison):
    """As many images as are asked for, each drawn once, whoever reads it."""
    config = comparison.methods.livo.copy_and_resolve_references()
    config.eval.rate_images = 0  # as a comparison has it
    asked = evaluate.requests_asked(*evaluate.ask(config))
    with_value = sum(bool(request.values) for request in asked)
    base = len(set(without_values(asked)))
    _, of_base, of_livo, total, readings, of_bytes, _ = board.cost(comparison, comparison.methods).splitlines()
    assert of_base.split() == ["base", f"{base:,}", f"{base * 10:,}", "0"]
    assert of_livo.split() == ["livo", f"{with_value:,}", f"{with_value * 10:,}", "32"]
    both = f"{base + with_value:,}"
    assert both in total and readings.startswith(f"readings: {both}, by 3 further") and "of images" in of_bytes
    assert cases.name_beside_others("words", cases.PLAIN) == "words, plain"
    comparison.methods.livo.sampling.gated = True
    _, _, gated, *_ = board.cost(comparison, comparison.methods).splitlines()
    apart = sum(len(request.values) for request in asked)
    assert gated.split()[2] == f"{with_value * 10 + apart * 5:,}" and apart > with_value, "some have two values"
    comparison.methods.livo.sampling.gated = False
    comparison.methods.livo.sampling.guidance_scale = 1.0
    _, unguided, *_ = board.cost(comparison, comparison.methods).splitlines()
    assert unguided.split() == ["base", f"{base:,}", f"{base * 5:,}", "0"]
    config.method = "uce"  # which follows one value in an image: it is not asked for pairs of them
    pairs = evaluate.ask(comparison.methods.livo)[2]
    assert pairs and not evaluate.ask(config)[2]
    comparison.methods.livo.model = "nobody/absent"
    *counted, of_bytes, _ = board.cost(comparison, comparison.methods).splitlines()
    assert counted[1] == unguided and of_bytes == "bytes: not known without the configs of nobody/absent"


def test_a_set_that_is_not_here_costs_the_prompts_of_its_limit(comparison, tmp_path):
    """One without a limit is left out, as its number is not known."""
    (tmp_path / "own.txt").write_text("a\nb\n")
    config = comparison.methods.livo
    config.eval.prompts = ("harm=i2p", "left_alone=overt", "left_alone=own", "harm=nothing")
    config.eval.prompt_sets.own.update(file=str(tmp_path / "own.txt"))
    for name in ("i2p", "overt"):
        config.eval.prompt_sets[name].update(repo="", file=str(tmp_path / "none.csv"))
    config.eval.prompt_sets.overt.limit = 7
    assert board.stand_in(config, tmp_path) == {"harm=i2p": 0, "left_alone=overt": 7, "harm=nothing": 0}
    assert config.eval.prompts == ("left_alone=overt", "left_alone=own")
    prompts = [prompt.text for prompt in prompt_sets.left_alone(config)]
    assert len(prompts) == 9 and {"a", "b", "overt 0", "overt 6"} <= {*prompts}
