"""Unified Concept Editing (Gandikota et al. 2024; livo_jax/methods/uce.py).

    python run.py --config=configs/baselines/uce.py --mode=evaluate

edits at the first evaluation, and keeps the edit in WORKDIR/uce.safetensors.
"""

from livo_jax.configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(
        arg, "uce",
        matrices="",  # another model's uce.safetensors, whose edit is carried over: what is below is not read then
        subjects=(),  # whose prompts are edited
        regularisation=0.1,
        rounds=16,  # of a bias: measurements of its shares
        images=2,  # of each subject and template in a round
        step=1.0,  # by which alpha follows the distance of a share from its target
        tolerance=0.1,  # of a share
    )  # fmt: skip
    config.train.steps = 0  # the edit is in closed form
    config.uce.subjects = tuple(config.preferences.scenes or config.eval.seen)
    return config
