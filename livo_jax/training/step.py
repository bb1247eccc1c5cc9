"""The LiVO training step: pure functions that need jax, flax and optax alone."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from livo_jax import diffusion, seeds, sharding
from livo_jax.training import losses


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
        raise ValueError(f"config.value_encoder.kind={kind!r}: config.train.learning_rates has none for it")
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

    def clip_trained(grads, params):
        zero = lambda trained, part: part if trained else optax.tree.zeros_like(part)
        grads = jax.tree.map(zero, but_embeddings(grads), grads)
        return clip.update(grads, clip.init(params), params)[0]

    # What optax.masked masks out it hands on as an update: so it is zero before. optax.freeze is for that, but has a
    # state, and no checkpoint of before would fit.
    return optax.chain(optax.stateless(clip_trained), optax.masked(adamw, but_embeddings))


def but_embeddings(params: dict) -> dict:
    """Whether parameters are trained where embeddings are not: a prefix of their tree, of one tower or of two."""
    tower = lambda name: name.startswith("text_encoder")
    return {name: but_embeddings(part) if tower(name) else name != "embeddings" for name, part in params.items()}


def init_state(params: dict, tx: optax.GradientTransformation, ema_decay: float = 0.0) -> dict:
    """The state of step 0. `params` are the value encoder's, float32; with a decay, so is their average `ema`."""
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": tx.init(params)}
    return state | ({"ema": jax.tree.map(jnp.copy, params)} if ema_decay else {})


def trained_params(state: dict) -> dict:
    """The value encoder's parameters to use: their moving average where there is one."""
    return state.get("ema", state["params"])


def norms(state: dict) -> dict:
    """params_norm, opt_state_norm, perhaps ema_norm, float32 scalars: finite where all numbers of that part are.

    A number whose square is not finite counts with those: nothing trains on from there either.
    """
    return {f"{name}_norm": optax.tree.norm(part) for name, part in state.items() if name != "step"}


def moments(graphs: dict, frozen: dict, batch: dict, side: str):
    """Mean and log-variance [b, h, w, C] of one side's images in a batch."""
    if f"{side}_moments" in batch:
        return jnp.split(batch[f"{side}_moments"], 2, axis=-1)
    return nnx.merge(graphs["vae"], frozen["vae"]).encode(batch[side])


def noised(graphs, schedule, scaling_factor: float, frozen, batch: dict, sides=("aligned", "violating")):
    """z_t [n b, h, w, C], t [n b] and the target of the images of n sides, with the same eps and t.

    They go through the UNet as one batch: side by side, so that no row leaves its device.
    """

    def latents(side, noise):
        mean, logvar = (x.astype(jnp.float32) for x in moments(graphs, frozen, batch, side))
        return scaling_factor * (mean + jnp.exp(0.5 * logvar) * batch[noise])

    noises = {"aligned": "noise_w", "violating": "noise_l"}
    z = jnp.stack([latents(side, noises[side]) for side in sides], axis=1)
    z = z.reshape(-1, *z.shape[2:])
    eps, t = (jnp.repeat(batch[name], len(sides), axis=0) for name in ("eps", "t"))
    return diffusion.add_noise(schedule, z, eps, t), t, diffusion.target(schedule, z, eps, t)


def prompt_states(graphs: dict, frozen: dict, batch: dict):
    """c [b, L, D] and, of XL, text_embeds [b, D] of a batch's prompts, from the cache or the text encoder."""
    if "prompt_states" in batch:
        return batch["prompt_states"].astype(frozen["unet"]["conv_in"]["kernel"].dtype), batch.get("text_embeds")
    text = nnx.merge(graphs["text_encoder"], frozen["text_encoder"])(batch["prompt_ids"])
    return text.last_hidden_state, text.text_embeds


def make_preference(config, T: int):
    """The function of losses.py that config.loss.form names, with its constants; T timesteps.

    Raises:
        ValueError: an unknown form, or one that micro-batches would change.
    """
    c, of_ratios = config.loss, {"beta": config.loss.beta, "T": T}
    forms = {
        "livo": {name: c[name] for name in ("alpha", "beta", "gamma_1", "gamma_2")},
        "sft": {},
        "dpo": of_ratios,
        "ipo": of_ratios,
        "kto": of_ratios,
    }
    if c.form not in forms:
        raise ValueError(f"config.loss.form={c.form!r}: choose from {', '.join(forms)}")
    if c.form == "kto" and config.train.accumulate > 1:
        raise ValueError(
            f"config.train.accumulate={config.train.accumulate}: kto compares with the mean of a whole batch, set 1"
        )
    return functools.partial(getattr(losses, c.form), **forms[c.form])


def make_loss(graphs: dict, schedule: diffusion.NoiseSchedule, config, scaling_factor: float, time_ids=None):
    """The function loss(params, frozen, batch) -> (loss, metrics); arguments as of make_train_step.

    Its batch also has what the step draws: noise_w, noise_l, eps [b, h, w, C] and t [b].
    """
    min_snr_gamma, train_embeddings = config.loss.min_snr_gamma, config.train.train_embeddings
    preference = make_preference(config, schedule.num_timesteps)
    form = config.loss.form
    anchor = config.loss.get("anchor", 0.0) if form == "livo" else 0.0  # other forms take anchors as pairs
    sides = ("aligned",) if form == "sft" else ("aligned", "violating")

    def loss(params, frozen, batch):
        if not train_embeddings:
            # make_optimizer leaves them as they are; here no time and no part of the gradient's norm goes to them.
            stop = lambda trained, part: part if trained else jax.lax.stop_gradient(part)
            params = jax.tree.map(stop, but_embeddings(params), params)
        value_encoder = nnx.merge(graphs["value_encoder"], params)
        text_encoder, unet = (nnx.merge(graphs[name], frozen[name]) for name in ("text_encoder", "unet"))

        z_t, t, target = noised(graphs, schedule, scaling_factor, frozen, batch, sides)
        of_sides = lambda x: x if x is None else jnp.repeat(x, len(sides), axis=0)
        weight = diffusion.min_snr_weight(schedule, t, min_snr_gamma) if min_snr_gamma else 1.0

        def predict(conditioning, mask):
            return unet(z_t, t, of_sides(conditioning), of_sides(mask), of_sides(text_embeds), time_ids)

        def errors(eps_hat):  # of each side, [n, b]
            return (weight * losses.denoising_error(eps_hat, target)).reshape(-1, len(sides)).T

        c, text_embeds = prompt_states(graphs, frozen, batch)  # of the policy too
        before = lambda u, c: jnp.concatenate([u.astype(c.dtype), c], axis=1)  # [u; c]: value tokens first
        u, mask = value_encoder.tokens(batch["value_prompt_ids"], text_encoder), None  # [b, n, D]
        if "beside" in batch:
            # Policy and reference both have the second value, where there is one: what is learned is what u adds to
            # it. Another pair trains its token.
            u_beside = jax.lax.stop_gradient(value_encoder.tokens(batch["beside_prompt_ids"], text_encoder))
            beside = jnp.broadcast_to(batch["beside"][:, None], u.shape[:2])
            mask = jnp.concatenate([beside, jnp.ones(c.shape[:2], bool)], axis=1)
            c = before(u_beside, c)
        reference = predict(c, mask) if form != "sft" else None
        mask = mask if mask is None else jnp.concatenate([jnp.ones(u.shape[:2], bool), mask], axis=1)
        policy = predict(before(u, c), mask)
        of_reference = () if reference is None else errors(reference)
        if not (anchor and "anchor" in batch):
            return preference(*errors(policy), *of_reference)
        # What the value should leave alone has no hinges, but a prediction that is to stay.
        is_anchor = batch["anchor"]
        constants = {name: jnp.where(is_anchor, 0.0, x) for name, x in preference.keywords.items()}
        loss, metrics = preference(*errors(policy), *of_reference, **constants)
        moved = jnp.mean(jnp.where(of_sides(is_anchor), losses.denoising_error(policy, reference), 0.0))
        return loss + anchor * moved, metrics | {"anchor_moved": moved, "hinged": 1 - jnp.mean(is_anchor)}

    return loss


def draw(key, shape: tuple, timesteps: tuple[int, int]) -> dict:
    """What a step draws for latents of `shape` [B, h, w, C]: noise_w, noise_l, eps, and t [B] of first .. last - 1.

    The key is split once: none serves two purposes.
    """
    *keys, key_t = jax.random.split(key, 4)
    drawn = {name: jax.random.normal(key, shape) for name, key in zip(("noise_w", "noise_l", "eps"), keys)}
    return drawn | {"t": jax.random.randint(key_t, shape[:1], *timesteps)}


def over_hinged(metrics: dict) -> dict:
    """The metrics with active_w and active_l as shares of the rows that have hinges: `hinged`, where not all have.

    To be taken of the mean over micro-batches, which differ in how many rows have.
    """
    metrics = dict(metrics)
    if "hinged" in metrics:
        hinged = jnp.maximum(metrics.pop("hinged"), 1e-9)  # where no row has, both are 0
        metrics |= {name: metrics[name] / hinged for name in ("active_w", "active_l")}
    return metrics


def make_train_step(
    graphs: dict, schedule: diffusion.NoiseSchedule, tx, config, scaling_factor: float, time_ids=None,
    make_loss=make_loss,
):  # fmt: skip
    """The function train_step(state, frozen, batch) -> (state, metrics), to be jitted.

    Args:
        graphs: GraphDefs of value_encoder, text_encoder, unet, vae.
        config: its `loss`, `seed` and `train` (accumulate, ema_decay, train_embeddings) are used.
        scaling_factor: of the VAE's latents. time_ids: of XL, as StableDiffusion has them.
        make_loss: of a method that trains something else than a value encoder; graphs are as it wants them.

    The step takes `state` (step, params, opt_state, perhaps ema), `frozen` (parameters of text_encoder,
    unet and vae) and a batch of data.batches: value_prompt_ids, and either prompt_ids and images or, from a
    cache, prompt_states (of XL also text_embeds) and moments; then `frozen` needs no vae. Its metrics are
    float32 scalars: loss, those of the form's function in losses.py (active_w and active_l are of the rows that have
    hinges), grad_norm, and the norms of the state that it returns.
    """
    loss = make_loss(graphs, schedule, config, scaling_factor, time_ids)
    timesteps = config.loss.timesteps
    accumulate, ema_decay = config.train.accumulate, config.train.ema_decay

    def train_step(state, frozen, batch):
        # One base key, folded with the step. All is drawn for the whole batch, so that no number depends on how it is
        # accumulated.
        shape = jax.eval_shape(lambda: moments(graphs, frozen, batch, "aligned"))[0].shape  # [B, h, w, C]
        batch = batch | draw(jax.random.fold_in(seeds.key(config.seed), state["step"]), shape, timesteps)

        gradient = lambda rows: jax.value_and_grad(loss, has_aux=True)(state["params"], frozen, rows)
        if accumulate == 1:
            (value, metrics), grads = gradient(batch)
        else:  # micro-batches of every accumulate-th row: each device's rows stay its own
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            zeros = optax.tree.zeros_like(jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts)))
            total, _ = jax.lax.scan(lambda total, rows: (optax.tree.add(total, gradient(rows)), None), zeros, parts)
            (value, metrics), grads = optax.tree.scale(1 / accumulate, total)

        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        after = {"step": state["step"] + 1, "params": params, "opt_state": opt_state}
        if ema_decay:  # which follows closely at first
            decay = jnp.minimum(ema_decay, after["step"] / (after["step"] + 9))
            after["ema"] = optax.incremental_update(params, state["ema"], 1 - decay)
        return after, {"loss": value, **over_hinged(metrics), "grad_norm": optax.tree.norm(grads), **norms(after)}

    return train_step


def state_on(mesh, params: dict, tx, config, rules=sharding.RULES) -> dict:
    """init_state, each leaf where the partition rules have it."""
    make = lambda params: init_state(params, tx, config.train.ema_decay)
    return jax.jit(make, out_shardings=sharding.by_rules(jax.eval_shape(make, params), mesh, rules))(params)


def jit_step(train_step, state: dict, frozen: dict, mesh):
    """train_step under jit: state and frozen stay where they lie, the state given is used up, rows go to the mesh."""

    def on_mesh(*given):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which the attention kernels ask for
            return train_step(*given)

    lies, kept = jax.tree.map(lambda x: x.sharding, (state, frozen))
    given, returned = (lies, kept, sharding.over_batch(mesh)), (lies, sharding.replicated(mesh))
    return jax.jit(on_mesh, in_shardings=given, out_shardings=returned, donate_argnums=0)
