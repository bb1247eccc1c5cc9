"""Negative prompt, of harms (livo_jax/methods/negative.py).

python run.py --config=configs/baselines/negative.py --mode=evaluate
"""

from livo_jax.configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "negative")
    config.train.steps = 0  # it trains nothing
    return config
