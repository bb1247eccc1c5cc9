"""Schedules, targets and samplers agree with diffusers' for the same config."""

import inspect
from unittest import mock

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


@jax.jit
def sample(noise, table, added=None):
    """Around toy_unet; added: [n, B, h, w, C], the noise of each step."""
    return diffusion.sample(lambda z, t, _: (toy_unet(z, t, jnp), None), noise, table, None, lambda i: added[i])


SAMPLERS = {
    "ddim": ("DDIMScheduler", dict(clip_sample=False)),  # its default is for pixels
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "dpmsolver++_karras": ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True)),
    "euler": ("EulerDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
}
FEW_STEPS = {
    "ddim_trailing": ("DDIMScheduler", dict(clip_sample=False, timestep_spacing="trailing")),
    "euler_trailing": ("EulerDiscreteScheduler", dict(timestep_spacing="trailing")),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
OPTIONS = [
    {},
    dict(timestep_spacing="linspace"),
    dict(timestep_spacing="leading", steps_offset=1),
    dict(timestep_spacing="trailing"),
    dict(set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1),  # as SD 1.5 is published
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


def trajectory(sampler, config, steps, noise, added=None):
    """Timesteps and last latents of diffusers' scheduler around toy_unet, which adds the noise of `added`."""
    import diffusers

    name, forced = (SAMPLERS | FEW_STEPS)[sampler]
    options = {"eta": config["eta"]} if "eta" in config else {}  # its file has no such field
    scheduler = getattr(diffusers, name).from_config(config | forced)
    scheduler.set_timesteps(steps)
    drawn = iter([] if added is None else added)
    z = torch.tensor(noise) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = toy_unet(scheduler.scale_model_input(z, t).numpy(), float(t))
        draw = f"{type(scheduler).__module__}.randn_tensor"
        with mock.patch(draw, lambda *_, **__: torch.tensor(next(drawn)), create=True):  # PNDM's draws none
            z = scheduler.step(torch.tensor(out, dtype=torch.float32), t, z, **options).prev_sample
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


FEW_STEPS_CASES = [
    ("ddim_trailing", dict(timestep_spacing="leading", steps_offset=1)),
    ("euler_trailing", dict(timestep_spacing="leading", steps_offset=1)),
    ("euler_ancestral", {}),
    ("euler_ancestral", dict(timestep_spacing="leading", steps_offset=1)),
    ("euler_ancestral", dict(timestep_spacing="trailing")),
    ("euler_ancestral", dict(use_karras_sigmas=True, use_beta_sigmas=True, final_sigmas_type="sigma_min")),
    ("lcm", dict(timestep_spacing="leading", steps_offset=1)),
    ("lcm", dict(original_inference_steps=100)),
    ("lcm", dict(original_inference_steps=30)),  # which does not divide the timesteps
    ("lcm", dict(original_inference_steps=8, timestep_scaling=0.001)),  # so that z itself counts
    ("tcd", {}),
    ("tcd", dict(eta=0.0)),
    ("tcd", dict(eta=0.7, original_inference_steps=30)),
    ("tcd", dict(eta=1.0, original_inference_steps=8)),
]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("sampler, options", FEW_STEPS_CASES, ids=str)
def test_few_steps(sampler, options, steps, prediction_type):
    """With the noise that they add at each step but the last."""
    config = BASE | options | dict(prediction_type=prediction_type)
    noise, *added = np.random.default_rng(0).normal(size=(1 + steps, 2, 4, 4, 4)).astype(np.float32)
    timesteps, expected = trajectory(sampler, config, steps, noise, added)
    table = diffusion.sampler_table(config, sampler, steps)
    np.testing.assert_allclose(table.t, timesteps, rtol=1e-5, atol=1e-3 if "euler" in sampler else 0)
    assert relative_error(sample(noise, table, np.stack(added)), expected) < 1e-4
    if sampler in ("ddim_trailing", "euler_trailing") or config.get("eta") == 0:
        assert table.noise is None, "so that none is drawn"
        assert relative_error(sample(noise, table), expected) < 1e-4
    else:
        assert (table.noise[:-1] > 0).all() and table.noise[-1] == 0


@pytest.mark.parametrize("sampler", ["euler_ancestral", "lcm", "tcd"])
def test_few_steps_from_zero_terminal_snr(sampler):
    config = BASE | dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    noise, *added = np.random.default_rng(0).normal(size=(5, 1, 4, 4, 4)).astype(np.float32)
    _, expected = trajectory(sampler, config, 4, noise, added)
    table = diffusion.sampler_table(config, sampler, 4)
    assert relative_error(sample(noise, table, np.stack(added)), expected) < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "euler"])
def test_zero_terminal_snr(sampler):
    """The zero that rescaling puts at T - 1 is what samplers start from."""
    config = BASE | dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    noise = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    _, expected = trajectory(sampler, config, 10, noise)
    assert relative_error(sample(noise, diffusion.sampler_table(config, sampler, 10)), expected) < 1e-4


@pytest.mark.parametrize(
    "config, sampler, steps, message",
    [
        (dict(prediction_type="sample"), "ddim", 10, "prediction_type='sample': choose from epsilon, v_prediction"),
        (dict(beta_schedule="sigmoid"), "ddim", 10, "beta_schedule='sigmoid'"),
        ({}, "heun", 0, "sampler='heun': choose from ddim, .*dpmsolver.*; steps=0: choose 1 to 1000"),
        (dict(timestep_spacing="odd", solver_order=3), "dpmsolver++", 10, "timestep_spacing='odd'.*solver_order=3"),
        (dict(thresholding=True), "ddim", 10, "thresholding"),
        (dict(steps_offset=1), "ddim", 1000, "1000 steps with steps_offset=1 pass the last timestep"),
        (dict(timestep_spacing="linspace"), "dpmsolver++", 1000, "steps=1000: so many that timesteps repeat"),
        (dict(interpolation_type="log_linear"), "euler", 10, "interpolation_type='log_linear': choose from linear"),
        (dict(use_beta_sigmas=True), "euler", 10, "use_beta_sigmas: not supported; set it to false, or choose ddim"),
        (dict(use_flow_sigmas=True), "ddim", 10, "use_flow_sigmas=True: not Stable Diffusion's noise"),
        (dict(timestep_type="continuous"), "ddim", 10, "timestep_type='continuous': not Stable Diffusion's noise"),
        ({}, "lcm", 60, "steps=60: choose 1 to 50, the original_inference_steps of its distillation"),
        (dict(original_inference_steps=4), "tcd", 5, "steps=5: choose 1 to 4, the original"),
        (dict(original_inference_steps=2000), "lcm", 5, "original_inference_steps=2000: choose 1 to 1000"),
        (dict(original_inference_steps=None, eta=1.5), "tcd", 5, "original_inference_steps=None: .*eta=1.5: choose 0"),
        (dict(rescale_betas_zero_snr=True), "lcm", 4, "rescale_betas_zero_snr: .*lcm cannot start there"),
        (dict(beta_end=None), "ddim", 10, "beta_end=None: a number is wanted"),
        (dict(lambda_min_clipped=None), "ddim", 10, "lambda_min_clipped=None: a number is wanted"),
        (dict(num_train_timesteps=1e3), "ddim", 10, "num_train_timesteps=1000.0: a whole number is wanted"),
        (dict(steps_offset="1"), "ddim", 10, "steps_offset='1': a whole number is wanted"),
        (dict(beta_schedule="linear", beta_end=1.5), "ddim", 10, "betas from .* to 1.5: all must be between 0 and 1"),
        (
            dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            "ddim",
            10,
            "rescale_betas_zero_snr: .*ddim cannot start there",
        ),
    ],
)
def test_what_we_cannot_sample_is_refused(config, sampler, steps, message):
    with pytest.raises(ValueError, match=message):
        diffusion.sampler_table(config, sampler, steps)


@pytest.mark.parametrize("name", sorted(diffusion.SCHEDULERS))
def test_every_known_scheduler_is_read_for_its_noise(name):
    """The noise of a file that says nothing else is that of its class, and every sampler draws with its settings."""
    import diffusers

    # DPMSolverSDE's class wants torchsde; its defaults are Heun's.
    theirs = diffusers.HeunDiscreteScheduler if "SDE" in name else getattr(diffusers, name)
    parameters = inspect.signature(theirs.__init__).parameters.items()
    defaults = {field: parameter.default for field, parameter in parameters if field not in ("self", "kwargs")}
    diffusion.check_scheduler(name)
    ours, named = (diffusion.NoiseSchedule.from_json(config) for config in ({"_class_name": name}, defaults))
    np.testing.assert_array_equal(ours.alphas_cumprod, named.alphas_cumprod)
    right, _ = diffusion.for_latents(defaults | {"_class_name": name}, is_xl=False)
    for sampler in diffusion.SAMPLERS:
        table = diffusion.sampler_table(right, sampler, 5)
        assert all(np.isfinite(column).all() for column in jax.tree.leaves(table))


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "FlowMatchEulerDiscreteScheduler",
            "is of flow matching: the model was .*take a Stable",
        ),
        ("EDMDPMSolverMultistepScheduler", "is of EDM: the model was trained on other noise .*take a Stable"),
        ("MyScheduler", "is an unknown scheduler; known are DDIM.*name DDIMScheduler there"),
        (None, "_class_name=None is an unknown scheduler"),
    ],
)
def test_schedulers_of_other_noise_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        diffusion.check_scheduler(name)


DEIS = BASE | {  # as published models have it
    "_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho", "solver_order": 2,
    "lower_order_final": True, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0,
    "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False, "prediction_type": "epsilon",
}  # fmt: skip


OURS = dict(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint")


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "euler", "pndm"])
def test_settings_of_another_solver_do_not_stop_ours(sampler):
    noise = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    _, expected = trajectory(sampler, DEIS | OURS, 10, noise)  # diffusers itself refuses "deis"
    right, notes = diffusion.for_latents(DEIS | {"solver_order": 3}, is_xl=False)
    assert not notes
    for config in (DEIS, right):
        assert relative_error(sample(noise, diffusion.sampler_table(config, sampler, 10)), expected) < 1e-4


@pytest.mark.parametrize(
    "config, is_xl, notes",
    [
        (dict(_class_name="DDIMScheduler", steps_offset=1), False, ["clip_sample"]),
        (dict(_class_name="PNDMScheduler", steps_offset=1), False, []),  # which never clips
        (dict(_class_name="PNDMScheduler", clip_sample=True), False, ["clip_sample", "steps_offset"]),
        (dict(_class_name="EulerDiscreteScheduler", steps_offset=0), True, []),
        (dict(_class_name="DDIMScheduler", clip_sample=False, thresholding=True), True, ["thresholding"]),
        (
            dict(_class_name="DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=3),
            True,
            ["algorithm_type='sde-dpmsolver++'", "solver_order=3"],
        ),
    ],
    ids=str,
)
def test_what_pipelines_of_latents_set_right(config, is_xl, notes):
    from diffusers import DDIMScheduler

    right, said = diffusion.for_latents(BASE | config, is_xl)
    assert [note.split()[0] for note in said] == notes
    noise = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    offset = config.get("steps_offset", 0) if is_xl else 1
    _, expected = trajectory("ddim", DDIMScheduler(**BASE, clip_sample=False, steps_offset=offset).config, 10, noise)
    assert relative_error(sample(noise, diffusion.sampler_table(right, "ddim", 10)), expected) < 1e-4
    _, expected = trajectory("dpmsolver++", BASE | OURS, 10, noise)
    assert relative_error(sample(noise, diffusion.sampler_table(right, "dpmsolver++", 10)), expected) < 1e-4
