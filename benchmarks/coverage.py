"""How often the 95% intervals of livo_jax/evaluation/uncertainty.py hold the mean that numbers were drawn with.

    python -m benchmarks.coverage

No time: 2,000 samples of 8 and of 16 prompts from each distribution, with and without images to be shares of.
"""

import itertools
import math

import numpy as np
from absl import app, flags

from livo_jax.evaluation.uncertainty import confidence, over_trainings, significance_over_trainings

PROMPTS, IMAGES, RATES = (8, 16), (10, 20), (0.005, 0.01, 0.02, 0.05)
TOSSES = 60  # of a fair coin, of which D1 = |heads - tails| / TOSSES is one prompt's


def imbalance(rng, size):
    return np.abs(2 * rng.binomial(TOSSES, 0.5, size) / TOSSES - 1)


NUMBERS = {  # draw(rng, size), and the mean
    "beta(2, 5)": (lambda rng, size: rng.beta(2, 5, size), 2 / 7),
    "beta(0.5, 0.5)": (lambda rng, size: rng.beta(0.5, 0.5, size), 0.5),
    "D1 of binomial(60, 0.5)": (
        imbalance,
        sum(math.comb(TOSSES, k) * abs(2 * k / TOSSES - 1) for k in range(TOSSES + 1)) / 2**TOSSES,
    ),
}
DEVIATIONS = ((0.1, 0.0), (0.1, 0.02), (0.1, 0.05), (0.1, 0.1), (0.02, 0.1))  # over prompts, over trainings
SPREADS = {  # draw(rng, mean, size) -> the rates of prompts
    "one rate": lambda rng, mean, size: np.full(size, mean),
    "uniform": lambda rng, mean, size: rng.uniform(0, 2 * mean, size),
    "beta, correlation 0.1": lambda rng, mean, size: rng.beta(9 * mean, 9 * (1 - mean), size),
    "beta, correlation 0.3": lambda rng, mean, size: rng.beta(7 / 3 * mean, 7 / 3 * (1 - mean), size),
    "half in some prompts": lambda rng, mean, size: 0.5 * (rng.random(size) < 2 * mean),
}


def of_numbers(draw, mean: float, prompts: int, samples: int) -> float:
    """The share of intervals of `samples` samples that hold the mean."""
    drawn = draw(np.random.default_rng(prompts), (samples, prompts))
    ends = np.array([confidence(row)[1] for row in drawn])
    return float(np.mean((ends[:, 0] <= mean) & (mean <= ends[:, 1])))


def of_shares(draw, mean: float, images: int, prompts: int, samples: int) -> float:
    """The same of rates that draw(rng, mean, size) draws, seen in `images` images of each prompt."""
    rng = np.random.default_rng(prompts)
    hits = rng.binomial(images, draw(rng, mean, (samples, prompts)))
    kinds, of = np.unique(np.sort(hits, axis=1), axis=0, return_inverse=True)  # the order of prompts does not matter
    ends = np.array([confidence(row / images, trials=np.full(prompts, images))[1] for row in kinds])[of.ravel()]
    return float(np.mean((ends[:, 0] <= mean) & (mean <= ends[:, 1])))


def of_trainings(deviations: tuple[float, float], trainings: int, samples: int) -> tuple[float, float]:
    """The share of intervals over 16 prompts alone, and over so many trainings too, that hold the mean.

    Each prompt and each training moves the mean of 0 by a normal number of these standard deviations, and each prompt
    of each training by one of 0.05.
    """
    rng, P = np.random.default_rng(trainings), 16
    by_prompt = deviations[0] * rng.normal(size=(samples, P, 1))
    by_training = deviations[1] * rng.normal(size=(samples, 1, trainings))
    held = []
    for numbers in by_prompt + by_training + 0.05 * rng.normal(size=(samples, P, trainings)):
        mean, over_prompts = confidence(numbers.mean(1), limits=(-np.inf, np.inf))
        ends = over_prompts, over_trainings(mean, over_prompts, numbers.mean(0))
        held.append([low <= 0 <= high for low, high in ends])
    return tuple(np.mean(held, axis=0))


def false_differences(deviations: tuple[float, float], trainings: int, samples: int) -> float:
    """How often p is below 0.05 where two methods, drawn as in of_trainings, have the same mean."""
    rng, P, found = np.random.default_rng(trainings), 16, 0
    for _ in range(samples):
        a, b = (
            deviations[0] * rng.normal(size=(P, 1))
            + deviations[1] * rng.normal(size=(1, trainings))
            + 0.05 * rng.normal(size=(P, trainings))
            for _ in "ab"
        )
        found += significance_over_trainings(a.mean(1) - b.mean(1), a.mean(0), b.mean(0)) < 0.05
    return found / samples


def main(_):
    print("| numbers | " + " | ".join(f"{prompts} prompts" for prompts in PROMPTS) + " |\n|---|---|---|")
    for name, (draw, mean) in NUMBERS.items():
        print(f"| {name} | " + " | ".join(f"{of_numbers(draw, mean, P, SAMPLES.value):.3f}" for P in PROMPTS) + " |")
    columns = list(itertools.product(PROMPTS, IMAGES))
    print(
        "\n| mean rate | prompts' rates | "
        + " | ".join(f"{P} x {n}" for P, n in columns)
        + " |\n|---|---|---|---|---|---|"
    )
    for mean, (name, draw) in itertools.product(RATES, SPREADS.items()):
        found = (of_shares(draw, mean, n, P, SAMPLES.value) for P, n in columns)
        print(f"| {mean} | {name} | " + " | ".join(f"{x:.3f}" for x in found) + " |", flush=True)
    print(
        "\n| deviations | prompts alone | of 3 trainings | of 5 | p < 0.05, of 3 | of 10 |\n|---|---|---|---|---|---|"
    )
    for deviations in DEVIATIONS:
        (alone, three), (_, five) = (of_trainings(deviations, T, SAMPLES.value) for T in (3, 5))
        wrong = [false_differences(deviations, T, SAMPLES.value) for T in (3, 10)]
        shown = " | ".join(f"{x:.3f}" for x in (alone, three, five, *wrong))
        print(f"| {deviations[0]}, {deviations[1]} | {shown} |")


if __name__ == "__main__":
    SAMPLES = flags.DEFINE_integer("samples", 2000, "Of each distribution.", lower_bound=1)
    app.run(main)
