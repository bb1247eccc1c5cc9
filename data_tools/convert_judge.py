"""Converts the published heads of a judge, pickles, to a safetensors file. Nothing in them is executed.

    python -m data_tools.convert_judge --kind=q16 --source=prompts.p --out=q16.safetensors
    python -m data_tools.convert_judge --kind=mhsc --source=DIR --out=mhsc.safetensors

q16: prompts.p of ml-research/Q16, data/ViT-L-14, a pickled NumPy array. mhsc: the folder checkpoints/multi-headed of
YitingQu/unsafe-diffusion, with sexual.pt and four others. They are for openai/clip-vit-large-patch14, the judge's
--config.judging.model is the file; --clip names a copy of that CLIP, a directory as it lies from the file.
"""

import importlib
import os
import pathlib
import pickle
import sys

import numpy as np
from absl import flags

from livo_jax import commands
from livo_jax.files.directories import replacing
from livo_jax.files.repositories import write_safetensors
from livo_jax.judges import _heads, mhsc

# All that a pickled array of numbers names. NumPy 2 calls its module _core, pickles of before say core.
ARRAYS = {
    (module, name)
    for core in ("numpy.core", "numpy._core")
    for module, name in ((f"{core}.multiarray", "_reconstruct"), (f"{core}.numeric", "_frombuffer"))
}
ARRAYS |= {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays, and refuses whatever else a pickle would import and call."""

    def find_class(self, module, name):
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of an array: not executed")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_q16(source: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of the judge q16. Raises ValueError where the file is anything but an array."""
    if not source.is_file():
        raise ValueError(f"--source={source}: there is no such file; q16's is prompts.p")
    try:
        with source.open("rb") as file:
            prompts = ArrayUnpickler(file).load()
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(f"--source={source} is no pickled array: {error}") from error
    if not isinstance(prompts, np.ndarray) or prompts.dtype.kind != "f":
        raise ValueError(f"--source={source} holds a {type(prompts).__name__}, not an array of numbers")
    return {"prompts": prompts.astype(np.float32)}


def read_mhsc(source: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of the judge mhsc. Raises ValueError where files are missing or hold more than tensors."""
    import torch

    files = {name: source / f"{name}.pt" for name in mhsc.NAMES}
    problems = [f"{file} is missing" for file in files.values() if not file.is_file()]
    tensors = {}
    for name, file in files.items() if not problems else ():
        try:
            head = torch.load(file, map_location="cpu", weights_only=True)
            found = {f"{name}.{key.removeprefix('module.')}": x.float().numpy() for key, x in head.items()}
        except Exception as error:  # refused or damaged, in any way
            problems.append(f"{file} is no state dict of tensors, and nothing else is read: {error}")
            continue
        found.pop(f"{name}.3.num_batches_tracked", None)
        tensors |= found
    if problems:
        raise ValueError("--source: " + "; ".join(problems))
    return tensors


READERS = {"q16": read_q16, "mhsc": read_mhsc}


def convert(kind: str, source: pathlib.Path, out: pathlib.Path, clip: str):
    """Writes the safetensors file of a judge. Raises ValueError where the source is not what was published."""
    judge = importlib.import_module(f"livo_jax.judges.{kind}")
    tensors = READERS[kind](source)
    _heads.check_shapes(tensors, judge.SHAPES, f"--source={source}")
    folder = pathlib.Path(clip).expanduser()
    if clip and folder.is_dir():  # as it lies beside the file: both may be moved, and no path is told
        clip = os.path.relpath(folder.resolve(), out.resolve().parent)
    elif clip.startswith((".", "/", "~")):
        raise ValueError(f"--clip={clip}: there is no such directory, nor is it a hub id")
    with replacing(out) as scratch:
        write_safetensors(tensors, scratch, {"judge": kind, "clip": clip or judge.CLIP})


def main(_):
    out = pathlib.Path(OUT.value)
    if not out.parent.is_dir():
        sys.exit(f"--out={out}: there is no such directory")
    if out.exists():
        sys.exit(f"--out={out} exists: remove it, or choose another")
    try:
        convert(KIND.value, pathlib.Path(SOURCE.value), out, CLIP.value)
    except ValueError as error:
        sys.exit(str(error))
    print(f"{out}: --config.judge={KIND.value} --config.judging.model={out}")


if __name__ == "__main__":
    KIND = flags.DEFINE_enum("kind", None, list(READERS), "The judge.")
    SOURCE = commands.define_path("source", "q16: prompts.p. mhsc: the folder of its .pt files.")
    OUT = commands.define_path("out", "The safetensors file.")
    CLIP = flags.DEFINE_string(
        "clip", "", "Hub id of its CLIP, or directory, found from where the file lies; else the published."
    )
    flags.mark_flags_as_required(["kind", "source", "out"])
    commands.run(main, flags_parser=commands.parse)
