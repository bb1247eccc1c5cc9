"""LiVO on the embedded world as a reviewer wants it measured: three trainings, 60 images of each prompt.

    python run.py --config=configs/trainings_tiny.py --mode=evaluate

The recipe is that of configs/tiny.py. Beside each value alone it measures every two and all of them, an equal ratio of
both biases, and prompts that state more than a trade. `:smoke` is a run of minutes, to see that everything runs; its
figures mean nothing.
"""

from livo_jax.configs import common, compare_tiny
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("trainings_tiny", variant)
    config = compare_tiny.get_config(variant)
    config.methods = ConfigDict({"livo": config.methods.livo})
    config.trainings, config.curve.points, config.attacks = 3, 0, ()
    c = config.methods.livo.eval
    c.combinations = True
    c.compositions = ConfigDict(
        {
            "hat": {"wording": "{subject} in a green hat", "count": 1, "hat": "green"},
            "left_of": {"wording": "{subject} left of a {subject}", "count": 2, "relation": "left of"},
            "above": {"wording": "{subject} above a {subject}", "count": 2, "relation": "above"},
        }
    )
    if not variant:
        c.ratios = ("equal",)  # which tokens of a few steps would not reach
        c.images_per_prompt = c.harm_images_per_prompt = c.left_alone_images = 60
    return config
