"""A value encoder that is a low-rank update of the frozen text encoder."""

import os
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax import seeds, sharding
from livo_jax.files.directories import write_json
from livo_jax.files.loras import is_number, unsupported
from livo_jax.files.repositories import describe, find_repository, open_tensors, read_json, write_safetensors
from livo_jax.models import low_rank
from livo_jax.models.clip import CLIPTextConfigWithProjection, CLIPTextModel, CLIPTextModels
from livo_jax.models.weights import from_published, one_key, split, to_published
from livo_jax.value_encoders.base import (
    EXPORTED,
    WIDTHS,
    TrainableTokens,
    check_base,
    check_export,
    move_pooled,
    set_exported,
    set_reading,
    text_tokens,
)


class LoRA(TrainableTokens):
    """Kind "lora": the frozen text encoder, its kernels W as W + alpha / rank * A B (Hu et al. 2022).

    Args:
        text_encoder: of the model; its shapes are used.
        rank: columns of A and rows of B.
        targets: names of the layers that are updated, of TARGETS.

    Raises:
        ValueError: a rank or alpha below any use, targets that there are not; all are listed.
    """

    TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    FITS = (*WIDTHS, "intermediate_size", "num_hidden_layers")
    SETTINGS = ("rank", "alpha", "targets")
    PREFIX = "base_model.model."  # of peft's names, which end as the layers of today's transformers are called
    FILES = ("adapter_config.json", "adapter_model.safetensors")

    def __init__(self, text_encoder: CLIPTextModel | CLIPTextModels, *, rank: int, alpha: float, targets, rngs):
        problems = [f"target {name!r}: choose from {', '.join(self.TARGETS)}" for name in {*targets} - {*self.TARGETS}]
        if rank < 1 or alpha <= 0 or not targets:
            problems.append(f"rank={rank}, alpha={alpha}, {len(targets)} targets: each must be above 0")
        if problems:
            raise ValueError("lora cannot work: " + "; ".join(problems))
        self.config, self.rank, self.alpha, self.targets = text_encoder.config, rank, alpha, tuple(sorted(targets))
        self.updates = low_rank.updates(text_encoder, targets, rank, rngs)

    def tokens(self, ids, text_encoder):
        return text_tokens(self._updated(text_encoder), ids, self.states)

    def pooled_shift(self, ids, text_encoder):
        return move_pooled(self._updated(text_encoder), ids, text_encoder) if self.moves_pooled else None

    def _updated(self, text_encoder):
        # It computes in float32 from its embeddings on; a layer widens its kernel as it computes.
        graph, params = split(text_encoder)
        text_encoder = nnx.merge(graph, jax.tree_util.tree_map_with_path(_widened, params))
        return low_rank.updated(text_encoder, self.updates, self.alpha / self.rank)

    def merged(self, text_encoder):
        """The text encoder with the updates in its weights, float32: to be saved."""
        return low_rank.merged(text_encoder, self.updates, self.alpha / self.rank)

    @classmethod
    def make(cls, config, sd):
        c = config.value_encoder
        rngs = nnx.Rngs(seeds.key(config.seed))
        return set_reading(cls(sd.text_encoder, rank=c.rank, alpha=c.alpha, targets=c.targets, rngs=rngs), config)

    @classmethod
    def start(cls, config, sd, mesh):
        return sharding.replicate(cls.make(config, sd), mesh)

    @classmethod
    def files(cls) -> list[str]:
        return [EXPORTED, *(f"{place}{name}" for place in ("", "adapter/", "adapter_2/") for name in cls.FILES)]

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike, sd, *, sharding=None) -> "LoRA":
        """Loads an adapter of peft for the text encoder of a StableDiffusion.

        Args:
            path_or_hub_id: with adapter_config.json and adapter_model.safetensors, at the root or in adapter/, as
                an export has it; for XL those of the second tower in adapter_2/.
            sharding: where its weights go; the default device if None.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it does what we do not compute, or is of another text encoder. A warning says if the model
                that it names as its own is another than this.
        """
        root = find_repository(path_or_hub_id, cls.files())
        check_export(root, sd)
        exported = root / EXPORTED
        root = root / "adapter" if (root / "adapter").is_dir() else root
        parts = _parts(sd.text_encoder)
        # Of other folders a name that ends in _2 may be another adapter's.
        second = [_second(root)] if root.name == "adapter" or len(parts) > 1 else []
        roots = [root, *(place for place in second if place.is_dir())]
        settings, bases = zip(*map(cls._settings, roots))
        fits = f"{root}, an adapter of {bases[0]!r}, does not fit {sd.root}"
        if len(roots) != len(parts):
            raise ValueError(f"{fits}: it is for {len(roots)} text encoders, there are {len(parts)}")
        if settings[0] != settings[-1]:
            raise ValueError(f"{root} and {roots[-1].name} are of two kinds: {settings[0]} and {settings[-1]}")
        graph, abstract = split(nnx.eval_shape(lambda: cls(sd.text_encoder, **settings[0], rngs=one_key())))
        tensors = {
            f"updates.{part}{name.removeprefix(cls.PREFIX).removeprefix('text_model.')}": tensor
            for place, part in zip(roots, parts)
            for name, tensor in open_tensors([place / cls.FILES[1]]).items()
        }
        try:
            value_encoder = nnx.merge(graph, from_published(tensors, abstract, jnp.float32, sharding))
        except ValueError as error:
            raise ValueError(f"{fits}/text_encoder: {error}") from error
        check_base(root, bases[0], sd)
        return set_exported(value_encoder, exported)

    @classmethod
    def _settings(cls, root: pathlib.Path) -> tuple[dict, str]:
        """Rank, alpha and targets of an adapter, and the model that it is of."""
        if missing := [name for name in cls.FILES if not (root / name).is_file()]:
            raise FileNotFoundError(f"{root} has no {' and no '.join(missing)}.{describe(root)}")
        published = read_json(root / cls.FILES[0])
        problems = unsupported(published)
        targets, kind, bias = (published.get(name) for name in ("target_modules", "peft_type", "bias"))
        named = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
        if (kind, bias) != ("LORA", "none") or not named:
            problems.append(f"peft_type={kind!r}, bias={bias!r}, target_modules={targets!r}")
        rank, alpha = published.get("r", 8), published.get("lora_alpha", 8)
        if type(rank) is not int or not is_number(alpha):
            problems.append(f"r={rank!r}, lora_alpha={alpha!r}: these are numbers")
        if problems:
            raise ValueError(f"{root / cls.FILES[0]}: not supported: {', '.join(problems)}")
        # Each layer may be named alone, as diffusers names them: all of a kind must be there, or weights are missing.
        targets = sorted({name.rpartition(".")[2] for name in targets})
        return dict(rank=rank, alpha=alpha, targets=targets), published.get("base_model_name_or_path")

    def save(self, directory: pathlib.Path, base: str):
        """Writes adapter_config.json and adapter_model.safetensors, which peft loads on the text encoder of `base`.

        Those of a second text encoder are written to DIRECTORY_2.
        """
        settings = {
            "peft_type": "LORA", "base_model_name_or_path": base, "r": self.rank, "lora_alpha": self.alpha,
            "target_modules": list(self.targets), "bias": "none", "inference_mode": True,
        }  # fmt: skip
        updates = to_published(split(self)[1]["updates"])
        places = directory, _second(directory)
        for place, part, tower in zip(places, _parts(self), self.config.towers):
            # transformers has a text encoder with a projection around a text_model.
            projects = isinstance(tower, CLIPTextConfigWithProjection)
            prefix = f"{self.PREFIX}text_model." if projects else self.PREFIX
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / self.FILES[0], settings)
            published = {prefix + n.removeprefix(part): x for n, x in updates.items() if n.startswith(part)}
            write_safetensors(published, place / self.FILES[1], metadata={"format": "pt"})


def _widened(path, x):
    return x if path[-1].key == "kernel" else x.astype(jnp.float32)


def _parts(module) -> tuple[str, ...]:
    """What the names of each tower's weights begin with in a module of one tower or of two."""
    return ("text_encoder.", "text_encoder_2.") if len(module.config.towers) > 1 else ("",)


def _second(directory: pathlib.Path) -> pathlib.Path:
    """Where what is for the second tower lies, beside what is for the first."""
    return directory.with_name(f"{directory.name}_2")
