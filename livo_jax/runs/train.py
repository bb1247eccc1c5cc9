"""Training: train_and_evaluate(config, workdir) repeats the step of step.py; restore_run reads what it left."""

import collections
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
from tqdm import tqdm

from livo_jax import methods, sharding, values
from livo_jax.data.batches import batches
from livo_jax.data.cache import Cache, cache_directory
from livo_jax.data.preferences import Preferences
from livo_jax.evaluation.report import table
from livo_jax.files.directories import held, is_remote, resolve_directory, write_json
from livo_jax.files.modules import read_dtype
from livo_jax.processes import ending_together, say
from livo_jax.retrieval.retriever import run_files
from livo_jax.runs import build_preferences, cache_latents
from livo_jax.runs.attacked_pairs import read_found
from livo_jax.runs.check import check_config, check_with_model, problem_of
from livo_jax.runs.checkpoint import Checkpoints, Termination
from livo_jax.runs.evaluate import evaluate_and_report, read_results, sample_sheet
from livo_jax.runs.fields import of
from livo_jax.runs.gates import check_anchors, measure
from livo_jax.runs.log import Log, check_wandb
from livo_jax.runs.restore import load_base, load_models
from livo_jax.runs.workdir import check_shared, claim, read_gates, recipe
from livo_jax.training.objective import split_models
from livo_jax.training.optimizer import learning_rate, make_optimizer
from livo_jax.training.step import jit_step, make_train_step, norms, state_on, trained_params
from livo_jax.value_encoders.gates import as_json


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
    workdir = resolve_directory(workdir)
    directory = config.data.directory or workdir / "preferences"
    mesh = sharding.make_mesh(**config.mesh)
    with ending_together():
        check_config(config, mesh, problems_of_training(config, workdir, directory))
    with held(workdir, "trains in"):
        check_shared(workdir)
        _train_and_evaluate(config, workdir, pathlib.Path(directory).expanduser(), mesh)


def problems_of_training(config, workdir, directory) -> list[str]:
    """What stands in the way of training alone, with the pairs of `directory`, and shows without a model."""
    problems = problem_of(check_wandb, config)
    if is_remote(directory):
        problems.append(f"{directory} is in a bucket, where pairs cannot be read: give a config.data.directory on disk")
    elif not pathlib.Path(directory).expanduser().exists():
        problems += problem_of(read_found, config)
        if not config.judge:
            problems.append(
                f"{directory} holds no preference pairs, and without config.judge none can be built:"
                " give config.data.directory, or a judge that reads the axes of config.principles"
            )
    if config.eval.auto:
        problems += problem_of(lambda: run_files(workdir, values.load_principles(config)))
    if config.sampling.gated and methods.make_method(config).HAS_TOKENS:
        problems += [
            f"config.sampling.gated=True: what a value leaves alone is learned of anchors, set config.{name} above 0"
            for name in ("data.anchors", "loss.anchor")
            if not of(config, name)
        ]
    if unknown := problem_of(read_dtype, config.dtype, "config.dtype"):
        return problems + unknown
    if read_dtype(config.dtype) == jnp.float16:
        problems.append(
            f"config.dtype={config.dtype!r}: small gradients are 0 in float16, and no scale of the loss keeps them:"
            " train in bfloat16 or float32, and draw in float16 if you like"
        )
    return problems


def _train_and_evaluate(config, workdir, directory: pathlib.Path, mesh):
    """That of a workdir that is held, with the pairs of `directory`."""
    # ---- what is given: models, pairs
    with ending_together():
        sd, module = load_models(config, mesh)
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
            drop_results_of_others(config, workdir)
            claim(workdir, config)
    preferences, cache = open_pairs(config, workdir, directory, sd)

    # ---- state: from step 0, or where the last checkpoint left it
    method, tx = methods.make_method(config), make_optimizer(config)
    networks, params, frozen = split_models(sd, module, with_vae=not cache)
    state = state_on(mesh, params, tx, config, module.RULES)
    if start:
        state = checkpoints.restore(state, set_aside=True)
        say(f"resuming {workdir} at step {int(state['step'])}")
    start = int(state["step"])  # of a checkpoint that can be read
    reading = dict(
        batch_size=config.train.batch_size, image_size=sd.image_size, random_flip=config.data.random_flip,
        seed=config.seed, principles=values.load_principles(config),
        address=getattr(module, "text", values.principles.value_prompt),
    )  # fmt: skip
    gated = config.sampling.gated and method.HAS_TOKENS
    if gated and not read_gates(workdir):
        with ending_together():
            check_anchors(preferences, sd.tokenize, cache, **reading)
    iterator = batches(
        preferences, sd.tokenize, cache, **reading, start=start, concepts=method.CONCEPTS, paired=method.compares_pairs,
        **{name: config.data[name] for name in ("beside", "attributes", "anchors")},
    )  # fmt: skip

    def models() -> methods.Models:
        """As they are trained now."""
        return method.models(sd, networks.merge("trained", trained_params(state)))

    def gates() -> tuple:
        """Of the value encoder as it is trained now: measured, and kept, where they were not."""
        if not (found := read_gates(workdir)):
            say("measuring gates: how far each value moves what it is for, and what it should leave alone")
            found = measure(
                networks, trained_params(state), frozen, mesh, preferences, sd.tokenize, cache,
                **reading | {"batch_size": config.train.batch_size // config.train.accumulate},
            )  # fmt: skip
            with ending_together():
                if jax.process_index() == 0:
                    (workdir / "eval").mkdir(exist_ok=True)
                    write_json(workdir / "eval" / "gates.json", as_json(found))
        return found

    # ---- the step, compiled once
    step_fn = make_train_step(networks, tx, config, method.make_loss(networks))
    step_fn = jit_step(step_fn, state, frozen, mesh)
    read_norms = jax.jit(norms, out_shardings=sharding.replicated(mesh))

    # ---- the loop: while step k runs, the metrics of step k-1 are fetched and checked
    with ending_together():
        if start < steps and jax.process_index() == 0:
            drop(workdir, "results.json", "rates.json", "gates.json")  # they are of an earlier step
        log = Log(workdir, start, config)
    in_flight = collections.deque()
    profiled = range(start + 3, min(start + 3 + config.profile.steps, steps + 1))  # without what starts up
    bar = tqdm(total=steps, initial=start, desc="train", unit="step", disable=jax.process_index() > 0)

    def is_due(every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == steps)

    def settle(left: int):
        """Fetches and checks the metrics of the steps in flight but the last `left`."""
        while len(in_flight) > left:
            log.append(check_finite(*in_flight.popleft(), checkpoints, config))

    def show(step: int):
        """Writes the sample sheet of a step."""
        sample_sheet(models(), config, mesh, sheet_of(workdir, step))

    with log:
        with bar as progress, Termination(start) as termination:
            # The end may have come while the sheet was drawn.
            if start and is_due(config.log.samples_every, start) and not sheet_of(workdir, start).exists():
                show(start)
            for step in range(start + 1, steps + 1):
                batch = sharding.global_batch(mesh, log.next(iterator))
                if step == start + 1:
                    step_fn = step_fn.lower(state, frozen, batch).compile()
                    # Of one micro-batch: the analysis counts the body of a loop once.
                    flops = (step_fn.cost_analysis() or {}).get("flops", 0.0) * config.train.accumulate
                    read_norms = read_norms.lower(state).compile()
                    log.restart_clock()
                if step in profiled[:1]:
                    log.start_profile()
                state, metrics = step_fn(state, frozen, batch)
                in_flight.append((step, metrics))
                logs, shows = is_due(config.log.every, step), is_due(config.log.samples_every, step)
                saves, stops = is_due(config.checkpoint.every, step), termination.asked(step)
                ends_profile = step in profiled[-1:]
                # Nothing that is not finite is saved or shown; the first step tells at once.
                at_once = step == start + 1 or logs or shows or saves or stops or ends_profile
                settle(0 if at_once else 1)
                if ends_profile:
                    log.stop_profile()
                if at_once:
                    of_state = check_finite(step, read_norms(state), checkpoints, config)
                if logs:
                    numbers = log.flush(step, config.train.batch_size, flops, of_state)
                    progress.set_postfix_str(f"loss {numbers['train/loss']:.3f}", refresh=False)
                if saves:
                    checkpoints.save(step, state)
                if shows and not stops:
                    with termination.at_once():
                        show(step)
                    log.restart_clock()
                progress.update()
                if stops or termination.received:  # the signal may have come while settle waited
                    settle(0)
                    check_finite(step, read_norms(state), checkpoints, config)
                    save_and_exit(termination.signal, step, state, checkpoints)
        checkpoints.close()

        # ---- the evaluation
        trained = models()
        if gated:
            trained.value_encoder.gates = gates()
        if not config.judge:
            say(f"{workdir} is trained; config.judge is empty: nothing is evaluated")
        elif start == steps and (results := read_results(workdir)):
            say(f"{workdir} is finished: its {steps} steps are trained and evaluated")
            say(table(results))
        else:
            with held(workdir / "eval", "evaluates in"):
                results = evaluate_and_report(trained, config, mesh, workdir)
            log.write(steps, {metric_name(row): row["mean"] for row in results})


def drop_results_of_others(config, workdir):
    """Removes the results of images whose values were gated where they are not now, or the other way round."""
    before = recipe(workdir) or {}
    if before.get("sampling", {}).get("gated", False) != config.sampling.gated:
        drop(workdir, "results.json", "rates.json")


def drop(workdir, *names: str):
    """Removes files of eval/ that are there."""
    for name in names:
        (workdir / "eval" / name).unlink(missing_ok=True)


def open_pairs(config, workdir, directory: pathlib.Path, sd) -> tuple[Preferences, Cache | None]:
    """The pairs of a directory, and their cache where config.data.cache wants one: what is not there is made."""
    # With several processes each draws with its own devices, from a copy that is on no other.
    own = sd if jax.process_count() == 1 else None
    if not config.data.directory and not directory.exists():
        # Pairs must show something: random weights are not what draws them.
        build_preferences.build(config, directory, None if config.random_weights else own)
    with ending_together():
        preferences = Preferences(directory)
        preferences.check_values(values.load_principles(config))
    if not config.data.cache:
        return preferences, None
    place = cache_directory(preferences, workdir, sd, config)
    if not place.exists():
        cache_latents.write(preferences, own or load_base(config, sharding.make_local_mesh()), config, place)
    return preferences, Cache(preferences, sd, config, place)


def sheet_of(workdir, step: int) -> pathlib.Path:
    return workdir / "samples" / f"step_{step}.png"


def metric_name(row: dict) -> str:
    """The name of a result among the metrics of a run."""
    return f"eval/{row['value']}/{row['method']}/{row['split']}/{row['metric']}".replace(" ", "_")


def save_and_exit(signal, step: int, state: dict, checkpoints: Checkpoints):
    """Saves a step and ends with the status that a shell has for the signal."""
    say(f"\n{signal.name}: step {step} is being saved; Ctrl-C ends at once, without it")
    checkpoints.save(step, state)
    checkpoints.close()
    say(f"{signal.name}: step {step} is saved in {checkpoints.directory}; the same command goes on from there")
    sys.exit(128 + signal)


def check_finite(step: int, metrics: dict, checkpoints, config) -> dict[str, float]:
    """Fetches metrics of a step. Raises FloatingPointError if its loss, or what came of it, is not finite."""
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
