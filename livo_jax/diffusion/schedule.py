"""The noise schedule, and what a network is to predict."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

PREDICTION_TYPES = ("epsilon", "v_prediction")

# The schedulers of diffusers whose files describe the noise schedule that our samplers read, with what an absent
# beta_start, beta_end and beta_schedule mean in them.
BETAS = (0.0001, 0.02, "linear")

SCHEDULERS = {
    **dict.fromkeys(
        "DDIMScheduler DDIMParallelScheduler DDPMScheduler DDPMParallelScheduler DEISMultistepScheduler"
        " DPMSolverMultistepScheduler DPMSolverSinglestepScheduler EulerAncestralDiscreteScheduler"
        " EulerDiscreteScheduler LMSDiscreteScheduler PNDMScheduler SASolverScheduler UniPCMultistepScheduler".split(),
        BETAS,
    ),
    **dict.fromkeys(
        "DPMSolverSDEScheduler HeunDiscreteScheduler KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler".split(),
        (0.00085, 0.012, "linear"),
    ),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), (0.00085, 0.012, "scaled_linear")),
}

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")  # of Stable Diffusion 3
# What their files may ask for beside num_train_timesteps and shift, of which we compute one value only.
FLOW_FIXED = {
    "use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "invert_sigmas": False, "stochastic_sampling": False,
}  # fmt: skip

# What dpm_solver_pp computes; the first where the file is of another solver, whose settings say nothing of ours.
SOLVER = {
    "algorithm_type": ("dpmsolver++", "deis"),  # diffusers takes the second as the first
    "solver_order": (2, 1),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),  # and the last three as midpoint
}


def check_scheduler(name: str | None):
    """Raises ValueError unless a scheduler_config.json of this _class_name describes a noise schedule that we read."""
    if isinstance(name, str | None) and name in SCHEDULERS:
        return
    if "FlowMatch" in str(name) or "EDM" in str(name):
        raise ValueError(
            f"_class_name={name!r} is of {'flow matching' if 'Flow' in name else 'EDM'}: the model was trained on other"
            " noise than Stable Diffusion's and cannot be drawn with here, whatever the file names: take a Stable"
            " Diffusion 1.x, 2.x or XL"
        )
    raise ValueError(
        f"_class_name={name!r} is an unknown scheduler; known are {', '.join(sorted(SCHEDULERS))}. If the model was"
        " trained on the noise of the file's beta_start, beta_end and beta_schedule, name DDIMScheduler there"
    )


def for_latents(config: dict, is_xl: bool) -> tuple[dict, list[str]]:
    """A published scheduler_config.json with what pipelines of latents set right, and words for what that changed.

    As diffusers' StableDiffusionPipeline does, clip_sample is False, and but for XL steps_offset is 1. thresholding
    is False too, which diffusers calls unsuitable for latents. Another solver's settings give way to those of SOLVER.
    """
    name = config.get("_class_name") or ""
    right, notes = dict(config), []
    if config.get("clip_sample", name.startswith(("DDIM", "DDPM"))):  # whose default it is
        notes.append("clip_sample is taken as false: latents are not clipped")
    if config.get("thresholding"):
        notes.append("thresholding is taken as false: it is for pixels")
    right |= {"clip_sample": False, "thresholding": False}
    if not is_xl and config.get("steps_offset", 0) != 1:
        notes.append("steps_offset is taken as 1, as Stable Diffusion was published")
        right["steps_offset"] = 1
    for field, known in SOLVER.items():
        if name != "DPMSolverMultistepScheduler":
            right[field] = known[0]
        elif config.get(field, known[0]) not in known:
            notes.append(f"{field}={config[field]!r} is taken as {known[0]!r}, which dpmsolver++ here computes")
            right[field] = known[0]
    return right, notes


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """alphas_cumprod: [T] float64, decreasing. prediction_type: "epsilon" or "v_prediction"."""

    alphas_cumprod: np.ndarray
    prediction_type: str

    @classmethod
    def from_json(cls, config: dict) -> "NoiseSchedule":
        """Reads a published scheduler_config.json; absent fields take diffusers' defaults.

        Raises:
            ValueError: unknown beta_schedule or prediction_type, betas that are no variances, or noise of another
                kind of model.
        """
        steps = config.get("num_train_timesteps", 1000)
        names = ("beta_start", "beta_end", "beta_schedule")
        defaults = SCHEDULERS.get(config.get("_class_name"), BETAS)
        start, end, kind = (config.get(name, default) for name, default in zip(names, defaults))
        for name, usual in (("timestep_type", "discrete"), ("use_flow_sigmas", False)):
            if config.get(name, usual) not in (usual, None):
                raise ValueError(f"{name}={config[name]!r}: not Stable Diffusion's noise (only {usual!r})")
        given = {"beta_start": start, "beta_end": end}
        given |= {name: config[name] for name in ("lambda_min_clipped", "timestep_scaling") if name in config}
        for name, number in given.items():
            if not isinstance(number, int | float):
                raise ValueError(f"{name}={number!r}: a number is wanted")
        offset = config.get("steps_offset", 0)
        for name, number, least in (("num_train_timesteps", steps, 1), ("steps_offset", offset, 0)):
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{name}={number!r}: a whole number is wanted")
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
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas from {betas.min():g} to {betas.max():g}: all must be between 0 and 1")
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

    def times(self, t):
        """What the network is told for timesteps t [B]."""
        return t


def shifted(sigma, shift: float):
    """Noise levels moved up where images have more pixels to hide it in (Esser et al. 2024, equation 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """Of flow matching (Lipman et al. 2023; Esser et al. 2024): z_t = (1 - sigma) z + sigma eps.

    sigmas: [T] float64, ascending to 1. shift: by which they are moved.
    """

    sigmas: np.ndarray
    shift: float

    prediction_type = "flow"

    @classmethod
    def from_json(cls, config: dict) -> "FlowSchedule":
        """Reads a published scheduler_config.json; absent fields take diffusers' defaults.

        Raises:
            ValueError: a scheduler of other noise, or fields that ask for what we do not compute; all are listed.
        """
        problems, name = [], config.get("_class_name")
        if name not in FLOW_SCHEDULERS:
            problems.append(f"_class_name={name!r} is no flow matching: choose from {', '.join(FLOW_SCHEDULERS)}")
        steps, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
        if type(steps) is not int or steps < 1:
            problems.append(f"num_train_timesteps={steps!r}: a whole number above 0 is wanted")
        if type(shift) not in (int, float) or not 0 < shift < math.inf:
            problems.append(f"shift={shift!r}: a number above 0 is wanted")
        for field, only in FLOW_FIXED.items():
            if config.get(field, only) not in (only, None):
                problems.append(f"{field}={config[field]!r}: only {only!r}")
        if problems:
            raise ValueError("; ".join(problems))
        return cls(shifted(np.arange(1, steps + 1) / steps, shift), shift)

    @property
    def num_timesteps(self) -> int:
        return len(self.sigmas)

    def coefficients(self, t):
        """(1 - sigma, sigma) of timesteps t [B], each [B, 1, 1, 1] float32."""
        s = jnp.asarray(self.sigmas, jnp.float32)[t][:, None, None, None]
        return 1 - s, s

    def times(self, t):
        """What the network is told for timesteps t [B]: their sigmas, times the number of timesteps."""
        return jnp.asarray(self.sigmas * self.num_timesteps, jnp.float32)[t]


def read_schedule(config: dict) -> NoiseSchedule | FlowSchedule:
    """The schedule of a published scheduler_config.json, by its _class_name. Errors as of the schedules' from_json."""
    return (FlowSchedule if config.get("_class_name") in FLOW_SCHEDULERS else NoiseSchedule).from_json(config)


def add_noise(schedule: NoiseSchedule | FlowSchedule, z, eps, t):
    """z_t [B, h, w, C] of latents z and noise eps at timesteps t [B] (Ho et al. 2020, equation 4)."""
    a, s = schedule.coefficients(t)
    return a * z + s * eps


def target(schedule: NoiseSchedule | FlowSchedule, z, eps, t):
    """What the network is to predict, [B, h, w, C].

    That is eps; or the velocity a_t eps - s_t z (Salimans & Ho 2022); or that of a flow, eps - z.
    """
    if schedule.prediction_type == "epsilon":
        return eps
    if schedule.prediction_type == "flow":
        return eps - z
    a, s = schedule.coefficients(t)
    return a * eps - s * z


def min_snr_weight(schedule: NoiseSchedule, t, gamma: float):
    """Min-SNR loss weights [B] float32 (Hang et al. 2023): min(snr, gamma) / snr, over snr + 1 for velocity.

    Raises ValueError for a FlowSchedule, of which the density of timesteps takes their place.
    """
    if schedule.prediction_type == "flow":
        raise ValueError(
            f"config.loss.min_snr_gamma={gamma}: it is not for flow matching; set it to 0, and choose where timesteps"
            " are drawn by config.loss.timestep_density"
        )
    snr = jnp.asarray(schedule.alphas_cumprod / (1 - schedule.alphas_cumprod), jnp.float32)[t]
    if schedule.prediction_type == "epsilon":
        return jnp.minimum(1.0, gamma / snr)  # finite at snr = 0 too
    return jnp.minimum(snr, gamma) / (snr + 1)
