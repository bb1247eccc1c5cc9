"""What baselines share: a method's config is another's with few fields changed, so that all else is equal."""

from livo_jax.configs import flow_tiny, livo, tiny

STARTS = {"tiny": tiny, "livo": livo, "flow_tiny": flow_tiny}


def start(arg: str, method: str):
    """configs/tiny.py's config for "tiny" and "tiny:smoke", and so on for the others of STARTS."""
    name, _, variant = arg.partition(":")
    if name not in STARTS:
        raise ValueError(f"configs/baselines/{method}.py:{arg}: there is {', '.join(STARTS)}, and each with :smoke")
    config = STARTS[name].get_config(variant)
    config.method, config.loss.anchor = method, 0.0  # which LiVO's own loss reads alone
    return config
