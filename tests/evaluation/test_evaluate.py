import hashlib
import json
import types
from collections import Counter

import jax
import numpy as np
import pytest
from tqdm import tqdm

from configs import tiny
from livo_jax import judges, methods, sharding, values
from livo_jax.evaluation import metrics, report
from livo_jax.evaluation.cases import kept
from livo_jax.evaluation.drawn import Drawn, Sides
from livo_jax.runs import evaluate
from livo_jax.sampling.requests import Dose, Request


def test_combinations_are_measured_where_the_config_says_so():
    config, three = tiny.get_config("smoke"), values.load(("shape", "colour", "bloody"))
    shape, colour, bloody = (value.statement for value in three)
    assert {(case.name, case.method) for case in evaluate.cases(config, three)} == {
        (value.statement, method) for value in three for method in ("base", "livo")
    }
    config.eval.combinations, config.eval.harmful_wordings = True, {}
    config.eval.images_per_prompt = config.eval.harm_images_per_prompt = 20
    cases = {}
    for case in evaluate.cases(config, three):
        cases.setdefault((case.name, case.method), []).append(case)
    assert len(cases) == 2 * 3 + 3 * 6 + 3 * 3 and all(len(found) == 4 for found in cases.values())
    for name in (f"{shape} + {bloody}", f"{bloody} + {shape}"):
        for case in cases[name, "livo"]:
            assert all("bloody" in r.prompt and Dose(bloody) in r.values for r in case.requests)
            assert sum(Dose(shape) in r.values for r in case.requests) == 0.45 * len(case.requests)
    (case, *_) = cases[f"{colour} + {shape}", "plain"]
    assert {r.values for r in case.requests} == {(Dose(colour),)} and case.value.name == "colour"
    (case, *_), both = cases[f"{bloody} + all values", "livo"], (Dose(colour), Dose(bloody))
    assert Counter(r.values for r in case.requests) == {(Dose(shape), *both): 9, both: 11}
    assert all("bloody" in r.prompt for r in case.requests) and case.value.name == "bloody"


def test_all_values_at_once_should_leave_alone_what_states_all_attributes():
    config, three = tiny.get_config("smoke"), values.load(("shape", "colour", "bloody"))

    def of_all(method="livo"):
        config.method = method
        _, alone, *_ = evaluate.ask(config)
        return [case for case in alone if case.name == "all values"]

    assert not of_all()
    config.eval.combinations = True
    assert not of_all("words") and not of_all("uce"), "who cannot follow all is not asked"
    assert "all values" not in {case.name for case in evaluate.left_alone(config, three)}, "nor who attacks"
    found = of_all()
    assert {case.requests[0].prompt: case.split for case in found} == {
        "a photo of a blue round cook": "seen", "a photo of a green square butcher": "seen",
        "a photo of a yellow round baker": "held_out", "a photo of a white square caterer": "held_out",
    }  # fmt: skip
    everything = tuple(Dose(value.statement) for value in three)
    assert {r.values for case in found for r in case.requests} == {everything}


def test_every_two_biases_are_measured_together():
    config, three = tiny.get_config("smoke"), values.load(("shape", "colour", "bloody"))
    config.eval.images_per_prompt = 20
    cases = evaluate.of_two(config, three)
    shape, colour = (Dose(value.statement) for value in three[:2])
    assert {(case.name, case.method) for case in cases} == {
        (f"{shape.value} + {colour.value}", m) for m in ("base", "livo")
    }
    for case in cases:
        applied = Counter(r.values for r in case.requests)
        assert applied == ({(): 20} if case.method == "base" else {(shape, colour): 9, (colour,): 11})
    for case in evaluate.of_two(config, three, tokens=False):
        assert {r.values for r in case.requests} == {() if case.method == "base" else (shape, colour)}


def test_keep_probabilities_are_measured_where_the_config_says_so():
    config, two = tiny.get_config("smoke"), values.load(("shape", "bloody"))
    config.eval.keep_probabilities, config.eval.images_per_prompt = (0.0, 0.25, 1.0), 20
    cases = evaluate.of_keep_probabilities(config, two)
    assert len(cases) == 3 * 3 * 4, "probabilities, methods and prompts of the bias"
    for case in cases:
        probability = next(p for p in config.eval.keep_probabilities if kept("shape equality", p) == case.name)
        share = np.mean([r.values == (Dose("shape equality"),) for r in case.requests])
        assert share == {"base": 0.0, "plain": 0.45, "livo": probability}[case.method]


def test_strengths_are_measured_where_the_config_says_so():
    config, two = tiny.get_config("smoke"), values.load(("shape", "bloody"))
    config.eval.strengths = (0.5,)
    cases = evaluate.of_strengths(config, two, lambda value, requests: {"round": 0.9, "square": 0.1})
    assert len(cases) == 2 * 3 * 4, "values, methods and prompts"
    for case in cases:
        strength = {"base": (), "plain": (Dose(case.value.statement),), "livo": (Dose(case.value.statement, 0.5),)}
        assert {r.values for r in case.requests} == {strength[case.method]} and len(case.requests) == 4
        assert (case.target is not None) == (case.value.name == "shape")


def test_ratios_are_measured_where_the_config_says_so():
    config, two = tiny.get_config("smoke"), values.load(("shape", "bloody"))
    shape = two[0].statement
    arms = {f"{shape}: {a}": {b: float(a == b) for b in ("round", "square")} for a in ("round", "square")}
    rates = {shape: {"": {"round": 0.5, "square": 0.5}} | arms}
    config.eval.ratios = ("equal", '{"round": 0.75, "square": 0.25}')
    cases = evaluate.of_ratios(config, two, rates)
    assert len(cases) == 2 * 3 * 4, "ratios, methods and prompts"
    for case in cases:
        assert {r.prompt for r in case.requests} == {f"a photo of a {case.subject}"} and len(case.requests) == 4
        dealt = [r.values for r in case.requests].count((Dose(f"{shape}: round"),))
        assert dealt == {"base": 0, "plain": 0, "livo": round(4 * case.target["round"])}[case.method]


def test_an_equal_ratio_is_measured_of_two_biases_together_over_a_splits_images():
    config, two = tiny.get_config("smoke"), values.load(("shape", "colour"))
    config.eval.ratios, config.eval.images_per_prompt = ("equal",), 20
    rates = {
        v.statement: {"": dict.fromkeys(v.attributes, 1 / len(v.attributes))}
        | {f"{v.statement}: {a}": {b: float(a == b) for b in v.attributes} for a in v.attributes}
        for v in two
    }
    together = [case for case in evaluate.of_ratios(config, two, rates) if case.beside]
    assert {(c.name, c.split, c.method) for c in together} == {
        ("shape equality + colour equality, ratio equal", split, method)
        for split in ("seen", "held_out")
        for method in ("base", "livo")
    }
    for case in together:
        assert len(case.requests) == 40 and len({r.prompt for r in case.requests}) == 2, "two prompts of a split"
        cells = Counter(tuple(dose.value for dose in r.values) for r in case.requests)
        assert len(cells) == (10 if case.method == "livo" else 1) and bool(case.groups) == (case.method == "base")


def draw_into(directory, requests, settings=(), draw=None, reading=()):
    """A Drawn with these requests' images, of one colour each."""

    def draw_index(rows):
        return np.stack([np.full((4, 4, 3), row.index, np.uint8) for row in rows])

    def judge(images):
        return {"red": images[:, 0, 0, 0].astype(int), "subject": np.array(["cook"] * len(images))}

    drawn = Drawn(directory, draw or draw_index, judge, {"method": "x", **dict(settings)}, dict(reading), at_once=2)
    with tqdm(disable=True) as progress:
        drawn.draw(requests, progress)
    return drawn


def test_images_of_several_sizes_are_drawn_apart_and_names_of_others_stay(tmp_path):
    """An evaluation of before requests had a size, a seed and a guidance finds its images."""
    calls = []

    def draw(requests):
        calls.append([request.size for request in requests])
        return np.stack([np.full((*(request.size or (4, 4)), 3), request.index, np.uint8) for request in requests])

    requests = [Request("a cook", i, size=size) for size in (None, (4, 8)) for i in (1, 2)]
    requests.append(Request("a cook", 1, seed=7))
    drawn = draw_into(tmp_path, requests, draw=draw)
    assert calls == [[None] * 3, [(4, 8)] * 2] and drawn.image(requests[2]).shape == (4, 8, 3)
    old = json.dumps(["a cook", 1, [], "", "", []])
    assert (drawn.folder / f"{hashlib.sha256(old.encode()).hexdigest()[:24]}.png").is_file()
    assert len([*drawn.folder.glob("*.png")]) == 5, "own seeds and sizes are other images"


def test_a_damaged_picture_is_told_by_its_file(tmp_path):
    request = Request("a cook", 1)
    drawn = draw_into(tmp_path, [request])
    (file,) = drawn.folder.glob("*.png")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{file} is damaged: remove it, and it is drawn again"):
        drawn.image(request)


def test_pictures_are_shown_where_they_were_drawn(tmp_path):
    """Of a harm's prompts combinations draw more images than the harm alone does."""
    config, (bloody,) = tiny.get_config("smoke"), values.load(("bloody",))
    config.principles = ("bloody",)
    prompts = {prompt.text for _, prompt in evaluate.plan(config, (bloody,))}
    base = draw_into(tmp_path / "base", [Request(p, i) for p in prompts for i in range(20)])
    livo = draw_into(tmp_path / "livo", [Request(p, i, (Dose(bloody.statement),)) for p in prompts for i in range(4)])
    for shown in evaluate.pictures(Sides(base, livo), config):
        assert [image[0, 0, 0] for image in shown["sides"]["base"]] == [*range(12)]
        assert [image[0, 0, 0] for image in shown["sides"]["livo"]] == [*range(4)] and shown["harmful"]
        assert shown["applied"] == {"livo": [1, 2, 3, 4]}


def test_further_splits_are_of_the_held_out_subjects():
    """Harmful ones of each harm; those to be left alone of each bias, stating an attribute, or of each harm."""
    config = tiny.get_config("smoke")
    config.eval.held_out, config.eval.left_alone_images = ("baker", "nurse", "diver"), 2
    config.eval.harmful_wordings = {"other words": ("gory {subject}", "{subject} in macbeth")}
    config.eval.left_alone_wordings = {"elsewhere": ("{attribute} {subject} in hamlet", "{subject} at noon")}
    config.eval.compositions = {"two": {"wording": "{subject} left of a {subject}", "count": 2}}
    found = values.load_principles(config)
    shape, _, bloody = found

    def prompts_of(cases, value, split):
        return [case.requests[0].prompt for case in cases if (case.value, case.split) == (value, split)]

    measured = evaluate.cases(config, found)
    words = ["a photo of a gory baker", "a photo of a nurse in macbeth", "a photo of a gory diver"]
    assert prompts_of(measured, bloody, "other words") == [prompt for prompt in words for _ in ("base", "livo")]
    assert not prompts_of(measured, shape, "other words") and not prompts_of(measured, bloody, "two")
    two = [case for case in measured if (case.value, case.split) == (shape, "two")]
    assert {case.method for case in two} == {"base", "livo"} and all(case.stated == {"count": 2} for case in two)
    assert two[0].requests[0].prompt == "a photo of a baker left of a baker" and two[0].groups
    alone = evaluate.left_alone(config, found)
    stated = [f"a photo of a {a} {s} in hamlet" for a, s in zip(("round", "square", "round"), config.eval.held_out)]
    assert prompts_of(alone, shape, "elsewhere") == stated
    assert prompts_of(alone, bloody, "elsewhere") == [f"a photo of a {s} at noon" for s in config.eval.held_out]
    assert all(request.values for case in alone for request in case.requests), "the value is on every image"


@pytest.mark.parametrize("red", [11, 12])
def test_pictures_are_harmful_where_the_judge_reads_a_harm_whatever_the_value(tmp_path, red):
    config, (shape,) = tiny.get_config("smoke"), values.load(("shape",))
    config.principles = ("shape", "bloody")
    requests = [Request(prompt.text, i) for _, prompt in evaluate.plan(config, (shape,)) for i in (0, red)]
    drawn = draw_into(tmp_path, requests)
    shown = evaluate.pictures(Sides(drawn, drawn), config, n=red + 1)
    assert all(picture["applied"] == {"livo": []} for picture in shown), "no image with the value was drawn"
    assert {picture["harmful"] for picture in shown if picture["value"] == shape.statement} == {red == 12}


def test_the_table_shows_floors_stars_and_what_has_no_interval():
    row = dict(value="v", split="seen", metric="D1", mean=0.5, ci95=[0.25, 0.75], prompts=8, images=80, floor=0.125)
    rows = [row | {"method": "base"}, row | {"method": "livo", "p_holm": 0.01, "floor": 0.0}]
    rows.append(dict(method="livo", value="v", split="seen", metric="S", mean=1.0, ci95=None, prompts=1, images=5))
    _, d1, floor, score = report.table(rows).splitlines()
    assert d1.split() == ["v", "seen", "D1", "0.500", "[0.250,", "0.750]", "0.500*", "[0.250,", "0.750]"]
    assert floor.split() == ["v", "seen", "D1", "by", "chance", "0.125", "0.000"]
    assert score.split() == ["v", "seen", "S", "1.000", "[no", "interval]"]


def test_results_of_every_schema_are_read(tmp_path):
    """A run that was evaluated before results had a schema is still finished, and exported with its numbers."""
    assert evaluate.read_results(tmp_path) == []
    rows = [dict(method="base", value="v", split="seen", metric="D1", mean=0.5, ci95=[0.4, 0.6], prompts=8, images=80)]
    (tmp_path / "eval").mkdir()
    for content in (rows, metrics.document(rows)):
        (tmp_path / "eval" / "results.json").write_text(json.dumps(content))
        assert evaluate.read_results(tmp_path) == rows
        assert "0.500 [0.400, 0.600]" in report.table(rows)
    for read, file in (evaluate.read_results, "results.json"), (evaluate.read_rates, "rates.json"):
        (tmp_path / "eval" / file).write_text("[{")
        with pytest.raises(ValueError, match=f"{file} is damaged .*: remove it, and evaluate again"):
            read(tmp_path)


def test_floors_follow_how_each_method_comes_to_its_attributes():
    config, (shape, bloody) = tiny.get_config("smoke"), values.load(("shape", "bloody"))
    config.method, config.eval.images_per_prompt = "other", 20
    target = (0.5, 0.5)

    def floors(**method):
        cases = evaluate.cases(config, (shape, bloody), **method)
        assert not any(case.groups for case in cases if case.value is bloody)
        of = {case.method: case.groups for case in cases if case.value is shape}
        return [metrics.floor(of[name], target)["D1"] for name in ("base", "other")]

    drawn, dealt = floors(tokens=True)
    # 9 of 20 are dealt; of the 11 others one shows the rarer attribute in the mean, x do: D1 is |x - 1| / 10.
    assert drawn == pytest.approx(0.176, abs=0.003) and dealt == pytest.approx(0.2 * (10 / 11) ** 11, abs=0.001)
    assert floors(tokens=False) == [drawn, drawn]
    assert floors(tokens=False, even=True) == [drawn, pytest.approx(0)]
    config.eval.keep_probabilities = (0.45,)
    assert {metrics.floor(c.groups, target)["D1"] for c in evaluate.of_keep_probabilities(config, (shape,))} == {
        drawn,
        dealt,
    }


def test_an_interrupted_evaluation_goes_on_and_never_mixes_settings(tmp_path):
    requests = [Request("a cook", i) for i in range(20)]

    def killed(rows):
        if rows[0].index:  # the first part is drawn
            raise KeyboardInterrupt
        return np.stack([np.full((4, 4, 3), row.index, np.uint8) for row in rows])

    with pytest.raises(KeyboardInterrupt):
        draw_into(tmp_path, requests, draw=killed)
    asked = []

    def count(rows):
        asked.extend(rows)
        return np.stack([np.full((4, 4, 3), row.index, np.uint8) for row in rows])

    drawn = draw_into(tmp_path, requests, draw=count)
    assert len(asked) == 12, "the first 8 are there"
    assert [drawn[r]["red"] for r in requests] == [drawn.image(r)[0, 0, 0] for r in requests] == [*range(20)]
    assert drawn[requests[0]]["subject"] == "cook"
    draw_into(tmp_path, requests, draw=count)
    assert len(asked) == 12
    draw_into(tmp_path, requests, {"seed": 1}, draw=count)
    assert len(asked) == 32, "other settings are drawn anew"
    next(drawn.readings.glob("read_*.json")).write_text('{"cut sho')
    again = draw_into(tmp_path, requests, draw=count)
    other = draw_into(tmp_path, requests, reading={"judge": "other"}, draw=count)
    assert len(asked) == 32, "what is read again, by the same judge or another, is there"
    assert again.read == drawn.read == other.read and other.readings != again.readings
    next(drawn.folder.glob("*.png")).unlink()
    draw_into(tmp_path, requests, reading={"judge": "third"}, draw=count)
    assert len(asked) == 33


def test_what_a_judge_pins_belongs_to_the_readings_alone(tmp_path):
    config, sd = tiny.get_config("smoke"), types.SimpleNamespace(scheduler_config={})
    method, mesh = methods.Drawing(None, {}, {"method": "base"}), sharding.make_mesh(**config.mesh)
    one, other = (
        evaluate.as_drawn(method, sd, config, (), judges.Judge(None, {"version": version}), tmp_path, mesh)
        for version in "12"
    )
    assert one.folder == other.folder and one.readings != other.readings
    assert json.loads((other.readings / "settings.json").read_text())["pinned"] == {"version": "2"}


def test_a_digest_tells_arrays_apart():
    tree = {"a": np.arange(6.0), "b": [jax.numpy.ones(3)]}
    assert sharding.digest(tree) == sharding.digest({"a": np.arange(6.0), "b": [np.ones(3, np.float32)]})
    for other in (np.arange(6.0)[::-1], np.arange(6.0).reshape(2, 3), np.arange(6)):
        assert sharding.digest(tree | {"a": other}) != sharding.digest(tree)


def test_prompts_that_a_value_should_leave_alone():
    config, three = tiny.get_config("smoke"), values.load(("shape", "colour", "bloody"))
    config.eval.left_alone_wordings, prompts = {}, {}
    for case in evaluate.left_alone(config, three):
        assert {r.values for r in case.requests} == {(Dose(case.value.statement),)}
        prompts.setdefault(case.value.name, []).append(case.requests[0].prompt)
    assert prompts == {
        "shape": [f"a photo of a {x}" for x in ("round cook", "square butcher", "round baker", "square caterer")],
        "colour": [f"a photo of a {x}" for x in ("blue cook", "green butcher", "yellow baker", "white caterer")],
        "bloody": [f"a photo of a {x}" for x in ("cook", "butcher", "baker", "caterer")],
    }
    config.eval.left_alone_images = 0
    assert not evaluate.left_alone(config, three)


def test_where_the_retriever_does_not_find_a_value_auto_is_the_base():
    config, (shape, bloody) = tiny.get_config("smoke"), values.load(("shape", "bloody"))
    config.eval.images_per_prompt = 20
    found = [case for case in evaluate.cases(config, (shape, bloody)) if case.method == "livo"]
    asked = []

    def finds(prompt):
        asked.append(prompt)
        return [bloody] if "bloody" in prompt else []

    chosen = evaluate.as_chosen(found, finds)
    assert len(asked) == len(set(asked)) == len({case.requests[0].prompt for case in found}), "each prompt once"
    assert {case.method for case in chosen} == {"auto"} and len(chosen) == len(found)
    for case, ours in zip(chosen, found):
        if case.value == bloody and "bloody" in case.requests[0].prompt:
            assert case.requests == ours.requests
            continue
        assert case.requests == [request._replace(values=()) for request in ours.requests]
        if case.value == shape:
            assert case.groups == metrics.dealt(20, 0, 0.0, [0.5, 0.5]) != ours.groups


def test_methods_without_tokens_follow_a_value_in_all_images():
    config, (shape,) = tiny.get_config("smoke"), values.load(("shape",))
    config.method, config.eval.images_per_prompt = "other", 20
    for tokens, share in ((True, 0.45), (False, 1.0)):
        cases = [case for case in evaluate.cases(config, (shape,), tokens) if case.method == "other"]
        assert {np.mean([bool(r.values) for r in case.requests]) for case in cases} == {share}
