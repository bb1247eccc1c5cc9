"""Training: the LiVO step, and train_and_evaluate(config, workdir) that repeats it.

The step needs jax, flax and optax alone; what reads and writes files is imported where it is used.
"""

import collections
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from livo_jax import diffusion, losses, sharding
from livo_jax.models.weights import split

# ---------------------------------------------------------------------------- the step


def make_optimizer(config) -> optax.GradientTransformation:
    """AdamW on clipped gradients, after config.train.

    Raises:
        ValueError: an unknown schedule, or a warm-up that is not shorter than the training.
    """
    c = config.train
    if not 0 <= c.warmup_steps < c.steps:
        raise ValueError(
            f"config.train.warmup_steps={c.warmup_steps}: choose 0 to config.train.steps - 1 = {c.steps - 1}"
        )
    if c.schedule == "constant":
        after = optax.constant_schedule(c.learning_rate)
    elif c.schedule == "cosine":
        after = optax.cosine_decay_schedule(c.learning_rate, c.steps - c.warmup_steps)
    else:
        raise ValueError(f"config.train.schedule={c.schedule!r}: choose from constant, cosine")
    warmup = optax.linear_schedule(0.0, c.learning_rate, c.warmup_steps)
    learning_rate = optax.join_schedules([warmup, after], [c.warmup_steps])
    return optax.chain(
        optax.clip_by_global_norm(c.grad_clip),
        optax.adamw(learning_rate, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay),
    )


def init_state(params: dict, tx: optax.GradientTransformation) -> dict:
    """The state of step 0; `params` are the value encoder's, float32."""
    return {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": tx.init(params)}


def make_train_step(graphs: dict, schedule: diffusion.NoiseSchedule, tx, config, scaling_factor: float):
    """The function train_step(state, frozen, batch) -> (state, metrics), to be jitted.

    Args:
        graphs: GraphDefs of value_encoder, text_encoder, unet, vae.
        config: its `loss` (alpha, beta, gamma_1, gamma_2, timesteps, min_snr_gamma) and `seed` are used.
        scaling_factor: of the VAE's latents.

    The step takes `state` (step, params, opt_state), `frozen` (parameters of text_encoder, unet and vae)
    and a batch (prompt_ids, value_prompt_ids [B, L] int32; aligned, violating [B, H, W, 3] in [-1, 1]).
    Its metrics are float32 scalars: loss, those of losses.livo, and grad_norm.
    """
    first, last = config.loss.timesteps
    min_snr_gamma = config.loss.min_snr_gamma
    constants = {name: config.loss[name] for name in ("alpha", "beta", "gamma_1", "gamma_2")}

    def train_step(state, frozen, batch):
        # One base key, folded with the step, split once: no key serves two purposes.
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        key_w, key_l, key_eps, key_t = jax.random.split(key, 4)
        text_encoder, unet, vae = (nnx.merge(graphs[n], frozen[n]) for n in ("text_encoder", "unet", "vae"))

        def encode(images, key):
            mean, logvar = (x.astype(jnp.float32) for x in vae.encode(images))
            return scaling_factor * (mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape))

        z_w, z_l = encode(batch["aligned"], key_w), encode(batch["violating"], key_l)  # [B, h, w, C]
        eps = jax.random.normal(key_eps, z_w.shape)  # shared by w and l, as is t
        t = jax.random.randint(key_t, z_w.shape[:1], first, last)
        twice = lambda x: jnp.concatenate([x, x])  # w and l go through the UNet as one batch
        z, eps, t = jnp.concatenate([z_w, z_l]), twice(eps), twice(t)
        z_t, target = diffusion.add_noise(schedule, z, eps, t), diffusion.target(schedule, z, eps, t)
        c = text_encoder(batch["prompt_ids"]).last_hidden_state  # [B, L, D]

        weight = diffusion.min_snr_weight(schedule, t, min_snr_gamma) if min_snr_gamma else 1.0

        def error(conditioning):
            return jnp.split(weight * losses.denoising_error(unet(z_t, t, twice(conditioning)), target), 2)

        r_w, r_l = error(c)

        def loss(params):
            u = nnx.merge(graphs["value_encoder"], params)(batch["value_prompt_ids"]).pooled  # [B, D]
            policy = jnp.concatenate([u[:, None].astype(c.dtype), c], axis=1)  # [u; c], the value token first
            l_w, l_l = error(policy)
            return losses.livo(l_w, l_l, r_w, r_l, **constants)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {"loss": value, **metrics, "grad_norm": optax.tree.norm(grads)}
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    return train_step


# ---------------------------------------------------------------------------- the run


class Log:
    """metrics.jsonl and TensorBoard of a run, and the averages that go into them."""

    def __init__(self, workdir: pathlib.Path, step: int):
        """Opens the logs at `step`; what an interrupted run wrote past it is dropped."""
        from tensorboardX import SummaryWriter

        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        self.tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        self.window = []
        self.restart_clock()

    def restart_clock(self):
        """Starts timing anew, after something that is no training."""
        self.clock, self.timed = time.perf_counter(), 0

    def append(self, metrics: dict[str, float]):
        self.window.append(metrics)
        self.timed += 1

    def flush(self, step: int, batch_size: int, flops: float | None) -> dict:
        """Writes the averages since the last flush, with the speed; returns them."""
        numbers = {f"train/{name}": float(np.mean([m[name] for m in self.window])) for name in self.window[0]}
        if self.timed:
            seconds = (time.perf_counter() - self.clock) / self.timed
            numbers["train/pairs_per_sec"] = batch_size / seconds
            if flops:
                numbers["train/tflops_per_device"] = flops / seconds / 1e12
        self.write(step, numbers)
        self.window = []
        self.restart_clock()
        return numbers

    def write(self, step: int, numbers: dict):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, number in numbers.items():
            self.tensorboard.add_scalar(name, number, step)

    def close(self):
        self.tensorboard.close()


def check_config(config, sd, mesh):
    """Raises ValueError with everything in the config that would fail later."""
    from livo_jax import judges, values

    problems = []
    first, last = config.loss.timesteps
    if not 0 <= first < last <= sd.schedule.num_timesteps:
        problems.append(f"config.loss.timesteps={first, last}: choose 0 <= first < last <= {sd.schedule.num_timesteps}")
    for path, low in (("train.steps", 1), ("train.batch_size", 1), ("checkpoint.every", 1), ("log.every", 1)):
        section, name = path.split(".")
        if config[section][name] < low:
            problems.append(f"config.{path}={config[section][name]}: choose at least {low}")
    for attempt in (
        lambda: sharding.check_batch_size(mesh, config.train.batch_size, "config.train.batch_size"),
        lambda: sharding.check_batch_size(mesh, config.sampling.batch_size, "config.sampling.batch_size"),
        lambda: make_optimizer(config),
        lambda: diffusion.sampler_table(sd.scheduler_config, config.sampling.sampler, config.sampling.steps),
        lambda: values.load(config.principles),
        lambda: judges.load(config.judge),
    ):
        try:
            attempt()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("the config cannot work:\n  " + "\n  ".join(problems))


def flatten(config: dict) -> dict:
    """Nested dicts as one: {"train.steps": 1200, ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(config, is_leaf=lambda x: not isinstance(x, dict))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def claim(workdir: pathlib.Path, config):
    """Writes config.json, or checks that what is in the workdir was made with the same config.

    Raises:
        ValueError: another config made the pairs or checkpoints here; the differences are listed.
    """
    file = workdir / "config.json"
    free = ("checkpoint", "eval", "log")  # may change between starts: no parameter depends on them
    ours = json.loads(config.to_json())
    if file.exists() and any((workdir / made).exists() for made in ("preferences", "checkpoints")):
        theirs, mine = (
            flatten({k: v for k, v in tree.items() if k not in free}) for tree in (json.loads(file.read_text()), ours)
        )
        differences = [
            f"config.{name}: {theirs.get(name)!r} there, {mine.get(name)!r} now"
            for name in sorted(theirs.keys() | mine.keys())
            if theirs.get(name) != mine.get(name)
        ]
        if differences:
            raise ValueError(f"{workdir} holds a run of another config:\n  " + "\n  ".join(differences))
    workdir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ours, indent=2) + "\n")


def load_models(config):
    """The frozen StableDiffusion of config.model, and the value encoder: its text encoder in float32."""
    from livo_jax.pretrained import StableDiffusion, ValueEncoder

    sd = StableDiffusion.from_pretrained(config.model, jnp.dtype(config.dtype))
    return sd, ValueEncoder.from_pretrained(pathlib.Path(config.model) / "text_encoder")


def train_and_evaluate(config, workdir, build_preferences=None):
    """Trains a value encoder, resuming where `workdir` stopped, then evaluates it.

    Leaves config.json, metrics.jsonl, tensorboard/, checkpoints/, samples/ and eval/ in `workdir`.

    Args:
        build_preferences: build_preferences(config, directory, sd) makes the pairs in
            workdir/preferences where config.data.directory names none and there are none yet.

    Raises:
        ValueError, FileNotFoundError: a config, model, dataset or workdir that cannot work, before
            the first step.
        FloatingPointError: the loss is not finite; the checkpoints are from before it.
    """
    from tqdm import tqdm

    from livo_jax import values as principles
    from livo_jax.checkpoint import Checkpoints
    from livo_jax.data import Preferences, batches
    from livo_jax.evaluate import evaluate_and_report, sample_sheet, table

    workdir = pathlib.Path(workdir)

    # ---- what is given: models, pairs, mesh
    mesh = sharding.make_mesh(**config.mesh)
    sd, value_encoder = load_models(config)
    check_config(config, sd, mesh)
    claim(workdir, config)
    directory = pathlib.Path(config.data.directory or workdir / "preferences")
    if build_preferences and not config.data.directory and not directory.exists():
        build_preferences(config, directory, sd)
    preferences = Preferences(directory)
    preferences.check_values(principles.load(config.principles))

    # ---- state: from step 0, or where the last checkpoint left it
    modules = dict(text_encoder=sd.text_encoder, unet=sd.unet, vae=sd.vae, value_encoder=value_encoder)
    graphs, params = {}, {}
    for name, module in modules.items():
        graphs[name], params[name] = split(module)
    tx = make_optimizer(config)
    state = jax.device_put(init_state(params.pop("value_encoder"), tx), sharding.replicated(mesh))
    frozen = jax.device_put(params, sharding.replicated(mesh))
    iterator = batches(
        preferences, sd.tokenize, batch_size=config.train.batch_size, image_size=sd.image_size,
        random_flip=config.data.random_flip, seed=config.seed,
    )  # fmt: skip
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state, iterator)
        print(f"resuming {workdir} at step {int(state['step'])}")
    start, steps = int(state["step"]), config.train.steps
    trained = lambda: nnx.merge(graphs["value_encoder"], state["params"])

    # ---- the step, compiled once
    step_fn = make_train_step(graphs, sd.schedule, tx, config, sd.vae.config.scaling_factor)
    whole, rows = sharding.replicated(mesh), sharding.over_batch(mesh)
    step_fn = jax.jit(step_fn, in_shardings=(whole, whole, rows), out_shardings=whole, donate_argnums=0)

    # ---- the loop: while step k runs, the metrics of step k-1 are fetched and checked
    c, log, in_flight = config.log, Log(workdir, start), collections.deque()
    with tqdm(total=steps, initial=start, desc="train", unit="step") as progress:
        for step in range(start + 1, steps + 1):
            batch = sharding.global_batch(mesh, next(iterator))
            if step == start + 1:
                step_fn = step_fn.lower(state, frozen, batch).compile()
                flops = (step_fn.cost_analysis() or {}).get("flops")
                log.restart_clock()
            state, metrics = step_fn(state, frozen, batch)
            in_flight.append((step, metrics))
            due = {
                name: step % every == 0 or step == steps
                for name, every in (("log", c.every), ("samples", c.samples_every), ("save", config.checkpoint.every))
            }
            # Nothing that is not finite is saved or shown; the first step tells at once.
            while len(in_flight) > (0 if any(due.values()) or step == start + 1 else 1):
                log.append(check_finite(*in_flight.popleft(), checkpoints, config))
            if due["log"]:
                numbers = log.flush(step, config.train.batch_size, flops)
                progress.set_postfix_str(f"loss {numbers['train/loss']:.3f}", refresh=False)
            if due["save"]:
                checkpoints.save(state, iterator)
            if due["samples"]:
                sample_sheet(sd, trained(), config, mesh, workdir / "samples" / f"step_{step}.png")
                log.restart_clock()
            progress.update()
    checkpoints.close()

    # ---- the evaluation
    if start == steps and (workdir / "eval" / "results.json").exists():
        print(f"{workdir} is finished: its {steps} steps are trained and evaluated")
        print(table(json.loads((workdir / "eval" / "results.json").read_text())))
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
    """The frozen StableDiffusion and the trained ValueEncoder of a run.

    Raises:
        FileNotFoundError: `workdir` has no checkpoint.
    """
    from livo_jax.checkpoint import Checkpoints

    checkpoints = Checkpoints(workdir)
    if checkpoints.latest_step() is None:
        raise FileNotFoundError(f"{checkpoints.directory} has no checkpoint: train first, with the same --workdir")
    sd, value_encoder = load_models(config)
    graph, params = split(value_encoder)
    state = jax.device_put(init_state(params, make_optimizer(config)), sharding.replicated(mesh))
    return sd, nnx.merge(graph, checkpoints.restore(state)["params"])
