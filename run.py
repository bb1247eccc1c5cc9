"""Trains, evaluates, samples, exports: python run.py --config=configs/tiny.py [--workdir=DIR] [--mode=...].

Any config field can be set on the command line: --config.train.steps=200 --config.seed=1
"""

import os
import pathlib

from absl import app, flags, logging
from ml_collections import config_flags

from livo_jax import commands

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, FILE or FILE:VARIANT.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives. Default: runs/<config file's name>.")
MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate", "generate", "export", "demo", "plan"],
    "train also evaluates at its end; demo serves a page; plan tells what training needs.",
)  # fmt: skip
PROMPT = flags.DEFINE_multi_string("prompt", [], "generate: a prompt; may be repeated.")
PROMPTS_FILE = commands.define_path(
    "prompts_file", "generate: a text file with a prompt on each line; or a .csv, .tsv or .jsonl with a column prompt."
)
VALUE = flags.DEFINE_multi_string("value", [], "generate: a value, by name or statement; may be repeated; or auto.")
STRENGTH = flags.DEFINE_multi_float("strength", [], "generate: of all values, or of each; 1 is LiVO, 0 the base.")
KEEP = flags.DEFINE_float(
    "keep_probability", None, "generate: the share of a prompt's images that values are applied to, exact of every 20."
    " Default: all; with --value=auto what principles.toml says.", 0.0, 1.0
)  # fmt: skip
RATIO = flags.DEFINE_string(
    "ratio", None, "generate: which attributes the images of bias values should show: equal, a JSON object of"
    " attribute: share, or a file of one."
)  # fmt: skip
NUM_IMAGES = flags.DEFINE_integer(
    "num_images", 8, "generate: images of each prompt; of every 20 values get exactly their share.", lower_bound=1
)
SEED = flags.DEFINE_integer("seed", 0, "generate: of the noise.", lower_bound=0, upper_bound=2**63 - 1)
SHELF = flags.DEFINE_string("shelf", None, "generate: directory or hub id of a shelf; --value is by its names.")
DISTRIBUTED = commands.define_distributed()
DEVICES = flags.DEFINE_integer("devices", None, "plan: how many. Default: those that are here.", lower_bound=1)
PORT = flags.DEFINE_integer("port", 7860, "demo: of 127.0.0.1.", lower_bound=1, upper_bound=65535)
OUT = flags.DEFINE_string("out", None, "generate, export: the directory to write.")


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

    from livo_jax.runs import fields

    changed = config_flags.get_override_values(flags.FLAGS["config"])
    if "methods" in config:
        if MODE.value != "evaluate":
            raise app.UsageError(f"--config={name} compares methods: give --mode=evaluate, not {MODE.value}")
        from livo_jax.runs.compare import compare

        for method, own in config.methods.items():
            begin = f"methods.{method}."
            own_changed = {name.removeprefix(begin): x for name, x in changed.items() if name.startswith(begin)}
            fields.check(own, own_changed, comparing=True)
        compare(config, workdir)
        return
    fields.check_mode(config, MODE.value, VALUE.value)
    fields.check(config, changed)
    if MODE.value == "plan":
        import jax

        from livo_jax.runs import plan

        print(plan.text(plan.plan(config, DEVICES.value or jax.device_count()), config))
        return
    if MODE.value == "train":
        from livo_jax.runs.train import train_and_evaluate

        train_and_evaluate(config, workdir)
        return

    from livo_jax import files, sharding, values
    from livo_jax.demo import demo
    from livo_jax.export import export
    from livo_jax.files.directories import find, held
    from livo_jax.retrieval.retriever import Retriever
    from livo_jax.runs import evaluate, restore
    from livo_jax.runs.workdir import recipe
    from livo_jax.sampling import pairs
    from livo_jax.value_encoders import shelf

    workdir, out = find(workdir), os.path.expanduser(OUT.value or "")
    mesh = sharding.make_mesh(**config.mesh)
    if MODE.value == "demo":
        demo.check(PORT.value)
    if MODE.value in ("generate", "export") and not out:
        raise app.UsageError(f"--mode={MODE.value} needs --out=DIR")
    if MODE.value == "export" and pathlib.Path(out).exists():
        raise app.UsageError(f"--out={OUT.value} exists: remove it, or export to another")
    if MODE.value == "generate" and (pathlib.Path(out).is_file() or any(pathlib.Path(out).glob("*"))):
        raise app.UsageError(f"--out={OUT.value} is not empty: remove it, or generate into another")
    if MODE.value == "generate":
        prompts = [files.tidy(prompt) for prompt in PROMPT.value]  # as in files: their noise depends on their text
        problems = [f"--prompt {fault}" for prompt in prompts if (fault := files.text_fault(prompt))]
        problems += ["--prompt is empty"] * (not all(prompts))
        if PROMPTS_FILE.value:
            if not pathlib.Path(PROMPTS_FILE.value).is_file():
                raise app.UsageError(f"--prompts_file={PROMPTS_FILE.value}: there is no such file")
            found = files.read_texts(PROMPTS_FILE.value, ["prompt"], problems)
            prompts += [prompt for (prompt,) in found]
            if not found and not problems:
                problems.append(f"{PROMPTS_FILE.value}: no prompts in it")
        if problems:
            raise app.UsageError("these prompts cannot be used:\n  " + "\n  ".join(problems))
        if not prompts:
            raise app.UsageError("--mode=generate needs --prompt=TEXT or --prompts_file=FILE")
        known = values.load_principles(config)
        statement = (lambda name: name) if SHELF.value else lambda name: values.find(name, known).statement
        chosen = "auto" if VALUE.value == ["auto"] else [statement(name) for name in VALUE.value]
        if len(STRENGTH.value) > 1 and len(STRENGTH.value) != len(VALUE.value):
            raise app.UsageError(f"{len(STRENGTH.value)} times --strength for {len(VALUE.value)} times --value")
        several = dict(zip(chosen, STRENGTH.value)) if len(STRENGTH.value) > 1 else None
        options = {
            "strength": several or (STRENGTH.value or [1.0])[0], "keep_probability": KEEP.value,
            "retriever": Retriever(known) if chosen == "auto" else None,
            "ratio": RATIO.value, "rates": evaluate.read_rates(workdir) if RATIO.value else None,
        }  # fmt: skip
    if MODE.value == "generate" and SHELF.value:
        sd = restore.load_base(config, mesh)
        chosen, options["strength"], value_encoder = shelf.Shelf(SHELF.value, sd).take(chosen, options["strength"])
    else:
        sd, value_encoder = restore.restore_run(config, workdir, mesh)
    if MODE.value == "evaluate":
        # Of a method that trains the UNet, the base is another.
        own = value_encoder is None and config.train.steps
        base, trained = (restore.load_base(config, mesh), sd) if own else (sd, None)
        with held(workdir / "eval", "evaluates in"):  # also while the run trains
            evaluate.evaluate_and_report(base, value_encoder, config, mesh, workdir, trained)
    elif MODE.value == "demo":
        demo.serve(sd, value_encoder, config, mesh, PORT.value)
    elif MODE.value == "generate":
        pairs.write_pairs(
            out, sd, value_encoder, prompts, chosen, NUM_IMAGES.value,
            seed=SEED.value, mesh=mesh, options=options, **config.sampling.to_dict(),
        )  # fmt: skip
    else:
        rates = evaluate.read_rates(workdir) if (workdir / "eval" / "rates.json").exists() else None
        results = evaluate.read_results(workdir)
        export.export(out, sd, value_encoder, config, results, rates, recipe(workdir))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=commands.parse)
