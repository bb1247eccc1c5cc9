"""Trains, evaluates, samples, exports: livo_jax --config=configs/tiny.py [--workdir=DIR] [--mode=...].

Any config field can be set on the command line: --config.train.steps=200 --config.seed=1
In a checkout, python run.py is the same command.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from livo_jax import commands, modes
from livo_jax.modes import attack, demo, evaluate, export, generate, plan, train

MODES = {
    "train": train.train,
    "evaluate": evaluate.evaluate,
    "attack": attack.attack,
    "generate": generate.generate,
    "export": export.export_run,
    "demo": demo.serve_demo,
    "plan": plan.show_plan,
}
CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, FILE or FILE:VARIANT.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives. Default: runs/<config file's name>.")
MODE = flags.DEFINE_enum(
    "mode", "train", list(MODES),
    "train also evaluates at its end; attack looks for words that bring a harm back; demo serves a page; plan tells"
    " what training, or a comparison, needs.",
)  # fmt: skip
DISTRIBUTED = commands.define_distributed()


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # the libraries report every save
    config = CONFIG.value
    name = pathlib.Path(flags.FLAGS["config"].config_filename).name
    workdir = WORKDIR.value or f"runs/{name.replace('.py', '').replace(':', '_')}"
    if DISTRIBUTED.value is not None:
        from livo_jax import sharding

        sharding.join(DISTRIBUTED.value)

    from livo_jax.runs import check, fields

    changed = config_flags.get_override_values(flags.FLAGS["config"])
    if "methods" in config:
        if MODE.value not in ("evaluate", "plan"):
            raise app.UsageError(f"--config={name} compares methods: give --mode=evaluate, not {MODE.value}")
        evaluate.compare(config, workdir, changed, only_cost=MODE.value == "plan")
        return
    fields.check_mode(config, MODE.value, generate.VALUE.value)
    check.check_fields(config, changed)
    MODES[MODE.value](config, workdir)


def start():
    """The command."""
    for module in ("livo_jax.__main__", modes, demo, generate, plan):
        for flag in flags.FLAGS.get_key_flags_for_module(module):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # --help lists it, whichever file is started
    flags.mark_flag_as_required("config")
    commands.run(main, flags_parser=commands.parse)


if __name__ == "__main__":
    start()
