"""Diffusion-DPO on the value encoder (Wallace et al. 2024; losses.dpo).

python run.py --config=configs/baselines/dpo.py
"""

from livo_jax.configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "dpo")
    config.loss.form = "dpo"
    # Of 0.2 and 2.5 on the embedded world, in 900 steps, 0.2 lowers the biases; 2.5 hardly does, but halves the harm.
    config.loss.beta = 2.5 if arg.startswith("livo") else 0.2  # with T = 1,000; 2.5: the paper's 5,000 for SD 1.5
    return config
