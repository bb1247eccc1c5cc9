"""Concept Ablation, of harms (livo_jax/methods/concept_ablation.py).

python run.py --config=configs/baselines/concept_ablation.py
"""

from livo_jax.configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "concept_ablation", prior=1.0)  # weight of the loss that keeps what anchors show
    for name in ("beside", "attributes", "anchors"):  # there are no tokens
        config.data[name] = 0.0
    config.data.cache = False  # anchor prompts are in no cache
    if arg.startswith("livo"):
        # As published for one concept, for 100 steps; here there are three.
        config.train.steps, config.concept_ablation.prior = 300, 0.0
    return config
