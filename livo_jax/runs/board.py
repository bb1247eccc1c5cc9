"""A comparison's board: what is wrong with it and what it costs, beforehand; and the card and tables that it leaves."""

import copy
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import shutil
import subprocess
import tomllib

import jax
import numpy as np

from livo_jax import judges, methods, sharding, values
from livo_jax.evaluation import board, cases, metrics, objects, prompt_sets
from livo_jax.files.settings import flatten
from livo_jax.judges import hash_files
from livo_jax.runs import attack, check, evaluate, plan, trainings
from livo_jax.runs.further import Further, load_networks, load_readers
from livo_jax.sampling.requests import has_own_row, without_values

FIELDS = ("judges", "quality")  # of a comparison, that make it a board
PACKAGES = (  # whose versions the card has
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "transformers", "safetensors",
)  # fmt: skip
IMAGES_PER_PROMPT = ("images_per_prompt", "harm_images_per_prompt", "left_alone_images")
DEFINITION = (  # the fields of a value that numbers depend on
    "statement", "kind", "axis", "attributes", "wordings", "aligned", "harmful_from", "highest", "keep_probability",
)  # fmt: skip
PLACE = ("method", "value", "split", "prompt", "index", "applied")  # of a reading
AGREEMENT = ("judge", "other", "value", "reads", "method")  # of two judges


def is_board(comparison) -> bool:
    return all(field in comparison for field in FIELDS)


# ---------------------------------------------------------------------------- before it starts


def check_board(comparison, configs: dict):
    """Raises ValueError with all that is wrong with a board and shows before anything is drawn.

    Each judge reads one image of noise, but `vlm`, whose questions cost: so it shows which axes it reads.
    """
    first, noise, problems = copy.deepcopy(next(iter(configs.values()))), None, problems_of_methods(configs)
    first.eval.prompts = readable_prompts(first)  # without the others the rest is looked at
    problems += check.problems_of(lambda: load_networks(**comparison.quality.to_dict()))
    try:
        side = plan.abstract_model(first).image_size
        noise = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    except (ValueError, FileNotFoundError) as error:
        problems += [f"config.model: {text}" for text in check.apart(str(error))]
    unknown = check.problem_of(values.load_principles, first)
    if not unknown:
        for told in check.problem_of(_try_judge, first, noise):
            problems += [f"config.judge: {text}" for text in check.apart(told)]
        problems += check.problems_of(_try_readers, comparison, first, noise)
    check.fail_with(list(dict.fromkeys(problems + unknown)))


def problems_of_methods(configs: dict) -> list[str]:
    """What is wrong with the methods of a comparison, and shows without a model."""
    first = next(iter(configs.values()))
    mesh, problems = sharding.make_mesh(**first.mesh), check.problems_of(prompt_sets.check, first)
    for own in configs.values():
        problems += check.problems_of(check.check_config, own, mesh) if own.train.steps else []
    return list(dict.fromkeys(problems))  # they have many in common


def readable_prompts(config) -> tuple[str, ...]:
    """Those of config.eval.prompts whose sets are here, and can be read."""
    one, readable = copy.deepcopy(config), []
    for entry in config.eval.prompts:
        one.eval.prompts = (entry,)
        if not check.problem_of(prompt_sets.check, one):
            readable.append(entry)
    return tuple(readable)


def stand_in(config, folder) -> dict[str, int]:
    """Puts prompts of no meaning in the place of sets that cannot be read, so that their cost can be told.

    A set has as many as its limit; without one its entry of config.eval.prompts is left out.

    Args:
        folder: where their files are written.

    Returns:
        How many there are of each such entry, 0 of one that is left out.
    """
    readable, missing = readable_prompts(config), {}
    for entry in config.eval.prompts:
        if entry in readable:
            continue
        name = entry.partition("=")[2]
        chosen = config.eval.prompt_sets.get(name)
        missing[entry] = chosen.limit if chosen else 0
        if missing[entry]:
            file = folder / f"{name}.txt"
            file.write_text("".join(f"{name} {k}\n" for k in range(chosen.limit)), encoding="utf-8")
            empty = dict.fromkeys(("repo", "sha256", "template", "subject", *prompt_sets.PARSERS), "")
            chosen.update(empty | {"file": str(file), "column": "prompt"})
    config.eval.prompts = tuple(entry for entry in config.eval.prompts if missing.get(entry, 1))
    return missing


def _try_judge(config, noise):
    judge = judges.load(config, values.load_principles(config), evaluate.subjects(config))
    if config.judge == "vlm" or noise is None:
        return
    reading = judge(noise)
    for name, composition in config.eval.compositions.to_dict().items():
        stated = {axis: x for axis, x in composition.items() if axis != "wording"}
        wanted = stated.get(objects.OBJECTS)
        if wanted and (found := objects.faults(wanted) or objects.unread([wanted], judge)):
            raise ValueError("\n".join(f"compositions: {name}: {problem}" for problem in found))
        objects.stated_shown(stated, reading)


def _try_readers(comparison, config, noise):
    for reader in load_readers(comparison, config):
        if reader.config.judge != "vlm" and noise is not None:
            reading = reader.judge(noise)
            for stated in reader.states.values():
                objects.stated_shown(stated, reading)


def passes(requests, sampling) -> int:
    """Of the UNet, to draw them: for the prompt, the negative prompt, and each value that has a row of its own."""
    guided = sampling.guidance_scale > 1
    own_rows = sum(has_own_row(dose, sampling.gated) for request in requests for dose in request.values)
    return sampling.steps * (len(requests) * (1 + guided) + own_rows)


def cost(comparison, configs: dict) -> str:
    """What a comparison or a board will cost, as if nothing of it were there: images, passes of the UNet, bytes.

    Of attacks the search, which is most of them. Bytes are told where the model's configs are there.
    """
    first = next(iter(configs.values()))
    lines, base = [], {}
    for name, own in configs.items():
        own = copy.deepcopy(own)
        evaluate.drop_rates(own)
        asked = evaluate.requests_asked(*evaluate.ask(own))
        base |= dict.fromkeys(without_values(asked))
        drawn = [request for request in asked if request.values]
        times = trainings.count_of(own, comparison)
        pairs = own.train.steps * own.train.batch_size
        lines.append((name, times * np.array([len(drawn), passes(drawn, own.sampling), pairs])))
    lines.insert(0, ("base", np.array([len(base), passes(base, first.sampling), 0])))
    lines.append(("all, at least", sum(counts for _, counts in lines)))
    total = lines[-1][1][0]
    told = [f"{'':20}{'images':>12}{'UNet passes':>16}{'pairs trained on':>18}"]
    told += [f"{name:20}{images:>12,}{evaluations:>16,}{pairs:>18,}" for name, (images, evaluations, pairs) in lines]
    for search in comparison.get("attacks", ()):
        of_base, *ways = (attack.by_search(own, search) for own in (first, *configs.values()))
        attacked = [own for own in ways if attack.is_attacked(own)]
        sought = attack.passes(of_base) + sum(
            attack.passes(own) * trainings.count_of(own, comparison) for own in attacked
        )
        told.append(f"attacks by {search}: {sought:,} UNet passes")
    further = comparison.get("judges")  # of a board
    several = f", by {len(further)} further judges too" if further else ""
    told.append(f"readings: {total:,}{several}")
    try:
        sd = plan.abstract_model(first)
    except (ValueError, FileNotFoundError):
        told.append(f"bytes: not known without the configs of {first.model}")
    else:
        pixels = plan.si(total * sd.image_size**2 * 3, "B").strip()
        weights = plan.si(sum(plan.size(part) for part in methods.weights_of(sd)), "B").strip()
        told.append(f"bytes: {pixels} of images at most, {weights} of weights for each model in memory")
    told.append("pairs that are not there are drawn first")
    return "\n".join(told)


# ---------------------------------------------------------------------------- what it leaves


def not_measured(comparison, config, found: Further) -> list[str]:
    """What the board leaves out, and what it would need. found: of any method."""
    told = []
    if not found.agreement:
        told.append("agreement of judges: no two of them read one value in the same images, as nudity=nudity")
    if not comparison.quality.inception:
        told.append("FID and KID: config.quality.inception and config.quality.reference are empty")
    if not comparison.quality.clip:
        told.append("CLIPScore: config.quality.clip is empty")
    if not config.eval.left_alone_images:
        told.append("over-refusal and quality: eval.left_alone_images is 0")
    of_first = any(composition.keys() - {"wording"} for composition in config.eval.compositions.to_dict().values())
    if not of_first and not any(entry.get("states") for entry in comparison.judges.values()):
        told.append("counts, attributes and relations: no composition and no judge states any")
    return told


def make_card(comparison, found: Further, judge: dict) -> dict:
    """All that was pinned, for JSON. Arguments: found: of any method; the first judge's `pinned`."""
    configs = comparison.methods
    compared_with = "livo" if "livo" in configs else next(iter(configs))
    first = configs[compared_with]
    fields = {name: flatten(json.loads(own.to_json())) for name, own in configs.items()}
    of_first = fields[compared_with]
    return {
        "versions": versions(),
        "computed_on": {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind},
        "model": first.model,
        "dtype": first.dtype,
        "quantised": first.quantised,
        "base": found.drawn,  # with the sha256 of its arrays
        "values": {
            value.name: {field: list(x) if isinstance(x := getattr(value, field), tuple) else x for field in DEFINITION}
            for value in values.load_principles(first)
        },
        "judges": {first.judge: judge, **found.pinned},
        "reads": {name: list(entry.reads) for name, entry in comparison.judges.items()},
        "states": {name: json.loads(entry.to_json()).get("states", {}) for name, entry in comparison.judges.items()},
        "harmful_from": [
            {"judge": judge, "value": value, "harmful_from": least}
            for (judge, value), least in (least_of_first(first) | found.harmful_from).items()
        ],
        "prompt_sets": prompt_sets.describe(first),
        "images_per_prompt": {kind: first.eval[kind] for kind in IMAGES_PER_PROMPT},
        "methods": {
            name: {
                "steps": own.train.steps,
                "seeds": [own.seed + n for n in range(trainings.count_of(own, comparison))],
                f"unlike_{compared_with}": {
                    field: x for field, x in fields[name].items() if field not in of_first or x != of_first[field]
                },
            }
            for name, own in configs.items()
        },
        "subjects": {"seen": list(first.eval.seen), "held_out": list(first.eval.held_out)},
        "quality": {field: _pin(given) for field, given in comparison.quality.items() if given},
        "not_measured": not_measured(comparison, first, found),
    }


def versions() -> dict[str, str]:
    """Of Python, livo_jax and the packages that are installed of those that it computes with.

    Of a checkout there is the commit too, with "-dirty" where files differ from it.
    """
    found = {"python": platform.python_version()}
    for package in ("livo_jax", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # as of a checkout, which says itself
            continue
    root = pathlib.Path(__file__).parents[2]
    if (root / "pyproject.toml").is_file():
        found["livo_jax"] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if (root / ".git").exists() and shutil.which("git"):
        describe = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found["commit"] = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return found


def least_of_first(config) -> dict[tuple[str, str], float]:
    """By the first judge and each harm's statement, the least score that it calls harmful."""
    harms = (value for value in values.load_principles(config) if value.kind == "harm")
    return {(config.judge, value.statement): value.harmful_from for value in harms}


def _pin(place: str) -> dict:
    """A file or folder, with its sha256; a folder's is that of its files' names and sha256."""
    path = pathlib.Path(place).expanduser()
    if not path.exists():
        return {"hub": place}
    hashes = hash_files(sorted(file for file in ([path] if path.is_file() else path.iterdir()) if file.is_file()))
    if path.is_dir():
        hashes = {path.name: hashlib.sha256(json.dumps(hashes).encode()).hexdigest(), "files": len(hashes)}
    return hashes


def write(folder, title: str, results: list[dict], costs: list[dict], further: dict, card: dict) -> dict:
    """Writes board.csv, board.md, board.tex, card.json, agreement.json, and the readings of the further judges.

    Readings that are there of judges that the board has no more are removed.

    Args:
        results: the first judge's rows. further: {method: its Further}.

    Returns:
        What report.write takes as `board`.
    """
    first_judge, *_ = card["judges"]
    rows = [row | {"judge": first_judge} for row in results]
    numbers, sets, agreement, readings = {}, {}, {}, {}  # the base's are in those of every method: once
    for method, of in further.items():
        for judge, of_judge in of.numbers.items():
            numbers.setdefault(judge, {}).update(cases.beside_others(method, of_judge))
        for row in of.sets:
            sets[row["method"], row["value"], row["split"], row["metric"]] = row | {"judge": ""}
        for row in of.agreement:
            row = row | {"method": cases.name_beside_others(method, row["method"])}
            agreement[tuple(row[name] for name in AGREEMENT)] = row
        for judge, of_judge in of.readings.items():
            for row in of_judge:
                row = row | {"method": cases.name_beside_others(method, row["method"])}
                readings.setdefault(judge, {})[tuple(row[name] for name in PLACE)] = row
    for judge, of_judge in numbers.items():
        base_first = dict(sorted(of_judge.items(), key=lambda of: of[0][0] != "base"))  # stable
        of_judge = metrics.rows(base_first) + board.rows_over_categories(base_first)
        rows += [row | {"judge": judge} for row in of_judge]
    rows += list(sets.values())
    rows.sort(key=lambda row: row["method"] != "base")  # stable
    least = {(of["judge"], of["value"]): of["harmful_from"] for of in card["harmful_from"]}
    tables = board.tables(rows + board.rows_of_costs(costs), least)
    texts = {
        "board.csv": board.as_rows(tables),
        "board.md": board.as_markdown(tables, title, card),
        "board.tex": board.as_latex(tables),
        "card.json": json.dumps(card, indent=2) + "\n",
        "agreement.json": json.dumps(list(agreement.values()), indent=2) + "\n",
    }
    texts |= {f"readings_{judge}.csv": board.as_csv([*of.values()]) for judge, of in readings.items()}
    for file in folder.glob("readings_*.csv"):
        if file.name not in texts:
            file.unlink()
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    return {
        "tables": board.for_page(tables), "agreement": list(agreement.values()), "card": card, "files": texts,
        "further": list(readings),
    }  # fmt: skip
