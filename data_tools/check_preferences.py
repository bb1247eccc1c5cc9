"""Reports what a preference dataset holds, and what is wrong with it.

    python -m data_tools.check_preferences --data=DIR --against=DIR2 --config=configs/tiny.py --out=SHEETS

Errors, after which the exit status is 1: images that do not decode or have one colour all over, pairs of the same
picture twice, and leakage, that is scenes or prompts that DIR2 has too or that config.eval holds out. Duplicates are
counted, no more: build_preferences itself repeats violating images where a scene has fewer of them than aligned ones.
Sheets of harms are blurred, and so are those of values that principles.toml does not know, but for --show_unknown.
"""

import hashlib
import itertools
import json
import pathlib
import re
import statistics
from collections import Counter, defaultdict

import imagehash
import numpy as np
from absl import flags, logging
from ml_collections import config_flags
from PIL import Image, ImageOps
from tqdm import tqdm

from livo_jax import commands, data, files, judges
from livo_jax.files.images import blurred, sheet
from livo_jax.values.principles import PRINCIPLES, read_tables, text_hash

FEW = 3  # examples of duplicates; the smallest scenes; the commonest sizes
WORDS = r"(?<!\w)(?:{})(?!\w)"  # a pattern of texts that are no part of a longer word
COLUMNS, ROW_PAIRS, LARGEST = 12, 4, 128  # of a contact sheet; pixels of an image in it


def read_record(source, i: int):
    """Record i, the images of its sides that decode to their end, and the errors."""
    images, problems = {}, []
    try:
        record = source[i]
    except ValueError as error:
        return {}, images, [f"record {i}, aligned and violating: {error.__cause__}"]
    for side in data.SIDES:
        try:
            images[side] = files.read_image(record[side])
        except ValueError as error:
            problems.append(f"record {i}, {side}: {error}")
            continue
        if judges.uniform(np.asarray(images[side])[None])[0]:
            problems.append(f"record {i}, {side}: it has one colour all over: build or import the pairs without it")
    return record, images, problems


def attribute_shown(provenance: bytes, side: str) -> str:
    """The attribute that an image shows, by the record's provenance: "-" for none (harm), "unknown" if not told."""
    try:
        return str(json.loads(provenance)[f"{side}_shows"]) or "-"
    except (ValueError, KeyError, TypeError):  # the provenance of imported pairs is any text
        return "unknown"


def check(preferences: data.Preferences, against=None, held_out=(), least_distance=4) -> tuple[list[str], list[str]]:
    """Reads every record, one at a time.

    Args:
        against: Preferences that should share no scene and no prompt with these, or None.
        held_out: subjects that should be no scene and stand in no prompt.
        least_distance: bits of 64; near duplicates are images of a block and side whose hashes differ in fewer.

    Returns:
        The lines of the report, and the errors, each a line.
    """
    source, problems, leaks, identical = preferences.source, [], {}, 0  # leaks: what -> the first record that has it
    pairs, labels, twins, sizes = defaultdict(Counter), defaultdict(Counter), defaultdict(list), Counter()
    unseen, theirs = [subject.casefold() for subject in held_out], set()
    if against:
        theirs |= {("scene", block.scene.casefold()) for block in against.blocks}
        for i in tqdm(range(len(against.source)), desc="against", unit="pair"):
            theirs.add(("prompt", against.source[i]["prompt"].decode().casefold()))

    progress = tqdm(total=len(source), desc="check", unit="pair")
    for block in preferences.blocks:
        pairs[block.value][block.scene] += block.count
        scene = block.scene.casefold()
        first = {side: {} for side in data.SIDES}  # digest of an image file -> the first record that has it
        hashes = {side: np.zeros(block.count, np.uint64) for side in data.SIDES}  # perceptual ones, in this order
        for i in range(block.start, block.start + block.count):
            progress.update()
            record, images, found = read_record(source, i)
            problems += found
            if not record:
                continue
            prompt = record["prompt"].decode()
            for kind, text in ("scene", block.scene), ("prompt", prompt):
                if (kind, text.casefold()) in theirs:
                    leaks.setdefault(f"the {kind} {text!r} is in {against.directory} too", i)
            if scene in unseen:
                leaks.setdefault(f"the scene {block.scene!r} is held out", i)
            # Beside its own scene: a nurse practitioner is not the held-out nurse.
            rest = re.sub(WORDS.format(re.escape(scene)), "", prompt.casefold())
            if unseen and (name := re.search(WORDS.format("|".join(map(re.escape, unseen))), rest)):
                leaks.setdefault(f"the prompt {prompt!r} names {name[0]!r}, which is held out", i)
            for side, image in images.items():
                labels[block.value, side][attribute_shown(record["provenance"], side)] += 1
                sizes[f"{image.width}x{image.height}"] += 1
                digest, n = hashlib.sha256(record[side]).digest(), len(first[side])
                if digest in first[side]:
                    twins[side, "byte-identical"].append((i, first[side][digest]))
                    continue
                bits = hashes[side][n] = np.uint64(int(str(imagehash.phash(image)), 16))
                near = np.flatnonzero(np.bitwise_count(hashes[side][:n] ^ bits) < least_distance)
                twins[side, "near"] += [(i, list(first[side].values())[k]) for k in near[:1]]
                first[side][digest] = i
            if len(images) == 2 and len({(image.size, image.tobytes()) for image in images.values()}) == 1:
                problems.append(f"record {i}: the aligned and the violating image are the same picture")
                identical += 1
    progress.close()

    lines = [f"{preferences.directory}: {len(source)} pairs", "", "pairs of each value"]
    for value, scenes in pairs.items():
        fewest, counts = sorted(scenes.items(), key=lambda item: item[1])[:FEW], scenes.values()
        middle = f"min {min(counts)}, median {statistics.median(counts):g}, max {max(counts)}"
        lines.append(
            f"  {value}: {scenes.total()}; of each of {len(scenes)} scenes {middle}; fewest: {_listed(fewest)}"
        )
    lines += ["", f"images: {sizes.total()} of {2 * len(source)} decode; pairs of the same picture twice: {identical}"]
    lines += [f"  of {len(sizes)} sizes, most: {_listed(sizes.most_common(FEW))}"]
    lines += ["", f"images like an earlier one of value, scene and side (near: under {least_distance} of 64 bits)"]
    for side, kind in itertools.product(data.SIDES, ("byte-identical", "near")):
        found = twins[side, kind]
        examples = ", ".join(f"{i} like {earlier}" for i, earlier in found[:FEW])
        lines.append(f"  {side}, {kind}: {len(found)} ({len(found) / len(source):.1%}) {examples}".rstrip())
    lines += ["", "what the images show"]
    lines += [f"  {value}, {side}: {_listed(counts.most_common())}" for (value, side), counts in labels.items()]
    where = ([str(against.directory)] if against else []) + (["config.eval.held_out"] if unseen else [])
    lines += ["", f"scenes and prompts of {' and '.join(where)}: {len(leaks)}" if where else "leakage: not looked for"]
    return lines, problems + [f"record {i}: {leak}" for leak, i in leaks.items()]


def _listed(counts) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts)


def sheets(preferences: data.Preferences, out: pathlib.Path, show_unknown: bool = False) -> list[str]:
    """Writes a contact sheet of each value, aligned above violating; returns a line about each.

    That of a harm is blurred; as it is, it is beside it, in a file whose name ends with _harmful. That of a value which
    principles.toml does not know is blurred, since it may be a harm, unless `show_unknown` says otherwise.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines, names = [], set()
    kinds = {table["statement"]: table["kind"] for table in read_tables().values()}
    for value in dict.fromkeys(block.value for block in preferences.blocks):
        records = [i for b in preferences.blocks if b.value == value for i in range(b.start, b.start + b.count)]
        chosen = np.linspace(0, len(records) - 1, min(len(records), COLUMNS * ROW_PAIRS)).astype(int)
        images = {side: [] for side in data.SIDES}
        for i in chosen:
            _, found, _ = read_record(preferences.source, records[i])
            for side in data.SIDES:  # made small at once: there may be a hundred, of any size
                image = found.get(side, Image.new("RGB", (1, 1)))  # black: check tells why
                images[side].append(ImageOps.fit(image, (min(LARGEST, *image.size),) * 2))
        size = max(image.width for side in data.SIDES for image in images[side])
        rows = [
            [np.asarray(ImageOps.fit(image, (size, size))) for image in images[side][k : k + COLUMNS]]
            for k in range(0, len(chosen), COLUMNS)
            for side in data.SIDES
        ]
        name = re.sub("[^a-z0-9]+", "_", value.lower()).strip("_")[:100]
        if not name or name in names:  # of another script, or another value's but for its punctuation
            name += f"_{text_hash(value):08x}"
        names.add(name)
        scale = max(1, 64 // size)
        line = f"{out / name}.png: {len(chosen)} pairs of {value}, aligned above violating"
        kind = kinds.get(value, "bias" if show_unknown else "unknown")
        if kind == "harm":
            sheet(rows, scale).save(out / f"{name}_harmful.png")
        if kind == "unknown":
            line += f"; blurred, for {PRINCIPLES.name} does not know the value: --show_unknown shows it"
        if kind != "bias":
            rows = [blurred(row) for row in rows]
        sheet(rows, scale).save(out / f"{name}.png")
        lines.append(line)
    return lines


def main(_):
    logging.set_verbosity(logging.WARNING)
    preferences = data.Preferences(DATA.value)
    against = data.Preferences(AGAINST.value) if AGAINST.value else None
    held_out = CONFIG.value.eval.held_out if CONFIG.value is not None else ()
    lines, problems = check(preferences, against, held_out, LEAST_DISTANCE.value)
    if OUT.value:
        lines += ["", *sheets(preferences, pathlib.Path(OUT.value), SHOW_UNKNOWN.value)]
    lines += ["", f"errors: {len(problems)}", *(f"  {problem}" for problem in problems)]
    print("\n".join(lines))
    return int(bool(problems))


if __name__ == "__main__":
    DATA = commands.define_path("data", "The dataset.")
    AGAINST = commands.define_path("against", "Another, which should share no scene and no prompt with it.")
    OUT = commands.define_path("out", "Where to put a contact sheet of each value.")
    SHOW_UNKNOWN = flags.DEFINE_bool(
        "show_unknown", False, "Whether sheets of values that principles.toml does not know are not blurred."
    )
    LEAST_DISTANCE = flags.DEFINE_integer("least_distance", 4, "Bits of 64 below which two images are near duplicates.")
    CONFIG = config_flags.DEFINE_config_file("config", None, "A config, whose eval.held_out should not occur.")
    flags.mark_flag_as_required("data")
    commands.run(main, flags_parser=commands.parse)
