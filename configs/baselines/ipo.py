"""IPO on the value encoder (Azar et al. 2024; losses.ipo).

python run.py --config=configs/baselines/ipo.py
"""

from configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "ipo")
    config.loss.form = "ipo"
    # The margin of errors that it leads to is 1 / (2 beta T): 1e-4, as the published training scripts have it for
    # Stable Diffusion 1.5, or 0.04, about what LiVO's hinges ask for on the embedded world.
    config.loss.beta = 5.0 if arg.startswith("livo") else 0.0125
    return config
