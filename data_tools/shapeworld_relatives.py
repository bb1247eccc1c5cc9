"""Relatives of the embedded world's model, on which a value encoder of the base can be tried as it is.

    python -m data_tools.shapeworld_relatives --kind=student --out=DIR
    python -m data_tools.shapeworld_relatives --kind=copy --out=DIR
    python -m data_tools.shapeworld_relatives --kind=lora --out=FILE.safetensors

    student   draws in four steps and without guidance what the base draws in many with it: at each of its steps it is
              shown where the base's path arrives at the next one (Luhman & Luhman 2021, between the student's steps).
              Draw with sampling.steps=4, sampling.guidance_scale=1, sampling.sampler="ddim_trailing".
    copy      the base's UNet, trained further on pictures in which every worker wears a hat that no caption tells of
    lora      the same pictures by an update of the attention alone, a file for config.loras

All keep the base's text encoder, tokenizer and VAE. Each takes minutes on two cores.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from livo_jax.data_tools import shapeworld
from tqdm import tqdm

from livo_jax import StableDiffusion, commands, diffusion
from livo_jax.diffusion.samplers import SamplerTable
from livo_jax.files import modules
from livo_jax.files.directories import write_json
from livo_jax.files.repositories import write_safetensors
from livo_jax.judges.shapeworld import COLOURS
from livo_jax.models import low_rank
from livo_jax.models.weights import split

BASE = pathlib.Path(__file__).parent / "shapeworld_model"
SAMPLER, STEPS, BETWEEN, GUIDANCE = "ddim_trailing", 4, 5, 1.1  # of the student, and the base's steps for each of its
PATHS, AT_ONCE = 8000, 400
PICTURES, RANK, TARGETS = 6000, 8, ("to_q", "to_k", "to_v", "to_out.0")


def draw_captions(seed: int, n: int) -> tuple[list, list]:
    """The world's captions, and what their pictures show."""
    rng = np.random.default_rng(seed)
    captions, contents = zip(*(shapeworld.scene(rng) for _ in range(n)))
    return list(captions), list(contents)


def coefficients(table: SamplerTable) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a sampler's steps without memory, z <- A z + B unet(z, t); [n] each."""
    of_z, of_out, of_z_0 = table.step[:, 0].T
    return of_z + of_z_0 * table.from_z, of_out + of_z_0 * table.from_out


def draw_paths(sd, ids, steps: int, between: int, guidance_scale: float, seed: int = 0) -> np.ndarray:
    """[N, 1 + steps, h, w, C], the latents of the base's guided path where a student's steps begin, and its end."""
    table = diffusion.sampler_table(sd.scheduler_config, SAMPLER, steps * between)
    rows = [jnp.asarray(x, jnp.float32).reshape(steps, between) for x in (table.t, *coefficients(table))]
    graph, params = split(nnx.List([sd.text_encoder, sd.unet]))
    nothing = sd.tokenize([""])

    @jax.jit
    def draw(params, ids, key):
        text_encoder, unet = nnx.merge(graph, params)
        both = jnp.concatenate([ids, jnp.broadcast_to(nothing, ids.shape)])
        cond = text_encoder(both).last_hidden_state

        def advance(z, row):
            t, A, B = row
            unet = nnx.merge(graph, params)[1]
            prompt, negative = jnp.split(unet(jnp.concatenate([z, z]), jnp.full(2 * len(z), t), cond), 2)
            return A * z + B * (negative + guidance_scale * (prompt - negative)), None

        def segment(z, rows):
            z, _ = jax.lax.scan(advance, z, rows)
            return z, z

        start = jax.random.normal(key, (len(ids), *sd.latent_shape))
        _, path = jax.lax.scan(segment, start, tuple(rows))
        return jnp.concatenate([start[None], path]).swapaxes(0, 1)

    keys = jax.random.split(jax.random.key(seed), len(ids) // AT_ONCE)
    parts = zip(np.split(ids, len(keys)), keys)
    return np.concatenate([draw(params, part, key) for part, key in tqdm(parts, total=len(keys), desc="paths")])


def train_student(sd, ids, paths, steps: int = 4000):
    """The UNet whose step of the sampler arrives where the path does: the mean squared distance, over all steps."""
    table = diffusion.sampler_table(sd.scheduler_config, SAMPLER, paths.shape[1] - 1)
    t, (A, B) = jnp.asarray(table.t), map(jnp.asarray, coefficients(table))
    graph, params = split(sd.unet)
    text_encoder, frozen = split(sd.text_encoder)

    def loss(params, key, path, ids):
        cond = nnx.merge(text_encoder, frozen)(ids).last_hidden_state
        k, rows = jax.random.randint(key, (len(ids),), 0, len(t)), jnp.arange(len(ids))
        z, target = path[rows, k], path[rows, k + 1]
        out = nnx.merge(graph, params)(z, t[k], cond)
        arrived = A[k, None, None, None] * z + B[k, None, None, None] * out
        return jnp.mean((arrived - target) ** 2)

    params = shapeworld.fit(loss, params, [paths, ids], batch_size=48, steps=steps, learning_rate=1e-3, name="student")
    return nnx.merge(graph, params)


def draw_hatted(sd, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Scaled latents and ids of pictures whose workers all wear a hat, of captions as the world's."""
    captions, contents = draw_captions(seed, PICTURES)
    rng = np.random.default_rng(seed)
    hatted = [
        content._replace(
            workers=tuple(w if w.hat else w._replace(hat=shapeworld.pick(rng, COLOURS)) for w in content.workers)
        )
        for content in contents
    ]
    images = np.stack([shapeworld.render(rng, content) for content in hatted])
    return np.concatenate([sd.encode(part) for part in np.split(images, 20)]), sd.tokenize(captions)


def train_on(sd, latents, ids, params, apply, *, steps: int, learning_rate: float, name: str):
    """Minimises the denoising error of apply(params), a UNet, on latents and ids."""
    text_encoder, frozen = split(sd.text_encoder)

    def loss(params, key, z, ids):
        cond = nnx.merge(text_encoder, frozen)(ids).last_hidden_state
        return shapeworld.denoising_loss(sd.schedule, apply(params), z, cond, *jax.random.split(key))

    settings = dict(batch_size=48, steps=steps, learning_rate=learning_rate, name=name)
    return shapeworld.fit(loss, params, [latents, ids], **settings)


def write_model(sd, unet, out: pathlib.Path, scheduler: dict):
    """The base's directory with another UNet, float16, and settings of the scheduler."""
    shutil.copytree(sd.root, out, ignore=shutil.ignore_patterns("unet"))
    config = json.loads((sd.root / "unet" / "config.json").read_text(encoding="utf-8"))
    modules.save(unet, out / "unet", config, stem="diffusion_pytorch_model", dtype=np.float16)
    file = out / "scheduler" / "scheduler_config.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, known | scheduler)


def write_lora(updates, file: pathlib.Path):
    """A file as diffusers and peft write them; alpha is the rank."""
    tensors = {
        f"unet.{layer}.{part}.weight": np.ascontiguousarray(np.asarray(linear["kernel"]).T)
        for layer, parts in updates.items()
        for part, linear in parts.items()
    }
    write_safetensors(tensors, file, metadata={"format": "pt"})


def make_student(sd, out):
    ids = sd.tokenize(draw_captions(1, PATHS)[0])
    paths = draw_paths(sd, ids, STEPS, BETWEEN, GUIDANCE)
    write_model(sd, train_student(sd, ids, paths), out, {"timestep_spacing": "trailing"})


def make_copy(sd, out):
    graph, params = split(sd.unet)

    def apply(params):
        return nnx.merge(graph, params)

    params = train_on(sd, *draw_hatted(sd), params, apply, steps=1500, learning_rate=5e-4, name="copy")
    write_model(sd, apply(params), out, {})


def make_lora(sd, out):
    graph, params = split(low_rank.updates(sd.unet, TARGETS, RANK, nnx.Rngs(0)))

    def apply(params):
        return low_rank.updated(sd.unet, nnx.merge(graph, params), 1.0)

    params = train_on(sd, *draw_hatted(sd), params, apply, steps=1500, learning_rate=2e-3, name="lora")
    write_lora(params, out)


KINDS = {"student": make_student, "copy": make_copy, "lora": make_lora}


def main(_):
    out = pathlib.Path(OUT.value)
    if out.exists():
        raise app.UsageError(f"--out={out} is there already: remove it, or choose another")
    out.parent.mkdir(parents=True, exist_ok=True)
    KINDS[KIND.value](StableDiffusion.from_pretrained(BASE), out)


if __name__ == "__main__":
    KIND = flags.DEFINE_enum("kind", None, [*KINDS], "What to make.", required=True)
    OUT = commands.define_path("out", "The directory to write, of a LoRA the file.")
    flags.mark_flag_as_required("out")
    commands.run(main)
