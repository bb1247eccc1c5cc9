"""Concept Ablation, of harms (livo_jax/methods/concept_ablation.py).

python run.py --config=configs/baselines/concept_ablation.py
"""

from livo_jax.configs import baselines
from ml_collections import ConfigDict


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "concept_ablation")
    for name in ("beside", "attributes", "anchors"):  # there are no tokens
        config.data[name] = 0.0
    config.data.cache = False  # anchor prompts are in no cache
    config.concept_ablation = c = ConfigDict({"prior": 1.0})  # weight of the loss that keeps what anchors show
    if arg.startswith("livo"):
        # As published for one concept, for 100 steps; here there are three.
        config.train.steps, c.prior = 300, 0.0
    return config
