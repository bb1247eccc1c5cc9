"""--mode=attack looks for words that bring a harm back. It has no flags of its own: config.attack is its budget."""


def attack(config, workdir: str):
    from livo_jax import sharding
    from livo_jax.files.directories import held, resolve_directory
    from livo_jax.runs import attack, restore

    attack.check(config)
    workdir = resolve_directory(workdir)
    mesh = sharding.make_mesh(**config.mesh)
    models = restore.restore_run(config, workdir, mesh)
    with held(workdir / "eval", "attacks in"):
        attack.attack(models, config, mesh, workdir)
