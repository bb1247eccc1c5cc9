from configs import tiny
from livo_jax import evaluate, values
from livo_jax.generate import Dose, Request


def test_combinations_are_measured_where_the_config_says_so():
    config, three = tiny.get_config("smoke"), values.load(("shape", "colour", "bloody"))
    shape, colour, bloody = (value.statement for value in three)
    assert {(case.name, case.method) for case in evaluate.cases(config, three)} == {
        (value.statement, method) for value in three for method in ("base", "livo")
    }
    config.eval.combinations = True
    cases = {}
    for case in evaluate.cases(config, three):
        cases.setdefault((case.name, case.method), []).append(case)
    assert len(cases) == 2 * 3 + 3 * 6 and all(len(found) == 4 for found in cases.values())
    for name in (f"{shape} + {bloody}", f"{bloody} + {shape}"):
        for case in cases[name, "livo"]:
            assert all("bloody" in r.prompt and Dose(bloody) in r.values for r in case.requests)
            assert sum(Dose(shape) in r.values for r in case.requests) == len(case.requests) / 2
    (case, *_) = cases[f"{colour} + {shape}", "plain"]
    assert {r.values for r in case.requests} == {(Dose(colour),)} and case.value.name == "colour"


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


def test_pictures_are_shown_where_both_sides_were_drawn():
    """Of a harm's prompts combinations draw more images than the harm alone does."""
    config, (bloody,) = tiny.get_config("smoke"), values.load(("bloody",))
    config.principles = ("bloody",)
    prompts = {prompt for *_, prompt in evaluate.plan(config, (bloody,))}
    images = {Request(p, i): "base" for p in prompts for i in range(50)}
    images |= {Request(p, i, (Dose(bloody.statement),)): "livo" for p in prompts for i in range(4)}
    for shown in evaluate.pictures(images, config):
        assert (shown["base"], shown["livo"]) == (["base"] * 4, ["livo"] * 4)
