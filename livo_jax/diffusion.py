"""Diffusion mathematics as pure functions: schedule, noising, targets, samplers.

Notation: z_t = a_t z_0 + s_t eps with a_t = sqrt(alphas_cumprod[t]) and s_t = sqrt(1 - a_t^2). Schedules and
samplers are built in numpy float64 from a published scheduler_config.json and agree with diffusers'
schedulers of the same config.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """alphas_cumprod: [T] float64, decreasing. prediction_type: "epsilon" or "v_prediction"."""

    alphas_cumprod: np.ndarray
    prediction_type: str

    @classmethod
    def from_json(cls, config: dict) -> "NoiseSchedule":
        """Reads a published scheduler_config.json; absent fields take diffusers' defaults.

        Raises:
            ValueError: unknown beta_schedule or prediction_type.
        """
        steps = config.get("num_train_timesteps", 1000)
        start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        kind = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            betas = np.asarray(config["trained_betas"], np.float64)
        elif kind == "linear":
            betas = np.linspace(start, end, steps)
        elif kind == "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, steps) ** 2
        elif kind == "squaredcos_cap_v2":
            bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        else:
            raise ValueError(f"beta_schedule={kind!r}: choose from linear, scaled_linear, squaredcos_cap_v2")
        alphas_cumprod = np.cumprod(1 - betas)
        if config.get("rescale_betas_zero_snr"):
            # Lin et al. 2023, algorithm 1: shift and scale sqrt(alphas_cumprod) so that it ends at 0.
            root = np.sqrt(alphas_cumprod)
            alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={prediction_type!r}: choose from {', '.join(PREDICTION_TYPES)}")
        return cls(alphas_cumprod, prediction_type)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def coefficients(self, t):
        """(a_t, s_t) of timesteps t [B], each [B, 1, 1, 1] float32."""
        bar = self.alphas_cumprod
        a, s = (jnp.asarray(table, jnp.float32)[t] for table in (np.sqrt(bar), np.sqrt(1 - bar)))
        return a[:, None, None, None], s[:, None, None, None]


def add_noise(schedule: NoiseSchedule, z, eps, t):
    """z_t [B, h, w, C] of latents z and noise eps at timesteps t [B] (Ho et al. 2020, equation 4)."""
    a, s = schedule.coefficients(t)
    return a * z + s * eps


def target(schedule: NoiseSchedule, z, eps, t):
    """What the UNet is to predict, [B, h, w, C]: eps, or the velocity a_t eps - s_t z (Salimans & Ho 2022)."""
    if schedule.prediction_type == "epsilon":
        return eps
    a, s = schedule.coefficients(t)
    return a * eps - s * z


def min_snr_weight(schedule: NoiseSchedule, t, gamma: float):
    """Min-SNR loss weights [B] float32 (Hang et al. 2023): min(snr, gamma) / snr, over snr + 1 for velocity."""
    snr = jnp.asarray(schedule.alphas_cumprod / (1 - schedule.alphas_cumprod), jnp.float32)[t]
    if schedule.prediction_type == "epsilon":
        return jnp.minimum(1.0, gamma / snr)  # finite at snr = 0 too
    return jnp.minimum(snr, gamma) / (snr + 1)


# ---------------------------------------------------------------------------- samplers


class SamplerTable(NamedTuple):
    """A deterministic sampler as numbers: one row for each of its n steps, float32 but for t.

    A step turns the prediction at (z, t) into z_0 and eps by a and s, then

        z <- from_z * z + from_eps * eps + from_z_0 * z_0 + from_previous * (z_0 of the step before)
    """

    t: np.ndarray  # [n] int32, what the UNet is told
    a: np.ndarray
    s: np.ndarray
    from_z: np.ndarray
    from_eps: np.ndarray
    from_z_0: np.ndarray
    from_previous: np.ndarray
    clip: np.ndarray  # z_0 is clipped to [-clip, clip]; infinite for latents


def ddim(schedule: NoiseSchedule, config: dict, steps: int) -> SamplerTable:
    """DDIM with eta = 0 (Song et al. 2021, equation 12), as diffusers' DDIMScheduler steps."""
    T = schedule.num_timesteps
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "linspace":
        t = np.linspace(0, T - 1, steps).round()[::-1]
    elif spacing == "leading":
        t = np.arange(steps)[::-1] * (T // steps) + config.get("steps_offset", 0)
    else:
        t = np.arange(T, 0, -T / steps).round() - 1
    t = t.astype(int)
    before = t - T // steps
    last = 1.0 if config.get("set_alpha_to_one", True) else schedule.alphas_cumprod[0]
    bar, bar_before = schedule.alphas_cumprod[t], np.where(before >= 0, schedule.alphas_cumprod[before], last)
    zeros = np.zeros(steps)
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else np.inf
    return SamplerTable(
        t, np.sqrt(bar), np.sqrt(1 - bar), zeros, np.sqrt(1 - bar_before), np.sqrt(bar_before), zeros,
        np.full(steps, clip),
    )  # fmt: skip


def dpm_solver_pp(schedule: NoiseSchedule, config: dict, steps: int) -> SamplerTable:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), as diffusers' DPMSolverMultistepScheduler steps."""
    T = schedule.num_timesteps
    bar = schedule.alphas_cumprod.copy()
    bar[-1] = bar[-1] or 2.0**-24  # a zero terminal SNR would be an infinite sigma
    sigmas = np.sqrt((1 - bar) / bar)

    # The steps: T - clipped .. 0, where lambda = -log sigma is not below lambda_min_clipped.
    last = T - np.searchsorted(-np.log(sigmas[::-1]), config.get("lambda_min_clipped", -np.inf))
    spacing = config.get("timestep_spacing", "linspace")
    if spacing == "linspace":
        t = np.linspace(0, last - 1, steps + 1).round()[:0:-1]
    elif spacing == "leading":
        t = np.arange(steps + 1)[:0:-1] * (last // (steps + 1)) + config.get("steps_offset", 0)
    else:
        t = np.arange(last, 0, -T / steps).round() - 1
    sigma = np.interp(t, np.arange(T), sigmas)
    if config.get("use_karras_sigmas"):  # Karras et al. 2022, equation 5, rho = 7
        ramp = np.linspace(0, 1, steps)
        sigma = (sigmas[-1] ** (1 / 7) + ramp * (sigmas[0] ** (1 / 7) - sigmas[-1] ** (1 / 7))) ** 7
        t = np.interp(np.log(sigma), np.log(sigmas), np.arange(T)).round()
    to_zero = config.get("final_sigmas_type", "zero") == "zero"
    sigma = np.append(sigma, 0.0 if to_zero else sigmas[0])

    # With r = sigma' / sigma = exp(-h): z' = (s'/s) z + a' (1 - r) D, and D extrapolates the last two z_0.
    a, ratio = 1 / np.sqrt(sigma**2 + 1), sigma[1:] / sigma[:-1]
    s = sigma * a
    gain = a[1:] * (1 - ratio)
    with np.errstate(divide="ignore"):
        h = -np.log(ratio)  # infinite at sigma' = 0
    if config.get("solver_type", "midpoint") == "heun":
        second = a[1:] * (1 - gain / a[1:] / h)
    else:
        second = 0.5 * gain
    slope = np.zeros(steps)  # of z_0 in lambda, times h; zero makes the step first-order
    slope[1:] = second[1:] * h[1:] / h[:-1]
    few = config.get("lower_order_final", True) and steps < 15
    if config.get("solver_order", 2) == 1:
        slope[:] = 0
    elif to_zero or few or config.get("euler_at_final"):
        slope[-1] = 0
    zeros = np.zeros(steps)
    return SamplerTable(
        t.astype(int), a[:-1], s[:-1], s[1:] / s[:-1], zeros, gain + slope, -slope, np.full(steps, np.inf)
    )


SAMPLERS = {"ddim": ddim, "dpmsolver++": dpm_solver_pp}


def sampler_table(config: dict, sampler: str, steps: int) -> SamplerTable:
    """The sampler's table for a published scheduler_config.json, whatever scheduler that names.

    As in diffusers, a field that is absent (`timestep_spacing` above all) takes the default of the
    sampler, not of the scheduler that the file names.

    Raises:
        ValueError: an unknown sampler, step count or option; all problems are listed.
    """
    schedule = NoiseSchedule.from_json(config)
    problems = []
    if sampler not in SAMPLERS:
        problems.append(f"sampler={sampler!r}: choose from {', '.join(SAMPLERS)}")
    if not 1 <= steps <= schedule.num_timesteps:
        problems.append(f"steps={steps}: choose 1 to {schedule.num_timesteps}")
    choices = {"timestep_spacing": ("linspace", "leading", "trailing")}
    if sampler == "dpmsolver++":
        choices |= {
            "algorithm_type": ("dpmsolver++",),
            "solver_order": (1, 2),
            "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),  # diffusers takes the last three as midpoint
            "final_sigmas_type": ("zero", "sigma_min"),
        }
    for name, known in choices.items():
        if config.get(name, known[0]) not in known:
            problems.append(f"{name}={config[name]!r}: choose from {', '.join(map(str, known))}")
    for name in ("thresholding", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"):
        if config.get(name):
            problems.append(f"{name}: not supported")
    if problems:
        raise ValueError("scheduler config: " + "; ".join(problems))
    table = SAMPLERS[sampler](schedule, config, steps)
    if table.t.max() >= schedule.num_timesteps:
        raise ValueError(f"{steps} steps with steps_offset={config.get('steps_offset')} pass the last timestep")
    return SamplerTable(table.t.astype(np.int32), *(np.asarray(column, np.float32) for column in table[1:]))


def sample(predict, z, table: SamplerTable, prediction_type: str):
    """Runs a sampler; traceable, one loop whatever the number of steps.

    Args:
        predict: (z [B, h, w, C], t scalar int32) -> the UNet's prediction [B, h, w, C].
        z: [B, h, w, C] float32 standard normal noise.
        table: what sampler_table returns.

    Returns:
        [B, h, w, C] float32 latents z_0, scaled as the UNet has them.
    """

    def step(carry, row: SamplerTable):
        z, previous = carry
        out = predict(z, row.t).astype(z.dtype)
        if prediction_type == "epsilon":
            z_0, eps = (z - row.s * out) / row.a, out
        else:
            z_0, eps = row.a * z - row.s * out, row.a * out + row.s * z
        z_0 = jnp.clip(z_0, -row.clip, row.clip)
        z = row.from_z * z + row.from_eps * eps + row.from_z_0 * z_0 + row.from_previous * previous
        return (z, z_0), None

    (z, _), _ = jax.lax.scan(step, (z, jnp.zeros_like(z)), table)
    return z
