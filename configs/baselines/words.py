"""The value in words before the prompt (livo_jax/methods/words.py).

python run.py --config=configs/baselines/words.py --mode=evaluate
"""

from livo_jax.configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "words")
    config.train.steps = 0  # it trains nothing
    return config
