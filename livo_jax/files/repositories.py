"""The files of published models: directories, hub repositories, configs and safetensors, found, told apart and read."""

import errno
import importlib.util
import json
import math
import os
import pathlib
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

# safetensors' names of the dtypes that weights have.
FLOATS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
}  # fmt: skip
# Beside fp8 weights that must be multiplied by them.
SCALES = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale(_inv)?|input_scale)$")
POINTER = b"version https://git-lfs.github.com/spec"  # how the text begins that Git leaves for a large file
LORA = "pytorch_lora_weights.safetensors"
ONE_FILE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")  # of a whole model, as web interfaces use it


# ---------------------------------------------------------------------------- directories


def find_repository(path_or_hub_id: str | os.PathLike, patterns: list[str]) -> pathlib.Path:
    """The local directory of a model: itself, or a snapshot of a hub repository.

    Args:
        path_or_hub_id: a directory, which may begin with ~ (data_tools/shapeworld_model and the architectures in
            benchmarks/ are found in any folder), or "owner/name" on the Hugging Face hub. HF_HOME,
            HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
        patterns: the files that are fetched from the hub.

    Raises:
        FileNotFoundError: it is neither; the message says what it is, and how to convert or fetch it.
        ValueError: files of the directory are pointers of Git LFS.
        OSError: it is to be fetched, and the hub's cache cannot be written.
    """
    name, local = str(path_or_hub_id), pathlib.Path(path_or_hub_id).expanduser()
    if local.is_dir():
        check_pointers(local, patterns)
        return local
    for folder in pathlib.Path(__file__).parents[1:3]:  # installed, and in a checkout: what livo_jax brings
        if name.startswith(("data_tools/", "benchmarks/")) and (folder / name).is_dir():
            return folder / name
    if local.is_file():
        what = describe(local.parent) if local.name == LORA else f" {from_one_file(local)}"
        raise FileNotFoundError(f"{name!r} is a file, and a model is a directory here.{what}")
    is_path = local.is_absolute() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1
    if is_path or local.suffix in ONE_FILE:
        raise FileNotFoundError(
            f"no model at {name!r}: nothing is there. Give the path of a directory in the diffusers layout as this"
            f" machine has it, or fetch one where there is a network, with\n  hf download OWNER/NAME --local-dir DIR"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{name!r} is gated: accept its licence at https://huggingface.co/{name}, then log in with\n  hf auth login"
        ) from error
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"no model at {name!r}: it is not a directory here, and not in the hub's cache or not"
            f" reachable ({type(error).__name__}). Fetch it where there is a network, with\n"
            f"  hf download {name}\n  or give the path of a copy, a directory."
        ) from error
    except ImportError as error:  # which says how to install what a SOCKS proxy wants
        raise FileNotFoundError(
            f"no model at {name!r}: it is no directory here, and the hub is not reached: {error} Or unset the proxy in"
            " the environment"
        ) from error
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        raise OSError(
            f"{name!r} is not whole in the hub's cache, and that cannot be written: {error}. Set HF_HOME to a folder"
            " that can"
        ) from error


def is_pointer(file: pathlib.Path) -> bool:
    """Whether a file is the pointer that Git leaves in the place of a large file which it did not fetch."""
    with file.open("rb") as opened:
        return opened.read(len(POINTER)) == POINTER


def check_pointers(directory: pathlib.Path, patterns: list[str]):
    """Raises ValueError where files of these patterns are pointers of Git LFS; all are listed."""
    files = sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})
    if found := [str(file.relative_to(directory)) for file in files if is_pointer(file)]:
        raise ValueError(
            f"{directory} was cloned without its large files: {', '.join(found)} are pointers of Git LFS. Fetch them:\n"
            f"  cd {directory} && git lfs install && git lfs pull"
        )


def read_tokenizer(place: pathlib.Path):
    """The transformers.CLIPTokenizer of a directory. Without its files it is an empty one, of fewer than 256 tokens.

    Raises ValueError where a file is damaged: also one of which transformers reads a part, and says nothing.
    """
    from transformers import CLIPTokenizer

    place = place.resolve()  # a relative one that is not there could be a repository of the hub
    try:
        tokenizer = CLIPTokenizer.from_pretrained(place)
    except Exception as error:  # of what type depends on the file
        raise ValueError(
            f"{place}: a file of the tokenizer (tokenizer_config.json, vocab.json, merges.txt or others) is damaged, or"
            f" begins with a byte order mark: fetch them again: {error}"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{place}: pad_token is null: write the published one, <|endoftext|> or !, as its vocab.json has"
        )
    if len(tokenizer) < 256:
        return tokenizer
    words = {i: token[: -len("</w>")] for token, i in tokenizer.get_vocab().items() if token.endswith("</w>")}
    last = max(i for i, word in words.items() if word.isascii() and word.isalpha())
    if last not in tokenizer(words[last])["input_ids"]:  # both files are in the order in which they were learned
        raise ValueError(
            f"{place}: {words[last]!r} of the vocabulary falls into pieces, so merges.txt is cut short, or of another"
            " vocab.json: fetch both again"
        )
    return tokenizer


def read_t5_tokenizer(place: pathlib.Path):
    """The transformers.T5Tokenizer of a directory. Raises ValueError where its files are missing or damaged."""
    from transformers import T5TokenizerFast

    if not any((place / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise ValueError(f"{place} has no vocabulary: is tokenizer.json or spiece.model there?")
    if not (place / "tokenizer.json").is_file() and not importlib.util.find_spec("sentencepiece"):
        raise ValueError(
            f"{place} has spiece.model alone, which sentencepiece reads: fetch its tokenizer.json, or pip install"
            " sentencepiece"
        )
    try:
        return T5TokenizerFast.from_pretrained(place.resolve())
    except Exception as error:  # of what type depends on the file
        raise ValueError(f"{place}: a file of T5's tokenizer is damaged: fetch them again: {error}") from error


def from_one_file(file: pathlib.Path) -> str:
    """How to make a model's directory of a file that web interfaces use."""
    return (
        "One file of a whole Stable Diffusion, as web interfaces use it, is converted by diffusers"
        " (StableDiffusionXLPipeline of an XL, StableDiffusion3Pipeline of a 3 or 3.5):\n"
        f'  python -c "from diffusers import StableDiffusionPipeline as P;'
        f" P.from_single_file('{file}').save_pretrained('DIR')\""
    )


def from_pickles(directory: pathlib.Path) -> str:
    """How to make safetensors of a directory's weights in PyTorch's older format, with what else belongs to them."""
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    root, loader = directory, f"transformers import {(config.get('architectures') or ['AutoModel'])[0]}"
    if (directory.parent / "model_index.json").is_file():
        root, loader = directory.parent, "diffusers import DiffusionPipeline"
    if not any(file.suffix in ONE_FILE for file in directory.glob("*")):  # of the hub, from where they were not fetched
        root = "OWNER/NAME"
    return f"  python -c \"from {loader} as M; M.from_pretrained('{root}').save_pretrained('DIR')\""


def describe(root: pathlib.Path) -> str:
    """What a directory is in which something else was looked for, with the way to that; empty if nobody knows."""
    listed = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    parts = ("model", "adapter_model", "diffusion_pytorch_model")
    whole = sorted(file for file in root.glob("*") if file.suffix in ONE_FILE and file.stem not in parts)
    if listed and (root / "text_encoder").is_dir():
        return (
            f"\n{root} is a whole {listed.get('_class_name')}. Its text encoder can be a value encoder of kind full:"
            f" give {root / 'text_encoder'}, or subfolder='text_encoder' to ValueEncoder.from_pretrained"
        )
    if listed:
        return f"\nIts model_index.json calls it a {listed.get('_class_name')}"
    if (root / LORA).is_file():
        return (
            f"\n{root} is a LoRA as scripts of diffusers leave it ({LORA}). A value encoder"
            " of kind lora has adapter_config.json and adapter_model.safetensors. Convert its text encoder's part with"
            " its base, by diffusers and a new peft:\n"
            "  python -c \"from diffusers import StableDiffusionPipeline as P; p = P.from_pretrained('BASE');"
            f" p.load_lora_weights('{root}'); p.text_encoder.save_pretrained('DIR')\"\n"
            f"or merge it into its base, with --config.model=BASE --config.loras=\"('{root}',)\""
        )
    if (root / "adapter_config.json").is_file():
        return f"\n{root} is an adapter of peft: --config.value_encoder.kind=lora --config.value_encoder.start takes it"
    if (root / "value_encoder").is_dir() or list(root.glob("value_tokens.safetensors")):
        return f"\n{root} is an exported value encoder: --config.value_encoder.start takes it, with its kind"
    if (root / "checkpoints").is_dir():
        return f"\n{root} is the workdir of a run: give it as --workdir, or export it and give the export"
    if (root / "config.json").is_file():
        return f"\nIts config.json is of model_type={read_json(root / 'config.json').get('model_type')!r}"
    return f"\n{from_one_file(whole[0])}" if whole else ""


def check_links(paths):
    """Raises FileNotFoundError for links to what is not there, as of a snapshot of the hub that was copied alone."""
    if lost := [str(path) for path in paths if path.is_symlink() and not path.exists()]:
        raise FileNotFoundError(
            f"{', '.join(lost)} links to a file that is not there: copy what it links to, as cp -rL does, or fetch it"
            " again"
        )


def read_json(path: pathlib.Path) -> dict:
    """A JSON object. Raises FileNotFoundError or ValueError that name the file."""
    check_links([path])
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a model directory has the diffusers layout")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        reason = "it has marks of a merge conflict of Git" if b"\n>>>>>>>" in path.read_bytes() else error
        raise ValueError(f"{path} is damaged, fetch it again: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged, fetch it again: it holds no object but a {type(content).__name__}")
    return content


# ---------------------------------------------------------------------------- weights


def weight_patterns(stem: str, variant: str | None) -> list[str]:
    """The files of one set of weights: whole, or an index and its shards (both ways to name them)."""
    dot = f".{variant}" if variant else ""
    shard = "?????-of-?????"
    names = (f"{stem}{dot}", f"{stem}{dot}-{shard}", f"{stem}-{shard}{dot}")
    return [f"{name}.safetensors" for name in names] + [f"{stem}.safetensors.index{dot}.json"]


def weight_files(directory: pathlib.Path, stem: str, variant: str | None) -> list[pathlib.Path]:
    """The safetensors files of a component; without a variant asked for, half precision where it lies alone.

    Raises:
        FileNotFoundError: there are none, or a shard is missing.
    """
    for dot in [f".{variant}"] if variant else ["", ".fp16"]:
        index = directory / f"{stem}.safetensors.index{dot}.json"
        if index.is_file():
            shards = [directory / name for name in sorted(set((read_json(index).get("weight_map") or {}).values()))]
            if not shards:
                raise ValueError(f"{index} lists no weights: fetch it again")
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise FileNotFoundError(f"{directory} lacks the shards {', '.join(missing)} that {index.name} lists")
            return shards
        if (whole := directory / f"{stem}{dot}.safetensors").is_file():
            return [whole]
    others = sorted(p.name for p in directory.glob("*") if p.suffix in (*ONE_FILE, ".msgpack"))
    check_links(directory / name for name in others)
    safe = [name for name in others if name.endswith(".safetensors")]
    if safe:
        remedy = f"There are {', '.join(safe)}. Without a variant half precision is read where it lies alone"
    else:
        remedy = (
            f"There {'are ' + ', '.join(others) if others else 'is none'}. Formats other than safetensors (.bin, .ckpt)"
            " can run code: not read, and not fetched from the hub. If you trust who made them, convert a whole copy:\n"
            + from_pickles(directory)
        )
    raise FileNotFoundError(
        f"{directory} has no {stem}{f'.{variant}' if variant else ''}.safetensors (variant={variant!r}). {remedy}"
    )


class Tensor(NamedTuple):
    """A tensor in a safetensors file, which np.asarray reads.

    Raises, when it is read:
        ValueError: it is no weight, or not finite.
    """

    path: pathlib.Path
    name: str
    shape: tuple
    dtype: str  # of FLOATS
    start: int  # of its bytes in the file

    def __array__(self, dtype=None, copy=None):
        if self.dtype not in FLOATS:
            raise ValueError(
                f"{self.path}: {self.name} is of dtype {self.dtype}; weights are read in {', '.join(FLOATS)}:"
                " fetch files of this model that are not quantised"
            )
        # No mapping, as safetensors has it: one that stays open keeps every page that was read in memory. And its NumPy
        # reader knows no fp8.
        array = np.fromfile(self.path, FLOATS[self.dtype], math.prod(self.shape), offset=self.start)
        array = array.reshape(self.shape)
        if bad := array.size - np.count_nonzero(np.isfinite(array)):
            raise ValueError(
                f"{self.path}: {bad} of {array.size} numbers of {self.name} are not finite, which draws black images:"
                " fetch it again, or take an earlier copy from who trained it"
            )
        return np.asarray(array, dtype)


def read_safetensors(file: str | os.PathLike) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the tensors of a small file. Raises ValueError for a damaged one, or one of another kind."""
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} {_another_kind(file) or 'is damaged'}: {error}") from error


def write_safetensors(tensors: dict[str, np.ndarray], file: str | os.PathLike, metadata: dict[str, str] | None = None):
    """Writes a safetensors file, readable for whom the umask lets read. Raises OSError, with the reason."""
    import safetensors
    from safetensors.numpy import save_file

    try:
        save_file(tensors, file, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(file, 0o666 & ~mask)  # safetensors' own are for their owner alone


def _another_kind(file: str | os.PathLike) -> str:
    """That a file is of another kind, where it is; "" else."""
    with open(file, "rb") as opened:
        other = opened.read(2) == b"PK" or pathlib.Path(file).suffix != ".safetensors"  # a zip: .npz, .pt
    return "is no safetensors file" if other else ""


def open_tensors(files: list[pathlib.Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, by name. Raises ValueError for a damaged file, or fp8 weights with scales."""
    import safetensors

    tensors = {}
    for path in files:
        try:
            with safetensors.safe_open(path, framework="numpy"):
                pass  # it checks the header
        except safetensors.SafetensorError as error:
            if is_pointer(path):
                check_pointers(path.parent, [path.name])
            raise ValueError(
                f"{path} {_another_kind(path) or 'is damaged or cut short, fetch it again'}: {error}"
            ) from error
        with path.open("rb") as file:  # a header's length, 8 bytes, and a header, which says where after it each lies
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
        for name in sorted(header.keys() - {"__metadata__"}):
            entry = header[name]
            place = start + entry["data_offsets"][0]
            tensors[name] = Tensor(path, name, tuple(entry["shape"]), entry["dtype"], place)
    if scales := [tensor for tensor in tensors.values() if SCALES.search(tensor.name)]:
        raise ValueError(
            f"{scales[0].path} holds fp8 weights that want scales of their own ({scales[0].name} and {len(scales) - 1}"
            " more), as ComfyUI has them: not read. Fetch this model in float32, float16 or plain fp8"
        )
    return tensors
