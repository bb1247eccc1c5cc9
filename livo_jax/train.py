"""Training: the LiVO step, and train_and_evaluate(config, workdir) that repeats it.

The step needs jax, flax and optax alone; what reads and writes files is imported where it is used.
"""

import collections
import functools
import importlib.util
import math
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from livo_jax import diffusion, losses, sharding
from livo_jax.models.unet import REMAT
from livo_jax.models.weights import split

# ---------------------------------------------------------------------------- the step


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
    peak = c.learning_rate * scales.get(c.learning_rate_scaling, 1.0)
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
    learning_rate = optax.join_schedules([warmup, schedules[c.schedule]], [c.warmup_steps])
    adamw = optax.adamw(learning_rate, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay)
    if not c.train_embeddings:
        adamw = optax.masked(adamw, lambda params: {name: name != "embeddings" for name in params})
    return optax.chain(optax.clip_by_global_norm(c.grad_clip), adamw)


def init_state(params: dict, tx: optax.GradientTransformation, ema_decay: float = 0.0) -> dict:
    """The state of step 0. `params` are the value encoder's, float32; with a decay, so is their average `ema`."""
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": tx.init(params)}
    return state | ({"ema": jax.tree.map(jnp.copy, params)} if ema_decay else {})


def trained_params(state: dict) -> dict:
    """The value encoder's parameters to use: their moving average where there is one."""
    return state.get("ema", state["params"])


def moments(graphs: dict, frozen: dict, batch: dict, side: str):
    """Mean and log-variance [b, h, w, C] of one side's images in a batch."""
    if f"{side}_moments" in batch:
        return jnp.split(batch[f"{side}_moments"], 2, axis=-1)
    return nnx.merge(graphs["vae"], frozen["vae"]).encode(batch[side])


def make_loss(graphs: dict, schedule: diffusion.NoiseSchedule, config, scaling_factor: float):
    """The function loss(params, frozen, batch) -> (loss, metrics); arguments as of make_train_step.

    Its batch also has what the step draws: noise_w, noise_l, eps [b, h, w, C] and t [b].
    """
    min_snr_gamma, train_embeddings = config.loss.min_snr_gamma, config.train.train_embeddings
    constants = {name: config.loss[name] for name in ("alpha", "beta", "gamma_1", "gamma_2")}

    def loss(params, frozen, batch):
        if not train_embeddings:
            params = params | {"embeddings": jax.lax.stop_gradient(params["embeddings"])}
        value_encoder, unet = nnx.merge(graphs["value_encoder"], params), nnx.merge(graphs["unet"], frozen["unet"])

        def latents(side, noise):
            mean, logvar = (x.astype(jnp.float32) for x in moments(graphs, frozen, batch, side))
            return scaling_factor * (mean + jnp.exp(0.5 * logvar) * noise)

        # w and l go through the UNet as one batch, with the same eps and t: side by side, so that no row leaves
        # its device.
        twice = lambda x: jnp.repeat(x, 2, axis=0)
        z = jnp.stack([latents("aligned", batch["noise_w"]), latents("violating", batch["noise_l"])], axis=1)
        z = z.reshape(-1, *z.shape[2:])
        eps, t = twice(batch["eps"]), twice(batch["t"])
        z_t, target = diffusion.add_noise(schedule, z, eps, t), diffusion.target(schedule, z, eps, t)
        weight = diffusion.min_snr_weight(schedule, t, min_snr_gamma) if min_snr_gamma else 1.0

        def errors(conditioning):
            return (weight * losses.denoising_error(unet(z_t, t, twice(conditioning)), target)).reshape(-1, 2).T

        if "prompt_states" in batch:
            c = batch["prompt_states"].astype(unet.conv_in.kernel.dtype)  # [b, L, D]
        else:
            c = nnx.merge(graphs["text_encoder"], frozen["text_encoder"])(batch["prompt_ids"]).last_hidden_state
        u = value_encoder(batch["value_prompt_ids"]).pooled  # [b, D]
        r_w, r_l = errors(c)
        l_w, l_l = errors(jnp.concatenate([u[:, None].astype(c.dtype), c], axis=1))  # [u; c], the value token first
        return losses.livo(l_w, l_l, r_w, r_l, **constants)

    return loss


def make_train_step(graphs: dict, schedule: diffusion.NoiseSchedule, tx, config, scaling_factor: float):
    """The function train_step(state, frozen, batch) -> (state, metrics), to be jitted.

    Args:
        graphs: GraphDefs of value_encoder, text_encoder, unet, vae.
        config: its `loss` (alpha, beta, gamma_1, gamma_2, timesteps, min_snr_gamma), `seed` and `train`
            (accumulate, ema_decay, train_embeddings) are used.
        scaling_factor: of the VAE's latents.

    The step takes `state` (step, params, opt_state, perhaps ema), `frozen` (parameters of text_encoder,
    unet and vae) and a batch of data.batches: value_prompt_ids, and either prompt_ids and images or, from a
    cache, prompt_states and moments; then `frozen` needs the unet alone. Its metrics are float32 scalars:
    loss, those of losses.livo, and grad_norm.
    """
    loss = make_loss(graphs, schedule, config, scaling_factor)
    first, last = config.loss.timesteps
    accumulate, ema_decay = config.train.accumulate, config.train.ema_decay

    def train_step(state, frozen, batch):
        # One base key, folded with the step, split once: no key serves two purposes. All is drawn for the
        # whole batch, so that no number depends on how it is accumulated.
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        key_w, key_l, key_eps, key_t = jax.random.split(key, 4)
        shape = jax.eval_shape(lambda: moments(graphs, frozen, batch, "aligned"))[0].shape  # [B, h, w, C]
        noise_w, noise_l, eps = (jax.random.normal(key, shape) for key in (key_w, key_l, key_eps))
        t = jax.random.randint(key_t, shape[:1], first, last)
        batch = {**batch, "noise_w": noise_w, "noise_l": noise_l, "eps": eps, "t": t}

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
        return after, {"loss": value, **metrics, "grad_norm": optax.tree.norm(grads)}

    return train_step


# ---------------------------------------------------------------------------- the run


def check_config(config, sd, mesh, judge: bool = True):
    """Raises ValueError with everything in the config that would fail later; `judge`: whether images are judged."""
    from livo_jax import judges, values
    from livo_jax.generate import PROMPT_LAYOUTS

    problems, found = [], []
    first, last = config.loss.timesteps
    if not 0 <= first < last <= sd.schedule.num_timesteps:
        problems.append(f"config.loss.timesteps={first, last}: choose 0 <= first < last <= {sd.schedule.num_timesteps}")
    positive = "train.steps train.reference_batch_size train.accumulate sampling.batch_size checkpoint.every log.every"
    for path in positive.split():
        section, name = path.split(".")
        if config[section][name] < 1:
            problems.append(f"config.{path}={config[section][name]}: choose at least 1")
    if not 0 <= config.train.ema_decay < 1:
        problems.append(f"config.train.ema_decay={config.train.ema_decay}: choose 0 (none) to below 1")
    if config.train.remat not in REMAT:
        problems.append(f"config.train.remat={config.train.remat!r}: choose from {', '.join(REMAT)}")
    if config.sampling.prompt_layout not in PROMPT_LAYOUTS:
        problems.append(
            f"config.sampling.prompt_layout={config.sampling.prompt_layout!r}: choose from {', '.join(PROMPT_LAYOUTS)}"
        )
    parts = sharding.batch_parts(mesh)
    if config.train.accumulate > 1 and config.train.batch_size % (parts * config.train.accumulate):
        problems.append(
            f"config.train.batch_size={config.train.batch_size} is not a multiple of the mesh's {parts} parts times"
            f" config.train.accumulate={config.train.accumulate}"
        )
    if config.profile.steps < 0:
        problems.append(f"config.profile.steps={config.profile.steps}: choose 0 (no profile) or more")
    if config.log.wandb and not importlib.util.find_spec("wandb"):
        problems.append(f"config.log.wandb={config.log.wandb!r}: wandb is not installed: pip install wandb")
    for attempt in (
        lambda: sharding.check_batch_size(mesh, config.train.batch_size, "config.train.batch_size"),
        lambda: make_optimizer(config),
        lambda: diffusion.sampler_table(sd.scheduler_config, config.sampling.sampler, config.sampling.steps),
        lambda: found.extend(values.load(config.principles)),
        lambda: config.judge and judge and judges.load(config, found, config.eval.seen),
    ):
        try:
            attempt()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("the config cannot work:\n  " + "\n  ".join(problems))


def load_models(config, mesh):
    """The frozen StableDiffusion of config.model, and the value encoder to start from, in float32, on the mesh.

    That is config.value_encoder, or the text encoder of the model.

    Raises:
        FileNotFoundError, ValueError: as StableDiffusion.from_pretrained; a value encoder of another model.
    """
    from livo_jax.generate import check_value_encoder
    from livo_jax.pretrained import StableDiffusion, ValueEncoder

    by_rules = functools.partial(sharding.by_rules, mesh=mesh)
    where = by_rules if config.shard_frozen else sharding.replicated(mesh)
    dtype, variant = jnp.dtype(config.dtype), config.variant or None
    if config.random_weights:
        sd = StableDiffusion.from_config(config.model, dtype, seed=config.seed, sharding=where)
    else:
        sd = StableDiffusion.from_pretrained(config.model, dtype, variant=variant, sharding=where)
    if config.value_encoder:
        value_encoder = ValueEncoder.from_pretrained(config.value_encoder, sharding=by_rules)
    elif config.random_weights:
        graph, params = split(sd.text_encoder)  # copied, for training gives the arrays of its state away
        value_encoder = nnx.merge(graph, jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params))
    else:
        value_encoder = ValueEncoder.from_pretrained(
            config.model, subfolder="text_encoder", variant=variant, sharding=by_rules
        )
    check_value_encoder(sd, value_encoder)
    sd.unet.remat = config.train.remat
    if config.shard_frozen:
        sd.unet.gather = functools.partial(sharding.gather, mesh=mesh)
    return sd, value_encoder


def state_on(mesh, params: dict, tx, config) -> dict:
    """init_state, each leaf where the partition rules have it."""
    make = lambda params: init_state(params, tx, config.train.ema_decay)
    return jax.jit(make, out_shardings=sharding.by_rules(jax.eval_shape(make, params), mesh))(params)


def jit_step(train_step, state: dict, frozen: dict, mesh):
    """train_step under jit: state and frozen stay where they lie, the state given is used up, rows go to the mesh."""
    lies, kept = jax.tree.map(lambda x: x.sharding, (state, frozen))
    given, returned = (lies, kept, sharding.over_batch(mesh)), (lies, sharding.replicated(mesh))
    return jax.jit(train_step, in_shardings=given, out_shardings=returned, donate_argnums=0)


def train_and_evaluate(config, workdir, build_preferences=None, cache_latents=None):
    """Trains a value encoder, resuming where `workdir` stopped, then evaluates it.

    Leaves config.json, metrics.jsonl, tensorboard/, checkpoints/, samples/ and eval/ in `workdir`. Several processes
    (sharding.join) train together, on a workdir that all of them see.

    Args:
        workdir: a directory, or gs://... and what else etils.epath and Orbax know.
        build_preferences: build_preferences(config, directory, sd) makes the pairs in
            workdir/preferences where config.data.directory names none and there are none yet.
        cache_latents: cache_latents(preferences, sd, config) makes the cache that config.data.cache wants.

    Raises:
        ValueError, FileNotFoundError: a config, model, dataset or workdir that cannot work, before
            the first step.
        FloatingPointError: the loss is not finite; the checkpoints are from before it.
        OSError: a checkpoint cannot be written.
        SystemExit: after SIGTERM, with its step saved; status 143, as a shell has it.
    """
    from tqdm import tqdm

    from livo_jax import values as principles
    from livo_jax.checkpoint import Checkpoints, Termination
    from livo_jax.data import Cache, Preferences, batches
    from livo_jax.evaluate import evaluate_and_report, read_results, sample_sheet, table
    from livo_jax.log import Log
    from livo_jax.workdir import claim, find, is_remote, say

    workdir = find(workdir)
    if is_remote(directory := config.data.directory or workdir / "preferences"):
        raise ValueError(
            f"{directory} is in a bucket, where pairs cannot be read: give a config.data.directory on disk"
        )
    directory = pathlib.Path(directory)
    if not config.judge and not directory.exists():
        raise ValueError(
            f"{directory} holds no preference pairs, and without config.judge none can be built:"
            " give config.data.directory, or a judge that reads the axes of config.principles"
        )

    # ---- what is given: models, pairs, mesh
    mesh = sharding.make_mesh(**config.mesh)
    sd, value_encoder = load_models(config, mesh)
    check_config(config, sd, mesh)
    claim(workdir, config)
    # With several processes each draws with its own devices, from a copy that is on no other.
    own = sd if jax.process_count() == 1 else None
    if build_preferences and not config.data.directory and not directory.exists():
        # Pairs must show something: random weights are not what draws them.
        build_preferences(config, directory, None if config.random_weights else own)
    preferences = Preferences(directory)
    preferences.check_values(principles.load(config.principles))
    if cache_latents and config.data.cache and not (directory / "cache").exists():
        cache_latents(preferences, own or load_models(config, sharding.make_local_mesh())[0], config)
    cache = Cache(preferences, sd, config) if config.data.cache else None

    # ---- state: from step 0, or where the last checkpoint left it
    modules = dict(unet=sd.unet, value_encoder=value_encoder)
    if not cache:
        modules |= dict(text_encoder=sd.text_encoder, vae=sd.vae)
    graphs, params = {}, {}
    for name, module in modules.items():
        graphs[name], params[name] = split(module)
    tx = make_optimizer(config)
    state, frozen = state_on(mesh, params.pop("value_encoder"), tx, config), params
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state, set_aside=True)
        say(f"resuming {workdir} at step {int(state['step'])}")
    start, steps = int(state["step"]), config.train.steps
    iterator = batches(
        preferences, sd.tokenize, cache, batch_size=config.train.batch_size, image_size=sd.image_size,
        random_flip=config.data.random_flip, seed=config.seed, start=start,
    )  # fmt: skip
    trained = lambda: nnx.merge(graphs["value_encoder"], trained_params(state))

    # ---- the step, compiled once
    step_fn = make_train_step(graphs, sd.schedule, tx, config, sd.vae.config.scaling_factor)
    step_fn = jit_step(step_fn, state, frozen, mesh)

    # ---- the loop: while step k runs, the metrics of step k-1 are fetched and checked
    c, log, in_flight = config.log, Log(workdir, start, config), collections.deque()
    profiled = range(start + 3, min(start + 3 + config.profile.steps, steps + 1))  # without what starts up
    bar = tqdm(total=steps, initial=start, desc="train", unit="step", disable=jax.process_index() > 0)
    each = lambda every, step: step % every == 0 or step == steps
    sheet = lambda step: workdir / "samples" / f"step_{step}.png"
    with bar as progress, Termination(start) as sigterm:
        if start and each(c.samples_every, start) and not sheet(start).exists():  # the end came while it was drawn
            sample_sheet(sd, trained(), config, mesh, sheet(start))
        for step in range(start + 1, steps + 1):
            batch = sharding.global_batch(mesh, log.next(iterator))
            if step == start + 1:
                step_fn = step_fn.lower(state, frozen, batch).compile()
                # Of one micro-batch: the analysis counts the body of a loop once.
                flops = (step_fn.cost_analysis() or {}).get("flops", 0.0) * config.train.accumulate
                log.restart_clock()
            if step in profiled[:1]:
                log.start_profile()
            state, metrics = step_fn(state, frozen, batch)
            in_flight.append((step, metrics))
            due = {
                "log": each(c.every, step),
                "samples": each(c.samples_every, step),
                "save": each(config.checkpoint.every, step),
                "stop": sigterm.asked(step),
                "profile": step in profiled[-1:],
            }
            # Nothing that is not finite is saved or shown; the first step tells at once.
            while len(in_flight) > (0 if any(due.values()) or step == start + 1 else 1):
                log.append(check_finite(*in_flight.popleft(), checkpoints, config))
            if due["log"]:
                numbers = log.flush(step, config.train.batch_size, flops)
                progress.set_postfix_str(f"loss {numbers['train/loss']:.3f}", refresh=False)
            if due["profile"]:
                log.stop_profile()
            if due["save"]:
                checkpoints.save(step, state)
            if due["samples"] and not due["stop"]:
                with sigterm.at_once():
                    sample_sheet(sd, trained(), config, mesh, sheet(step))
                log.restart_clock()
            progress.update()
            if due["stop"] or sigterm.received:
                checkpoints.save(step, state)
                checkpoints.close()
                log.close()
                say(f"SIGTERM: step {step} is saved in {checkpoints.directory}; the same command goes on from there")
                sys.exit(128 + signal.SIGTERM)
    checkpoints.close()

    # ---- the evaluation
    if not config.judge:
        say(f"{workdir} is trained; config.judge is empty: nothing is evaluated")
    elif start == steps and (results := read_results(workdir)):
        say(f"{workdir} is finished: its {steps} steps are trained and evaluated")
        say(table(results))
    else:
        results = evaluate_and_report(sd, trained(), config, mesh, workdir)
        name = lambda r: f"eval/{r['value']}/{r['method']}/{r['split']}/{r['metric']}".replace(" ", "_")
        log.write(steps, {name(r): r["mean"] for r in results})
    log.close()


def check_finite(step: int, metrics: dict, checkpoints, config) -> dict[str, float]:
    """Fetches a step's metrics. Raises FloatingPointError if its loss is not finite."""
    metrics = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(metrics["loss"]):
        checkpoints.wait()
        good = checkpoints.latest_step()
        raise FloatingPointError(
            f"the loss of step {step} is {metrics['loss']}. The last good checkpoint is"
            f" {'none' if good is None else f'step {good} in {checkpoints.directory}'}: lower"
            f" config.train.learning_rate={config.train.learning_rate} or look at the data, and train on from there"
        )
    return metrics


def restore_run(config, workdir, mesh):
    """The frozen StableDiffusion and the ValueEncoder of a run: trained, or config.value_encoder as it is.

    Raises:
        FileNotFoundError: `workdir` has no checkpoint and the config no value encoder.
        ValueError: the config cannot work, or the checkpoint is of another one.
    """
    from livo_jax.checkpoint import Checkpoints
    from livo_jax.workdir import find, recipe

    workdir = find(workdir)
    checkpoints = Checkpoints(workdir)
    trained = checkpoints.latest_step() is not None
    if not trained and not config.value_encoder:
        raise FileNotFoundError(
            f"{checkpoints.directory} has no checkpoint: train first, with the same --workdir, or give a trained value"
            " encoder by --config.value_encoder=DIRECTORY_OR_HUB_ID"
        )
    if trained and config.value_encoder != (start := recipe(workdir)["value_encoder"]):
        raise ValueError(
            f"{workdir} holds a value encoder trained from {start or 'the model'!r}, not from"
            f" {config.value_encoder!r}: to use that as it is, name a new --workdir"
        )
    sd, value_encoder = load_models(config, mesh)
    check_config(config, sd, mesh, judge=False)
    if trained:
        graph, params = split(value_encoder)
        state = checkpoints.restore(state_on(mesh, params, make_optimizer(config), config))
        value_encoder = nnx.merge(graph, trained_params(state))
    return sd, value_encoder
