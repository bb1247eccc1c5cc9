"""Computes once what training would compute at every step: the VAE's moments and the prompts' states.

    python -m data_tools.cache_latents --config=configs/livo.py --data=DIR

writes DIR/cache, which training with --config.data.cache=True reads in place of the images; it needs neither
VAE nor text encoder then. A cache of another model, resolution or dataset is refused.
"""

import os
import sys

from absl import flags, logging
from ml_collections import config_flags

from livo_jax import commands, data, sharding
from livo_jax.runs import restore
from livo_jax.runs.cache_latents import write


def main(_):
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    if DISTRIBUTED.value is not None:
        sharding.join(DISTRIBUTED.value)
    preferences = data.Preferences(DATA.value)
    if not os.access(preferences.directory, os.W_OK):
        sys.exit(
            f"--data={DATA.value} cannot be written: copy it, or train with config.data.cache=True, which then keeps"
            " the cache in its workdir"
        )
    write(preferences, restore.load_base(config, sharding.make_local_mesh()), config)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "The config whose model encodes.")
    DATA = commands.define_path("data", "The dataset, to which the cache is added.")
    DISTRIBUTED = commands.define_distributed()
    flags.mark_flags_as_required(["config", "data"])
    commands.run(main, flags_parser=commands.parse)
