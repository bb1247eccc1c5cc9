"""Trains, evaluates, samples: python run.py --config=configs/tiny.py [--workdir=DIR] [--mode=...].

Any config field can be set on the command line: --config.train.steps=200 --config.seed=1
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, FILE or FILE:VARIANT.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives. Default: runs/<config file's name>.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "generate"], "train also evaluates at its end.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "generate: a prompt; may be repeated.")
VALUE = flags.DEFINE_string("value", None, "generate: the value, by name or statement.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 8, "generate: images of each prompt.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "generate: of the noise.")
OUT = flags.DEFINE_string("out", None, "generate: the directory to write.")


def parse(argv):
    """absl's parser, which here answers misspelt overrides with what can be overridden."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError):
        from livo_jax.train import flatten

        override = lambda arg: arg.lstrip("-").startswith("config.")
        given = [arg.lstrip("-").split("=")[0] for arg in argv if override(arg)]
        sys.argv[:] = [arg for arg in argv if not override(arg)]  # where config_flags looks for overrides
        app.parse_flags_with_usage(sys.argv)
        fields = [f"config.{name}" for name in flatten(CONFIG.value.to_dict())]
        unknown = [name for name in given if name not in fields]
        sys.exit(f"the config has no {', '.join(unknown)}. It has\n  " + "\n  ".join(fields))


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # the libraries report every save
    config = CONFIG.value
    name = pathlib.Path(flags.FLAGS["config"].config_filename).name
    workdir = pathlib.Path(WORKDIR.value or pathlib.Path("runs") / name.replace(".py", "").replace(":", "_"))

    if MODE.value == "train":
        from data_tools.build_preferences import build
        from livo_jax.train import train_and_evaluate

        train_and_evaluate(config, workdir, build)
        return

    from livo_jax import evaluate, generate, sharding, train, values

    mesh = sharding.make_mesh(**config.mesh)
    if MODE.value == "generate":
        if not PROMPT.value or not OUT.value:
            raise app.UsageError("--mode=generate needs --prompt=TEXT and --out=DIR")
        statement = values.find(VALUE.value, values.load(config.principles)).statement if VALUE.value else None
    sd, value_encoder = train.restore_run(config, workdir, mesh)
    if MODE.value == "evaluate":
        evaluate.evaluate_and_report(sd, value_encoder, config, mesh, workdir)
    else:
        generate.write_pairs(
            OUT.value, sd, value_encoder, PROMPT.value, statement, NUM_IMAGES.value,
            seed=SEED.value, mesh=mesh, **config.sampling.to_dict(),
        )  # fmt: skip


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse)
