"""Diffusion: schedules, targets and samplers, pure functions."""

from livo_jax.diffusion.samplers import FLOW_SAMPLERS, SAMPLERS, sample, sampler_table
from livo_jax.diffusion.schedule import (
    FLOW_SCHEDULERS,
    SCHEDULERS,
    FlowSchedule,
    NoiseSchedule,
    add_noise,
    check_scheduler,
    for_latents,
    min_snr_weight,
    read_schedule,
    target,
)

__all__ = [
    "FLOW_SAMPLERS",
    "FLOW_SCHEDULERS",
    "FlowSchedule",
    "NoiseSchedule",
    "SAMPLERS",
    "SCHEDULERS",
    "add_noise",
    "check_scheduler",
    "for_latents",
    "min_snr_weight",
    "read_schedule",
    "sample",
    "sampler_table",
    "target",
]
