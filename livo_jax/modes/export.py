"""--mode=export writes a run's value encoder for PyTorch and diffusers."""

import os
import pathlib

from absl import app

from livo_jax.modes import OUT


def export_run(config, workdir: str):
    from livo_jax import sharding
    from livo_jax.export import export
    from livo_jax.files.directories import resolve_directory
    from livo_jax.runs import restore
    from livo_jax.runs.evaluate import read_rates, read_results
    from livo_jax.runs.workdir import recipe

    workdir, out = resolve_directory(workdir), os.path.expanduser(OUT.value or "")
    mesh = sharding.make_mesh(**config.mesh)
    if not out:
        raise app.UsageError("--mode=export needs --out=DIR")
    if pathlib.Path(out).exists():
        raise app.UsageError(f"--out={OUT.value} exists: remove it, or export to another")
    models = restore.restore_run(config, workdir, mesh)
    rates = read_rates(workdir) if (workdir / "eval" / "rates.json").exists() else None
    export.export(out, models.sd, models.value_encoder, config, read_results(workdir), rates, recipe(workdir))
