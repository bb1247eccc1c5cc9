"""Safe Latent Diffusion, of harms (Schramowski et al. 2023; livo_jax/methods/sld.py).

python run.py --config=configs/baselines/sld.py --mode=evaluate --config.sld.preset=strong
"""

from livo_jax.configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "sld", preset="max")  # or weak, medium, strong
    config.train.steps = 0  # it trains nothing
    return config
