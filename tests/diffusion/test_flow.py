"""Flow matching agrees with diffusers' for the same scheduler_config.json."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from livo_jax import diffusion
from livo_jax.training.batch import draw_noise
from tests.conftest import relative_error
from tests.diffusion.test_diffusion import sample, toy_unet

EULER, HEUN = diffusion.FLOW_SCHEDULERS
PUBLISHED = {"_class_name": EULER, "num_train_timesteps": 1000, "shift": 3.0}


def theirs_of(config, name=EULER):
    import diffusers

    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters  # Heun's has few fields, and tells of others
    return kind.from_config({field: x for field, x in config.items() if field in known})


@pytest.mark.parametrize("config", [PUBLISHED, {"_class_name": HEUN}, PUBLISHED | {"num_train_timesteps": 10}], ids=str)
def test_noise_and_target(config):
    theirs, ours = theirs_of(config), diffusion.read_schedule(config)
    np.testing.assert_allclose(ours.sigmas[::-1], theirs.sigmas, rtol=1e-6)
    t = np.array([0, 4, ours.num_timesteps - 1])
    z, eps = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    times = ours.times(t)
    np.testing.assert_allclose(times, theirs.timesteps.numpy()[::-1][t], rtol=1e-6)
    exact = theirs.timesteps[[ours.num_timesteps - 1 - i for i in t]]
    expected = theirs.scale_noise(torch.tensor(z), exact, torch.tensor(eps))
    assert relative_error(diffusion.add_noise(ours, z, eps, t), expected) < 1e-5
    np.testing.assert_array_equal(diffusion.target(ours, z, eps, t), eps - z)  # d z_t / d sigma


@pytest.mark.parametrize("steps", [1, 2, 5, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler, name", [("euler", EULER), ("heun", HEUN)])
def test_trajectories(sampler, name, shift, steps):
    config = PUBLISHED | {"shift": shift}
    noise = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    theirs, z = theirs_of(config, name), torch.tensor(noise)
    theirs.set_timesteps(steps)
    for t in theirs.timesteps:
        z = theirs.step(torch.tensor(toy_unet(z.numpy(), float(t)), dtype=torch.float32), t, z).prev_sample
    table = diffusion.sampler_table(config, sampler, steps)
    np.testing.assert_allclose(table.t, theirs.timesteps, rtol=1e-5)
    assert table.noise is None
    assert relative_error(sample(noise, table), z) < 1e-4  # theirs divides a difference by sigmas down to 0.001


def test_a_sampler_draws_what_a_network_that_knows_the_image_sees():
    """Along its straight line every sampler comes to the image, and z_0 is it at every evaluation."""
    image, noise = np.random.default_rng(1).normal(size=(2, 1, 2, 2, 4)).astype(np.float32)
    for sampler in diffusion.FLOW_SAMPLERS:
        table = diffusion.sampler_table(PUBLISHED, sampler, 4)

        def know(z, t, _, table=table):
            return noise - image, None

        assert relative_error(diffusion.sample(know, jnp.asarray(noise), table), image) < 1e-5
        sigma = table.t / 1000
        seen = (1 - sigma) * image.ravel()[0] + sigma * noise.ravel()[0]
        np.testing.assert_allclose(
            table.from_z * seen + table.from_out * (noise - image).ravel()[0], image.ravel()[0], rtol=1e-4
        )


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
def test_densities_of_timesteps(density):
    """As diffusers draws them for its trainings: quantiles of 20,000 of each."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    torch.manual_seed(0)
    name = {"uniform": "none"}.get(density, density)
    theirs = 100 + 800 * compute_density_for_timestep_sampling(name, 20_000, logit_mean=0.0, logit_std=1.0).numpy()
    t = np.asarray(draw_noise(jax.random.key(0), (20_000, 1, 1, 1), (100, 900), density).t)
    assert t.dtype == np.int32 and 100 <= t.min() and t.max() <= 899
    at = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(t, at), np.quantile(theirs, at), atol=12)  # of 800


@pytest.mark.parametrize(
    "config, sampler, steps, message",
    [
        ({}, "dpmsolver++", 5, "sampler='dpmsolver.*: choose from euler, heun, which are of flow matching"),
        ({}, "pndm", 1001, "sampler='pndm'.*; steps=1001: choose 1 to 1000"),
        ({"shift": 0, "use_dynamic_shifting": True}, "euler", 5, "shift=0: .*; use_dynamic_shifting=True: only False"),
        ({"shift": "3", "use_karras_sigmas": True}, "euler", 5, "shift='3': a number.*; use_karras_sigmas=True"),
        (
            {"shift": float("inf"), "num_train_timesteps": 1.5},
            "euler",
            5,
            "steps=1.5: a whole.*shift=inf: a number",
        ),
    ],
)
def test_what_we_cannot_sample_is_refused(config, sampler, steps, message):
    with pytest.raises(ValueError, match=message):
        diffusion.sampler_table(PUBLISHED | config, sampler, steps)


def test_what_is_of_other_noise_is_refused():
    with pytest.raises(ValueError, match="_class_name='DDIMScheduler' is no flow matching: choose from FlowMatchEuler"):
        diffusion.FlowSchedule.from_json({"_class_name": "DDIMScheduler"})
    with pytest.raises(ValueError, match="min_snr_gamma=5.0: it is not for flow matching; set it to 0"):
        diffusion.min_snr_weight(diffusion.read_schedule(PUBLISHED), np.zeros(1, int), 5.0)
