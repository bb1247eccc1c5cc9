"""Diffusion: schedules, targets and samplers, pure functions."""

from livo_jax.diffusion.samplers import SAMPLERS, sample, sampler_table
from livo_jax.diffusion.schedule import (
    SCHEDULERS,
    NoiseSchedule,
    add_noise,
    check_scheduler,
    for_latents,
    min_snr_weight,
    target,
)

__all__ = [
    "NoiseSchedule",
    "SAMPLERS",
    "SCHEDULERS",
    "add_noise",
    "check_scheduler",
    "for_latents",
    "min_snr_weight",
    "sample",
    "sampler_table",
    "target",
]
