"""The optimizer of config.train, and what of the parameters it leaves alone."""

import jax
import optax


def learning_rate(config) -> float:
    """config.train.learning_rate or, where that is 0, that of what is trained.

    Raises:
        ValueError: a method or kind of value encoder that has none.
    """
    c = config.train
    if c.learning_rate:
        return c.learning_rate
    kind = config.value_encoder.kind
    trained = config.method if config.method in c.learning_rates else kind
    if trained not in c.learning_rates:
        raise ValueError(
            f"config.value_encoder.kind={kind!r}: config.train.learning_rates has none for it, set"
            " config.train.learning_rate"
        )
    return c.learning_rates[trained]


def make_optimizer(config) -> optax.GradientTransformation:
    """AdamW on clipped gradients, after config.train.

    Raises:
        ValueError: an unknown schedule or scaling, or a warm-up that is not shorter than the training.
    """
    c, problems = config.train, []
    if not 0 <= c.warmup_steps < c.steps:
        problems.append(
            f"config.train.warmup_steps={c.warmup_steps}: choose 0 to config.train.steps - 1 = {c.steps - 1}"
        )
    ratio = c.batch_size / max(1, c.reference_batch_size)
    scales = {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}
    peak = learning_rate(config) * scales.get(c.learning_rate_scaling, 1.0)
    schedules = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, max(1, c.steps - c.warmup_steps)),
    }
    for name, choices in (("learning_rate_scaling", scales), ("schedule", schedules)):
        if c[name] not in choices:
            problems.append(f"config.train.{name}={c[name]!r}: choose from {', '.join(choices)}")
    if problems:
        raise ValueError("\n  ".join(problems))
    warmup = optax.linear_schedule(0.0, peak, c.warmup_steps)
    rate = optax.join_schedules([warmup, schedules[c.schedule]], [c.warmup_steps])
    adamw = optax.adamw(rate, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay)
    clip = optax.clip_by_global_norm(c.grad_clip)
    if c.train_embeddings:
        return optax.chain(clip, adamw)

    def zero_unless(trained, part):
        return part if trained else optax.tree.zeros_like(part)

    def clip_trained(grads, params):
        grads = jax.tree.map(zero_unless, but_embeddings(grads), grads)
        return clip.update(grads, clip.init(params), params)[0]

    # What optax.masked masks out it hands on as an update: so it is zero before. optax.freeze is for that, but has a
    # state, and no checkpoint of before would fit.
    return optax.chain(optax.stateless(clip_trained), optax.masked(adamw, but_embeddings))


def but_embeddings(params: dict) -> dict:
    """Whether parameters are trained where embeddings are not: a prefix of their tree, of one tower or of two."""
    return {
        name: but_embeddings(part) if name.startswith("text_encoder") else name != "embeddings"
        for name, part in params.items()
    }
