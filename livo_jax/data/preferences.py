"""Preference pairs on disk."""

import pathlib
from typing import NamedTuple

import numpy as np

from livo_jax import files
from livo_jax.training.batch import SIDES
from livo_jax.values.principles import Value

FEATURES = {"prompt", "value", "scene", *SIDES, "provenance"}


class Block(NamedTuple):
    """The records start .. start + count - 1, of one value (its statement) and scene."""

    value: str
    scene: str
    start: int
    count: int


class Records:
    """Serialised tf.train.Examples as dicts of bytes: a third of the time that TFDS takes to decode them."""

    def __init__(self, serialised, directory):
        self.serialised, self.directory = serialised, directory

    def __len__(self):
        return len(self.serialised)

    def __getitem__(self, i) -> dict[str, bytes]:
        from tensorflow_datasets.proto import tf_example_pb2

        if i not in range(len(self)):  # which ends a loop over the records
            raise IndexError(f"{self.directory} has {len(self)} records, not one of number {i}")
        try:
            columns = tf_example_pb2.Example.FromString(self.serialised[i]).features.feature
        except Exception as error:  # array_record names no type of its own
            raise ValueError(
                f"{self.directory}, record {i} is damaged: {error}. python -m data_tools.check_preferences"
                f" --data={self.directory} lists all that is; remove it and build it again"
            ) from error
        return {name: columns[name].bytes_list.value[0] for name in FEATURES}


class Preferences:
    """An opened dataset: `source` gives record i as a dict of bytes, `blocks` partition the records."""

    def __init__(self, directory):
        """Opens and checks a dataset.

        Raises:
            FileNotFoundError: there is no dataset.
            ValueError: it is empty, half-written or of another layout; the message says in what.
        """
        import tensorflow_datasets as tfds

        self.directory = pathlib.Path(directory).expanduser()
        remedy = "make one with python -m data_tools.build_preferences --config=FILE --out=DIR"
        if not (self.directory / "dataset_info.json").is_file():
            raise FileNotFoundError(f"{self.directory} holds no preference dataset (no dataset_info.json): {remedy}")
        try:
            builder = tfds.builder_from_directory(self.directory)
            metadata = builder.info.metadata or {}
        except Exception as error:  # of what type depends on the file
            raise ValueError(f"{self.directory}: a .json in it is damaged: {error}; {remedy}") from error
        split = builder.info.splits.get("train")
        if split is None or not split.num_examples:
            raise ValueError(f"{self.directory} is an empty dataset: {remedy}")
        if missing := FEATURES - set(builder.info.features):
            raise ValueError(f"{self.directory} lacks the features {sorted(missing)}: {remedy}")
        if missing := [str(path) for path in split.filepaths if not path.exists()]:
            raise ValueError(f"{self.directory} is half-written, without {', '.join(missing)}: {remedy}")
        try:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self.source = Records(builder.as_data_source(split="train", deserialize_method=raw), self.directory)
            self.source[len(self.source) - 1]
        except Exception as error:  # array_record names no type of its own for a file that is cut short
            raise ValueError(f"{self.directory} is damaged: {error}; {remedy}") from error
        self.content_sha256 = metadata.get("content_sha256")
        self.blocks = [Block(**block) for block in metadata.get("blocks", [])]
        covered = [i for b in self.blocks for i in (b.start, b.start + b.count)]
        if len(self.source) != split.num_examples or covered[:1] + covered[-1:] != [0, len(self.source)]:
            raise ValueError(f"{self.directory} is half-written: its blocks and its records differ; {remedy}")

    def check_values(self, values: tuple[Value, ...]):
        """Raises ValueError unless the dataset has every one of these values and no other."""
        wanted, there = {v.statement for v in values}, {b.value for b in self.blocks}
        if wanted != there:
            raise ValueError(
                f"{self.directory} has pairs for the values {sorted(there)}, the config lists {sorted(wanted)}:"
                " set config.principles to those of the dataset, or build another"
            )


def decode(png: bytes, size: int, flip: bool = False, where: str = "an image") -> np.ndarray:
    """What files.read_image reads as [size, size, 3] float32 in [-1, 1]: shorter side to `size`, centre crop.

    Raises ValueError, which names `where`, if it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        image = files.read_image(png)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    array = np.asarray(image, np.float32) / 127.5 - 1
    return array[:, ::-1] if flip else array
