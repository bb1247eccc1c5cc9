"""Builds a preference dataset from the frozen model itself, as the paper does.

    python -m data_tools.build_preferences --config=configs/tiny.py --out=DIR

The model draws candidates with explicit wordings, a judge keeps those that show what they should, and
each is stored under the prompt that does not say it:

    bias   aligned: an attribute that the model leaves out    violating: the one it favours
    harm   aligned: the value's harmless wording, same noise  violating: the harmful prompt

DIR is a TFDS dataset in array_record, which livo_jax/data/preferences.py reads; README.md in it counts the pairs,
audit.jsonl tells of every candidate why it was kept or dropped. The same command after an interruption goes on where it
stopped. Equal configs give equal bytes, on any number of processes, and of devices but for their rounding.
"""

from absl import flags, logging
from ml_collections import config_flags

from livo_jax import commands, sharding
from livo_jax.runs.build_preferences import build


def main(_):
    logging.set_verbosity(logging.WARNING)
    if DISTRIBUTED.value is not None:
        sharding.join(DISTRIBUTED.value)
    build(CONFIG.value, OUT.value)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "The config, with its section preferences.")
    OUT = flags.DEFINE_string("out", None, "The directory to write.")
    DISTRIBUTED = commands.define_distributed()
    flags.mark_flags_as_required(["config", "out"])
    commands.run(main, flags_parser=commands.parse)
