"""Diffusion-DPO on the UNet, by low-rank updates of its attention (livo_jax/methods/dpo_unet.py).

python run.py --config=configs/baselines/dpo_unet.py
"""

from livo_jax.configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "dpo_unet", rank=8, alpha=8.0)  # kernels are W + alpha / rank * A B
    config.loss.beta = 2.5 if arg.startswith("livo") else 0.2  # with T = 1,000; 2.5: the paper's 5,000 for SD 1.5
    if arg.startswith("tiny"):
        # Of 1,200 steps and 3,600: after the latter no trade is recognised.
        config.train.steps = min(1200, config.train.steps)
    for name in ("beside", "attributes", "anchors"):  # there are no tokens
        config.data[name] = 0.0
    return config
