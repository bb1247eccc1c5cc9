"""--mode=generate writes images with values beside those without."""

import os
import pathlib

from absl import app, flags

from livo_jax import commands
from livo_jax.modes import OUT

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


def generate(config, workdir: str):
    from livo_jax import sharding, values
    from livo_jax.files.directories import resolve_directory
    from livo_jax.retrieval.retriever import Retriever, run_files
    from livo_jax.runs import restore
    from livo_jax.sampling.pairs import write_pairs
    from livo_jax.value_encoders.shelf import Shelf

    workdir, out = resolve_directory(workdir), os.path.expanduser(OUT.value or "")
    mesh = sharding.make_mesh(**config.mesh)
    if not out:
        raise app.UsageError("--mode=generate needs --out=DIR")
    if pathlib.Path(out).is_file():
        raise app.UsageError(f"--out={OUT.value} is a file: name a directory")
    if any(pathlib.Path(out).glob("*")):
        raise app.UsageError(f"--out={OUT.value} is not empty: remove it, or generate into another")
    prompts = read_prompts()
    chosen, options = read_values(config, workdir)
    known = values.load_principles(config)
    files = run_files(workdir, known) if chosen == "auto" else {}  # before models are loaded
    if SHELF.value:
        sd = restore.load_base(config, mesh)
        opened = Shelf(SHELF.value, sd)
        (chosen,), options["strength"], value_encoder = opened.take([chosen], options["strength"])
    else:
        _, sd, value_encoder = restore.restore_run(config, workdir, mesh)
    if chosen == "auto":
        retriever = options["retriever"] = Retriever(known, sd=sd, value_encoder=value_encoder, files=files)
        if looking := retriever.backends.get("first_steps"):
            print(f"first_steps: {looking.evaluations} evaluations of the UNet a prompt, beside those of its images")
    write_pairs(
        out, sd, value_encoder, prompts, chosen, NUM_IMAGES.value,
        seed=SEED.value, mesh=mesh, options=options, **config.sampling.to_dict(),
    )  # fmt: skip


def read_prompts() -> list[str]:
    """Those of --prompt and --prompts_file. Raises UsageError with all that is wrong with them."""
    from livo_jax import files

    prompts = [files.tidy(prompt) for prompt in PROMPT.value]  # as in files: their noise depends on their text
    faults = [files.text_fault(prompt) for prompt in prompts]
    problems = [f"--prompt {fault}" for fault in faults if fault]
    if not all(prompts):
        problems.append("--prompt is empty")
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
    return prompts


def read_values(config, workdir) -> tuple[str | list[str], dict]:
    """The statements of --value (of a shelf: its names), or "auto"; the options of `requests_of`, but no retriever."""
    from livo_jax import values
    from livo_jax.runs.evaluate import read_rates

    if twice := sorted({name for name in VALUE.value if VALUE.value.count(name) > 1}):
        raise app.UsageError(f"--value={', '.join(twice)} is given more than once: --strength doses a value")
    known = values.load_principles(config)
    if VALUE.value == ["auto"]:
        chosen = "auto"
    elif SHELF.value:
        chosen = list(VALUE.value)
    else:
        chosen = [values.find(name, known).statement for name in VALUE.value]
    strength = STRENGTH.value[0] if STRENGTH.value else 1.0
    if len(STRENGTH.value) > 1:
        if len(STRENGTH.value) != len(VALUE.value):
            raise app.UsageError(f"{len(STRENGTH.value)} times --strength for {len(VALUE.value)} times --value")
        strength = dict(zip(chosen, STRENGTH.value))
    return chosen, {
        "strength": strength,
        "keep_probability": KEEP.value,
        "ratio": RATIO.value,
        "rates": read_rates(workdir) if RATIO.value else None,
    }
