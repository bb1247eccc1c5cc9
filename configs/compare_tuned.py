"""Methods of the embedded world, each tuned by the same protocol, then trained three times.

    for i in 1 2 3 4; do python run.py --config=configs/compare_tuned.py:trial_$i --mode=evaluate; done
    python -m data_tools.rank_trials runs/compare_tuned_trial_*
    python run.py --config=configs/compare_tuned.py --mode=evaluate

Every method that has something to set has four trials of 1,200 steps, LiVO too. They are measured on 16 trades that no
other evaluation has, of which 8 are held out of the trials' pairs. CHOSEN has the trial of each method that ranked
first. `:smoke` is a run of minutes, to see that everything runs; its figures mean nothing.
"""

import itertools

from livo_jax.configs import common, compare_tiny, tiny
from ml_collections import ConfigDict

TRIALS = {  # of a method: the settings of its fields, every one beside every other; the first is its config's own
    "livo": {"train.learning_rates.full": (1.5e-3, 3e-3), "loss.anchor": (6000.0, 2000.0)},
    "sft": {"train.learning_rates.full": (3e-3, 1.5e-3), "data.anchors": (0.3, 0.6)},
    "dpo": {"train.learning_rates.full": (3e-3, 1.5e-3), "loss.beta": (0.2, 0.8)},
    "ipo": {"train.learning_rates.full": (3e-3, 1.5e-3), "loss.beta": (0.05, 0.2)},
    "kto": {"train.learning_rates.full": (3e-3, 1.5e-3), "loss.beta": (0.4, 0.1)},
    "dpo_unet": {"train.learning_rates.dpo_unet": (3e-4, 1.5e-4), "loss.beta": (0.2, 0.8)},
    "concept_ablation": {
        "train.learning_rates.concept_ablation": (3e-4, 1e-4), "concept_ablation.prior": (1.0, 4.0),
    },
    "uce": {"uce.regularisation": (0.1, 1.0), "uce.step": (1.0, 0.5)},
    "fair_diffusion": {"fair_diffusion.scale": (2.0, 4.0), "fair_diffusion.threshold": (0.5, 0.75)},
    "sld": {"sld.preset": ("max", "strong", "medium", "weak")},
}  # fmt: skip
CHOSEN = {
    "livo": 2, "sft": 1, "dpo": 1, "ipo": 4, "kto": 1, "dpo_unet": 3, "concept_ablation": 4, "uce": 4,
    "fair_diffusion": 1, "sld": 1,
}  # fmt: skip
STEPS = 1200


def trials(method: str) -> list[dict]:
    """The trials of a method: {field: setting} of each."""
    fields = TRIALS[method]
    return [dict(zip(fields, settings)) for settings in itertools.product(*fields.values())]


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("compare_tuned", variant, ("smoke", *(f"trial_{n}" for n in range(1, 5))))
    number = int(variant[-1]) if variant.startswith("trial") else None
    config = compare_tiny.get_config("" if number else variant)
    for method in TRIALS:
        config.methods[method].update_from_flattened_dict(trials(method)[(number or CHOSEN[method]) - 1])
    config.attacks = ()
    if number:
        config.methods = ConfigDict({method: config.methods[method] for method in TRIALS})
        config.curve.points = 0
        for own in config.methods.values():
            make_trial(own)
    else:
        config.trainings = 3
    return config


def make_trial(config):
    """Makes a method's config that of a trial: fewer steps, and other trades."""
    unseen = [name for i, name in enumerate(tiny.SEEN) if i % 3]  # by other evaluations
    c = config.eval
    c.held_out, c.seen = tuple(unseen[::4]), tuple(unseen[1::4])
    c.harmful_wordings, c.left_alone_wordings = ConfigDict(), ConfigDict()
    c.images_per_prompt, c.rate_images = 20, 0
    config.preferences.scenes = tuple(name for name in tiny.SEEN if name not in c.held_out)
    config.data.directory = "runs/compare_tuned_pairs"  # which all trials share
    if "uce" in config:
        config.uce.subjects = config.preferences.scenes
    if config.train.steps > STEPS:
        config.train.warmup_steps = config.train.warmup_steps * STEPS // config.train.steps
        config.train.steps = STEPS
