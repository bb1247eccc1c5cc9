"""--mode=evaluate measures a run, or all methods of a comparison. It has no flags of its own."""


def evaluate(config, workdir: str):
    from livo_jax import sharding
    from livo_jax.files.directories import held, resolve_directory
    from livo_jax.runs import restore
    from livo_jax.runs.evaluate import evaluate_and_report

    workdir = resolve_directory(workdir)
    mesh = sharding.make_mesh(**config.mesh)
    models = restore.restore_run(config, workdir, mesh)
    with held(workdir / "eval", "evaluates in"):  # also while the run trains
        evaluate_and_report(models, config, mesh, workdir)


def compare(config, workdir: str, changed: dict, only_cost: bool = False):
    """Trains and measures config.methods; `changed`: {field: value} of what the command line sets.

    only_cost: checks it and tells what it would cost, and does nothing.
    """
    from livo_jax.runs import compare

    if only_cost:
        compare.tell_cost(config, changed)
    else:
        compare.compare(config, workdir, changed)
