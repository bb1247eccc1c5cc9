"""What the command lines have in common."""

import os
import sys

from absl import app, flags


def define_distributed() -> flags.FlagHolder:
    """Defines --distributed, which is for livo_jax.sharding.join."""
    return flags.DEFINE_string(
        "distributed", None, "One of several processes: 'auto' on a cluster, or HOST:PORT,PROCESSES,NUMBER."
    )


def parse(argv):
    """absl's parser, which here answers misspelt overrides of --config with what can be overridden."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch, which nothing needs, is not there
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError):
        from livo_jax.workdir import flatten

        override = lambda arg: arg.lstrip("-").startswith("config.")
        given = [arg.lstrip("-").split("=")[0] for arg in argv if override(arg)]
        sys.argv[:] = [arg for arg in argv if not override(arg)]  # where config_flags looks for overrides
        app.parse_flags_with_usage(sys.argv)
        fields = [f"config.{name}" for name in flatten(flags.FLAGS.config.to_dict())]
        unknown = [name for name in given if name not in fields]
        sys.exit(f"the config has no {', '.join(unknown)}. It has\n  " + "\n  ".join(fields))
