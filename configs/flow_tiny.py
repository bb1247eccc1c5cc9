"""The flow world: configs/tiny.py on a Stable Diffusion 3 of the same pictures, trained by flow matching.

    python -m data_tools.flow_world --out=data_tools/flow_world_model    # once: 3,000 steps
    python run.py --config=configs/flow_tiny.py

What is not set here is the first world's, chosen on it; nothing was measured on this one yet.
`configs/flow_tiny.py:smoke` is the same in a minute.
"""

import pathlib

from livo_jax.configs import tiny
from ml_collections import ConfigDict

FLOW = pathlib.Path(__file__).resolve().parents[1] / "data_tools" / "flow_world_model"


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(
            f"configs/flow_tiny.py:{variant}: there is configs/flow_tiny.py and configs/flow_tiny.py:smoke"
        )
    config = tiny.get_config(variant)
    config.model = str(FLOW)
    config.sampling.sampler = "euler"
    return config
