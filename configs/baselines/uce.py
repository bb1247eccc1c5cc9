"""Unified Concept Editing (Gandikota et al. 2024; livo_jax/methods/uce.py).

    python run.py --config=configs/baselines/uce.py --mode=evaluate

edits at the first evaluation, and keeps the edit in WORKDIR/uce.safetensors.
"""

from livo_jax.configs import baselines
from ml_collections import ConfigDict


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "uce")
    config.train.steps = 0  # the edit is in closed form
    config.uce = c = ConfigDict()
    c.subjects = tuple(config.preferences.scenes or config.eval.seen)  # whose prompts are edited
    c.regularisation = 0.1
    c.rounds = 16  # of a bias: measurements of its shares
    c.images = 2  # of each subject and template in a round
    c.step = 1.0  # by which alpha follows the distance of a share from its target
    c.tolerance = 0.1  # of a share
    return config
