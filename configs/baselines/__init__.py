"""What baselines share: a method's config is another's with few fields changed, so that all else is equal."""

from livo_jax.configs import livo, tiny


def start(arg: str, method: str):
    """configs/tiny.py's config for "tiny" and "tiny:smoke", configs/livo.py's for "livo" and "livo:smoke"."""
    name, _, variant = arg.partition(":")
    if name not in ("tiny", "livo"):
        raise ValueError(f"configs/baselines/{method}.py:{arg}: there is tiny and livo, and each with :smoke")
    config = {"tiny": tiny, "livo": livo}[name].get_config(variant)
    config.method, config.loss.anchor = method, 0.0  # which LiVO's own loss reads alone
    return config
