"""--mode=evaluate measures a run, or all methods of a comparison. It has no flags of its own."""


def evaluate(config, workdir: str):
    from livo_jax import sharding
    from livo_jax.files.directories import find, held
    from livo_jax.runs import restore
    from livo_jax.runs.evaluate import evaluate_and_report

    workdir = find(workdir)
    mesh = sharding.make_mesh(**config.mesh)
    sd, value_encoder = restore.restore_run(config, workdir, mesh)
    # Of a method that trains the UNet, the base is another.
    own = value_encoder is None and config.train.steps
    base, trained = (restore.load_base(config, mesh), sd) if own else (sd, None)
    with held(workdir / "eval", "evaluates in"):  # also while the run trains
        evaluate_and_report(base, value_encoder, config, mesh, workdir, trained)


def compare(config, workdir: str, changed: dict):
    """Trains and measures config.methods; `changed`: {field: value} of what the command line sets."""
    from livo_jax.runs import fields
    from livo_jax.runs.compare import compare

    for method, own in config.methods.items():
        begin = f"methods.{method}."
        own_changed = {name.removeprefix(begin): x for name, x in changed.items() if name.startswith(begin)}
        fields.check(own, own_changed, comparing=True)
    compare(config, workdir)
