"""--mode=train trains, and evaluates at its end. It has no flags of its own."""


def train(config, workdir: str):
    from livo_jax.runs.train import train_and_evaluate

    train_and_evaluate(config, workdir)
