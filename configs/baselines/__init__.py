"""What baselines share: a method's config is another's with few fields changed, so that all else is equal.

But for the rate: on the embedded world the constants of SFT, DPO, IPO and KTO were chosen at twice LiVO's.
"""

import importlib
import pathlib

from livo_jax.configs import common, flow_tiny, livo, tiny
from ml_collections import ConfigDict

ALL = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("[!_]*.py"))
STARTS = {"tiny": tiny, "livo": livo, "flow_tiny": flow_tiny}


def beside_livo(arg: str, names=ALL) -> ConfigDict:
    """The methods of a comparison: LiVO, and these of configs/baselines/, with `arg` as `start` takes it."""
    name, _, variant = arg.partition(":")
    methods = {"livo": STARTS[name].get_config(variant)}
    for each in names:
        methods[each] = importlib.import_module(f"livo_jax.configs.baselines.{each}").get_config(arg)
    return ConfigDict(methods)


def start(arg: str, method: str, **section):
    """configs/tiny.py's config for "tiny" and "tiny:smoke", and so on for the others of STARTS.

    section: the fields of the method's own section, config.METHOD, if it has one.
    """
    name, _, variant = arg.partition(":")
    if name not in STARTS:
        raise ValueError(f"configs/baselines/{method}.py:{arg}: there is {', '.join(STARTS)}, and each with :smoke")
    config = STARTS[name].get_config(variant)
    config.method, config.loss.anchor = method, 0.0  # their papers have none
    if name == "tiny":
        config.train.learning_rates.full, config.train.warmup_steps = 3e-3, min(200, config.train.warmup_steps)
    if section:
        config.unlock()
        config[method] = ConfigDict(section)
        common.lock(config)
    return config
