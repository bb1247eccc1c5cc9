"""Building preference pairs: candidates, what a judge keeps of them, and the dataset.

data_tools/build_preferences.py is the command, and tells how pairs are made.
"""

import dataclasses
import io
import itertools
import json
import math
import pathlib
import types
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import imagehash
import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from livo_jax import data, judges, seeds, sharding
from livo_jax import values as principles
from livo_jax.data import dataset, word_lists
from livo_jax.data.rewording import reworded
from livo_jax.files.modules import read_dtype
from livo_jax.processes import ending_together
from livo_jax.runs import check, restore
from livo_jax.runs.attacked_pairs import attacked_prompts, read_found
from livo_jax.sampling.generate import generate, settings_of_base
from livo_jax.sampling.requests import Request
from livo_jax.sampling.stable_diffusion import StableDiffusion
from livo_jax.values.principles import phrase, text_hash


class Candidate(NamedTuple):
    """An image to be drawn (`request`) for one side of a pair, stored under `prompt`."""

    value: principles.Value
    scene: str
    side: str  # "aligned" or "violating"
    shows: str  # bias: the attribute that must be seen
    prompt: str
    request: Request
    attacked: bool = False  # whether an attack found the prompt


def pairs_per_scene(value: principles.Value, config) -> int:
    return config.preferences.pairs_per_scene if value.kind == "bias" else config.preferences.harm_pairs_per_scene


def scenes(value: principles.Value, config) -> tuple[str, ...]:
    """The subjects of a value's pairs: config.preferences.scenes or, where it is empty, those seen of its sources.

    Raises:
        ValueError: the value's sources are none, or are not to be had.
    """
    if config.preferences.scenes:
        return tuple(config.preferences.scenes)
    try:
        return tuple(word_lists.split(word_lists.words(value.sources))[0])
    except ValueError as error:
        raise ValueError(f"config.preferences.scenes is empty, and for the sources of {value.name}, {error}") from None


def values_and_scenes(values, config) -> list[tuple[principles.Value, str]]:
    return [(value, scene) for value in values for scene in scenes(value, config)]


def census(values, config) -> dict[str, int]:
    """The scenes of all biases, and their places in the census, which draws neutral images of each of them once."""
    of_biases = (scene for value, scene in values_and_scenes(values, config) if value.kind == "bias")
    return {scene: place for place, scene in enumerate(dict.fromkeys(of_biases))}


def favoured(reading, values, config) -> dict:
    """(name of a bias, scene) -> the attribute that most of the scene's neutral images show, where any can be read."""
    found, n = {}, config.preferences.census_per_scene
    places = census(values, config)
    for value, scene in values_and_scenes([v for v in values if v.kind == "bias"], config):
        start = places[scene] * n
        counts = Counter(a for a in reading[value.axis][start : start + n] if a in value.attributes)
        if counts:
            found[value.name, scene] = counts.most_common(1)[0][0]
    return found


def candidates(values, config, favourite: dict, attacked=types.MappingProxyType({})) -> list[Candidate]:
    """What to draw: as many images of each side for each value and scene, of biases those that `favourite` has.

    Args:
        attacked: of harms further prompts, as attacked_prompts gives them.
    """
    c = config.preferences
    plan = []
    for value, scene in values_and_scenes(values, config):
        rng = np.random.default_rng([config.seed, text_hash(value.statement), text_hash(scene)])
        templates = rng.permutation(c.templates).tolist()
        stereotype = favourite.get((value.name, scene))
        if value.kind == "bias" and not stereotype:
            continue
        others = [attribute for attribute in value.attributes if attribute != stereotype] or [""]
        for i in range(math.ceil(pairs_per_scene(value, config) * c.candidates_per_pair)):
            turn, place = divmod(i, len(others))
            # One for all of a turn: of a few pairs, templates of their own would tell the attribute.
            template, wording = templates[turn % len(templates)], value.wordings[turn % len(value.wordings)]
            if value.kind == "bias":
                prompt = phrase(template, scene)
                shown = {"aligned": others[place], "violating": stereotype}
                sides = [
                    (side, attribute, phrase(template, wording.format(attribute=attribute, subject=scene)))
                    for side, attribute in shown.items()
                ]
            else:
                prompt = phrase(template, wording.format(subject=scene))
                sides = [
                    ("aligned", "", phrase(template, value.aligned.format(subject=scene))),
                    ("violating", "", prompt),
                ]
            for side, shows, drawn in sides:
                negative = value.negative if side == "aligned" else ""
                request = Request(drawn, i, negative=negative, noise=prompt if value.kind == "harm" else "")
                plan.append(Candidate(value, scene, side, shows, prompt, request))
        for neutral, prompt in attacked.get((value.statement, scene), ()):
            harmless = reworded(neutral, scene, value.aligned)
            for i in range(math.ceil(c.candidates_per_pair)):
                aligned = Request(harmless, i, negative=value.negative, noise=prompt)
                plan.append(Candidate(value, scene, "aligned", "", prompt, aligned, attacked=True))
                plan.append(Candidate(value, scene, "violating", "", prompt, Request(prompt, i), attacked=True))
    return plan


def fault(candidate: Candidate, reading: dict, i: int, values) -> str:
    """Why image i does not show what it should: subject, attribute or harm, and no other harm; "" where it does.

    A judge that reads no subjects takes every image for one of its subject.
    """
    if "subject" in reading and (subject := reading["subject"][i]) != candidate.scene:
        return f"subject '{subject}'"
    if candidate.value.kind == "bias" and (shown := reading[candidate.value.axis][i]) != candidate.shows:
        return f"{candidate.value.axis} '{shown}' instead of '{candidate.shows}'"
    for value in (v for v in values if v.kind == "harm"):
        if np.isnan(reading[value.axis][i]):
            return "unreadable"
        wanted = candidate.side == "violating" and candidate.value.name == value.name
        if (reading[value.axis][i] >= value.harmful_from) != wanted:
            return f"{value.axis} {reading[value.axis][i]}, {'not ' if wanted else ''}harmful"
    return ""


class Drawn(NamedTuple):
    """Judged images: `png[i]` is a file's bytes, `reading` what the judge read and a perceptual `hash`, arrays [N]."""

    png: Sequence[bytes]
    reading: dict[str, np.ndarray]


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def draw(folder: pathlib.Path, requests: list[Request], sd, judge, config) -> Drawn:
    """Draws and judges images, in files of `folder`; each process draws its share of those that are not there.

    A file's name tells what it was asked for: what an earlier version was asked for is not taken for it.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    folder.mkdir(exist_ok=True)
    size, mesh = config.preferences.images_per_file, sharding.make_local_mesh()
    chunks = [requests[start : start + size] for start in range(0, len(requests), size)]
    names = [f"{k:05d}-{text_hash(repr(chunk)):08x}" for k, chunk in enumerate(chunks)]
    images_of, reading_of = ([folder / f"{name}.{kind}" for name in names] for kind in ("images", "json"))
    mine = dataset.my_share(len(chunks))
    missing = [k for k in mine if not reading_of[k].exists()]
    total, left = (sum(len(chunks[k]) for k in which) for which in (mine, missing))
    bar = tqdm(total=total, initial=total - left, desc=folder.name, unit="image")
    with ending_together(), bar as progress:
        for k in missing:
            images = generate(sd, chunks[k], seed=config.seed, mesh=mesh, **config.sampling.to_dict())
            reading = {axis: column.tolist() for axis, column in judge(images).items()}
            reading["hash"] = [str(imagehash.phash(Image.fromarray(image))) for image in images]
            dataset.write_whole(images_of[k], map(png, images))
            dataset.write_whole(reading_of[k], json.dumps(reading))
            progress.update(len(images))
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in reading_of]
    reading = {axis: np.concatenate([part[axis] for part in parts]) for axis in parts[0]}
    return Drawn(ArrayRecordDataSource([str(file) for file in images_of]), reading)


class Pair(NamedTuple):
    """Two kept candidates of a value and scene, and the numbers of their images."""

    aligned: Candidate
    violating: Candidate
    images: tuple[int, int]


def balanced(kept: list[tuple[Candidate, int]], n: int) -> list[tuple[Candidate, int]]:
    """At most n of the kept, in their order, of each attribute as many as of the others where there are as many."""
    groups = defaultdict(list)
    for place, (candidate, _) in enumerate(kept):
        groups[candidate.shows].append(place)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
    return [kept[place] for place in sorted([place for place in turns if place is not None][:n])]


def difference(a: Candidate, b: Candidate) -> int:
    """Of two images of a scene: 0 where prompt and index are one, and perhaps the noise; 1: the prompt; 2: neither."""
    if a.prompt != b.prompt:
        return 2
    return int(a.request.index != b.request.index)


def matched(aligned: list[tuple[Candidate, int]], violating: list[tuple[Candidate, int]]) -> list[tuple]:
    """Each of the aligned with the violating one that differs least beside the value: of several the least used."""
    uses, pairs = Counter(), []
    for candidate, i in aligned if violating else ():
        order = [(difference(candidate, other), uses[j]) for other, j in violating]
        nearest = violating[order.index(min(order))]
        uses[nearest[1]] += 1
        pairs.append(((candidate, i), nearest))
    return pairs


def pair(plan: list[Candidate], images: dict, reading: dict, values, config):
    """Chooses the pairs.

    Args:
        images: Request -> the number of its image in `reading`.

    Returns:
        Pairs; data.Blocks that partition them; for each candidate the reason why it is not used, or "". A scene of
        which no candidate is left on one side has none: a warning says so, the card lists it.

    Raises:
        ValueError: values that are left without a pair, and why.
    """
    c, reasons, groups = config.preferences, [], defaultdict(list)
    hashes = [int(text, 16) for text in reading["hash"]]
    for candidate in plan:
        i = images[candidate.request]
        group = groups[candidate.value.name, candidate.scene, candidate.side]
        reason = fault(candidate, reading, i, values)
        if not reason:
            near = (kept for kept, j in group if (hashes[i] ^ hashes[j]).bit_count() < c.least_distance)
            if twin := next(near, None):
                reason = f"looks like {twin.request.prompt!r}, {twin.request.index}"
            else:
                group.append((candidate, i))
        reasons.append(reason)

    pairs, blocks, problems, used = [], [], [], set()
    for value, scene in values_and_scenes(values, config):
        n = pairs_per_scene(value, config)
        kept = [groups[value.name, scene, side] for side in data.SIDES]
        aligned, violating = ([k for k in side if not k[0].attacked] for side in kept)
        # An attacked prompt's images are for each other: where one of them is not kept, the prompt has no pair.
        of_prompts = [{(k.prompt, k.request.index): (k, i) for k, i in side if k.attacked} for side in kept]
        attacked = [(of_prompts[0][key], of_prompts[1][key]) for key in of_prompts[0] if key in of_prompts[1]]
        others = matched(balanced(aligned, n), violating)
        turns = itertools.chain.from_iterable(itertools.zip_longest(others, attacked))
        chosen = [both for both in turns if both is not None][:n]
        if not chosen:
            dropped = Counter(r for k, r in zip(plan, reasons) if r and (k.value, k.scene) == (value, scene))
            why = ", ".join(f"{times} times {reason}" for reason, times in dropped.most_common(3))
            why = why or f"no neutral image's {value.axis} can be read"
            problems.append(f"{value.statement}, {scene}: {len(aligned)} aligned, {len(violating)} violating: {why}")
            continue
        blocks.append(data.Block(value.statement, scene, len(pairs), len(chosen)))
        pairs += [Pair(a, b, (i, j)) for (a, i), (b, j) in chosen]
        used.update(candidate for both in chosen for candidate, _ in both)
    if problems:
        advice = (
            "the judge kept too few candidates: raise config.preferences.candidates_per_pair, reword the value in"
            " principles.toml, or take the scenes out of config.preferences.scenes\n  " + "\n  ".join(problems)
        )
        if {value.statement for value in values} - {block.value for block in blocks}:
            raise ValueError(advice)
        logging.warning("%d scenes are without pairs; %s", len(problems), advice)
    return pairs, blocks, [r or ("" if k in used else "over the quota") for k, r in zip(plan, reasons)]


def card(pairs: list[Pair], blocks: list[data.Block], values, config) -> str:
    """The dataset's README.md: what it holds, by value, scene and attribute."""
    there = {(block.value, block.scene) for block in blocks}
    asked = [(value.statement, scene) for value, scene in values_and_scenes(values, config)]
    empty = [f"- without pairs: {value}, {scene}" for value, scene in asked if (value, scene) not in there]
    per_value, rows = Counter(), []
    for block in blocks:
        per_value[block.value] += block.count
        mine = pairs[block.start : block.start + block.count]
        shown = [Counter(getattr(p, side).shows for p in mine) for side in data.SIDES]
        cells = [", ".join(f"{attribute or '-'} {n}" for attribute, n in counts.items()) for counts in shown]
        rows.append(f"| {block.value} | {block.scene} | {block.count} | {cells[0]} | {cells[1]} |")
    return f"""# Preference pairs

{len(pairs)} pairs (prompt, value, aligned image, violating image), drawn by
{config.preferences.model or config.model} with seed {config.seed}, judged by {config.judge}. config.json tells how,
audit.jsonl what was kept and why.

{chr(10).join([f"- {value}: {n}" for value, n in per_value.items()] + empty)}

| value | scene | pairs | aligned images show | violating images show |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def audit(plan: list[Candidate], reasons: list[str], images: dict, reading: dict) -> str:
    """A JSON line for each candidate: what was drawn, what was read, and why it is not used; "" where it is."""
    lines = []
    for candidate, reason in zip(plan, reasons):
        read = {axis: column[images[candidate.request]].item() for axis, column in reading.items()}
        read = {axis: None if x != x else x for axis, x in read.items()}  # JSON has no nan
        line = candidate._asdict() | {"value": candidate.value.statement, "request": candidate.request._asdict()}
        lines.append(json.dumps(line | {"read": read, "dropped": reason}) + "\n")
    return "".join(lines)


def made_of(config, values) -> dict:
    """All that the pairs depend on, as JSON values."""
    whole = json.loads(config.to_json())
    whole["sampling"] = settings_of_base(whole["sampling"])
    judging = whole["judging"]
    named = ["model", "subject", *(name for name in ("labels", "unspecified") if judging[name])]  # as builds of before
    named += ["classes", "detected_from"] if config.judge == "detector" else []
    whole["judging"] = {name: judging[name] for name in named}
    fields = "seed model variant dtype judge judging sampling preferences".split()
    fields += [name for name in ("loras", "quantised") if config[name]]  # as builds of before
    tables = json.loads(json.dumps({value.name: dataclasses.asdict(value) for value in values}))
    # What the sources come to is in the scenes; the others are the metrics' and the retriever's.
    for table in tables.values():
        for field in (
            "sources",
            "highest",
            "keywords",
            "exceptions",
            "stated",
            "descriptions",
            "auto",
            "score",
            "reason",
        ):
            table.pop(field, None)
    if attacks := whole["preferences"].pop("attacks"):  # as builds of before
        files = [pathlib.Path(file).expanduser() for file in attacks]
        whole["preferences"]["attacks"] = [judges.hash_files([file])[file.name] for file in files]
    whole["preferences"]["scenes"] = whole["preferences"]["scenes"] or {v.name: list(scenes(v, config)) for v in values}
    return {name: whole[name] for name in fields} | {"principles": tables}


def build(config, directory, sd: StableDiffusion | None = None):
    """Builds the dataset of config.preferences in `directory`, from where an earlier start of it stopped.

    Raises:
        FileExistsError: the directory is something else, or another process builds it now.
        OSError: the disk is full.
        ValueError: a value without scenes; a value or scene of which the judge kept no image on one side; files of
            config.preferences.attacks that cannot be used.
    """
    directory = pathlib.Path(directory).expanduser().absolute()
    check.fail_with([*seeds.problems(config), *check.problems_of_section(config, "preferences")])
    values = principles.load_principles(config)
    found = read_found(config)
    judge = judges.load(config, values, list(dict.fromkeys(s for value in values for s in scenes(value, config))))
    with dataset.under_construction(directory, made_of(config, values)) as work:
        if work is None:
            print(f"{directory} is finished: to build it again, remove it")
            return
        c, favourite = config.preferences, {}
        if sd is None or c.model:
            model, variant = c.model or config.model, config.variant or None
            sd = StableDiffusion.from_pretrained(model, read_dtype(config.dtype, "config.dtype"), variant=variant)
            if not c.model:
                restore.adapt(sd, config)
        of_harms = {(v.statement, scene) for v, scene in values_and_scenes(values, config) if v.kind == "harm"}
        attacked = attacked_prompts(found, of_harms, config, sd.tokenizer)
        if neutral := [phrase(c.templates[0], scene) for scene in census(values, config)]:
            requests = [Request(prompt, i) for prompt in neutral for i in range(c.census_per_scene)]
            reading = draw(work / "census", requests, sd, judge, config).reading
            favourite = favoured(reading, values, config)
        plan = candidates(values, config, favourite, attacked)
        requests = list(dict.fromkeys(candidate.request for candidate in plan))
        images = {request: i for i, request in enumerate(requests)}
        drawn = draw(work / "candidates", requests, sd, judge, config) if plan else Drawn((), {"hash": []})
        pairs, blocks, reasons = pair(plan, images, drawn.reading, values, config)

        def record(k):
            a, b, (i, j) = pairs[k]
            provenance = {"aligned": a.request._asdict(), "violating": b.request._asdict(), "seed": config.seed}
            provenance |= {"aligned_shows": a.shows, "violating_shows": b.shows}
            return dict(
                prompt=a.prompt, value=a.value.statement, scene=a.scene, aligned=drawn.png[i], violating=drawn.png[j],
                provenance=json.dumps(provenance),
            )  # fmt: skip

        files = {"README.md": card(pairs, blocks, values, config)}
        files["audit.jsonl"] = audit(plan, reasons, images, drawn.reading)
        dataset.write(work, directory, record, blocks, files)
