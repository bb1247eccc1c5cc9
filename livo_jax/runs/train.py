"""Training: train_and_evaluate(config, workdir) repeats the step of step.py; restore_run reads what it left."""

import collections
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from livo_jax import methods, sharding, values
from livo_jax.data.batches import batches
from livo_jax.data.cache import Cache, cache_directory
from livo_jax.data.preferences import Preferences
from livo_jax.evaluation.report import table
from livo_jax.files.directories import find, held, is_remote
from livo_jax.files.modules import read_dtype
from livo_jax.models.weights import split
from livo_jax.processes import ending_together, say
from livo_jax.runs import build_preferences, cache_latents
from livo_jax.runs.check import check_config, check_with_model
from livo_jax.runs.checkpoint import Checkpoints, Termination
from livo_jax.runs.evaluate import evaluate_and_report, read_results, sample_sheet
from livo_jax.runs.log import Log, check_wandb
from livo_jax.runs.restore import load_models, with_update
from livo_jax.runs.workdir import check_shared, claim
from livo_jax.training.step import (
    jit_step,
    learning_rate,
    make_loss,
    make_optimizer,
    make_train_step,
    state_on,
    trained_params,
)


def train_and_evaluate(config, workdir):
    """Trains a value encoder, resuming where `workdir` stopped, then evaluates it.

    The pairs are those of config.data.directory or, where it names none, of workdir/preferences: there they are built
    if there are none yet. So is the cache of latents that config.data.cache wants.

    Leaves config.json, metrics.jsonl, tensorboard/, checkpoints/, samples/ and eval/ in `workdir`. Several processes
    (sharding.join) train together, on a workdir that all of them see. Meanwhile it is kept from other runs.

    Args:
        workdir: a directory, or gs://BUCKET/...

    Raises:
        ValueError, FileNotFoundError: a config, model, dataset or workdir that cannot work, before
            the first step.
        FileExistsError: another process trains, or now evaluates, in the workdir.
        RuntimeError: another process of this run cannot begin, and why.
        FloatingPointError: the loss, its gradients or what they made of the state is not finite; no checkpoint has it.
        OSError: a checkpoint cannot be written.
        SystemExit: after SIGTERM or Ctrl-C, with its step saved; status 143 or 130, as a shell has them.
    """
    workdir = find(workdir)
    with ending_together():
        if is_remote(directory := config.data.directory or workdir / "preferences"):
            raise ValueError(
                f"{directory} is in a bucket, where pairs cannot be read: give a config.data.directory on disk"
            )
        directory = pathlib.Path(directory).expanduser()
        if not config.judge and not directory.exists():
            raise ValueError(
                f"{directory} holds no preference pairs, and without config.judge none can be built:"
                " give config.data.directory, or a judge that reads the axes of config.principles"
            )
        if read_dtype(config.dtype, "config.dtype") == jnp.float16:
            raise ValueError(
                f"config.dtype={config.dtype!r}: small gradients are 0 in float16, and no scale of the loss keeps them:"
                " train in bfloat16 or float32, and draw in float16 if you like"
            )
        check_wandb(config)
    with held(workdir, "trains in"):
        check_shared(workdir)
        _train_and_evaluate(config, workdir, directory)


def _train_and_evaluate(config, workdir, directory: pathlib.Path):
    """That of a workdir that is held, with the pairs of `directory`."""
    # ---- what is given: models, pairs, mesh
    mesh = sharding.make_mesh(**config.mesh)
    with ending_together():
        check_config(config, mesh)
        sd, value_encoder = load_models(config, mesh)
        check_with_model(config, sd)
    checkpoints, steps = Checkpoints(workdir, config.checkpoint.keep), config.train.steps
    start = checkpoints.latest_step() or 0
    if start > steps:
        raise ValueError(
            f"{checkpoints.directory} has step {start}, config.train.steps={steps}: choose as many at least, or another"
            " --workdir"
        )
    with ending_together():
        if jax.process_index() == 0:
            claim(workdir, config)
    # With several processes each draws with its own devices, from a copy that is on no other.
    own = sd if jax.process_count() == 1 else None
    if not config.data.directory and not directory.exists():
        # Pairs must show something: random weights are not what draws them.
        build_preferences.build(config, directory, None if config.random_weights else own)
    with ending_together():
        preferences = Preferences(directory)
        preferences.check_values(values.load_principles(config))
    cache = None
    if config.data.cache:
        place = cache_directory(preferences, workdir, sd, config)
        if not place.exists():
            cache_latents.write(preferences, own or load_models(config, sharding.make_local_mesh())[0], config, place)
        cache = Cache(preferences, sd, config, place)

    # ---- state: from step 0, or where the last checkpoint left it
    of_unet = methods.of_unet(config)
    part = "update" if of_unet else "value_encoder"  # what is trained
    modules = {"unet": sd.unet, "text_encoder": sd.text_encoder, part: value_encoder}
    if not cache:
        modules["vae"] = sd.vae
    graphs, params = {}, {}
    for name, module in modules.items():
        graphs[name], params[name] = split(module)
    tx = make_optimizer(config)
    state, frozen = state_on(mesh, params.pop(part), tx, config, value_encoder.RULES), params
    if start:
        state = checkpoints.restore(state, set_aside=True)
        say(f"resuming {workdir} at step {int(state['step'])}")
    start = int(state["step"])  # of a checkpoint that can be read
    iterator = batches(
        preferences, sd.tokenize, cache, batch_size=config.train.batch_size, image_size=sd.image_size,
        random_flip=config.data.random_flip, seed=config.seed, start=start, principles=values.load_principles(config),
        **{name: config.data[name] for name in ("beside", "attributes", "anchors")},
        concepts=config.method == "concept_ablation", paired=methods.compares_pairs(config),
        reads_prompt=config.value_encoder.reads_prompt,
    )  # fmt: skip

    def trained():
        """The value encoder, or None; and the StableDiffusion whose UNet is trained, or None."""
        module = nnx.merge(graphs[part], trained_params(state))
        return (None, with_update(sd, module)) if of_unet else (module, None)

    # ---- the step, compiled once
    loss = of_unet.make_loss if of_unet else make_loss
    step_fn = make_train_step(graphs, sd.schedule, tx, config, sd.vae.config.scaling_factor, sd.time_ids, loss)
    step_fn = jit_step(step_fn, state, frozen, mesh)

    # ---- the loop: while step k runs, the metrics of step k-1 are fetched and checked
    with ending_together():
        if start < steps and jax.process_index() == 0:
            (workdir / "eval" / "results.json").unlink(missing_ok=True)  # it is of an earlier step
        log = Log(workdir, start, config)
    c, in_flight = config.log, collections.deque()
    profiled = range(start + 3, min(start + 3 + config.profile.steps, steps + 1))  # without what starts up
    bar = tqdm(total=steps, initial=start, desc="train", unit="step", disable=jax.process_index() > 0)
    each = lambda every, step: every and (step % every == 0 or step == steps)
    sheet = lambda step: workdir / "samples" / f"step_{step}.png"

    def settle(left: int):
        """Fetches and checks the metrics of the steps in flight but the last `left`."""
        while len(in_flight) > left:
            log.append(check_finite(*in_flight.popleft(), checkpoints, config))

    with log:
        with bar as progress, Termination(start) as termination:
            if start and each(c.samples_every, start) and not sheet(start).exists():  # the end came while it was drawn
                sample_sheet(sd, *trained(), config, mesh, sheet(start))
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
                    "stop": termination.asked(step),
                    "profile": step in profiled[-1:],
                }
                # Nothing that is not finite is saved or shown; the first step tells at once.
                settle(0 if any(due.values()) or step == start + 1 else 1)
                if due["log"]:
                    numbers = log.flush(step, config.train.batch_size, flops)
                    progress.set_postfix_str(f"loss {numbers['train/loss']:.3f}", refresh=False)
                if due["profile"]:
                    log.stop_profile()
                if due["save"]:
                    checkpoints.save(step, state)
                if due["samples"] and not due["stop"]:
                    with termination.at_once():
                        sample_sheet(sd, *trained(), config, mesh, sheet(step))
                    log.restart_clock()
                progress.update()
                if due["stop"] or termination.received:
                    settle(0)
                    name = termination.signal.name
                    say(f"\n{name}: step {step} is being saved; Ctrl-C ends at once, without it")
                    checkpoints.save(step, state)
                    checkpoints.close()
                    say(f"{name}: step {step} is saved in {checkpoints.directory}; the same command goes on from there")
                    sys.exit(128 + termination.signal)  # as a shell has it
        checkpoints.close()

        # ---- the evaluation
        if not config.judge:
            say(f"{workdir} is trained; config.judge is empty: nothing is evaluated")
        elif start == steps and (results := read_results(workdir)):
            say(f"{workdir} is finished: its {steps} steps are trained and evaluated")
            say(table(results))
        else:
            value_encoder, own = trained()
            with held(workdir / "eval", "evaluates in"):
                results = evaluate_and_report(sd, value_encoder, config, mesh, workdir, own)
            name = lambda r: f"eval/{r['value']}/{r['method']}/{r['split']}/{r['metric']}".replace(" ", "_")
            log.write(steps, {name(r): r["mean"] for r in results})


def check_finite(step: int, metrics: dict, checkpoints, config) -> dict[str, float]:
    """Fetches a step's metrics. Raises FloatingPointError if its loss, or what came of it, is not finite."""
    metrics = {name: float(value) for name, value in metrics.items()}
    names = {
        "loss": f"the loss of step {step}", "grad_norm": f"the norm of the gradients of step {step}",
        "params_norm": f"the norm of the parameters after step {step}",
        "opt_state_norm": f"the norm of the optimizer's state after step {step}",
        "ema_norm": f"the norm of the moving average after step {step}",
    }  # fmt: skip
    wrong = [f"{names[name]} is {metrics[name]}" for name in names if not math.isfinite(metrics.get(name, 0.0))]
    if not wrong:
        return metrics
    checkpoints.wait()
    good = checkpoints.latest_step()
    last = f"The last checkpoint, all of it finite, is step {good} in {checkpoints.directory}"
    raise FloatingPointError(
        f"{', '.join(wrong)}. {'There is no checkpoint' if good is None else last}: the same command meets the same"
        f" batch at step {step}, and ends so again. Look at the pairs, or lower"
        f" config.train.learning_rate={learning_rate(config)} in a new --workdir"
    )
