"""Fair Diffusion, of biases (Friedrich et al. 2023; livo_jax/methods/fair_diffusion.py).

python run.py --config=configs/baselines/fair_diffusion.py --mode=evaluate
"""

from livo_jax.configs import baselines
from ml_collections import ConfigDict


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "fair_diffusion")
    config.train.steps = 0  # it trains nothing
    config.fair_diffusion = c = ConfigDict()
    c.edit = "{attribute} person"  # the text of an attribute; it may have the {prompt}
    c.scale = 4.0
    c.warmup = 10  # steps of 50 before it takes effect; of fewer steps the same share
    c.threshold = 0.95  # share of the places that an edit leaves alone
    c.momentum, c.beta = 0.3, 0.6
    if arg.startswith("tiny"):
        # That world's captions know no persons, and its workers fill a quarter of a picture of 8 x 8 latents.
        c.edit, c.scale, c.warmup, c.threshold = "{attribute}, {prompt}", 2.0, 0, 0.5
    return config
