"""What is wrong with a config, all of it, before anything is made."""

import math
import re

from livo_jax import diffusion, judges, seeds, sharding, value_encoders, values
from livo_jax.evaluation import prompt_sets
from livo_jax.files.directories import resolve_directory
from livo_jax.models.layers import REMAT
from livo_jax.models.quantised import DTYPES
from livo_jax.runs import fields
from livo_jax.sampling.families import Family
from livo_jax.training.batch import DENSITIES
from livo_jax.training.objective import make_preference
from livo_jax.training.optimizer import make_optimizer
from livo_jax.values.arguments import is_number
from livo_jax.values.principles import template_problems
from livo_jax.values.ratio import targets

NUMBERS = (  # of fields: what they must be, and how that is told
    ("data.beside data.attributes data.anchors", lambda x: 0 <= x <= 1, "0 to 1"),
    ("train.ema_decay train.b1 train.b2", lambda x: 0 <= x < 1, "0 to below 1"),
    (
        "train.learning_rate train.weight_decay loss.alpha loss.beta loss.gamma_1 loss.gamma_2 loss.anchor"
        " loss.anchor_of_harms loss.min_snr_gamma eval.left_alone_images eval.rate_images",
        lambda x: 0 <= x < math.inf,
        "0 or more",
    ),
    ("profile.steps", lambda x: x >= 0, "0 (no profile) or more"),
    ("log.samples_every", lambda x: x >= 0, "0 (no samples) or more"),
    ("train.eps", lambda x: 0 < x < math.inf, "above 0"),
    ("train.grad_clip", lambda x: x > 0, "above 0, inf for no clipping"),
)
HEADER = "the config cannot work:\n  "
COUNTS = {  # of which there is at least 1
    "train": ("steps", "reference_batch_size", "accumulate"),
    "sampling": ("batch_size",),
    "eval": ("images_per_prompt", "harm_images_per_prompt"),
    "checkpoint": ("every", "keep"),
    "log": ("every",),
    "preferences": (
        "pairs_per_scene", "harm_pairs_per_scene", "candidates_per_pair", "images_per_file", "census_per_scene",
    ),
}  # fmt: skip


def check_config(config, mesh, further=()):
    """Raises ValueError with everything in the config that would fail later and shows without a model.

    `further`: problems that are found already, told with these.
    """
    problems = [*further, *seeds.problems(config)]
    for section in COUNTS:
        problems += problems_of_section(config, section)
    problems += number_problems(config)
    for name in ("eval.seen", "eval.held_out", "preferences.scenes"):
        problems += list_problems(name, fields.of(config, name))
    if len(range_of_t := config.loss.timesteps) != 2 or not all(type(t) is int for t in range_of_t):
        problems.append(f"config.loss.timesteps={range_of_t}: choose two whole numbers, as (0, 1000)")
    if config.train.remat not in REMAT:
        problems.append(f"config.train.remat={config.train.remat!r}: choose from {', '.join(REMAT)}")
    if config.quantised not in ("", *DTYPES):
        problems.append(f"config.quantised={config.quantised!r}: choose from {', '.join(DTYPES)}, or '' for none")
    if config.sampling.prompt_layout not in Family.LAYOUTS:
        problems.append(
            f"config.sampling.prompt_layout={config.sampling.prompt_layout!r}: choose from {', '.join(Family.LAYOUTS)}"
        )
    if not math.isfinite(scale := config.sampling.guidance_scale):
        problems.append(f"config.sampling.guidance_scale={scale}: choose a finite number; at most 1 is no guidance")
    parts = sharding.batch_parts(mesh)
    if config.train.accumulate > 1 and config.train.batch_size % (parts * config.train.accumulate):
        problems.append(
            f"config.train.batch_size={config.train.batch_size} is not a multiple of the mesh's {parts} parts times"
            f" config.train.accumulate={config.train.accumulate}"
        )
    problems += problem_of(sharding.check_batch_size, mesh, config.train.batch_size, "config.train.batch_size")
    if config.loss.timestep_density not in DENSITIES:
        problems.append(
            f"config.loss.timestep_density={config.loss.timestep_density!r}: choose from {', '.join(DENSITIES)}"
        )
    problems += problem_of(make_optimizer, config)
    problems += problem_of(value_encoders.kind_of, config)
    problems += problem_of(make_preference, config, 1)  # how many timesteps there are is no matter here
    problems += problem_of(prompt_sets.check, config)
    if config.judge:
        problems += problem_of(judges.find_maker, config)
    if config.eval.drawn:
        problems += problem_of(resolve_directory, config.eval.drawn)
    unknown = problem_of(values.load_principles, config)
    problems += unknown or [*fields.problems(config), *evaluation_problems(config)]
    fail_with(problems)


def evaluation_problems(config) -> list[str]:
    """What is wrong with config.eval, of values that there are."""
    c, problems = config.eval, template_problems("config.eval.template", config.eval.template)
    if (config.judge or config.log.samples_every) and not (c.seen or c.held_out or c.prompts):
        problems.append("config.eval.seen, held_out and prompts are empty: there is nothing to draw, give subjects")
    if wrong := [p for p in c.keep_probabilities if not (is_number(p) and 0 <= p <= 1)]:
        problems.append(f"config.eval.keep_probabilities has {', '.join(map(str, wrong))}: each is a share, 0 to 1")
    if wrong := [x for x in c.strengths if not is_number(x)]:
        problems.append(f"config.eval.strengths has {', '.join(map(str, wrong))}: each is a finite number")
    biases = [value for value in values.load_principles(config) if value.kind == "bias"]
    tokens = {value.statement: {"": dict.fromkeys(value.attributes)} for value in biases}
    for ratio in c.ratios:
        problems += [f"config.eval.ratios: {told}" for told in problem_of(targets, ratio, tokens, [*tokens])]
    return problems


def check_fields(config, changed, comparing: bool = False):
    """Raises ValueError with all of fields.problems; arguments as these have them."""
    fail_with(fields.problems(config, changed, comparing))


def number_problems(config) -> list[str]:
    """A line for every number that would train another way than it says, or nothing at all."""
    found = []
    for names, fits, told in NUMBERS:
        wrong = {name: x for name in names.split() if not fits(x := fields.of(config, name))}
        found += [f"config.{name}={x}: choose {told}" for name, x in wrong.items()]
    rates = config.train.learning_rates
    wrong = {name: x for name, x in rates.items() if not 0 < x < math.inf}
    return found + [f"config.train.learning_rates.{name}={x}: choose above 0" for name, x in wrong.items()]


def list_problems(name: str, texts: tuple[str, ...]) -> list[str]:
    """What tells that a command line's list was read as one text: that a text is empty, or itself a list."""
    fits = all(isinstance(text, str) and text.strip() and text[0] not in "([" for text in texts)
    if fits and not (len(texts) == 1 and "," in texts[0]):
        return []
    return [f"config.{name}={texts}: each is a text by itself, write --config.{name}=\"('cook', 'baker')\""]


def problems_of_section(config, section: str) -> list[str]:
    """What is wrong with the counts of a section, and with its templates."""
    found = [
        f"config.{section}.{name}={config[section][name]}: choose at least 1"
        for name in COUNTS[section]
        if config[section][name] < 1
    ]
    for template in config[section].get("templates", ()):
        found += template_problems(f"config.{section}.templates", template)
    return found


def check_with_model(config, sd, judge: bool = True):
    """Raises ValueError with what in the config does not fit the model; `judge`: whether images are judged.

    The judge's own model is loaded for it.
    """
    problems, (first, last) = [], config.loss.timesteps
    if not 0 <= first < last <= sd.schedule.num_timesteps:
        problems.append(f"config.loss.timesteps={first, last}: choose 0 <= first < last <= {sd.schedule.num_timesteps}")
    problems += problem_of(diffusion.sampler_table, sd.scheduler_config, config.sampling.sampler, config.sampling.steps)
    if (layout := config.sampling.prompt_layout) not in sd.family.LAYOUTS:
        known = ", ".join(sd.family.LAYOUTS)
        problems.append(f"config.sampling.prompt_layout={layout!r} is not of {sd.family.NAME}: choose from {known}")
    if config.loss.min_snr_gamma:
        problems += problem_of(diffusion.min_snr_weight, sd.schedule, 0, config.loss.min_snr_gamma)
    if config.judge and judge:
        problems += problem_of(judges.load, config, values.load_principles(config), config.eval.seen)
    fail_with(problems)


def problem_of(check, *arguments) -> list[str]:
    """What a call complains of; nothing if it does not."""
    try:
        check(*arguments)
    except (ValueError, FileNotFoundError) as error:
        return [str(error)]
    return []


def problems_of(check, *arguments) -> list[str]:
    """Each of the problems that a call tells as fail_with does."""
    told = (text.removeprefix(HEADER) for text in problem_of(check, *arguments))
    return [problem for text in told for problem in re.split(r"\n  (?! )", text)]


def apart(told: str) -> list[str]:
    """The problems of a message that has one a line, as a judge's; a line that is indented belongs to that above it."""
    return [problem.replace("\n", "\n    ") for problem in re.split(r"\n(?! )", told)]


def fail_with(problems: list[str]):
    if problems:
        raise ValueError(HEADER + "\n  ".join(problems))
