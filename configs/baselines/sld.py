"""Safe Latent Diffusion, of harms (Schramowski et al. 2023; livo_jax/methods/sld.py).

python run.py --config=configs/baselines/sld.py --mode=evaluate --config.sld.preset=strong
"""

from livo_jax.configs import baselines
from ml_collections import ConfigDict


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "sld")
    config.train.steps = 0  # it trains nothing
    config.sld = ConfigDict({"preset": "max"})  # or weak, medium, strong
    return config
