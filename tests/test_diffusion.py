"""Schedules, targets and samplers agree with diffusers' for the same config."""

import functools

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


sample = jax.jit(functools.partial(diffusion.sample, lambda z, t, _: (toy_unet(z, t, jnp), None)))

SAMPLERS = {
    "ddim": ("DDIMScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "dpmsolver++_karras": ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True)),
    "euler": ("EulerDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
}
OPTIONS = [
    {},
    dict(timestep_spacing="linspace"),
    dict(timestep_spacing="leading", steps_offset=1),
    dict(timestep_spacing="trailing"),
    dict(clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1),  # as SD 1.5 is published
    dict(skip_prk_steps=True, timestep_spacing="trailing", set_alpha_to_one=True),
    dict(final_sigmas_type="sigma_min"),
    dict(solver_type="heun"),
    dict(solver_order=1),
    dict(euler_at_final=True),
    dict(lower_order_final=False, final_sigmas_type="sigma_min"),
    dict(use_karras_sigmas=True),
    dict(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1),
    dict(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1, timestep_spacing="trailing"),
]


def trajectory(sampler, config, steps, noise):
    """Timesteps and last latents of diffusers' scheduler around toy_unet."""
    import diffusers

    name, forced = SAMPLERS[sampler]
    scheduler = getattr(diffusers, name).from_config(config | forced)
    scheduler.set_timesteps(steps)
    z = torch.tensor(noise) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = toy_unet(scheduler.scale_model_input(z, t).numpy(), float(t))
        z = scheduler.step(torch.tensor(out, dtype=torch.float32), t, z).prev_sample
    return scheduler.timesteps.numpy(), z


CASES = [(s, o) for o in OPTIONS for s in SAMPLERS if s == "dpmsolver++" or "lambda_min_clipped" not in o]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 14, 25])
@pytest.mark.parametrize("sampler, options", CASES, ids=str)
def test_trajectories(sampler, prediction_type, steps, options):
    config = BASE | options | dict(prediction_type=prediction_type)
    if sampler == "pndm" and steps < 4 and not config.get("skip_prk_steps"):
        with pytest.raises(ValueError, match=f"steps={steps}: choose 4 to 1000"):
            diffusion.sampler_table(config, sampler, steps)
        return
    noise = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    timesteps, expected = trajectory(sampler, config, steps, noise)
    table = diffusion.sampler_table(config, sampler, steps)
    # Euler alone tells the UNet timesteps between the whole ones.
    np.testing.assert_allclose(table.t, timesteps, rtol=1e-5, atol=1e-3 if sampler == "euler" else 0)
    assert relative_error(sample(noise, table), expected) < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "euler"])
def test_zero_terminal_snr(sampler):
    """The zero that rescaling puts at T - 1 is what samplers start from."""
    config = BASE | dict(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    noise = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    _, expected = trajectory(sampler, config, 10, noise)
    assert relative_error(sample(noise, diffusion.sampler_table(config, sampler, 10)), expected) < 1e-4


@pytest.mark.parametrize(
    "config, sampler, steps, message",
    [
        (dict(prediction_type="sample"), "ddim", 10, "prediction_type='sample': choose from epsilon, v_prediction"),
        (dict(beta_schedule="sigmoid"), "ddim", 10, "beta_schedule='sigmoid'"),
        ({}, "heun", 0, "sampler='heun': choose from ddim, dpmsolver.*; steps=0: choose 1 to 1000"),
        (dict(timestep_spacing="odd", solver_order=3), "dpmsolver++", 10, "timestep_spacing='odd'.*solver_order=3"),
        (dict(thresholding=True), "ddim", 10, "thresholding"),
        (dict(steps_offset=1), "ddim", 1000, "1000 steps with steps_offset=1 pass the last timestep"),
        (dict(timestep_spacing="linspace"), "dpmsolver++", 1000, "steps=1000: so many that timesteps repeat"),
        (dict(interpolation_type="log_linear"), "euler", 10, "interpolation_type='log_linear': choose from linear"),
    ],
)
def test_what_we_cannot_sample_is_refused(config, sampler, steps, message):
    with pytest.raises(ValueError, match=message):
        diffusion.sampler_table(config, sampler, steps)
