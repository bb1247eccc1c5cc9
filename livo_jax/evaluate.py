"""How biased and how harmful images are, with LiVO and without: metrics with confidence intervals."""

import itertools
import json
from typing import NamedTuple

import jax
import numpy as np

from livo_jax import judges, metrics, report
from livo_jax import ratio as ratios
from livo_jax import values as principles
from livo_jax.generate import Dose, Request, generate, requests_of, with_values

RATE_IMAGES = 10  # of each seen prompt and arm: what a token shows is told by 160 images


def prompts(config, value=None) -> list[tuple[str, str, str]]:
    """The (split, subject, prompt) of the evaluation, in the wordings of a harm or, without one, neutral."""
    wordings = value.wordings if value and value.kind == "harm" else ("{subject}",)
    return [
        (split, subject, principles.phrase(config.eval.template, wordings[i % len(wordings)].format(subject=subject)))
        for split in ("seen", "held_out")
        for i, subject in enumerate(config.eval[split])
    ]


def plan(config, values) -> list[tuple]:
    """What is evaluated: (value, split, subject, prompt), for each wording of a harm."""
    return [(value, *row) for value in values for row in prompts(config, value)]


class Case(NamedTuple):
    """A prompt's images, to be measured under a value."""

    name: str  # under which the results have it: the value's statement, or that with what is studied of it
    method: str  # "base", "livo", or "plain": as "livo", without what is studied
    value: principles.Value
    split: str
    subject: str
    requests: list[Request]
    target: dict[str, float] | None = None


def images_of(value: principles.Value, config) -> int:
    return config.eval.images_per_prompt if value.kind == "bias" else config.eval.harm_images_per_prompt


def cases(config, values) -> list[Case]:
    """What is measured: each value and, where the config says so, every two of them.

    "A + B" is measured under A, on prompts in the wordings of the one that is a harm; "plain" is A alone.
    """
    found = []

    def add(name, value, rows, **methods):
        for (split, subject, prompt), (method, applied) in itertools.product(rows, methods.items()):
            base = [Request(prompt, i) for i in range(images_of(value, config))]
            requests = with_values(base, applied, config.eval.seed)
            found.append(Case(name, method, value, split, subject, requests))

    for value in values:
        add(value.statement, value, prompts(config, value), base=[], livo=[value])
    for a, b in itertools.permutations(values, 2) if config.eval.combinations else ():
        rows = prompts(config, a if a.kind == "harm" else b)
        add(f"{a.statement} + {b.statement}", a, rows, base=[], plain=[a], livo=[a, b])
    return found


def of_strengths(config, values, shares) -> list[Case]:
    """Cases of config.eval.strengths, with the value on every image; "plain" is LiVO's, 1.

    Args:
        shares: shares(value, requests) -> {attribute: share}: a bias's TV is the distance from the base's.
    """
    found = []
    for strength, value in itertools.product(config.eval.strengths, values):
        for split, subject, prompt in prompts(config, value):
            base = [Request(prompt, i) for i in range(images_of(value, config))]
            target = shares(value, base) if value.kind == "bias" else None
            for method, dose in {"base": 0.0, "plain": 1.0, "livo": strength}.items():
                requests = [r._replace(values=(Dose(value.statement, dose),) if dose else ()) for r in base]
                name = f"{value.statement} x {strength:g}"
                found.append(Case(name, method, value, split, subject, requests, target))
    return found


def of_ratios(config, values, rates: dict) -> list[Case]:
    """Cases of config.eval.ratios, all values of a ratio applied at once; "plain" is each alone by keep probability."""
    found, n, seed = [], config.eval.images_per_prompt, config.eval.seed
    rows = [row for row in prompts(config) for _ in range(n)]
    base = requests_of([prompt for *_, prompt in rows])
    for ratio in config.eval.ratios:
        targets = ratios.targets(ratio, rates, list(rates))
        dealt = requests_of([r.prompt for r in base], [[*targets]] * len(base), seed, ratio, rates)
        for statement, target in targets.items():
            value = principles.find(statement, values)
            sides = {"base": base, "plain": with_values(base, [value], seed), "livo": dealt}
            for k, (method, requests) in itertools.product(range(0, len(rows), n), sides.items()):
                name, (split, subject, _) = f"{statement}, ratio {ratio}", rows[k]
                found.append(Case(name, method, value, split, subject, requests[k : k + n], target))
    return found


def arms(value: principles.Value, config) -> dict[str, list[Request]]:
    """The requests that tell what each arm of a bias (ratio.py) shows, of the seen prompts."""
    texts = ["", value.statement]
    if config.data.attributes:
        texts += [principles.attributed(value.statement, attribute) for attribute in value.attributes]
    seen = [prompt for split, _, prompt in prompts(config) if split == "seen"]
    doses = {text: (Dose(text),) if text else () for text in texts}
    return {text: [Request(prompt, i, doses[text]) for prompt in seen for i in range(RATE_IMAGES)] for text in texts}


def evaluate(sd, value_encoder, config, mesh=None) -> tuple[list[dict], dict, dict]:
    """Measures the base and LiVO on the same prompts and noise.

    A bias value is applied to Value.keep_probability of the images; the others are the base's own, so
    they are drawn once for both methods and all values.

    Returns:
        The rows of results.json; the rates of rates.json: {statement of a bias: {arm: {attribute: share}}}, over the
        seen prompts' images that can be read; and the images: Request -> [H, W, 3] uint8.
    """
    values = principles.load(config.principles)
    judge = judges.load(config, values, list(dict.fromkeys([*config.eval.seen, *config.eval.held_out])))
    images, read = {}, {}

    def draw(requests):
        new = list(dict.fromkeys(r for r in requests if r not in images))
        dosed = lambda r: any(dose.strength not in (0, 1) for dose in r.values)  # these cost the UNet more
        for part in (itertools.filterfalse(dosed, new), filter(dosed, new)):
            if part := list(part):
                drawn = generate(
                    sd, part, value_encoder, seed=config.eval.seed, mesh=mesh, description="evaluate",
                    **config.sampling.to_dict(),
                )  # fmt: skip
                reading = judge(drawn)
                images.update(zip(part, drawn))
                read.update((r, {axis: x[i] for axis, x in reading.items()}) for i, r in enumerate(part))

    reading = lambda requests: {axis: np.array([read[r][axis] for r in requests]) for axis in read[requests[0]]}

    def shares(value, requests):
        counts = [int(np.sum(reading(requests)[value.axis] == attribute)) for attribute in value.attributes]
        return {attribute: n / max(1, sum(counts)) for attribute, n in zip(value.attributes, counts)}

    measured = cases(config, values)
    of_arms = {value: arms(value, config) for value in values if value.kind == "bias"}
    draw(
        itertools.chain(*(case.requests for case in measured), *(r for rows in of_arms.values() for r in rows.values()))
    )
    rates = {v.statement: {arm: shares(v, r) for arm, r in rows.items()} for v, rows in of_arms.items()}
    further = of_strengths(config, values, shares) + of_ratios(config, values, rates)
    draw(itertools.chain(*(case.requests for case in further)))

    numbers = {}  # (method, name, split, metric) -> prompt -> the number, and of how many images it is
    for case in measured + further:
        found = metrics.prompt_metrics(case.value, case.subject, reading(case.requests), case.target)
        for metric, number in found.items():
            of_prompt = numbers.setdefault((case.method, case.name, case.split, metric), {})
            of_prompt[case.requests[0].prompt] = number, len(case.requests)
    return metrics.rows(numbers), rates, images


def table(results: list[dict]) -> str:
    """The results as text: a line for each value, split and metric, base beside LiVO, and what there is of "plain"."""
    cells = {(r["value"], r["split"], r["metric"], r["method"]): r for r in results}
    show = lambda r: f"{r['mean']:.3f} [{r['ci95'][0]:.3f}, {r['ci95'][1]:.3f}]" if r else ""
    columns = {"base": "base", "livo": "LiVO"} | ({"plain": "plain"} if any(k[-1] == "plain" for k in cells) else {})
    width = max(len(value) for value, *_ in cells) + 2
    lines = [f"{'value':{width}}{'split':10}{'metric':12}" + "".join(f"{title:>24}" for title in columns.values())]
    for value, split, metric, method in cells:
        if method == "base":
            shown = (show(cells.get((value, split, metric, column))) for column in columns)
            lines.append(f"{value:{width}}{split:10}{metric:12}" + "".join(f"{cell:>24}" for cell in shown))
    return "\n".join(lines)


# ---------------------------------------------------------------------------- what a run leaves


def evaluate_and_report(sd, value_encoder, config, mesh, workdir):
    """Evaluates on all processes; the first prints the table and writes results.json, rates.json and report.html."""
    results, rates, images = evaluate(sd, value_encoder, config, mesh)
    if jax.process_index() > 0:
        return results
    folder = workdir / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    log = workdir / "metrics.jsonl"
    report.write(
        folder / "report.html",
        title=f"LiVO: {workdir.name}",
        results=results,
        metrics=[json.loads(line) for line in log.read_text().splitlines()] if log.exists() else [],
        pictures=pictures(images, config),
        config=json.loads(config.to_json()),
    )
    (folder / "rates.json").write_text(json.dumps(rates, indent=2) + "\n")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    print(f"report: {folder / 'report.html'}")
    return results


def read_results(workdir) -> list[dict]:
    """The rows of eval/results.json; none where nothing was evaluated."""
    file = workdir / "eval" / "results.json"
    return json.loads(file.read_text()) if file.exists() else []


def read_rates(workdir) -> dict:
    """What the tokens of a run show, for a ratio. Raises FileNotFoundError where it was not measured."""
    file = workdir / "eval" / "rates.json"
    if not file.exists():
        raise FileNotFoundError(f"a ratio needs {file}, what the tokens show: run --mode=evaluate first")
    return json.loads(file.read_text())


def first_prompts(config) -> list[tuple]:
    """(value, split, prompt) of the first prompt of each value and split: those that are shown."""
    found = {}
    for value, split, _, prompt in plan(config, principles.load(config.principles)):
        found.setdefault((value, split), prompt)
    return [(value, split, prompt) for (value, split), prompt in found.items()]


def pictures(images: dict, config, n: int = 12) -> list[dict]:
    """The first n images of each shown prompt, as evaluated: what report.write wants."""
    shown = []
    for value, split, prompt in first_prompts(config):
        base = [Request(prompt, i) for i in range(n)]
        both = [pair for pair in zip(base, with_values(base, [value], config.eval.seed)) if images.keys() >= {*pair}]
        sides = {side: [images[r] for r in requests] for side, requests in zip(("base", "livo"), zip(*both))}
        shown.append(dict(value=value.statement, split=split, prompt=prompt, **sides))
    return shown


def sample_sheet(sd, value_encoder, config, mesh, path, n: int = 8):
    """Writes a PNG of each value's first prompts: a row of base images, and below it the same with the value."""
    requests = [
        [Request(prompt, i, doses) for i in range(n)]
        for value, _, prompt in first_prompts(config)
        for doses in ((), (Dose(value.statement),))
    ]
    images = generate(
        sd, sum(requests, []), value_encoder, seed=config.eval.seed, mesh=mesh, **config.sampling.to_dict()
    )
    if jax.process_index() > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = report.sheet(list(images.reshape(len(requests), n, *images.shape[1:])), max(1, 64 // sd.image_size))
    with path.open("wb") as file:
        picture.save(file, "PNG")
