"""How biased and how harmful images are, with a method and without: metrics with confidence intervals."""

import dataclasses
import functools
import itertools
import json
import types

import jax
from tqdm import tqdm

from livo_jax import judges, methods, sharding
from livo_jax import values as principles
from livo_jax.evaluation import metrics, objects, prompt_sets, report
from livo_jax.evaluation.cases import (  # fmt: skip
    AUTO,
    arms,
    as_chosen,
    cases,
    everywhere,
    left_alone,
    of_keep_probabilities,
    of_ratios,
    of_strengths,
    of_two,
    plan,
    rows_of_ratios,
)
from livo_jax.evaluation.drawn import Drawn, Sides
from livo_jax.files.directories import replacing, resolve_directory, write_json
from livo_jax.files.images import blurred, sheet
from livo_jax.retrieval.retriever import Retriever, run_files
from livo_jax.runs.log import read_metrics
from livo_jax.runs.workdir import read_json
from livo_jax.sampling.generate import settings_of_base
from livo_jax.sampling.requests import Dose, Request, requests_of, with_values, without_values

AGAIN = "remove it, and evaluate again with --mode=evaluate"


def as_drawn(drawing: methods.Drawing, sd, config, values, judge, directory, mesh) -> Drawn:
    """A method's images, with all that they depend on, and all that their readings do."""
    settings = drawing.settings | {
        "arrays": sharding.digest(drawing.state),
        "scheduler": sd.scheduler_config,
        "sampling": settings_of_base(config.sampling.to_dict()),
        "seed": config.eval.seed,
    }
    trains = isinstance(methods.make_method(config), methods.TrainedMethod)
    if not trains and drawing.settings.get("method") != "base":
        # What such a method does with a value its principle says, not the requests alone.
        settings["values"] = [dataclasses.asdict(value) for value in values]
    at_once = config.sampling.batch_size * sharding.batch_parts(mesh)
    return Drawn(directory, drawing.draw, judge, settings, reading_settings(config, values, judge), at_once)


def make_sides(sd, drawing: methods.Drawing, config, values, judge, directory, mesh) -> Sides:
    """The images of the base and of a method. Arguments as as_drawn has them."""
    both = methods.base(config, sd, mesh), drawing
    return Sides(*(as_drawn(own, sd, config, values, judge, directory, mesh) for own in both))


def drawn_directory(config, workdir):
    """Where the images and readings of a run's evaluations are kept."""
    return resolve_directory(config.eval.drawn) if config.eval.drawn else workdir / "eval" / "drawn"


def reading_settings(config, values, judge) -> dict:
    """What the readings of a judge depend on beside the images."""
    free = ("endpoint", "cache", "budget")
    free += ("classes", "colours", "detected_from", "counted_from")  # of the judge detector, which pins them
    return {
        "judge": config.judge,
        "judging": {name: x for name, x in config.judging.to_dict().items() if name not in free},
        "pinned": judge.pinned,
        "values": [dataclasses.asdict(value) for value in values],
        "subjects": subjects(config),
    }


def subjects(config) -> list[str]:
    """Those that the judge tells apart."""
    of_sets = [prompt for value in principles.load_principles(config) for prompt in prompt_sets.rows(config, value)]
    of_sets += prompt_sets.left_alone(config)
    told = [prompt.subject for prompt in of_sets if prompt.subject]
    return list(dict.fromkeys([*config.eval.seen, *config.eval.held_out, *told]))


def draw_base(sd, config, directory, mesh):
    """Draws the base's images of an evaluation, for several methods' to share. Arguments as of evaluate."""
    values = principles.load_principles(config)
    judge = judges.load(config, values, subjects(config))
    base = as_drawn(methods.base(config, sd, mesh), sd, config, values, judge, directory, mesh)
    measured = cases(config, values) + of_two(config, values) + left_alone(config, values, together=True)
    requests = dict.fromkeys(request for case in measured for request in without_values(case.requests))
    if config.eval.ratios:
        requests |= dict.fromkeys(requests_of([prompt.text for prompt in rows_of_ratios(config)]))
    with tqdm(total=len(requests), desc="base", unit="image", disable=jax.process_index() > 0) as progress:
        base.draw([*requests], progress)


@dataclasses.dataclass
class Evaluated:
    """What an evaluation found.

    Attributes:
        sides: the images of the base and of the method.
        numbers: (method, name, split, metric) -> prompt -> Measured, as metrics.rows takes them.
        rates: of rates.json, {statement of a bias: {arm: {attribute: share}}}, over the seen prompts' images that can
            be read, of a method with tokens.
        readings: the rows of readings.csv, one of each image under each name: dicts of method, value, split, prompt,
            index, applied (the values, with their strengths), and what the judge read, by axis.
        measured, alone: the cases, and those of over-refusal.
    """

    sides: Sides
    measured: list = dataclasses.field(default_factory=list)
    alone: list = dataclasses.field(default_factory=list)
    numbers: dict = dataclasses.field(default_factory=dict)
    rates: dict = dataclasses.field(default_factory=dict)
    readings: list = dataclasses.field(default_factory=list)

    def add(self, case, found: dict[str, float], floors=types.MappingProxyType({})):
        """Adds a case's numbers, by metric; floors are those by chance, of the metrics that have one."""
        prompts = {request.noise or request.prompt for request in case.requests}
        # By which methods are paired.
        prompt = next(iter(prompts)) if len(prompts) == 1 else f"{len(prompts)} prompts"
        for metric, number in found.items():
            of_prompt = self.numbers.setdefault((case.method, case.name, case.split, metric), {})
            of_prompt[prompt] = metrics.Measured(number, len(case.requests), floors.get(metric), prompts=len(prompts))

    def add_over_refusal(self, case, values):
        """Adds how many images of a prompt that is to be left alone change; of the base those that cannot be read."""
        before, after = self.sides.reading(without_values(case.requests)), self.sides.reading(case.requests)
        if case.method != AUTO:
            self.add(case._replace(method="base"), {"over_refusal": metrics.changed(values, before, before)})
        self.add(case, {"over_refusal": metrics.changed(values, before, after)})

    def keep(self, method: str, case, requests):
        """Adds a row for each image of a case, under a method's name."""
        for request in requests:
            applied = "; ".join(f"{dose.value} x {dose.strength:g}" for dose in request.values)
            row = dict(method=method, value=case.name, split=case.split, prompt=request.prompt, index=request.index)
            self.readings.append(row | {"applied": applied} | self.sides.of(request)[request])


def followed_values(config) -> list[principles.Value]:
    """Those that the method is for."""
    kinds = methods.make_method(config).KINDS
    return [value for value in principles.load_principles(config) if value.kind in kinds]


def ask(config) -> tuple:
    """What is measured of a method: cases, those of over-refusal, those of two biases, and the arms of each bias."""
    followed, method = followed_values(config), methods.make_method(config)
    tokens, even = method.HAS_TOKENS, method.EVEN
    pairs = of_two(config, followed, tokens, even) if method.TOGETHER else []
    biases = [value for value in followed if value.kind == "bias" and tokens and config.eval.rate_images]
    of_arms = {value: arms(value, config) for value in biases}
    alone = left_alone(config, followed, together=tokens and method.TOGETHER)
    return cases(config, followed, tokens, even), alone, pairs, of_arms


def drop_rates(config):
    """Leaves out what the tokens show, of a comparison's method: there ratios alone ask for it."""
    if not config.eval.ratios:
        config.eval.rate_images = 0


def requests_asked(measured, alone, pairs, of_arms) -> list[Request]:
    """All images of what `ask` returns, each once."""
    rows = [case.requests for case in measured + pairs + alone] + [without_values(case.requests) for case in alone]
    return [*dict.fromkeys(itertools.chain(*rows, *(r for arms in of_arms.values() for r in arms.values())))]


def evaluate(sd, drawing: methods.Drawing, config, directory, mesh, judge, finds=None) -> Evaluated:
    """Measures the base and a method on the same prompts and noise.

    The value of a method with tokens is applied to Value.keep_probability of the images; the others are the base's own.

    Args:
        sd: the base.
        directory: keeps images and readings (Drawn); what is there already is not drawn again.
        judge: as judges.load makes it for config.
        finds: finds(prompt) -> the values that a retriever finds for it, whose images are then measured too (AUTO).
    """
    values = principles.load_principles(config)
    sides = make_sides(sd, drawing, config, values, judge, directory, mesh)

    # ---- what is asked for
    measured, alone, pairs, of_arms = asked = ask(config)
    found = Evaluated(sides, measured, alone)
    sides.draw(requests_asked(*asked))
    if finds:
        own = [case for case in measured if case.method == config.method]
        measured, alone = measured + as_chosen(own, finds), alone + as_chosen(alone, finds)

    # ---- what the tokens show, and what that asks for
    for value in of_arms:
        found.rates[value.statement] = {arm: sides.shares(value, r) for arm, r in of_arms[value].items()}
    further, followed = [], followed_values(config)
    if methods.make_method(config).HAS_TOKENS:
        further += of_keep_probabilities(config, followed) + of_strengths(config, followed, sides.shares)
        further += of_ratios(config, followed, found.rates)
    if further:
        sides.draw(itertools.chain(*(case.requests for case in further)))

    # ---- numbers
    for case in measured + pairs + further:
        found.keep(case.method, case, case.requests)
        reading = sides.reading(case.requests)
        if case.beside:
            floors = metrics.joint_floor(*case.groups) if case.groups else {}
            found.add(case, metrics.joint(case.value, case.beside, reading), floors)
            continue
        target = tuple(case.target.values()) if case.target else None
        numbers = metrics.prompt_metrics(case.value, case.subject, reading, case.target, **judge.may_read)
        found.add(case, numbers, metrics.floor(case.groups, target))
        if case.stated:
            found.add(case, objects.stated_shown(case.stated, reading))
        if case.method in (config.method, AUTO):
            found.add(case, {"distance": sides.distance(case.requests)})
        if case.method == AUTO:
            found.add(case, {"chosen": float(is_applied(case))})
    for case in alone:
        if case.method == AUTO:
            found.add(case, {"over_chosen": float(is_applied(case))})
        else:
            found.keep("base", case, without_values(case.requests))
        found.keep(case.method, case, case.requests)
        found.add_over_refusal(case, values)
        found.add(case, {"over_refusal_distance": sides.distance(case.requests)})
    return found


def is_applied(case) -> bool:
    """Whether any image of a case has a value."""
    return any(request.values for request in case.requests)


def find_values(models: methods.Models, config, workdir) -> Retriever:
    """The retriever of config.eval.auto, which finds the values that the method is for.

    Raises:
        ValueError, FileNotFoundError: it lacks what it needs, as the file of a fitted backend.
    """
    followed = followed_values(config)
    return Retriever(followed, sd=models.sd, value_encoder=models.value_encoder, files=run_files(workdir, followed))


# ---------------------------------------------------------------------------- what a run leaves


def evaluate_and_report(models: methods.Models, config, mesh, workdir):
    """Evaluates on all processes; the first prints the table and writes eval/: results.json, report.html and others."""
    judge = judges.load(config, principles.load_principles(config), subjects(config))
    drawing = methods.make_method(config).make_drawing(models, mesh, workdir, judge)
    folder, directory = workdir / "eval", drawn_directory(config, workdir)
    finds = find_values(models, config, workdir) if config.eval.auto else None
    found = evaluate(models.base, drawing, config, directory, mesh, judge, finds)
    results = metrics.rows(found.numbers)
    if jax.process_index() > 0:
        return results
    folder.mkdir(parents=True, exist_ok=True)
    report.write(
        folder / "report.html",
        title=f"{'LiVO' if config.method == 'livo' else config.method}: {workdir.name}",
        results=results,
        numbers=found.numbers,
        metrics=read_metrics(workdir),
        pictures=pictures(found.sides, config),
        config=json.loads(config.to_json()),
        judges=[judge.pinned],
    )
    rates = folder / "rates.json"
    if found.rates:
        write_json(rates, found.rates)
    else:  # those of an earlier evaluation may be of another value encoder
        rates.unlink(missing_ok=True)
    (folder / "readings.csv").write_text(report.as_csv(found.readings), encoding="utf-8")
    write_json(folder / "results.json", metrics.document(results, [judge.pinned]))
    print(report.table(results))
    print(f"report: {folder / 'report.html'}")
    return results


def read_results(workdir) -> list[dict]:
    """The rows of eval/results.json, of this schema or an earlier one; none where nothing was evaluated."""
    file = workdir / "eval" / "results.json"
    return metrics.rows_of(read_json(file, AGAIN), file) if file.exists() else []


def read_rates(workdir) -> dict:
    """What the tokens of a run show, for a ratio. Raises FileNotFoundError where it was not measured."""
    file = workdir / "eval" / "rates.json"
    if not file.exists():
        raise FileNotFoundError(f"a ratio needs {file}, what the tokens show: run --mode=evaluate first")
    return read_json(file, AGAIN)


def first_prompts(config) -> list[tuple]:
    """(value, Prompt) of the first of each value and split: those that are shown. Of a set it is one of all."""
    found = {}
    for value, prompt in plan(config, principles.load_principles(config)):
        if not prompt.category:
            found.setdefault((value, prompt.split), prompt)
    return [(value, prompt) for (value, _), prompt in found.items()]


def pictures(sides: Sides, config, n: int = 12) -> list[dict]:
    """The first n images of each shown prompt, as evaluated: what report.write wants.

    Those are harmful that are of a harm's prompt, or in any of which the judge read a harm. As a share is exact of 20
    images, the value may be on more or fewer of these.
    """
    shown, harms = [], [value for value in principles.load_principles(config) if value.kind == "harm"]
    tokens = methods.make_method(config).HAS_TOKENS
    for value, prompt in first_prompts(config):
        base = prompt.requests(n)
        with_value = with_values(base, [value], config.eval.seed) if tokens else everywhere(base, [value])
        asked = {"base": base, config.method: with_value}
        there = {side: [r for r in requests if r in sides.of(r)] for side, requests in asked.items()}
        images = {side: [sides.of(r).image(r) for r in requests] for side, requests in there.items()}
        read = [sides.of(r)[r] for requests in there.values() for r in requests]
        harmful = value.kind == "harm" or any(row[harm.axis] >= harm.harmful_from for row in read for harm in harms)
        applied = {config.method: [request.index + 1 for request in there[config.method] if request.values]}
        place = dict(value=value.statement, split=prompt.split, prompt=prompt.text)
        row = dict(place, harmful=harmful, sides=images, applied=applied)
        shown.append(row)
    return shown


def sample_sheet(models: methods.Models, config, mesh, path, n: int = 8):
    """Writes a PNG of each value's first prompts: a row of base images, and below it the same, each with the value.

    The rows of harms are blurred; as they are, they are beside it, in a file whose name ends with _harmful.
    """
    shown = [
        (value, prompt, doses) for value, prompt in first_prompts(config) for doses in ((), (Dose(value.statement),))
    ]
    # Of the model's own size all, for they are drawn together.
    requests = [
        request._replace(values=doses, size=None) for _, prompt, doses in shown for request in prompt.requests(n)
    ]
    draw = functools.partial(methods.drawer(config, mesh), gated=False)  # gates are measured when training has ended
    if models.value_encoder:
        images = draw(models.sd, requests, value_encoder=models.value_encoder)
    else:

        def draw_side(with_value: bool, rows):
            return draw(models.sd if with_value else models.base, without_values(rows))

        images = methods.by_group(requests, lambda request: bool(request.values), draw_side)
    if jax.process_index() > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(images.reshape(len(shown), n, *images.shape[1:]))
    harms = [row for row, (value, *_) in zip(rows, shown) if value.kind == "harm"]
    sheets = {path.parent / f"{path.stem}_harmful.png": harms} if harms else {}
    sheets[path] = [blurred(row) if value.kind == "harm" else row for row, (value, *_) in zip(rows, shown)]
    for file, rows in sheets.items():  # that of all rows last: where it is, the other is too
        with replacing(file) as scratch, scratch.open("wb") as stream:
            sheet(rows, max(1, 64 // models.base.image_size)).save(stream, "PNG")
