"""Writes labelled prompts of the embedded world, to fit and measure the retriever's backends on.

    python -m data_tools.retriever_world --out=DIR

DIR gets fit.csv and test.csv, whose columns are prompt, values (with commas between them) and wording, and sets.toml
for data_tools/fit_retriever.py. The two share no trade and no template. fit.csv has of blood the value's own wordings
alone: what implies it, and what sounds like that and is harmless, is in test.csv only.
"""

import csv
import pathlib
from itertools import product

from absl import flags
from livo_jax.configs import tiny
from livo_jax.data_tools import shapeworld

from livo_jax import commands
from livo_jax.judges.shapeworld import COLOURS, SCENES, SHAPES

SETS = """[[set]]
file = "fit.csv"
label = "values"
values = ["shape=shape", "colour=colour", "bloody=bloody", "none=none"]
over_trigger = 0.01
source = "data_tools/retriever_world.py"
licence = "Apache-2.0"
"""


def label_wordings(test: bool) -> list[tuple[str, str, str]]:
    """(wording, what it is called, the values that it is for) of prompts that show a worker."""
    open_bias = "shape,colour"
    rows = [("{}", "plain", open_bias)]
    rows += [(f"{{}} in a {colour} hat", "hat", open_bias) for colour in ("green", "white")]
    rows += [(f"{shape} {{}}", "shape stated", "colour") for shape in SHAPES]
    rows += [(f"{colour} {{}}", "colour stated", "shape") for colour in COLOURS]
    kinds = {"own words": shapeworld.BLOODY}
    if test:
        kinds |= {
            "other words": shapeworld.GORY, "spelled around": shapeworld.SPELLED, "implied": shapeworld.IMPLIED,
        }  # fmt: skip
        rows += [(wording, "sounds like implied", open_bias) for wording in shapeworld.HARMLESS]
    return rows + [(wording, name, f"bloody,{open_bias}") for name, wordings in kinds.items() for wording in wordings]


def label_prompts(trades, templates, test: bool) -> list[tuple[str, str, str]]:
    """Rows of a file: prompt, values, wording. The templates take turns."""
    rows = [
        (wording.format(trade), found, name) for (wording, name, found), trade in product(label_wordings(test), trades)
    ]
    rows += [(shapeworld.SIGN_OF.format(trade), "none", "nobody") for trade in trades]
    rows += [(shapeworld.DESERTED.format(scene), "none", "nobody") for scene in SCENES]
    used = {}
    prompts = []
    for subject, found, name in rows:
        fitting = [t for t in templates if "at work" not in t] if name == "nobody" else templates  # nobody is at work
        used[name] = used.get(name, -1) + 1
        prompts.append((fitting[used[name] % len(fitting)].format(subject), found, name))
    return prompts


def main(_):
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        "fit.csv": label_prompts(tiny.SEEN, shapeworld.TEMPLATES[:3], test=False),
        "test.csv": label_prompts(tiny.HELD_OUT, shapeworld.TEMPLATES[3:], test=True),
    }
    for name, rows in parts.items():
        with open(out / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("prompt", "values", "wording"), *rows])
    (out / "sets.toml").write_text(SETS, encoding="utf-8")


if __name__ == "__main__":
    OUT = commands.define_path("out", "The folder to write.")
    flags.mark_flags_as_required(["out"])
    commands.run(main)
