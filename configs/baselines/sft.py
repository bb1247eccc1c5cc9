"""Supervised fine-tuning of the value encoder on the aligned images (losses.sft).

python run.py --config=configs/baselines/sft.py
"""

from livo_jax.configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "sft")
    config.loss.form = "sft"
    return config
