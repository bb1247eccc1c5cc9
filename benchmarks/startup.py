"""Times the start: imports, and lowering and compiling a training step, without and with the persistent cache.

    python -m benchmarks.startup --config=configs/tiny.py
    python -m benchmarks.startup --config=configs/livo.py --config.model=benchmarks/sd15 --config.random_weights=True

On a CPU the second wants --config.dtype=float32 --config.train.batch_size=1 --image_size=256.

Each runs in a new process. The compilation cache is a temporary directory, empty at first.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging
from livo_jax.benchmarks import common
from ml_collections import config_flags

from livo_jax import commands

CONFIG = config_flags.DEFINE_config_file("config", None, "The config whose step is compiled.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "In pixels. Default: the model's.")
IMPORTS = {
    "import livo_jax": "import livo_jax",
    "import run": "import run",
    "from livo_jax import StableDiffusion": "from livo_jax import StableDiffusion",
    "what training imports": "import livo_jax.runs.train",
}


def seconds(code: str) -> float:
    """The median time of a Python process that runs `code`."""
    times = []
    for _ in range(common.REPEATS.value):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compile_step(cache: str) -> list[dict]:
    """The rows of benchmarks.train_step without peers, with the overrides of this command line."""
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, "-m", "livo_jax.benchmarks.train_step"]
        command += ["--repeats=1", "--peers=", f"--results={results}"]
        command += [arg for arg in sys.argv[1:] if arg.startswith(("--config", "--image_size"))]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_ENABLE_COMPILATION_CACHE": "true"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        with open(f"{results}/train_step.json", encoding="utf-8") as file:
            return json.load(file)["rows"]


def main(_):
    logging.set_verbosity(logging.WARNING)
    rows = [{"what": "nothing (python itself)", "seconds": seconds("")}]
    rows += [{"what": what, "seconds": seconds(code)} for what, code in IMPORTS.items()]
    with tempfile.TemporaryDirectory() as cache:
        for start in ("first", "second"):
            for row in compile_step(cache):
                rows.append({"what": f"{row['step']}: compile, {start} start", "seconds": row["compile_s"]})
                rows.append({"what": f"{row['step']}: lower, {start} start", "seconds": row["lower_s"]})
    common.report("startup", {"model": CONFIG.value.model}, rows)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=commands.parse)
