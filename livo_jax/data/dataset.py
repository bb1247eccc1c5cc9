"""Writes preference datasets: TFDS in array_record, in shards, by one process or many.

A dataset grows in a folder beside its place and moves there when it is whole. Every file in that folder
is whole too, so that a build that was killed at any moment goes on from the files that it left.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable

import jax
from tqdm import tqdm

from livo_jax.data.preferences import FEATURES, SIDES, Block
from livo_jax.files import directories, settings
from livo_jax.processes import ending_together

SHARD_SIZE = 1024  # records


def my_share(n: int) -> range:
    """Which of n pieces of work are this process's."""
    return range(jax.process_index(), n, jax.process_count())


@contextlib.contextmanager
def held(work: pathlib.Path):
    """Makes the folder `work` where it is not there, and keeps other commands out of it: directories.held.

    Raises:
        FileExistsError: another process holds it.
        OSError: the disk is full; and whatever else is raised within.
    """
    try:
        with directories.held(work):
            yield
    except (OSError, RuntimeError) as error:  # array_record names no type of its own
        if not any(os.strerror(number) in str(error) for number in directories.FULL):
            raise
        raise OSError(f"no space left for {work}: {error}. Free some and run the same command again") from error


@contextlib.contextmanager
def under_construction(directory: pathlib.Path, config: dict):
    """Yields the folder in which the dataset `directory` grows, or None where it is finished.

    Args:
        config: JSON values: all that the dataset depends on.

    Raises:
        FileExistsError: `directory`, or what grew of it, is made of something else, and of what; or
            another process is building it.
        OSError: the disk is full.
    """
    work = directory.with_name(f".{directory.name}.partial")

    def check(place):
        file = place / "config.json"
        if not file.exists():
            raise FileExistsError(f"{place} exists and was not built here: remove it, or build into another --out")
        if found := settings.differences(json.loads(file.read_text(encoding="utf-8")), config):
            raise FileExistsError(
                f"{place} is made of another config: remove it, or build into another --out\n  " + "\n  ".join(found)
            )

    with ending_together():
        finished = directory.exists()
        if finished:
            check(directory)
    if finished:
        yield None
        return
    with held(work):
        with ending_together():
            if jax.process_index() == 0 and not (work / "config.json").exists():
                write_whole(work / "config.json", json.dumps(config, indent=2))
        check(work)
        yield work


def write_whole(path: pathlib.Path, content: Iterable[bytes] | str):
    """Writes a text, or records as an array_record file, that appears at `path` whole or not at all."""
    scratch = path.with_name(f".{path.name}")
    if isinstance(content, str):
        try:
            scratch.write_text(content, encoding="utf-8")
        except OSError as error:  # of a full disk it names no file
            raise OSError(f"{path} cannot be written: {error}") from error
    else:
        write_array_record(scratch, content)
    os.replace(scratch, path)


def write_array_record(path: pathlib.Path, records: Iterable[bytes]):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write(work: pathlib.Path, directory: pathlib.Path, record: Callable[[int], dict], blocks: list[Block], files: dict):
    """Writes the shards that `work` lacks, each process its share, and moves the dataset to `directory`.

    Args:
        work: of under_construction.
        record: record(i) is the i-th {prompt, value, scene, provenance: str; aligned, violating: bytes of
            an image file}.
        blocks: partition the records, in order.
        files: further texts of the dataset, name -> content.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    text, image = tfds.features.Text(), tfds.features.Image(shape=(None, None, 3))
    features = tfds.features.FeaturesDict({name: image if name in SIDES else text for name in sorted(FEATURES)})
    serializer = ExampleSerializer(features.get_serialized_info())
    count = sum(block.count for block in blocks)
    total = -(-count // SHARD_SIZE)
    dataset, notes = work / "dataset", work / "shards"
    for folder in (dataset, notes):
        folder.mkdir(exist_ok=True)

    def examples(shard, digest):
        for i in range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, count)):
            columns = {name: io.BytesIO(x) if name in SIDES else x for name, x in record(i).items()}
            example = serializer.get_tf_example(features.encode_example(columns))
            example = example.SerializeToString(deterministic=True)  # the order of a map's keys is a process' own
            digest.update(example)
            yield example

    def write_shards():
        for shard in tqdm(my_share(total), desc="write", unit="shard"):
            note = notes / f"{shard:05d}.json"
            file = dataset / f"preferences-train.array_record-{shard:05d}-of-{total:05d}"
            if not note.exists():
                digest = hashlib.sha256()
                write_whole(file, examples(shard, digest))
                facts = {"sha256": digest.hexdigest(), "bytes": file.stat().st_size}
                write_whole(note, json.dumps(facts))

    def finish():
        facts = [json.loads((notes / f"{shard:05d}.json").read_text(encoding="utf-8")) for shard in range(total)]
        content = hashlib.sha256("".join(fact["sha256"] for fact in facts).encode()).hexdigest()
        template = tfds.core.ShardedFileTemplate(
            data_dir=dataset, dataset_name="preferences", split="train", filetype_suffix="array_record"
        )
        lengths = [min(SHARD_SIZE, count - shard * SHARD_SIZE) for shard in range(total)]
        tfds.folder_dataset.write_metadata(
            data_dir=dataset,
            features=features,
            split_infos=[
                tfds.core.SplitInfo("train", lengths, sum(fact["bytes"] for fact in facts), filename_template=template)
            ],
            description="Preference pairs (prompt, value, aligned image, violating image) for LiVO.",
            metadata=tfds.core.MetadataDict(blocks=[block._asdict() for block in blocks], content_sha256=content),
            disable_shuffling=True,  # the blocks are ranges of the order of writing
            check_data=False,  # by TensorFlow
        )
        shutil.copy(work / "config.json", dataset)
        for name, content in files.items():
            (dataset / name).write_text(content, encoding="utf-8")
        for scratch in dataset.glob(".*"):
            scratch.unlink()
        dataset.rename(directory)
        shutil.rmtree(work)

    with ending_together():
        write_shards()
    with ending_together():
        if jax.process_index() == 0:
            finish()
