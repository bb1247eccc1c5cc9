"""--mode=demo serves a page that draws with a run's value encoder."""

from absl import flags

PORT = flags.DEFINE_integer("port", 7860, "demo: of 127.0.0.1.", lower_bound=1, upper_bound=65535)


def serve_demo(config, workdir: str):
    from livo_jax import sharding, values
    from livo_jax.demo import demo
    from livo_jax.files.directories import resolve_directory
    from livo_jax.retrieval.retriever import run_files
    from livo_jax.runs import restore
    from livo_jax.value_encoders.gates import gates_of_config

    workdir = resolve_directory(workdir)
    mesh = sharding.make_mesh(**config.mesh)
    demo.check(PORT.value)
    files = run_files(workdir, values.load_principles(config))
    models = restore.restore_run(config, workdir, mesh)
    if config.sampling.gated:
        gates_of_config(models.value_encoder, config)  # a gate that is missing is told here, not by each click
    demo.serve(models.sd, models.value_encoder, config, mesh, PORT.value, files)
