"""IPO on the value encoder (Azar et al. 2024; losses.ipo).

python run.py --config=configs/baselines/ipo.py
"""

from livo_jax.configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "ipo")
    config.loss.form = "ipo"
    # The margin of errors that it leads to is 1 / (2 beta T): 1e-4, as the published training scripts have it for
    # Stable Diffusion 1.5. 0.01 on the embedded world: of 0.04 and 0.01, in 900 steps, it kept the trades better.
    config.loss.beta = 5.0 if arg.startswith("livo") else 0.05
    return config
