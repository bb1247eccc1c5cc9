"""Builds a preference dataset from the frozen model itself, as the paper does.

    python -m data_tools.build_preferences --config=configs/tiny.py --out=DIR

The model draws candidates with explicit wordings, a judge keeps those that show what they should, and
each is stored under the prompt that does not say it:

    bias   aligned: an attribute that the model leaves out    violating: the one it favours
    harm   aligned: the prompt without the harmful wording    violating: the harmful prompt, same noise

DIR is a TFDS dataset in array_record; livo_jax/data.py reads it.
"""

import contextlib
import io
import itertools
import json
import pathlib
import shutil
import uuid
from collections import Counter, defaultdict
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from livo_jax import data, judges
from livo_jax import values as principles
from livo_jax.generate import Request, generate
from livo_jax.pretrained import StableDiffusion
from livo_jax.values import text_hash


class Candidate(NamedTuple):
    """An image to be drawn (`request`) for one side of a pair, stored under `prompt`."""

    value: principles.Value
    scene: str
    side: str  # "aligned" or "violating"
    shows: str  # bias: the attribute that must be seen
    prompt: str
    request: Request


def favoured(reading, values, scenes, n: int) -> dict:
    """(value name, scene) -> the attribute that most of the scene's n neutral images show.

    Raises:
        ValueError: scenes of which the judge reads none of the images; all are listed.
    """
    found, problems = {}, []
    for i, scene in enumerate(scenes):
        for value in values:
            counts = Counter(a for a in reading[value.axis][i * n : (i + 1) * n] if a in value.attributes)
            if counts:
                found[value.name, scene] = counts.most_common(1)[0][0]
            else:
                problems.append(f"{value.axis} of {scene}")
    if problems:
        raise ValueError(f"the judge reads in no neutral image the {', the '.join(problems)}")
    return found


def candidates(values, config, favourite: dict) -> list[Candidate]:
    """What to draw: for each value and scene, as many aligned images as violating ones."""
    c = config.preferences
    plan = []
    for value, scene in itertools.product(values, c.scenes):
        # At random: in step with the attributes, a template would tell the attribute.
        rng = np.random.default_rng([config.seed, text_hash(value.statement), text_hash(scene)])
        if value.kind == "bias":
            stereotype = favourite[value.name, scene]
            others = itertools.cycle(a for a in value.attributes if a != stereotype)
        for i in range(c.pairs_per_scene if value.kind == "bias" else c.harm_pairs_per_scene):
            template, wording = str(rng.choice(c.templates)), value.wordings[i % len(value.wordings)]
            neutral = template.format(scene)
            if value.kind == "bias":
                prompt = neutral
                shown = {"aligned": next(others), "violating": stereotype}
                sides = [
                    (side, attribute, template.format(wording.format(attribute=attribute, subject=scene)))
                    for side, attribute in shown.items()
                ]
            else:
                prompt = template.format(wording.format(subject=scene))
                sides = [("aligned", "", neutral), ("violating", "", prompt)]
            for side, shows, drawn in sides:
                request = Request(drawn, i, noise=prompt if value.kind == "harm" else "")
                plan.append(Candidate(value, scene, side, shows, prompt, request))
    return plan


def keep(candidate: Candidate, reading: dict, i: int, values) -> bool:
    """Whether image i shows what the candidate should: the subject, the attribute or the harm, and no other harm."""
    harms = {v.name: reading[v.axis][i] >= v.harmful_from for v in values if v.kind == "harm"}
    if reading["subject"][i] != candidate.scene:
        return False
    if candidate.value.kind == "bias":
        return reading[candidate.value.axis][i] == candidate.shows and not any(harms.values())
    wanted = {candidate.value.name} if candidate.side == "violating" else set()
    return {name for name, shown in harms.items() if shown} == wanted


def png(image: np.ndarray) -> io.BytesIO:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    stream.seek(0)
    return stream


def write(records: list[dict], blocks: list[data.Block], directory: pathlib.Path):
    """Writes records, in order, as a TFDS dataset that appears at `directory` whole or not at all."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # its bars count shards
    text, image = tfds.features.Text(), tfds.features.Image(shape=(None, None, 3), encoding_format="png")

    class Preferences(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="Preference pairs (prompt, value, aligned image, violating image) for LiVO.",
                features=tfds.features.FeaturesDict(
                    {name: image if name in ("aligned", "violating") else text for name in sorted(data.FEATURES)}
                ),
                metadata=tfds.core.MetadataDict(blocks=[block._asdict() for block in blocks]),
                disable_shuffling=True,  # the blocks are ranges of the order of writing
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(tqdm(records, desc="write", unit="pair"))

    scratch = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    try:
        builder = Preferences(data_dir=scratch, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # which speaks of downloads
            builder.download_and_prepare()
        pathlib.Path(builder.data_dir).rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def build(config, directory, sd: StableDiffusion | None = None):
    """Builds the dataset of config.preferences in `directory`.

    Raises:
        FileExistsError: the directory exists.
        ValueError: a value or scene of which the judge kept no image on one side.
    """
    directory = pathlib.Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists: remove it, or build into another --out")
    values = principles.load(config.principles)
    judge = judges.load(config.judge)
    sd = sd or StableDiffusion.from_pretrained(config.model, jnp.dtype(config.dtype), variant=config.variant or None)
    c = config.preferences
    draw = lambda requests, what: generate(
        sd, requests, seed=config.seed, description=what, **config.sampling.to_dict()
    )

    biases = [v for v in values if v.kind == "bias"]
    favourite = {}
    if biases:
        prompts = [c.templates[0].format(scene) for scene in c.scenes]
        census = [Request(prompt, i) for prompt in prompts for i in range(c.census_per_scene)]
        favourite = favoured(judge(draw(census, "census")), biases, c.scenes, c.census_per_scene)

    plan = candidates(values, config, favourite)
    requests = list(dict.fromkeys(candidate.request for candidate in plan))
    images = draw(requests, "candidates")
    reading, place = judge(images), {request: i for i, request in enumerate(requests)}
    sides = defaultdict(list)
    for candidate in plan:
        i = place[candidate.request]
        if keep(candidate, reading, i, values):
            sides[candidate.value.statement, candidate.scene, candidate.side].append((candidate, i))

    records, blocks, problems = [], [], []
    for value, scene in itertools.product(values, c.scenes):
        aligned, violating = (sides[value.statement, scene, side] for side in ("aligned", "violating"))
        if not aligned or not violating:
            problems.append(f"{value.statement}, {scene}: {len(aligned)} aligned, {len(violating)} violating")
            continue
        pairs = list(zip(aligned, itertools.cycle(violating)))
        blocks.append(data.Block(value.statement, scene, len(records), len(pairs)))
        for (a, i), (b, j) in pairs:
            provenance = {"aligned": a.request._asdict(), "violating": b.request._asdict(), "seed": config.seed}
            records.append(
                dict(prompt=a.prompt, value=value.statement, scene=scene, aligned=png(images[i]),
                     violating=png(images[j]), provenance=json.dumps(provenance))
            )  # fmt: skip
    if problems:
        raise ValueError("the judge kept too few candidates of\n  " + "\n  ".join(problems))
    write(records, blocks, directory)


def main(_):
    logging.set_verbosity(logging.WARNING)
    build(CONFIG.value, OUT.value)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "The config, with its section preferences.")
    OUT = flags.DEFINE_string("out", None, "The directory to write.")
    flags.mark_flags_as_required(["config", "out"])
    app.run(main)
