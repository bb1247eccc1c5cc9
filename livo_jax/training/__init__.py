"""The loss and the training step, with jax, flax and optax alone."""
