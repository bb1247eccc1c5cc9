"""LoRAs of a base model (LCM-LoRA, Lightning, a style), in files of diffusers or kohya's scripts, merged into it.

A layer's update (Hu et al. 2022) is scale alpha / rank * up @ down, of a convolution its kernels' products. Files name
layers after diffusers' modules, with dots or underscores, or of XL after the modules that Stability AI published.
"""

import json
import math
import os
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax.files.repositories import LORA, Tensor, find_repository, is_pointer, open_tensors
from livo_jax.models.weights import TO_OURS, TO_PUBLISHED, published_name, put, split

KOHYA = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",), "unet": ("lora_unet_",)}
# What follows a layer's name.
MATRIX = re.compile(r"(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(down|up|A|B)\.weight$")
ROLES = {"A": "down", "B": "up"}
METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings
# Fields of peft's settings that say nothing of what is computed with the weights: all others must ask for nothing.
SAY_NOTHING = set(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha"
    " target_modules lora_dropout bias layers_pattern megatron_config megatron_core qalora_group_size runtime_config"
    " ensure_weight_tying eva_config init_lora_weights".split()
)
# Which weights there are tells the file itself.
KNOWN = ("use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules")
WHOLE = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")  # dtypes
# The values of init_lora_weights with which the base's weights stay as they are.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# Stability AI's names of what lies in a block of ours, and outside of blocks.
INNER = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


class Update(NamedTuple):
    """Of one layer. down: [r, I] or [r, I, kH, kW]; up: [O, r] or [O, r, 1, 1]; factor: scale alpha / r."""

    down: Tensor
    up: Tensor
    factor: float

    def delta(self, shape) -> np.ndarray:
        """What is added to the layer's published weight of this shape, float32."""
        down, up = (np.asarray(x).astype(np.float32).reshape(x.shape[0], -1) for x in (self.down, self.up))
        return self.factor * (up @ down).reshape(shape)


def unsupported(settings: dict, known=()) -> list[str]:
    """What peft's settings of a LoRA ask for that is more than alpha / rank * up @ down, a line each.

    known: further fields that whoever asks knows about.
    """
    found = [f"{name}={x!r}" for name, x in settings.items() if x and name not in {*SAY_NOTHING, *known}]
    if (start := settings.get("init_lora_weights")) not in STARTS:
        found.append(
            f"init_lora_weights={start!r}, which changes the base's weights too: save it by peft's"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return found


def is_number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def merge_loras(text_encoder, unet, loras):
    """A text encoder and a UNet with LoRAs merged into their weights, each in its dtype and where it lay.

    Args:
        text_encoder: of one tower, or XL's of two. unet: None where the text encoder alone is wanted; what files have
            for the UNet is then not looked at.
        loras: entries as config.loras has them: "FILE" or "FILE=SCALE", a .safetensors file, the folder or hub id of a
            pytorch_lora_weights.safetensors, or OWNER/NAME/FILE on the hub.

    Returns:
        Both, of the same classes.

    Raises:
        FileNotFoundError: a file is not there. ValueError: an entry whose scale is no number, a damaged file, one that
            is no LoRA, or updates that fit no layer; all are listed.
    """
    loras = [loras] if isinstance(loras, str | os.PathLike) else loras
    modules = dict(zip(("text_encoder", "text_encoder_2"), text_encoder.towers))
    modules |= {} if unet is None else {"unet": unet}
    updates, problems = {}, []
    layers = {part: _layers(module) for part, module in modules.items()}
    names, only = _names(layers), ("text_encoder", "lora_te") if unet is None else ("",)
    for path, scale, entry in [(*find_lora(entry), entry) for entry in loras]:
        found, wrong = _read(path, scale, layers, names, only)
        problems += [f"{entry}: {problem}" for problem in wrong]
        for place, update in found.items():
            updates.setdefault(place, []).append(update)
    if problems:
        raise ValueError(
            f"{len(problems)} weights of LoRAs fit nothing in the model, which is of another family, width or kind, or"
            " cannot be merged:\n  " + "\n  ".join(problems)
        )

    def merged(part, module):
        graph, params = split(module)

        def add(path, leaf):
            name = published_name(path).removesuffix(".weight")
            if path[-1].key != "kernel" or (part, name) not in updates:
                return leaf
            delta = sum(update.delta(layers[part][name]) for update in updates[part, name])
            delta = put(np.ascontiguousarray(delta.transpose(TO_OURS[delta.ndim])), leaf.sharding)
            return (leaf.astype(jnp.float32) + delta).astype(leaf.dtype)

        return nnx.merge(graph, jax.tree_util.tree_map_with_path(add, params))

    done = {part: merged(part, module) for part, module in modules.items()}
    unet = done.pop("unet", None)
    return (type(text_encoder)(*done.values()) if len(done) > 1 else done["text_encoder"]), unet


def find_lora(entry: str | os.PathLike) -> tuple[pathlib.Path, float]:
    """The file and the scale of an entry of config.loras, which merge_loras tells, with its errors."""
    name, equals, scale = str(entry).rpartition("=")
    if not equals:
        name, scale = str(entry), "1"
    try:
        scale = float(scale)
    except ValueError:
        scale = math.nan
    if not abs(scale) <= float(np.finfo(np.float32).max):
        raise ValueError(f"config.loras: {entry!r}: what follows the last = is the scale, a number that float32 holds")
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        path = path / LORA
    elif not path.is_file() and path.suffix in ("", ".safetensors") and name.count("/") == (2 if path.suffix else 1):
        folder, file = os.path.split(name) if path.suffix else (name, LORA)
        path = find_repository(folder, [file]) / file
    if path.suffix != ".safetensors":
        raise ValueError(f"config.loras: {entry!r}: LoRAs are read from .safetensors alone: other formats can run code")
    if not path.is_file():
        raise FileNotFoundError(f"config.loras: {entry!r}: there is no {path}: name the .safetensors file in it")
    return path, scale


def _layers(module) -> dict[str, tuple]:
    """The layers that an update may be of, by published name without .weight: the shapes of their published weights."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(split(module)[1]):
        if path[-1].key == "kernel":
            order = TO_PUBLISHED[leaf.ndim]
            found[published_name(path).removesuffix(".weight")] = tuple(leaf.shape[i] for i in order)
    return found


def _names(layers: dict[str, dict[str, tuple]]) -> dict[str, tuple[str, str]]:
    """What files call the layers -> (part, its published name)."""
    found = {}
    for part, names in layers.items():
        for name in names:
            place = (part, name)
            own = _in_text_model(name) if part != "unet" else name
            underscored = {own, _stability_name(name, names)} if part == "unet" else {own}
            for prefix in KOHYA[part]:
                found |= {prefix + text.replace(".", "_"): place for text in underscored}
            # As processors had attention: attn1.processor.to_q, and to_out for to_out.0; of texts to_q for q_proj.
            old = own.removesuffix(".0") if part == "unet" else re.sub(r"(\w+)_proj$", r"to_\1", own)
            spellings = {own, old, re.sub(r"(attn[12])", r"\1.processor", old), name}  # the last as transformers 5
            found |= {f"{part}.{text}": place for text in spellings}
            found |= {text: place for text in spellings if part == "unet"}  # of files that have nothing else
    return found


def _in_text_model(name: str) -> str:
    return name if name.startswith("text_projection") else f"text_model.{name}"


def _stability_name(name: str, names) -> str:
    """What a layer of the UNet is called by Stability AI's modules; input and output blocks are numbered through."""
    if name in OUTER:
        return OUTER[name]
    block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    middle = re.match(r"mid_block\.(\w+)\.(\d+)\.(.+)", name)
    if middle:
        kind, j, rest = middle.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}.{INNER.get(rest, rest)}"
    if not block:
        return name
    side, i, kind, j, rest = block.groups()

    def count(level: int, kind: str) -> int:
        return len({match[1] for n in names if (match := re.match(rf"{side}_blocks\.{level}\.{kind}\.(\d+)\.", n))})

    resnets = count(int(i), "resnets")
    # An input block is one resnet with its attention, or what halves; of output blocks the last doubles too.
    before = sum(count(k, "resnets") + (side == "down") for k in range(int(i)))
    if side == "down":
        number = 1 + before + (resnets if kind == "downsamplers" else int(j))
        inner = 1 if kind == "attentions" else 0
        return f"input_blocks.{number}.{inner}.{'op' if kind == 'downsamplers' else INNER.get(rest, rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{before + resnets - 1}.{2 if count(int(i), 'attentions') else 1}.{rest}"
    return f"output_blocks.{before + int(j)}.{1 if kind == 'attentions' else 0}.{INNER.get(rest, rest)}"


def _read(
    path: pathlib.Path, scale: float, layers, names, only: tuple[str, ...]
) -> tuple[dict[tuple[str, str], Update], list[str]]:
    """The updates of a file by (part, published name), of the keys that begin so; and what is wrong with them.

    layers: as _layers has them, by part. names: what _names made of them.
    """
    import safetensors

    if is_pointer(path):
        return {}, ["it is a pointer of Git LFS: fetch the file itself"]
    tensors = open_tensors([path])
    matrices, alphas, problems = {}, {}, []
    with safetensors.safe_open(path, framework="numpy") as file:
        whole = {key: file.get_tensor(key) for key, x in tensors.items() if key.endswith(".alpha") and x.dtype in WHOLE}
        settings = _settings((file.metadata() or {}).get(METADATA, "{}"), layers, problems)
    for key, tensor in tensors.items():
        if not key.startswith(only):
            continue
        match, is_alpha = MATRIX.search(key), key.endswith(".alpha")
        layer = key[: match.start()] if match else key.removesuffix(".alpha")
        if layer not in names or not (match or is_alpha):
            problems.append(f"unexpected {key} {tensor.shape}")
        elif is_alpha:
            alpha = np.asarray(whole.get(key, tensor))
            if alpha.size != 1 or names[layer] in alphas:
                problems.append(f"{key} {alpha.shape} is no number, or there twice")
            else:
                alphas[names[layer]] = float(alpha.reshape(()))
        else:
            pair, role = matrices.setdefault(names[layer], {}), ROLES.get(match[1], match[1])
            if role in pair:
                problems.append(f"{key} is there twice, by two names of a layer")
            pair[role] = tensor
    found = {}
    for part, name in matrices.keys() | alphas.keys():
        pair = matrices.get((part, name), {})
        shape, label = layers[part][name], f"{part}.{name}"
        if missing := {"down", "up"} - pair.keys():
            problems.append(f"missing {' and '.join(sorted(missing))} of {label}")
            continue
        down, up = pair["down"], pair["up"]
        rank = down.shape[0] if down.shape else 0
        given = *up.shape[:1], math.prod(down.shape[1:]), math.prod(up.shape[1:])
        if rank < 1 or given != (shape[0], math.prod(shape[1:]), rank):
            problems.append(f"misshapen {label}: {up.shape} times {down.shape}, {shape} wanted")
            continue
        alpha = alphas.get((part, name), _alpha(settings, part, name, rank))
        divisor = math.sqrt(rank) if settings.get(f"{part}.use_rslora") else rank
        found[part, name] = Update(down, up, scale * alpha / divisor)
    if not tensors:
        problems.append("it holds no update at all")
    return found, sorted(problems)


def _settings(text: str, parts, problems: list[str]) -> dict:
    """Peft's settings in a file's metadata, {"unet.r": 4}; what is wrong with them is added to `problems`."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        problems.append(f"its {METADATA} is no JSON: {error}")
        return {}
    if not isinstance(settings, dict):
        problems.append(f"its {METADATA} is {text[:80]}, no object")
        return {}
    for part in parts:
        own = {name.removeprefix(f"{part}."): x for name, x in settings.items() if name.startswith(f"{part}.")}
        problems += [f"{part}: not supported: {told}" for told in unsupported(own, KNOWN)]
        patterns = own.get("alpha_pattern") or {}
        for name, alpha in {"lora_alpha": own.get("lora_alpha", 1), **patterns}.items():
            if not is_number(alpha):
                problems.append(f"{part}: {name}={alpha!r} in its {METADATA} is no number")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{part}: {pattern!r} in its {METADATA} is no pattern: {error}")
    return {} if problems else settings


def _alpha(settings: dict, part: str, name: str, rank: int) -> float:
    """The alpha of a layer that peft's settings say, if they are there; or else that by which the scale is 1."""
    for pattern, alpha in (settings.get(f"{part}.alpha_pattern") or {}).items():
        if any(re.fullmatch(rf"(?:.*\.)?{pattern}", text) for text in (name, _in_text_model(name))):
            return alpha
    return settings.get(f"{part}.lora_alpha", rank)
