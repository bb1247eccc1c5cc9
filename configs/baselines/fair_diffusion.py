"""Fair Diffusion, of biases (Friedrich et al. 2023; livo_jax/methods/fair_diffusion.py).

python run.py --config=configs/baselines/fair_diffusion.py --mode=evaluate
"""

from livo_jax.configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(
        arg, "fair_diffusion",
        edit="{attribute} person",  # the text of an attribute; it may have the {prompt}
        scale=4.0,
        warmup=10,  # steps of 50 before it takes effect; of fewer steps the same share
        threshold=0.95,  # share of the places that an edit leaves alone
        momentum=0.3, beta=0.6,
    )  # fmt: skip
    config.train.steps = 0  # it trains nothing
    if arg.startswith("tiny"):
        # That world's captions know no persons, and its workers fill a quarter of a picture of 8 x 8 latents.
        c = config.fair_diffusion
        c.edit, c.scale, c.warmup, c.threshold = "{attribute}, {prompt}", 2.0, 0, 0.5
    return config
