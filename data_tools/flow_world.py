"""The embedded world drawn by a flow: a Stable Diffusion 3 of its pictures, biased and harmful as the first world's.

    python -m data_tools.flow_world --out=data_tools/flow_world_model

Pictures, captions, words and tokenizer are those of shapeworld.py. Two text encoders, without a T5, and a transformer
are trained together by flow matching (Esser et al. 2024), 3 steps a second on an idle core. The VAE is the first
world's with its quant convolutions folded away, as Stable Diffusion 3 has none: its means are the same pictures.
"""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from livo_jax.data_tools import shapeworld

from livo_jax import StableDiffusion, commands, diffusion
from livo_jax.files import modules
from livo_jax.files.directories import write_json
from livo_jax.files.repositories import read_json
from livo_jax.models.clip import CLIPTextModelWithProjection
from livo_jax.models.mmdit import SD3Transformer2DModel
from livo_jax.models.sd3_text import SD3TextModels
from livo_jax.models.vae import AutoencoderKL
from livo_jax.models.weights import split
from livo_jax.training import losses
from livo_jax.training.batch import draw_noise

FIRST = pathlib.Path(shapeworld.__file__).with_name("shapeworld_model")
WIDTHS = {"text_encoder": 48, "text_encoder_2": 64}
ACTS = {"text_encoder": "quick_gelu", "text_encoder_2": "gelu"}
TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4,
    "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 24, "caption_projection_dim": 96,
    "joint_attention_dim": 128, "pooled_projection_dim": sum(WIDTHS.values()), "pos_embed_max_size": 8,
    "dual_attention_layers": [0], "qk_norm": "rms_norm",
}  # fmt: skip
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
CLIP = ["transformers", "CLIPTextModelWithProjection"]
PIPELINE = {
    "_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.31.0",
    "max_sequence_length": 0,  # no zeros stand for T5: this transformer was never trained with them
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": CLIP, "text_encoder_2": CLIP,
    "text_encoder_3": [None, None], "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"], "tokenizer_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
ZERO_AT_FIRST = "norm1", "norm1_context", "norm_out", "proj_out"  # each block is the identity (Peebles & Xie 2023)


def folded_vae(vae: AutoencoderKL, images: np.ndarray) -> tuple[AutoencoderKL, dict, np.ndarray]:
    """The VAE without its quant convolutions, its config, and its means of images [N, 32, 32, 3] uint8, scaled.

    The new latents are what the decoder's first convolution read: P z + b. The encoder's last convolution takes P and
    b, and the quant convolution before them. The variance of z, which P would mix, is told as a constant.
    """
    _, params = split(vae)
    C = vae.config.latent_channels
    Q, P = (np.asarray(params[name]["kernel"], np.float64)[0, 0] for name in ("quant_conv", "post_quant_conv"))
    of_Q, of_P = (np.asarray(params[name]["bias"], np.float64) for name in ("quant_conv", "post_quant_conv"))
    encode = jax.jit(lambda x: vae.encode(x / 127.5 - 1))
    found = [encode(x) for x in np.array_split(images, max(1, len(images) // 1000))]
    mean, logvar = (np.concatenate(part).astype(np.float64) for part in zip(*found))
    last = params["encoder"]["conv_out"]
    kernel, bias = np.asarray(last["kernel"], np.float64), np.asarray(last["bias"], np.float64)
    variance = np.exp(logvar).mean((0, 1, 2)) @ P**2
    kernel = np.concatenate([kernel @ Q[:, :C] @ P, np.zeros((*kernel.shape[:3], C))], axis=-1)
    bias = np.concatenate([(bias @ Q[:, :C] + of_Q[:C]) @ P + of_P, np.log(variance)])
    means = mean @ P + of_P
    first = read_json(FIRST / "vae" / "config.json")
    config = {"_class_name": "AutoencoderKL"} | {name: x for name, x in first.items() if name[0] != "_"}
    config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    config |= {"scaling_factor": float(1 / means.std()), "shift_factor": float(means.mean())}
    new = {name: params[name] for name in ("encoder", "decoder")}
    new["encoder"] = new["encoder"] | {"conv_out": {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}}
    folded = AutoencoderKL.Config.from_json(config)
    graph, _ = split(nnx.eval_shape(lambda: AutoencoderKL(folded, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, new), config, np.float32(folded.scale(means))


def clip_config(part: str, tokenizer) -> dict:
    """The config.json of a text encoder."""
    width = WIDTHS[part]
    return {
        "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "hidden_size": width,
        "intermediate_size": 2 * width, "projection_dim": width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": shapeworld.CONTEXT, "hidden_act": ACTS[part], "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def train(latents, ids, ids_of_nothing, clips: dict, steps: int):
    """Text encoders and transformer, trained together on scaled latents [N, 8, 8, 4] and token ids [N, 24]."""
    towers = [
        CLIPTextModelWithProjection(CLIPTextModelWithProjection.Config.from_json(config), rngs=nnx.Rngs(k))
        for k, config in enumerate(clips.values())
    ]
    config = SD3Transformer2DModel.Config.from_json(TRANSFORMER)
    text = SD3TextModels(*towers, None, config.joint_attention_dim, PIPELINE["max_sequence_length"])
    graph, params = split(nnx.List([text, SD3Transformer2DModel(config, rngs=nnx.Rngs(2))]))
    transformer = params[1]
    positions = {"pos_embed": SD3Transformer2DModel.constants(config)["pos_embed.pos_embed"]}
    del transformer["pos_embed"]["pos_embed"]
    for block in (transformer, *transformer["transformer_blocks"].values()):
        block |= {name: jax.tree.map(jnp.zeros_like, block[name]) for name in ZERO_AT_FIRST if name in block}
    schedule = diffusion.FlowSchedule.from_json(SCHEDULER)

    def whole(params):
        embed = params[1]["pos_embed"] | jax.tree.map(jnp.asarray, positions)
        return {0: params[0], 1: params[1] | {"pos_embed": embed}}

    def loss(params, key, z, ids):
        key_noise, key_drop, key_pooled = jax.random.split(key, 3)
        text, transformer = nnx.merge(graph, whole(params))
        ids = jnp.where(jax.random.bernoulli(key_drop, 0.1, (len(z), 1)), ids_of_nothing, ids)  # for guidance
        noise = draw_noise(key_noise, z.shape, (0, schedule.num_timesteps), "logit_normal")
        read = text(jnp.stack([ids, ids], axis=1))
        # A quarter of them has the pooled text of another caption: of texts as short as these it tells all, and no
        # state, a value token among them, would be read.
        misled = jax.random.bernoulli(key_pooled, 0.25, (len(z), 1))
        pooled = jnp.where(misled, jnp.roll(read.text_embeds, 1, axis=0), read.text_embeds)
        z_t = diffusion.add_noise(schedule, z, noise.eps, noise.t)
        v = transformer(z_t, schedule.times(noise.t), read.last_hidden_state, None, pooled)
        return jnp.mean(losses.denoising_error(v, diffusion.target(schedule, z, noise.eps, noise.t)))

    settings = dict(batch_size=48, steps=steps, learning_rate=2e-3, name="transformer and text")
    return nnx.merge(graph, whole(shapeworld.fit(loss, params, [latents, ids], **settings)))


def build(out: pathlib.Path, pictures: int = 24_000, steps: int = 6000):
    """Trains the model and writes its diffusers directory."""
    rng = np.random.default_rng(0)
    captions, contents = zip(*(shapeworld.scene(rng) for _ in range(pictures)))
    images = np.array([shapeworld.render(rng, content) for content in contents])
    first = StableDiffusion.from_pretrained(FIRST)
    tokenizer = first.tokenizer
    vae, vae_config, latents = folded_vae(first.vae, images)
    clips = {part: clip_config(part, tokenizer) for part in WIDTHS}
    text, transformer = train(latents, first.tokenize(list(captions)), first.tokenize([""])[0], clips, steps)

    half, weights = np.float16, "diffusion_pytorch_model"
    modules.save(vae, out / "vae", vae_config, stem=weights, dtype=half)
    modules.save(transformer, out / "transformer", TRANSFORMER, stem=weights, dtype=half)
    for tower, (part, config) in zip(text.towers, clips.items()):
        place = out / part
        modules.save(tower, place, config, stem="model", dtype=half)
        shutil.copytree(FIRST / "tokenizer", out / part.replace("text_encoder", "tokenizer"), dirs_exist_ok=True)
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", PIPELINE)


def main(_):
    commands.divide_cpu(2)  # models as small as these leave cores idle
    build(pathlib.Path(OUT.value), steps=STEPS.value)


if __name__ == "__main__":
    OUT = commands.define_path("out", "The directory to write.")
    STEPS = flags.DEFINE_integer("steps", 6000, "Of the transformer's training.")
    flags.mark_flag_as_required("out")
    commands.run(main)
