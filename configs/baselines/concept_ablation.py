"""Concept Ablation, of harms (livo_jax/baselines/concept_ablation.py).

python run.py --config=configs/baselines/concept_ablation.py
"""

from configs import baselines


def get_config(arg: str = "tiny"):
    config = baselines.start(arg, "concept_ablation")
    config.data.beside = config.data.attributes = 0.0  # there are no tokens to stand beside, or to name an attribute
    if arg.startswith("livo"):
        config.train.learning_rate, config.train.steps = 2e-6, 1600  # not searched
    return config
