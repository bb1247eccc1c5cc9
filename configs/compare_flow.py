"""LiVO beside SFT, DPO and negative prompts on the flow world (configs/flow_tiny.py).

    python run.py --config=configs/compare_flow.py --mode=evaluate

Other baselines edit a UNet. A field of a method is --config.methods.NAME.FIELD; `:smoke` is a run of minutes.
"""

from livo_jax.configs import baselines, common, compare_tiny
from ml_collections import ConfigDict

BASELINES = ("dpo", "negative", "sft")


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("compare_flow", variant)
    config = compare_tiny.get_config(variant)
    config.methods = baselines.beside_livo(f"flow_tiny:{variant}" if variant else "flow_tiny", BASELINES)
    config.attacks = ()  # for time: the search by queries could
    return config
