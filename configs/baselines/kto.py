"""Diffusion-KTO on the value encoder (Li et al. 2024; losses.kto).

python run.py --config=configs/baselines/kto.py
"""

from livo_jax.configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "kto")
    config.loss.form = "kto"
    # Of 0.1 and 0.4 on the embedded world, in 900 steps, 0.4 kept the trades better.
    config.loss.beta = 5.0 if arg.startswith("livo") else 0.4  # 5 is 5,000 with T = 1,000; not searched
    return config
