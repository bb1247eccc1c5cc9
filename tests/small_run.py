"""A run of seconds, as a user starts it: a small model of random weights, pairs that show nothing, no evaluation."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from absl.testing import flagsaver

import run as command_line
from livo_jax import commands
from tests.conftest import DEVICES, QUICK
from tests.data import test_data

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "unet": {"block_out_channels": [8], "down_block_types": ["CrossAttnDownBlock2D"],
             "up_block_types": ["CrossAttnUpBlock2D"]},
    "vae": {"block_out_channels": [8, 8, 8]},
    "text_encoder": {"num_hidden_layers": 1, "max_position_embeddings": 16},  # its prompts are short
}  # fmt: skip
TIMES = ("train/pairs_per_sec", "train/tflops_per_device", "train/wait_for_data")


def prepare(root: pathlib.Path):
    """Makes root/model and root/pairs."""
    model = root / "model"
    shutil.copytree(ROOT / "data_tools" / "shapeworld_model", model, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, changes in SMALL.items():
        file = model / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    tokenizer = model / "tokenizer" / "tokenizer_config.json"  # diffusers pads to what it says
    length = {"model_max_length": SMALL["text_encoder"]["max_position_embeddings"]}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | length))
    test_data.make(root / "pairs")


def environment(devices: int = 1) -> dict:
    """Of a process that compiles quickly, on so many virtual devices."""
    return os.environ | {"XLA_FLAGS": f"{DEVICES.format(devices)} {QUICK}"}


def overridden(own, given) -> list[str]:
    """Flags with those that are given in the place of their own: of a tuple that is there twice ml_collections makes
    one."""
    names = {flag.partition("=")[0] for flag in given}
    return [*(flag for flag in own if flag.partition("=")[0] not in names), *given]


def arguments(root, workdir, *given) -> list[str]:
    """The small run's command, of the model and pairs in `root`, and with what is given."""
    own = [
        "--config=configs/tiny.py:smoke", f"--workdir={workdir}", f"--config.model={root / 'model'}",
        "--config.random_weights=True", f"--config.data.directory={root / 'pairs'}",
        "--config.principles=('shape', 'colour')", "--config.judge=", "--config.eval.seen=('cook',)",
        "--config.eval.held_out=('baker',)", "--config.sampling.steps=2", "--config.log.samples_every=0",
        "--config.log.every=1", "--config.data.cache=False",
    ]  # fmt: skip
    return ["run.py", *overridden(own, given)]


def start(root, workdir, *given, devices: int = 1, **more) -> subprocess.Popen:
    """The small run as a process."""
    return subprocess.Popen(
        [sys.executable, *arguments(root, workdir, *given)], cwd=ROOT, env=environment(devices) | more,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_here(arguments: list[str]):
    """A command in this process, which saves the seconds of a start."""
    import grain  # noqa: F401 (it defines flags, which flagsaver would take away again)

    before, sys.argv = sys.argv, list(arguments)  # where config_flags looks for overrides
    try:
        with contextlib.chdir(ROOT), flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            commands.parse(arguments)
            command_line.main(arguments[:1])
    finally:
        sys.argv = before


def finish(process) -> str:
    """What it printed. Asserts that it succeeds."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    return out


def metrics(workdir) -> list[dict]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def final(workdir) -> dict:
    """The arrays of the newest checkpoint: {path: array}."""
    step = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(step / "state").item_metadata.tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(step / "state", restore_args=args))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
