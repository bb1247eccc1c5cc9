"""Samplers: tables of a step's coefficients, and the loop over them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from livo_jax.diffusion.schedule import SOLVER, FlowSchedule, NoiseSchedule, read_schedule, shifted

ORIGINAL_STEPS = 50  # of a distillation whose scheduler_config.json does not say how many
GAMMA = 0.3  # of TCD, where the file has no `eta`


class SamplerTable(NamedTuple):
    """A sampler as numbers, float32: one row for each evaluation of the UNet.

    The samplers are linear multistep methods. Their state is the latents z and K arrays of memory,
    [1 + K, B, h, w, C], the memory zero at first. A row turns it into the next by

        out    = unet(scale * z, t)
        z_0    = from_z * z + from_out * out            the image that the UNet sees in z
        state <- step @ [state, out, z_0]
        z <- z + noise * N(0, I)                        if the sampler is no deterministic one
    """

    t: np.ndarray  # [n]
    scale: np.ndarray  # [n]
    from_z: np.ndarray  # [n]
    from_out: np.ndarray  # [n]
    step: np.ndarray  # [n, 1 + K, 1 + K + 2]
    noise: np.ndarray | None = None  # [n], or None: then no noise is drawn


def _z_0(schedule: NoiseSchedule, a, s):
    """The coefficients (from_z, from_out) of z_0 where z = a z_0 + s eps."""
    if schedule.prediction_type != "epsilon":
        return a, -s
    with np.errstate(divide="ignore"):  # infinite at a zero terminal SNR, which sampler_table refuses
        return 1 / a, -s / a


def _eps(schedule: NoiseSchedule, a, s):
    """The coefficients (from_z, from_out) of eps where z = a z_0 + s eps."""
    return (0 * a, 1 + 0 * a) if schedule.prediction_type == "epsilon" else (s, a)


def _spaced(config: dict, default: str, steps: int, T: int, last: int) -> np.ndarray:
    """[steps] descending timesteps below `last`, as timestep_spacing says (Lin et al. 2023, table 2).

    Raises:
        ValueError: the first is not below T.
    """
    spacing = config.get("timestep_spacing", default)
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps)[::-1]
    if spacing == "leading":
        t = np.arange(steps)[::-1] * (last // steps) + config.get("steps_offset", 0)
        if t[0] >= T:
            raise ValueError(f"{steps} steps with steps_offset={config.get('steps_offset')} pass the last timestep")
        return t
    return np.arange(last, 0, -T / steps).round()[:steps] - 1  # rounding may give one more


def _sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """[T] s_t / a_t, ascending."""
    bar = schedule.alphas_cumprod.copy()
    bar[-1] = bar[-1] or 2.0**-24  # a zero terminal SNR would be an infinite sigma
    return np.sqrt((1 - bar) / bar)


def _karras(low: float, high: float, steps: int, sigmas: np.ndarray):
    """[steps] sigmas from high to low (Karras et al. 2022, equation 5, rho = 7), and their timesteps, not rounded."""
    ramp = np.linspace(0, 1, steps)
    sigma = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return sigma, np.interp(np.log(sigma), np.log(sigmas), np.arange(len(sigmas)))


def ddim(schedule: NoiseSchedule, config: dict, steps: int) -> SamplerTable:
    """DDIM with eta = 0 (Song et al. 2021, equation 12), as diffusers' DDIMScheduler steps."""
    T = schedule.num_timesteps
    t = _spaced(config, "leading", steps, T, T).round().astype(int)
    before = t - T // steps
    last = 1.0 if config.get("set_alpha_to_one", True) else schedule.alphas_cumprod[0]
    bar, bar_before = schedule.alphas_cumprod[t], np.where(before >= 0, schedule.alphas_cumprod[before], last)
    a, s, a_before, s_before = np.sqrt(bar), np.sqrt(1 - bar), np.sqrt(bar_before), np.sqrt(1 - bar_before)
    eps_z, eps_out = _eps(schedule, a, s)
    step = np.stack([s_before * eps_z, s_before * eps_out, a_before], axis=-1)[:, None]
    return SamplerTable(t, np.ones(steps), *_z_0(schedule, a, s), step)


def dpm_solver_pp(schedule: NoiseSchedule, config: dict, steps: int) -> SamplerTable:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), as diffusers' DPMSolverMultistepScheduler steps.

    Its memory is the z_0 of the step before.
    """
    T = schedule.num_timesteps
    sigmas = _sigmas(schedule)
    # Timesteps end where lambda = -log sigma falls below lambda_min_clipped.
    last = T - np.searchsorted(-np.log(sigmas[::-1]), config.get("lambda_min_clipped", -np.inf))
    if config.get("timestep_spacing") == "trailing":
        t = _spaced(config, "trailing", steps, T, last)
    else:  # the last of one more is left out
        t = _spaced(config, "linspace", steps + 1, T, last).round()[:-1]
    steps = len(t)
    sigma = np.interp(t, np.arange(T), sigmas)
    if config.get("use_karras_sigmas"):
        sigma, t = _karras(sigmas[0], sigmas[-1], steps, sigmas)
        if config.get("beta_schedule") == "squaredcos_cap_v2":
            t = np.floor(t)  # as diffusers does for this schedule alone
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
    with np.errstate(divide="ignore", invalid="ignore"):  # sampler_table refuses repeated timesteps, where h = 0
        slope[1:] = second[1:] * h[1:] / h[:-1]
    few = config.get("lower_order_final", True) and steps < 15
    if config.get("solver_order", 2) == 1:
        slope[:] = 0
    elif to_zero or few or config.get("euler_at_final"):
        slope[-1] = 0
    step = np.zeros((steps, 2, 4))  # [z, z_0 before] <- [z, z_0 before, out, z_0]
    step[:, 0] = np.stack([s[1:] / s[:-1], -slope, np.zeros(steps), gain + slope], axis=-1)
    step[:, 1, 3] = 1
    return SamplerTable(t.round(), np.ones(steps), *_z_0(schedule, a[:-1], s[:-1]), step)


def euler(schedule: NoiseSchedule, config: dict, steps: int, ancestral: bool = False) -> SamplerTable:
    """Euler's method in sigma (Karras et al. 2022, algorithm 1), as diffusers' EulerDiscreteScheduler steps.

    It steps x = z / a_t = z_0 + sigma eps. The state is x over its initial deviation, so that it
    begins as the noise.

    ancestral: whether a step goes further down, by noise that is added up to sigma again, as a step of the chain that
    is reversed (Ho et al. 2020, algorithm 2). So does diffusers' EulerAncestralDiscreteScheduler.
    """
    sigmas = _sigmas(schedule)
    t = _spaced(config, "linspace", steps, schedule.num_timesteps, schedule.num_timesteps)
    sigma = np.interp(t, np.arange(len(sigmas)), sigmas)
    if config.get("use_karras_sigmas"):
        low, high = (config.get(name) or sigma[i] for name, i in (("sigma_min", -1), ("sigma_max", 0)))
        sigma, t = _karras(low, high, steps, sigmas)
    initial = sigma.max() if config.get("timestep_spacing") != "leading" else np.sqrt(sigma.max() ** 2 + 1)
    after = np.append(sigma[1:], 0.0 if config.get("final_sigmas_type", "zero") == "zero" else sigmas[0])

    a, ratio, noise = 1 / np.sqrt(sigma**2 + 1), after / sigma, None
    if ancestral:
        noise = after * np.sqrt(1 - ratio**2) / initial
        ratio = ratio**2
    scale = initial * a
    from_z, from_out = _z_0(schedule, a, sigma * a)
    step = np.stack([ratio, np.zeros(steps), (1 - ratio) / initial], axis=-1)[:, None]
    step[-1] *= initial
    return SamplerTable(t, scale, from_z * scale, from_out, step, noise)


def euler_ancestral(schedule: NoiseSchedule, config: dict, steps: int) -> SamplerTable:
    """Euler's method with noise at each step, which knows none of Euler's choices of sigmas."""
    config = {name: x for name, x in config.items() if name not in ("use_karras_sigmas", "final_sigmas_type")}
    return euler(schedule, config, steps, ancestral=True)


def _distilled(config: dict, steps: int, T: int) -> np.ndarray:
    """[steps] descending timesteps of the original_inference_steps of a distillation, every T / original-th."""
    original = config.get("original_inference_steps", ORIGINAL_STEPS)
    chosen = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
    return (np.arange(original, 0, -1) * (T // original) - 1)[chosen]


def lcm(schedule: NoiseSchedule, config: dict, steps: int) -> SamplerTable:
    """Multistep sampling of latent consistency models (Luo et al. 2023), as diffusers' LCMScheduler steps.

    The consistency function at t is c_skip z + c_out z_0, and noise takes it to the next timestep.
    """
    t = _distilled(config, steps, schedule.num_timesteps)
    a, s = np.sqrt(schedule.alphas_cumprod[t]), np.sqrt(1 - schedule.alphas_cumprod[t])
    a_after, s_after = np.append(a[1:], 1.0), np.append(s[1:], 0.0)
    scaled, data = t * config.get("timestep_scaling", 10.0), 0.5
    c_skip, c_out = data**2 / (scaled**2 + data**2), scaled / np.sqrt(scaled**2 + data**2)
    step = np.stack([a_after * c_skip, np.zeros(steps), a_after * c_out], axis=-1)[:, None]
    return SamplerTable(t, np.ones(steps), *_z_0(schedule, a, s), step, s_after)


def tcd(schedule: NoiseSchedule, config: dict, steps: int) -> SamplerTable:
    """Strategic stochastic sampling (Zheng et al. 2024, gamma = `eta`), as diffusers' TCDScheduler steps.

    A step leads to (1 - gamma) of the next timestep, and noise from there to it.
    """
    eta, bar = config.get("eta", GAMMA), schedule.alphas_cumprod
    t = _distilled(config, steps, schedule.num_timesteps)
    after = np.append(t[1:], 0)
    between = np.floor(np.float32(1 - eta) * after.astype(np.float32)).astype(int)  # rounded as PyTorch does
    a, s, a_s, s_s = np.sqrt(bar[t]), np.sqrt(1 - bar[t]), np.sqrt(bar[between]), np.sqrt(1 - bar[between])
    ratio = bar[after] / bar[between]
    eps_z, eps_out = _eps(schedule, a, s)
    step = (np.sqrt(ratio) * np.stack([s_s * eps_z, s_s * eps_out, a_s])).T[:, None]
    return SamplerTable(t, np.ones(steps), *_z_0(schedule, a, s), step, np.sqrt(1 - ratio) if eta else None)


def pndm(schedule: NoiseSchedule, config: dict, steps: int) -> SamplerTable:
    """PNDM (Liu et al. 2022, equations 9, 12, 13), as diffusers' PNDMScheduler steps.

    Three Runge-Kutta steps of four evaluations each, or with skip_prk_steps one Heun step of two, then
    linear multisteps. The memory is z where such a step began, the weighted sum of its predictions,
    and the last three predictions that multisteps use.
    """
    # That scheduler does not know rescale_betas_zero_snr.
    schedule = NoiseSchedule.from_json(config | {"rescale_betas_zero_snr": False})
    T = schedule.num_timesteps
    stride, half = T // steps, T // steps // 2
    spaced = _spaced(config, "leading", steps, T, T).round().astype(int)
    bar = np.append(schedule.alphas_cumprod, 1.0 if config.get("set_alpha_to_one") else schedule.alphas_cumprod[0])
    Z, ORIGIN, SUM, E1, E2, E3, OUT = range(7)
    timesteps, rows = [], []

    def transfer(origin: int, start: int, end: int, prediction: dict) -> np.ndarray:
        """[8] z at `end` from state[origin], which is z at `start`, along {column: weight} (equation 9)."""
        b, b_end = bar[start], bar[max(end, -1)]
        move = (b_end - b) / (b * np.sqrt(1 - b_end) + np.sqrt(b * (1 - b) * b_end))
        eps_z, eps_out = _eps(schedule, np.sqrt(b), np.sqrt(1 - b))
        z = np.zeros(8)
        z[list(prediction)] = -move * eps_out * np.array(list(prediction.values()))
        z[origin] += np.sqrt(b_end / b) - move * eps_z
        return z

    def begin(start: int, end: int, prediction: dict, weight: float = 0.0):
        """The first or only evaluation of a step: remembers z and the prediction, whose weight in the sum is given."""
        row = np.zeros((6, 8))
        row[Z] = transfer(Z, start, end, prediction)
        row[ORIGIN, Z] = row[E1, OUT] = row[E2, E1] = row[E3, E2] = 1
        row[SUM, OUT] = weight
        timesteps.append(start)
        rows.append(row)

    def proceed(t: int, start: int, end: int, prediction: dict, weight: float = 0.0):
        """A further evaluation of a step, at t, by which z moves once more from where the step began."""
        row = np.zeros((6, 8))
        row[Z] = transfer(ORIGIN, start, end, prediction)
        row[ORIGIN, ORIGIN] = row[E1, E1] = row[E2, E2] = row[E3, E3] = row[SUM, SUM] = 1
        row[SUM, OUT] = weight
        timesteps.append(t)
        rows.append(row)

    if config.get("skip_prk_steps"):
        begin(spaced[0], spaced[0] - stride, {OUT: 1})
        if steps > 1:
            proceed(spaced[1], spaced[1] + stride, spaced[1], {OUT: 1 / 2, E1: 1 / 2})
        orders = [2, 3] + [4] * steps
        multisteps = spaced[1:]
    else:
        for start, end in zip(spaced[:3], spaced[1:4]):
            middle = end + half
            begin(start, start - half, {OUT: 1}, 1 / 6)
            proceed(middle, start, middle, {OUT: 1}, 1 / 3)
            proceed(middle, start, middle - half, {OUT: 1}, 1 / 3)
            proceed(end, start, end, {SUM: 1, OUT: 1 / 6})
        orders = [4] * steps
        multisteps = spaced[3:]
    adams_bashforth = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    for t, order in zip(multisteps, orders):
        begin(t, t - stride, dict(zip((OUT, E1, E2, E3), adams_bashforth[order])))
    n = len(rows)
    return SamplerTable(np.array(timesteps), np.ones(n), np.zeros(n), np.zeros(n), np.stack(rows))


def _with(sampler, **options):
    """The sampler with these in the place of what the scheduler_config.json says."""
    return lambda schedule, config, steps: sampler(schedule, config | options, steps)


SAMPLERS = {
    "ddim": ddim,
    "ddim_trailing": _with(ddim, timestep_spacing="trailing"),
    "dpmsolver++": dpm_solver_pp,
    "dpmsolver++_karras": _with(dpm_solver_pp, use_karras_sigmas=True),
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "euler_trailing": _with(euler, timestep_spacing="trailing"),
    "lcm": lcm,
    "pndm": pndm,
    "tcd": tcd,
}


def _flow_sigmas(schedule: FlowSchedule, steps: int) -> np.ndarray:
    """[steps + 1] descending sigmas, the last 0. diffusers shifts those between the shifted ends once more."""
    return np.append(shifted(np.linspace(1.0, schedule.sigmas[0], steps), schedule.shift), 0.0)


def flow_euler(schedule: FlowSchedule, steps: int) -> SamplerTable:
    """Euler's method along the flow, as diffusers' FlowMatchEulerDiscreteScheduler steps."""
    sigma = _flow_sigmas(schedule, steps)
    ones = np.ones(steps)
    step = np.stack([ones, np.diff(sigma), np.zeros(steps)], axis=-1)[:, None]
    return SamplerTable(sigma[:-1] * schedule.num_timesteps, ones, ones, -sigma[:-1], step)


def flow_heun(schedule: FlowSchedule, steps: int) -> SamplerTable:
    """Heun's method along the flow (Karras et al. 2022, algorithm 1), as diffusers' FlowMatchHeunDiscreteScheduler.

    Two evaluations a step, but one in the last. The memory is where a step began, and its first velocity.
    """
    sigma, Z, ORIGIN, V, OUT = _flow_sigmas(schedule, steps), 0, 1, 2, 3
    at, rows = [], []
    for start, end in zip(sigma[:-1], sigma[1:]):
        first, second = np.zeros((2, 3, 5))  # [z, origin, v] <- [z, origin, v, out, z_0]
        first[Z, [Z, OUT]] = 1, end - start
        first[ORIGIN, Z] = first[V, OUT] = 1
        second[Z, [ORIGIN, V, OUT]] = 1, (end - start) / 2, (end - start) / 2
        at += [start, end] if end else [start]
        rows += [first, second] if end else [first]
    at, ones = np.array(at), np.ones(len(rows))
    return SamplerTable(at * schedule.num_timesteps, ones, ones, -at, np.stack(rows))


FLOW_SAMPLERS = {"euler": flow_euler, "heun": flow_heun}


def _flow_table(schedule: FlowSchedule, sampler: str, steps: int) -> SamplerTable:
    """That of a model of flow matching. Raises ValueError as sampler_table."""
    problems = []
    if sampler not in FLOW_SAMPLERS:
        problems.append(f"sampler={sampler!r}: choose from {', '.join(FLOW_SAMPLERS)}, which are of flow matching")
    if not 1 <= steps <= schedule.num_timesteps:
        problems.append(f"steps={steps}: choose 1 to {schedule.num_timesteps}")
    if problems:
        raise ValueError("scheduler config: " + "; ".join(problems))
    return jax.tree.map(np.float32, FLOW_SAMPLERS[sampler](schedule, steps))


def sampler_table(config: dict, sampler: str, steps: int) -> SamplerTable:
    """The sampler's table for a published scheduler_config.json, whatever scheduler that names.

    As in diffusers, a field that is absent (`timestep_spacing` above all) takes the default of the
    sampler, not of the scheduler that the file names.

    Raises:
        ValueError: an unknown sampler, step count or option; all problems are listed.
    """
    schedule = read_schedule(config)
    if isinstance(schedule, FlowSchedule):
        return _flow_table(schedule, sampler, steps)
    problems = []
    if sampler not in SAMPLERS:
        problems.append(f"sampler={sampler!r}: choose from {', '.join(SAMPLERS)}")
    fewest = 4 if sampler == "pndm" and not config.get("skip_prk_steps") else 1
    most, why, T = schedule.num_timesteps, "", schedule.num_timesteps
    if sampler in ("lcm", "tcd"):
        most = config.get("original_inference_steps", ORIGINAL_STEPS)
        why = ", the original_inference_steps of its distillation"
        if not (isinstance(most, int) and 1 <= most <= T):
            problems.append(f"original_inference_steps={most!r}: choose 1 to {T}")
            most = T
    eta = config.get("eta", GAMMA)
    if sampler == "tcd" and not (isinstance(eta, int | float) and 0 <= eta <= 1):
        problems.append(f"eta={eta!r}: choose 0 (no noise) to 1")
    if not fewest <= steps <= most:
        problems.append(f"steps={steps}: choose {fewest} to {most}{why}")
    choices = {"timestep_spacing": ("linspace", "leading", "trailing")}
    if sampler.startswith("dpmsolver++"):
        choices |= SOLVER | {"final_sigmas_type": ("zero", "sigma_min")}
    if sampler in ("euler", "euler_trailing"):
        choices |= {"final_sigmas_type": ("zero", "sigma_min"), "interpolation_type": ("linear",)}
    for name, known in choices.items():
        if config.get(name, known[0]) not in known:
            problems.append(f"{name}={config[name]!r}: choose from {', '.join(map(str, known))}")
    if config.get("thresholding"):
        problems.append("thresholding: not supported")
    for name in ("use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config.get(name) and sampler.startswith(("dpmsolver++", "euler")) and sampler != "euler_ancestral":
            problems.append(f"{name}: not supported; set it to false, or choose ddim or pndm")
    if problems:
        raise ValueError("scheduler config: " + "; ".join(problems))
    table = SAMPLERS[sampler](schedule, config, steps)
    if not np.isfinite(table.step).all():
        raise ValueError(f"steps={steps}: so many that timesteps repeat, which {sampler} cannot step between")
    if not (np.isfinite(table.from_z).all() and np.isfinite(table.from_out).all()):
        raise ValueError(
            "rescale_betas_zero_snr: from noise alone a model of prediction_type='epsilon' sees no image, so that"
            f" {sampler} cannot start there: choose another sampler, or timestep_spacing='leading'"
        )
    return jax.tree.map(np.float32, table)


def sample(predict, noise, table: SamplerTable, carried=None, draw_noise=None):
    """Runs a sampler; traceable, one loop whatever the number of steps.

    Args:
        predict: (z [B, h, w, C], t scalar float32, carried) -> the UNet's prediction [B, h, w, C], and what it carries
            to the next step.
        noise: [B, h, w, C] float32, standard normal.
        table: what sampler_table returns.
        carried: a tree of arrays that predict gets at the first step.
        draw_noise: number of the step, int32 -> the noise [B, h, w, C] that it adds, standard normal; needed where the
            table has noise.

    Returns:
        [B, h, w, C] float32 latents z_0, scaled as the UNet has them.
    """

    def step(carry, row_and_number):
        row, number = row_and_number
        state, carried = carry
        z = state[0]
        out, carried = predict(row.scale * z, row.t, carried)
        out = out.astype(z.dtype)
        z_0 = row.from_z * z + row.from_out * out
        known = jnp.concatenate([state, out[None], z_0[None]])
        state = jnp.einsum("ij,j...->i...", row.step, known, precision="highest")
        if row.noise is not None:
            state = state.at[0].add(row.noise * draw_noise(number))
        return (state, carried), None

    numbers = None if table.noise is None else jnp.arange(len(table.noise))
    memory = jnp.zeros((table.step.shape[1] - 1, *noise.shape), noise.dtype)
    (state, _), _ = jax.lax.scan(step, (jnp.concatenate([noise[None], memory]), carried), (table, numbers))
    return state[0]
