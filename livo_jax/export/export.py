"""A trained value encoder for PyTorch: transformers loads it, diffusers draws with it."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile

from livo_jax.diffusion.samplers import GAMMA
from livo_jax.diffusion.schedule import SOLVER
from livo_jax.files.directories import write_json
from livo_jax.files.loras import find_lora, merge_loras
from livo_jax.files.modules import read_dtype, save
from livo_jax.files.repositories import read_json
from livo_jax.value_encoders import KINDS, copy_of, gates
from livo_jax.value_encoders.base import READING
from livo_jax.value_encoders.full import ValueEncoder
from livo_jax.value_encoders.lora import LoRA
from livo_jax.value_encoders.soft_tokens import SoftTokens
from livo_jax.values import dealing
from livo_jax.values.principles import lists, load_principles

PIPELINE = pathlib.Path(__file__).with_name("diffusers_pipeline.py")
CARRIED = ("name", "statement", "kind", "keep_probability", "keywords", "exceptions", "stated", "auto")  # of a Value
CARRIED_FILES = ("arguments", "dealing", "ratio", "rules")  # of livo_jax/values
SCHEDULERS = {  # of diffusers, for diffusion.SAMPLERS
    "ddim": ("DDIMScheduler", {"clip_sample": False, "thresholding": False}),
    "ddim_trailing": (
        "DDIMScheduler", {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"},
    ),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"thresholding": False}),
    "dpmsolver++_karras": ("DPMSolverMultistepScheduler", {"thresholding": False, "use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "lcm": ("LCMScheduler", {"clip_sample": False, "thresholding": False}),
    "pndm": ("PNDMScheduler", {}),
    "tcd": ("TCDScheduler", {"clip_sample": False, "thresholding": False}),
}  # fmt: skip

FLOW_SCHEDULERS = {  # and for diffusion.FLOW_SAMPLERS
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
}

READS = """reads {text}; what it gives, put before the prompt's tokens, makes the frozen base model
follow the value."""
WHAT = {  # the model card's first paragraph, by kind of value encoder
    "full": f"A CLIP text model that {READS}",
    "lora": f"""\
Low-rank updates of the base's text encoder. With them it {READS} `value_encoder/` is a CLIP text model that has the
updates in its weights; `adapter/` has them alone, for peft:
`PeftModel.from_pretrained(TEXT_ENCODER, FOLDER, subfolder="adapter")`.""",
    "token": """\
Learned tokens of each value, the same for every prompt: put before the prompt's tokens, they make the frozen base model
follow the value.""",
}


@contextlib.contextmanager
def whole_or_not_at_all(directory: pathlib.Path):
    """A new folder beside `directory` to write into, which gets its name when nothing failed.

    Raises:
        FileExistsError: `directory` exists.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists: remove it, or export to another --out")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def export(directory: str | os.PathLike, sd, value_encoder, config, results: list[dict] = (), rates=None, recipe=None):
    """Writes a value encoder as PyTorch's libraries read it.

        value_encoder/   config.json and model.safetensors: a transformers CLIPTextModel, float32, with low-rank updates
                         merged into it; or value_tokens.safetensors, soft tokens. The config has its base, the values
                         that it knows, and which prompts they are for
        adapter/         low-rank updates alone, which peft loads on the model's text encoder
        tokenizer/       of the model that it belongs to
        ..._2/           for XL and 3 the same of the second tower
        pipeline.py      a diffusers custom pipeline around both, with livo_arguments.py, livo_dealing.py,
                         livo_ratio.py, livo_rules.py
        README.md        a model card: how to use it, its recipe, its results

    Args:
        directory: to be made; it appears whole or not at all.
        sd: the StableDiffusion that the value encoder was trained against.
        config: its model, principles and sampling are used.
        results: the rows of eval/results.json. rates: of eval/rates.json; the pipeline needs them for a ratio.
        recipe: the config.json of the run that trained it, if any.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: the config samples in the official layout, which the pipeline does not draw; or has a kind of value
            encoder that it does not know.
    """
    if config.sampling.prompt_layout != "padded":
        raise ValueError(
            f"config.sampling.prompt_layout={config.sampling.prompt_layout!r}: pipelines draw padded alone"
        )
    if config.value_encoder.kind not in WHAT:
        raise ValueError(
            f"config.value_encoder.kind={config.value_encoder.kind!r}: pipelines know {', '.join(WHAT)}; its own code"
            " has to save another"
        )
    directory = pathlib.Path(directory).absolute()
    is_flow = sd.schedule.prediction_type == "flow"
    scheduler, options = (FLOW_SCHEDULERS if is_flow else SCHEDULERS)[config.sampling.sampler]
    # What the base's own file may say otherwise, or not say.
    right = ("steps_offset", *SOLVER) if scheduler == "DPMSolverMultistepScheduler" else ("steps_offset",)
    options = options | {name: sd.scheduler_config[name] for name in right if name in sd.scheduler_config}
    settings = {
        "family": sd.family.KEY, "size": sd.image_size, "scheduler": scheduler,
        "options": options, "eta": sd.scheduler_config.get("eta", GAMMA) if config.sampling.sampler == "tcd" else 0.0,
        "steps": config.sampling.steps, "guidance_scale": config.sampling.guidance_scale,
    }  # fmt: skip
    text_encoder = sd.text_encoder
    rounded = config.quantised or read_dtype(config.dtype) != "float32"
    if isinstance(value_encoder, LoRA) and rounded:  # what peft adds to is not
        text_encoder = ValueEncoder.from_pretrained(sd.root, subfolder="text_encoder", variant=config.variant or None)
        if config.loras:
            text_encoder, _ = merge_loras(text_encoder, None, config.loras)
    with whole_or_not_at_all(directory) as out:
        known = [{field: getattr(v, field) for field in CARRIED} for v in load_principles(config)]
        for value in known:
            value["alone"] = value["statement"] in value_encoder.alone
        base = name_base(config.model)
        knows = {"base": base, "family": sd.family.KEY, "values": known, "lists": lists(), "rates": rates}
        knows["gates"] = gates.as_json(value_encoder.gates)
        knows |= {"dealing": dealing.BLOCK} | {name: getattr(value_encoder, name) for name in READING}
        if isinstance(value_encoder, LoRA):
            value_encoder.save(out / "adapter", base)
            value_encoder = copy_of(value_encoder.merged(text_encoder))
        for k, tower in enumerate(value_encoder.config.towers):
            second = "_2" if k else ""
            published = read_json(sd.root / f"text_encoder{second}" / "config.json") | dataclasses.asdict(tower)
            published |= {"livo": knows}
            published |= {"architectures": ["CLIPTextModel"], "dtype": "float32", "torch_dtype": "float32"}
            if not isinstance(value_encoder, SoftTokens):
                # transformers before 5 needs the prefix, and 5 takes it.
                place, prefix = out / f"value_encoder{second}", "text_model."
                save(value_encoder.towers[k], place, published, stem="model", prefix=prefix)
            elif not k:
                value_encoder.save(out / "value_encoder", base)
                write_json(out / "value_encoder" / "config.json", published)
            shutil.copytree(sd.root / f"tokenizer{second}", out / f"tokenizer{second}")
        lines = PIPELINE.read_text(encoding="utf-8").splitlines(keepends=True)
        (place,) = (i for i, line in enumerate(lines) if line.startswith("SETTINGS = "))
        lines[place] = f"SETTINGS = {settings!r}\n"
        (out / "pipeline.py").write_text("".join(lines), encoding="utf-8")
        for name in CARRIED_FILES:
            text = pathlib.Path(dealing.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
            (out / f"livo_{name}.py").write_text(text.replace("from livo_jax.values.", "from .livo_"), encoding="utf-8")
        (out / "README.md").write_text(card(config, results, recipe), encoding="utf-8")


def name_base(model: str) -> str:
    """A hub id as it is; of a directory its last name, for its path means nothing on another machine."""
    place = pathlib.Path(model).expanduser()
    return place.resolve().name if model and place.is_dir() else model


def card(config, results, recipe) -> str:
    """The model card, Markdown."""
    values = load_principles(config)
    base, first, sampling = name_base(config.model), values[0], config.sampling
    is_local = base != config.model or pathlib.Path(base).is_dir()
    how = f"\n`BASE` is the directory of {base}, the model that it was trained on.\n" if is_local else ""
    named = "BASE" if is_local else repr(base)
    kind = KINDS[config.value_encoder.kind]
    read = "a value and a prompt" if config.value_encoder.reads_prompt else "a value"
    statements = "\n".join(
        f"- `{v.statement}` ({v.kind}): apply it to {v.keep_probability:.0%} of a prompt's images" for v in values
    )
    table = [
        f"| {r['value']} | {r['split'].replace('_', ' ')} | {r['metric']} | {r['method']} | {r['mean']:.3f} |"
        f" {'{:.3f} to {:.3f}'.format(*r['ci95']) if r['ci95'] else 'none'} | {r['images']} |"
        for r in results
    ]
    loras = [(path.name, scale) for path, scale in map(find_lora, config.loras)]
    fused = [  # the base as it was trained on
        f"pipe.load_lora_weights({name!r})\npipe.fuse_lora(lora_scale={scale})\npipe.unload_lora_weights()"
        for name, scale in loras
    ]
    merging = f"sd.merge_loras({[f'{name}={scale}' for name, scale in loras]})\n" if loras else ""
    merging += f"sd.quantise({config.quantised!r})\n" if config.quantised else ""
    if table:
        table = ["| value | prompts | metric | method | mean | 95% interval | images |", "|---" * 7 + "|", *table]
    if recipe:
        start = name_base(recipe["value_encoder"]["start"] or "")
        recipe = recipe | {"model": base, "value_encoder": recipe["value_encoder"] | {"start": start}}
    trained = {name: recipe[name] for name in ("model", "seed", "value_encoder", "loss", "train")} if recipe else {}
    return f"""---
library_name: diffusers
base_model: {base}
tags: [livo, stable-diffusion, text-to-image]
---

# LiVO value encoder for {base}

{WHAT[config.value_encoder.kind].format(text=read)}

The method is LiVO (Wang et al., ACM MM 2024, arXiv 2410.12700). Written by livo_jax.

It knows the values

{statements}

## Use
{how}
```python
from diffusers import DiffusionPipeline

HERE = "."  # the folder of this card, or its hub id
pipe = DiffusionPipeline.from_pretrained({named}, custom_pipeline=HERE, trust_remote_code=True)
{"".join(f"{line}{chr(10)}" for line in fused)}images = pipe(
    "a photo of a doctor", values={first.statement!r}, keep_probability={first.keep_probability},
    num_images_per_prompt=4,
).images
out = pipe(["a photo of a doctor", "a lake"], values="auto", strength=0.8)  # for each prompt the values it calls for
print(out.applied)  # for each image the values applied to it, with strength and reason
```

`values` are names or statements: one, or a list of them that work together, or for a list of prompts a list with such
an entry for each. "auto" goes by keywords alone, whatever else `auto` of principles.toml asks: a harm that no word says
it does not find. `strength` is a number, or a dict of value to number: 0 is the base model, 1 LiVO. A `ratio`,
"equal" or a dict of attribute to share, is what all images of a call are to show of a bias (it needs scipy).

`pipeline.py` beside this card is what that runs. In JAX:

```python
from livo_jax import StableDiffusion
from livo_jax.value_encoders import {kind.__name__}

sd = StableDiffusion.from_pretrained({named})
{merging}ve = {kind.__name__}.from_pretrained(HERE, sd=sd)
images = sd.generate(
    ["a photo of a doctor"] * 4, values={first.statement!r}, value_encoder=ve,
    keep_probability={first.keep_probability},
    sampler={sampling.sampler!r}, steps={sampling.steps}, guidance_scale={sampling.guidance_scale},
)
```

## Results

{"".join(line + chr(10) for line in table) or "It was not evaluated." + chr(10)}
`base` is the model alone, `livo` the model with this value encoder, on the same prompts and noise.

## Recipe

{f"```json{chr(10)}{json.dumps(trained, indent=2)}{chr(10)}```" if trained else "Not trained here."}
"""
