"""The cached training step on the last published Flax modules; benchmarks.train_step starts it.

python -m venv peer && peer/bin/pip install -r benchmarks/flax_peer.txt
python -m benchmarks.train_step --config=FILE --peers=flax --flax_python=peer/bin/python
"""

import functools
import json
import os
import pathlib
import re
import statistics
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffusers import FlaxUNet2DConditionModel
from flax import linen
from flax.traverse_util import unflatten_dict
from transformers import CLIPTextConfig
from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextModule

from livo_jax import diffusion
from livo_jax.training import losses

directory = pathlib.Path(sys.argv[1])
settings = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
root, config = pathlib.Path(settings["root"]), settings["config"]
dtype = jnp.dtype(config["dtype"])


def read_config(part: str, name: str = "config.json") -> dict:
    return json.loads((root / part / name).read_text(encoding="utf-8"))


def weights(part: str, dtype, rename) -> dict:
    """Our weights by the names of the published Flax modules."""
    arrays = np.load(directory / f"{part}.npz")
    return unflatten_dict({tuple(rename(name).split(".")): jnp.asarray(arrays[name], dtype) for name in arrays})


# The published modules have 32 groups whatever their config says, and GELU's tanh approximation.
group_norm = linen.GroupNorm
linen.GroupNorm = lambda num_groups, epsilon: group_norm(
    read_config("unet").get("norm_num_groups", 32), epsilon=epsilon
)
linen.gelu = functools.partial(linen.gelu, approximate=False)

unet = FlaxUNet2DConditionModel.from_config(read_config("unet"), dtype=dtype)
frozen = weights("unet", dtype, lambda name: re.sub(r"\.(\d+)", r"_\1", name))  # down_blocks_0.resnets_0
value_encoder = FlaxCLIPTextModule(CLIPTextConfig(**read_config("text_encoder")))
params = weights("text_encoder", jnp.float32, lambda name: f"text_model.{name}")
schedule = diffusion.NoiseSchedule.from_json(read_config("scheduler", "scheduler_config.json"))
c = config["train"]
tx = optax.chain(
    optax.clip_by_global_norm(c["grad_clip"]),
    optax.adamw(c["learning_rate"], b1=c["b1"], b2=c["b2"], eps=c["eps"], weight_decay=c["weight_decay"]),
)


def loss(params, frozen, batch):
    if not c["train_embeddings"]:
        text = params["text_model"]
        params = {"text_model": text | {"embeddings": jax.lax.stop_gradient(text["embeddings"])}}

    def latents(side):
        mean, logvar = jnp.split(batch[f"{side}_moments"], 2, axis=-1)
        return settings["scale"] * (mean + jnp.exp(0.5 * logvar) * batch[f"noise_{side}"])

    z = jnp.concatenate([latents("aligned"), latents("violating")])
    eps, t = jnp.tile(batch["noise_eps"], (2, 1, 1, 1)), jnp.tile(batch["noise_t"], 2)
    z_t, target = diffusion.add_noise(schedule, z, eps, t), diffusion.target(schedule, z, eps, t)
    prompt = batch["prompt_states"].astype(dtype)
    ids = batch["value_prompt_ids"]
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    u = value_encoder.apply({"params": params}, ids, jnp.ones_like(ids), positions).pooler_output

    def errors(cond):
        cond = jnp.tile(cond, (2, 1, 1))
        out = unet.apply({"params": frozen}, z_t.transpose(0, 3, 1, 2).astype(dtype), t, cond).sample
        return losses.denoising_error(out.transpose(0, 2, 3, 1), target).reshape(2, -1)

    r_w, r_l = errors(prompt)
    l_w, l_l = errors(jnp.concatenate([u[:, None].astype(dtype), prompt], axis=1))
    constants = {name: config["loss"][name] for name in ("alpha", "beta", "gamma_1", "gamma_2")}
    return losses.livo(l_w, l_l, r_w, r_l, **constants)[0]


def train_step(params, opt_state, frozen, batch):
    value, grads = jax.value_and_grad(loss)(params, frozen, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value, optax.tree.norm(grads)


first, rng = dict(np.load(directory / "batch.npz")), np.random.default_rng(1)
opt_state = tx.init(params)
start = time.perf_counter()
step = jax.jit(train_step, donate_argnums=(0, 1)).lower(params, opt_state, frozen, first).compile()
found = {"compile_s": time.perf_counter() - start}
if memory := step.memory_analysis():
    found["temporary_gib"] = memory.temp_size_in_bytes / 2**30
times = []
for i in range(settings["repeats"] + 3):
    drawn = {
        name: rng.standard_normal(first[name].shape, np.float32)
        for name in ("noise_aligned", "noise_violating", "noise_eps")
    }
    drawn["value_prompt_ids"] = rng.permuted(first["value_prompt_ids"][:, 1:-1], axis=1)
    drawn["value_prompt_ids"] = np.pad(drawn["value_prompt_ids"], ((0, 0), (1, 1)), mode="edge")
    batch = first if i == 0 else first | drawn
    start = time.perf_counter()
    params, opt_state, value, norm = step(params, opt_state, frozen, jax.device_put(batch))
    numbers = float(value), float(norm)
    times.append(time.perf_counter() - start)
    if i == 0:
        found["loss"], found["grad_norm"] = numbers
print(json.dumps(found | {"seconds": statistics.median(times[3:])}))
