"""The flow world's model: its VAE is the first world's, and its directory is a published one."""

import pathlib

import jax
import numpy as np

from data_tools import flow_world, shapeworld
from livo_jax import StableDiffusion, sharding

MODEL = pathlib.Path(flow_world.__file__).with_name("flow_world_model")


def test_a_model_of_few_steps(tmp_path, monkeypatch):
    """Built as the real one, of half its layers; the VAE makes the latents and pictures of the first world's."""
    monkeypatch.setitem(flow_world.TRANSFORMER, "num_layers", 2)
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # of more the step compiles for longer
    flow_world.build(tmp_path, pictures=96, steps=2)
    sd, first = StableDiffusion.from_pretrained(tmp_path), StableDiffusion.from_pretrained(flow_world.FIRST)
    rng = np.random.default_rng(1)
    pictures = np.array([shapeworld.render(rng, shapeworld.scene(rng)[1]) for _ in range(4)])

    @jax.jit
    def pass_through(images):
        x = images / 127.5 - 1
        ours, theirs = (vae.encode(x)[0] for vae in (sd.vae, first.vae))
        return sd.vae.decode(ours), first.vae.decode(theirs), sd.vae.config.scale(ours)

    ours, theirs, z = pass_through(pictures)
    assert np.abs(ours - theirs).max() < 0.02, "but for float16 files"
    assert abs(float(z.mean())) < 0.2 and abs(float(z.std()) - 1) < 0.2
    images = sd.generate(["a baker", "a cook"], steps=2, guidance_scale=2.0, batch_size=2, mesh=sharding.make_mesh(1))
    assert images.shape == (2, 32, 32, 3) and sd.family.KEY == "sd3"
    ours, whole = (sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) for root in (tmp_path, MODEL))
    assert ours < whole < 7e6, "float16"
