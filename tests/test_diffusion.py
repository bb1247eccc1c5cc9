"""Schedules, targets and samplers agree with diffusers' for the same config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from livo_jax import diffusion
from tests.conftest import relative_error

BASE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
SCHEDULES = [
    BASE,
    dict(beta_schedule="linear"),
    dict(beta_schedule="squaredcos_cap_v2"),
    dict(trained_betas=[0.01, 0.02, 0.03]),
    BASE | dict(rescale_betas_zero_snr=True),
]


@pytest.mark.parametrize("config", SCHEDULES)
def test_schedule(config):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler.from_config(config)
    assert np.allclose(
        diffusion.NoiseSchedule.from_json(config).alphas_cumprod, theirs.alphas_cumprod.numpy(), atol=1e-6
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_targets(prediction_type):
    from diffusers import DDPMScheduler

    config = BASE | dict(prediction_type=prediction_type)
    theirs, ours = DDPMScheduler.from_config(config), diffusion.NoiseSchedule.from_json(config)
    z, eps = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    t = np.array([0, 421, 999])
    torch_args = torch.tensor(z), torch.tensor(eps), torch.tensor(t)
    assert relative_error(diffusion.add_noise(ours, z, eps, t), theirs.add_noise(*torch_args)) < 1e-5
    target = theirs.get_velocity(*torch_args) if prediction_type == "v_prediction" else eps
    assert relative_error(diffusion.target(ours, z, eps, t), target) < 1e-5


def test_min_snr_weights():
    t = np.arange(1000)
    for prediction_type, divisor in (("epsilon", 0), ("v_prediction", 1)):
        schedule = diffusion.NoiseSchedule.from_json(BASE | dict(prediction_type=prediction_type))
        snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
        expected = np.minimum(snr, 5) / (snr + divisor)
        assert np.allclose(diffusion.min_snr_weight(schedule, t, 5.0), expected, rtol=1e-5)
    zero = diffusion.NoiseSchedule.from_json(BASE | dict(rescale_betas_zero_snr=True))
    assert np.isfinite(diffusion.min_snr_weight(zero, t, 5.0)).all()


W = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32) / 2


def toy_unet(z, t, np=np):
    return np.tanh(np.einsum("bhwc,cd->bhwd", z, W) + t / 1000)


OPTIONS = [
    {},
    dict(timestep_spacing="linspace"),
    dict(timestep_spacing="leading", steps_offset=1),
    dict(timestep_spacing="trailing"),
    dict(clip_sample=False, set_alpha_to_one=False),
    dict(final_sigmas_type="sigma_min"),
    dict(solver_type="heun"),
    dict(solver_order=1),
    dict(euler_at_final=True),
    dict(lower_order_final=False, final_sigmas_type="sigma_min"),
    dict(use_karras_sigmas=True),
    dict(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1),
]


@pytest.mark.parametrize("sampler, name", [("ddim", "DDIMScheduler"), ("dpmsolver++", "DPMSolverMultistepScheduler")])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 14, 25])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "defaults")
def test_trajectories(sampler, name, prediction_type, steps, options):
    import diffusers

    config = BASE | options | dict(prediction_type=prediction_type)
    theirs = getattr(diffusers, name).from_config(config)
    theirs.set_timesteps(steps)
    table = diffusion.sampler_table(config, sampler, steps)
    assert table.t.tolist() == theirs.timesteps.tolist()
    noise = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    expected = torch.tensor(noise)
    for t in theirs.timesteps:
        expected = theirs.step(torch.tensor(toy_unet(expected.numpy(), float(t))), t, expected).prev_sample
    sample = jax.jit(lambda z: diffusion.sample(lambda z, t: toy_unet(z, t, jnp), z, table, prediction_type))
    assert relative_error(sample(noise), expected) < 1e-4


def test_zero_terminal_snr():
    """The zero that rescaling puts at T - 1 is what both samplers start from."""
    import diffusers

    config = BASE | dict(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    for sampler, cls in (("ddim", diffusers.DDIMScheduler), ("dpmsolver++", diffusers.DPMSolverMultistepScheduler)):
        theirs = cls.from_config(config)
        theirs.set_timesteps(10)
        noise = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
        expected = torch.tensor(noise)
        for t in theirs.timesteps:
            expected = theirs.step(torch.tensor(toy_unet(expected.numpy(), float(t))), t, expected).prev_sample
        table = diffusion.sampler_table(config, sampler, 10)
        got = diffusion.sample(lambda z, t: toy_unet(z, t, jnp), noise, table, "v_prediction")
        assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize(
    "config, sampler, steps, message",
    [
        (dict(prediction_type="sample"), "ddim", 10, "prediction_type='sample': choose from epsilon, v_prediction"),
        (dict(beta_schedule="sigmoid"), "ddim", 10, "beta_schedule='sigmoid'"),
        ({}, "heun", 0, "sampler='heun': choose from ddim, dpmsolver.*; steps=0: choose 1 to 1000"),
        (dict(timestep_spacing="odd", solver_order=3), "dpmsolver++", 10, "timestep_spacing='odd'.*solver_order=3"),
        (dict(thresholding=True), "ddim", 10, "thresholding"),
    ],
)
def test_what_we_cannot_sample_is_refused(config, sampler, steps, message):
    with pytest.raises(ValueError, match=message):
        diffusion.sampler_table(config, sampler, steps)
