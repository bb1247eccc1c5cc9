"""Imports a preference dataset in the layout in which the authors of LiVO publish theirs.

    python -m data_tools.import_preferences --source=DIR_OR_TAR --out=DIR

The source, a folder or a tar of one, holds at any depth

    <type>/<scene>/metadata.jsonl    on each line {"label": ..., "prompt": str, "value": str, "file_name": str}

file_name is a PNG, JPEG or WebP, relative to the scene's folder; label (see LABELS) says on which side of a pair it
stands; value is the value's statement. A violating line needs no prompt, and no value: without one it is a partner
for all aligned lines of its folder, as the authors have it.

DIR becomes a dataset as data_tools/build_preferences.py makes them: the violating images of a value and scene are
partners for its aligned ones, in the order of the lines, the bytes of the images are stored as they are, and
README.md in it counts the pairs. A source with any fault is refused, and all faults are listed; hidden folders, as
.ipynb_checkpoints, are left out, and named. The same command after an interruption goes on where it stopped. Equal
sources give equal bytes.

A snapshot in a Hugging Face cache is made of links out of its folders, which are refused: download with --local-dir.
"""

import functools
import hashlib
import itertools
import json
import lzma
import os
import pathlib
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from absl import flags, logging
from tqdm import tqdm

from livo_jax import commands, data, files, judges
from livo_jax import values as principles
from livo_jax.data import dataset
from livo_jax.files import directories

LABELS = {  # to the authors 1 is aligned and every other number violating
    "aligned": ("positive", "pos", "aligned", "chosen", 1, True),
    "violating": ("negative", "neg", "violating", "rejected", 0, False),
}
TEXTS = ("prompt", "value", "file_name")
MAX_GB, MAX_MEMBERS = 200, 2_000_000  # of a tar; the authors' whole dataset is 86,000 pairs

# ---------------------------------------------------------------------------- the source


class Line(NamedTuple):
    """An image that a metadata.jsonl names."""

    type: str
    scene: str
    side: str  # "aligned" or "violating"
    prompt: str | None  # None: a violating image without
    value: str
    file: str  # relative to the source


class Source(NamedTuple):
    """What a source holds."""

    lines: list[Line]  # those without problems
    images: dict[str, str]  # every image that is there, relative to the source -> the first line that names it
    problems: list[str]  # but for images that cannot be used
    stray: int  # how many files no metadata.jsonl names
    hidden: list[str]  # folders that are left out, relative to the source
    sha256: str  # over the metadata and the sizes of the images


def parse(entry: dict) -> tuple[dict, list[str]]:
    """A line's {side, prompt, value, file_name}, each None where it cannot be used, and what is wrong with the line."""
    found, problems = dict.fromkeys(("side", *TEXTS)), []
    label = entry.get("label")
    side = next((side for side, labels in LABELS.items() if label in labels), None)
    side = found["side"] = side or ("violating" if isinstance(label, int) else None)
    if side == "violating":  # null and "" are none, too
        entry = {key: x for key, x in entry.items() if x or key not in ("prompt", "value")}
    needed = ("label", "file_name") if side == "violating" else ("label", *TEXTS)
    problems += [f"no {key}" for key in needed if key not in entry]
    for key in (key for key in TEXTS if key in entry):
        if fault := files.text_fault(entry[key]):
            problems.append(f"{key} {fault}")
        elif not entry[key].strip():
            problems.append(f"{key} is empty")
        else:
            found[key] = entry[key] if key == "file_name" else files.tidy(entry[key])
    if "label" in entry and not side:
        known = ", ".join(json.dumps(label) for label in itertools.chain(*LABELS.values()))
        problems.append(f"unknown label {label!r}: known are {known} and, for violating, other whole numbers")
    return found, problems


def misplaced(folder: pathlib.Path, name: str) -> str:
    """Why there is no file of this name in the folder; "" if there is."""
    path = pathlib.PurePath(name)
    inside = pathlib.Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder))
    if path.is_absolute() or ".." in path.parts or not inside:
        return "leaves its folder"
    if any(files.is_hidden(part) for part in path.parent.parts):
        return "is in a hidden folder"
    if os.path.isfile(folder / name):
        return ""
    return "is missing" + files.spelled_otherwise(name, _below(folder))


@functools.cache  # many may be missing
def _below(folder: pathlib.Path) -> dict[str, str]:
    return files.by_spelling(os.path.relpath(path, folder) for path in folder.rglob("*"))


def walk(root: pathlib.Path) -> tuple[list[pathlib.Path], int, list[str], list[str]]:
    """The folders with a metadata.jsonl below `root`, how many files there are, the hidden folders, which are left out
    with all that is in them, and what cannot be looked into."""
    scenes, count, hidden, problems = [], 0, [], []
    for folder, folders, names in os.walk(root, onerror=lambda error: problems.append(str(error))):
        hidden += [os.path.relpath(os.path.join(folder, name), root) for name in folders if files.is_hidden(name)]
        folders[:] = [name for name in folders if not files.is_hidden(name)]  # os.walk goes on in these
        linked = (os.path.join(folder, name) for name in folders)
        problems.extend(
            f"{link} is a link to a folder, which is not followed" for link in linked if os.path.islink(link)
        )
        count += len(names)
        if "metadata.jsonl" in names:
            scenes.append(pathlib.Path(folder))
    return sorted(scenes), count, sorted(hidden), problems


def read_source(root: pathlib.Path) -> Source:
    """Reads all metadata below a folder, and looks whether the images are there."""
    lines, images, digest = [], {}, hashlib.sha256()
    named, blocks = {}, {}  # real path, value -> the line; (value, scene) -> its first line, Counter of sides
    scenes, count, hidden, problems = walk(root)
    if not scenes:
        problems.append("there is no metadata.jsonl")
    for folder in tqdm(scenes, desc="read", unit="scene"):
        where = folder.relative_to(root)
        if len(where.parts) < 2 or files.text_fault(str(where)):
            problems.append(f"{str(where / 'metadata.jsonl')!r} is not <type>/<scene>/metadata.jsonl below the source")
            continue
        *_, kind, scene = where.parts
        try:
            metadata = (folder / "metadata.jsonl").read_bytes()
        except OSError as error:
            problems.append(f"{where}/metadata.jsonl: {error.strerror}")
            continue
        digest.update(metadata)
        rows = files.json_rows(metadata, where / "metadata.jsonl", problems)
        parsed = [(number, *parse(row)) for number, row in rows]
        if not metadata.strip():  # a download that broke off: without a word the scene would be missing
            problems.append(f"{where}/metadata.jsonl is empty: fetch it again, or remove it")
        aligned = (found["value"] for _, found, _ in parsed if found["side"] == "aligned")
        stated = list(dict.fromkeys(value for value in aligned if value))
        for number, found, wrong in parsed:
            place = f"{where}/metadata.jsonl:{number}"
            side, prompt, value, name = found.values()
            values = [value] if value else stated if side == "violating" else []
            if side == "violating" and not values and not wrong:
                wrong.append("no value, and no aligned line of this folder has one")
            for value in values if side else ():
                blocks.setdefault((value, scene), (place, Counter()))[1][side] += 1
            if name:
                path = os.path.realpath(folder / name)
                if fault := misplaced(folder, name):
                    wrong.append(f"{name} {fault}")
                elif again := [named[path, value] for value in values if (path, value) in named]:
                    wrong.append(f"{name} is named already in {again[0]}, for the same value")
                else:
                    named.update({(path, value): place for value in values})
                    images.setdefault(f"{where}/{name}", place)
                    digest.update(f"{where}/{name} {os.path.getsize(path)}\n".encode())
            if wrong:
                problems += [f"{place}: {problem}" for problem in wrong]
            else:
                lines += [Line(kind, scene, side, prompt, value, f"{where}/{name}") for value in values]
    for (value, scene), (place, sides) in blocks.items():
        if len(sides) < 2:
            counts = ", ".join(f"{sides[side]} {side}" for side in data.SIDES)
            problems.append(f"{place}: {value}, {scene}: {counts}; both are needed")
    stray = count - len(scenes) - len({path for path, _ in named})
    return Source(lines, images, problems, stray, hidden, digest.hexdigest())


def unusable(path: pathlib.Path) -> str:
    """Why an image cannot be used; "" if it can."""
    try:
        image = files.read_image(path)
    except (OSError, ValueError) as error:
        return f"cannot be used: {error}"
    if judges.uniform(np.asarray(image)[None])[0]:
        return "cannot be used: it has one colour all over: draw or fetch it again, or remove its line"
    return ""


def check_source(root: pathlib.Path, source: Source):
    """Raises ValueError that lists the problems of a source, images that cannot be used included."""
    with ThreadPoolExecutor() as pool:
        faults = pool.map(unusable, [root / file for file in source.images])
        faults = list(tqdm(faults, desc="check", unit="image", total=len(source.images)))
    named = zip(source.images.items(), faults)
    problems = source.problems + [f"{place}: {file} {fault}" for (file, place), fault in named if fault]
    if problems:
        raise ValueError("this source cannot be imported:\n  " + "\n  ".join(problems))


# ---------------------------------------------------------------------------- tars


def file_sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, tqdm(desc="hash", unit="B", unit_scale=True, total=path.stat().st_size) as progress:
        while piece := file.read(2**22):
            digest.update(piece)
            progress.update(len(piece))
    return digest.hexdigest()


def extract(archive: pathlib.Path, folder: pathlib.Path, max_gb: float, max_members: int):
    """Extracts a tar to `folder`, whole or not at all.

    Raises:
        ValueError: it is damaged, or larger than it may be, or members are not plain files and folders inside it.
    """
    if zipfile.is_zipfile(archive):
        raise ValueError(f"{archive} is a zip archive, and tar is read: unpack it, and give its folder")
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    problems, size, member = [], 0, None
    try:
        with tarfile.open(archive) as tar, tqdm(desc="extract", unit="file") as progress:
            for member in tar:
                progress.update()
                size += member.size
                if progress.n > max_members or size > max_gb * 1e9:
                    problems.append(
                        f"{member.name!r} is member {progress.n}, at {size / 1e9:.3g} GB: more than"
                        f" --max_members={max_members} or --max_gb={max_gb} allows"
                    )
                    break
                # The filter takes a leading slash away; and with links, those of Python before 3.11.13 and
                # 3.12.11 can be led out of the folder. The layout needs none.
                if os.path.isabs(member.name):
                    problems.append(f"{member.name!r} has an absolute name")
                elif member.issym() or member.islnk():
                    problems.append(f"{member.name!r} is a link, to {member.linkname!r}")
                else:
                    try:
                        tar.extract(member, scratch, set_attrs=False, filter="data")
                    except tarfile.FilterError as error:
                        problems.append(f"{member.name!r}: {error}")
            else:
                # tarfile takes whatever is no header for the end; the end is a block of zeros.
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("cut short or damaged")
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None) in directories.FULL:  # no fault of the tar
            raise
        problems.append(f"{f'at or after {member.name!r}' if member else 'as a tar'}: {error}")
    if problems:
        raise ValueError(f"{archive} cannot be extracted:\n  " + "\n  ".join(problems))
    scratch.rename(folder)


# ---------------------------------------------------------------------------- the import


def pair(lines: list[Line]) -> tuple[list[tuple[Line, Line]], list[data.Block], list[int]]:
    """Pairs (aligned, violating), Blocks that partition them, and how many violating images each block had."""
    groups = defaultdict(lambda: {side: [] for side in data.SIDES})
    for line in lines:
        groups[line.value, line.scene][line.side].append(line)
    pairs, blocks, violating = [], [], []
    for (value, scene), sides in sorted(groups.items()):
        blocks.append(data.Block(value, scene, len(pairs), len(sides["aligned"])))
        violating.append(len(sides["violating"]))
        pairs += zip(sides["aligned"], itertools.cycle(sides["violating"]))
    return pairs, blocks, violating


def card(blocks: list[data.Block], violating: list[int]) -> str:
    """The dataset's README.md: what it holds, by value and scene."""
    per_value = Counter()
    for block in blocks:
        per_value[block.value] += block.count
    return "\n".join(
        [
            "# Preference pairs",
            "",
            f"{per_value.total()} pairs (prompt, value, aligned image, violating image), imported by"
            " data_tools/import_preferences.py; config.json tells from where.",
            "",
            *(f"- {value}: {n}" for value, n in per_value.items()),
            "",
            "| value | scene | pairs | violating images | of which left out |",
            "|---|---|---|---|---|",
            *(
                f"| {b.value} | {b.scene} | {b.count} | {n} | {max(n - b.count, 0)} |"
                for b, n in zip(blocks, violating)
            ),
            "",
        ]
    )


def report(source: Source, blocks: list[data.Block], violating: list[int]):
    """Prints what is no fault and yet worth a look."""
    if source.hidden:
        print(f"hidden folders are left out: {', '.join(source.hidden)}")
    if source.stray:
        print(f"{source.stray} files are left out: no metadata.jsonl names them")
    if surplus := sum(max(n - block.count, 0) for block, n in zip(blocks, violating)):
        print(f"{surplus} violating images are left out: their value and scene have fewer aligned ones")
    known = {table["statement"] for table in principles.read_tables().values()}
    for value in sorted({block.value for block in blocks} - known):
        print(
            f"the value {value!r} is no statement in {principles.PRINCIPLES.name}: for training, add a table with it"
            " there, or mend its wording in the source and import again"
        )


def build(source, directory, max_gb: float = MAX_GB, max_members: int = MAX_MEMBERS):
    """Imports `source`, a folder or a tar, as the dataset `directory`, from where an earlier start of it stopped.

    Raises:
        FileExistsError: the directory is something else, or another process builds it now.
        FileNotFoundError: there is no source.
        OSError: the disk is full.
        ValueError: what is wrong with the source; all is listed.
    """
    source, directory = (pathlib.Path(path).absolute() for path in (source, directory))
    if not source.exists():
        raise FileNotFoundError(f"--source={source} is neither a folder nor a tar: there is nothing")
    found = read_source(source) if source.is_dir() else None
    config = {"source": str(source), "sha256": found.sha256 if found else file_sha256(source)}
    with dataset.under_construction(directory, config) as work:
        if work is None:
            print(f"{directory} is finished: to import it again, remove it")
            return
        root, checked = source, work / "checked"
        try:
            if not found:
                root = work / "source"
                if not root.exists():
                    extract(source, root, max_gb, max_members)
                found = read_source(root)
            if not checked.exists():
                check_source(root, found)
                checked.touch()
        except ValueError:
            shutil.rmtree(work)  # once mended, it is another source
            raise
        pairs, blocks, violating = pair(found.lines)
        report(found, blocks, violating)

        def record(k):
            a, b = pairs[k]
            return dict(
                prompt=a.prompt, value=a.value, scene=a.scene,
                aligned=(root / a.file).read_bytes(), violating=(root / b.file).read_bytes(),
                provenance=json.dumps({"aligned": a.file, "violating": b.file, "type": a.type}),
            )  # fmt: skip

        dataset.write(work, directory, record, blocks, {"README.md": card(blocks, violating)})


def main(_):
    logging.set_verbosity(logging.WARNING)
    build(SOURCE.value, OUT.value, LARGEST.value, MOST.value)


if __name__ == "__main__":
    SOURCE = commands.define_path("source", "The folder, or the tar of it, to import.")
    OUT = commands.define_path("out", "The directory to write.")
    LARGEST = flags.DEFINE_float("max_gb", MAX_GB, "What a tar may hold, uncompressed.", lower_bound=0)
    MOST = flags.DEFINE_integer("max_members", MAX_MEMBERS, "How many files and folders a tar may hold.", lower_bound=0)
    flags.mark_flags_as_required(["source", "out"])
    commands.run(main)
