"""How sure a mean over prompts is, and whether two methods differ: intervals, tests, their correction.

The prompt is the unit: other prompts are what numbers are told of. Of several trainings these are units too.
"""

import functools

import numpy as np

EQUAL = 1e-9  # numbers nearer to each other differ by rounding alone
TAILS = (0.025, 0.975)  # of a 95% interval
PRIOR = 16  # prompts that the sample's skewness is weighed against
MEANS, CORRELATIONS = 500, 40  # points of the posterior's grid
EXACT = 16  # prompts up to which a permutation test has all signs: 65,536


def confidence(per_prompt, *, trials=None, limits=(0, 1)) -> tuple[float, list[float] | None]:
    """The mean over prompts and its 95% interval.

    Args:
        per_prompt: [P] a number of each prompt.
        trials: [P] of how many images (or groups of images) each number is the share, if it is one.
        limits: the least and the highest that a number which is no share can be.

    Returns:
        The mean, and the interval: of shares by `of_shares`; of other numbers by `of_numbers`, cut at the limits, and
        None for one prompt, which tells nothing of others. Where all numbers are 0, or all are 1, and these are the
        limits, there is no spread to go by: each counts as one trial, which varies more than all that lies between.
    """
    per_prompt = np.asarray(per_prompt, float)
    P, mean = len(per_prompt), float(per_prompt.mean())
    at_an_end = tuple(limits) == (0, 1) and any(np.abs(per_prompt - end).max() < EQUAL for end in limits)
    if trials is None and P > 1 and at_an_end:
        per_prompt, trials = np.rint(per_prompt), np.ones(P)
    if trials is not None:
        low, high = of_shares(per_prompt * trials, np.asarray(trials))
    elif P > 1:
        low, high = np.clip(of_numbers(per_prompt), *limits)
    else:
        return mean, None
    return mean, [float(min(low, mean)), float(max(high, mean))]


def of_numbers(per_prompt: np.ndarray) -> tuple[float, float]:
    """The interval of the mean of P numbers, at least 2: Student's t, corrected for skewness (Hall 1992).

    The sample's skewness, whose variance is about 6 / P, is shrunk by P / (P + PRIOR). Without a correction intervals
    of skewed numbers hold too seldom, with all of it those of numbers that crowd at both ends too often
    (benchmarks/coverage.py), and so it is with resampling.
    """
    from scipy.stats import t

    P, mean, deviation = len(per_prompt), per_prompt.mean(), per_prompt.std(ddof=1)
    if deviation < EQUAL * max(1, abs(mean)):
        return mean, mean
    skewness = np.mean((per_prompt - mean) ** 3) / per_prompt.std() ** 3  # scipy.stats.skew takes twenty times as long
    a = skewness * P / (P + PRIOR)
    quantiles = t.ppf(TAILS[::-1], P - 1) / np.sqrt(P)
    if abs(a) > 1e-6:  # at 0 what follows is its limit, the quantiles
        quantiles = 3 / a * (np.cbrt(1 + a * (quantiles - a / (6 * P))) - 1)
    return tuple(mean - deviation * quantiles)


def of_shares(hits: np.ndarray, trials: np.ndarray) -> tuple[float, float]:
    """The interval of a mean share whose rate varies between prompts: of a beta-binomial model's posterior.

    A prompt's rate has a beta distribution of the mean m and the correlation r = 1 / (a + b + 1) of its images; a
    priori m has Jeffreys' beta(1/2, 1/2) and r a beta(1/2, 1). Unlike a spread this tells something where all images
    are hits, or none is; there it begins at that end.

    Args:
        hits: [P] how many of a prompt's `trials`, [P], are hits.
    """
    edges, *_ = _grid()
    kinds, times = np.unique(np.stack([hits, trials]), axis=1, return_counts=True)  # many prompts are alike
    likelihood = sum(n * _log_likelihood(*kind) for kind, n in zip(kinds.T.tolist(), times))
    posterior = np.exp(likelihood - likelihood.max()).sum(1)
    below = np.append(0, np.cumsum(posterior)) / posterior.sum()
    low, high = np.interp(TAILS, below, edges)
    return low if hits.any() else 0.0, high if (hits < trials).any() else 1.0


@functools.cache
def _grid():
    """Cells of equal prior mass: their edges of m, [MEANS + 1], and a and b in them, [MEANS, CORRELATIONS]."""

    def quantiles(u):
        return np.sin(np.pi / 2 * u) ** 2  # of beta(1/2, 1/2)

    mean = quantiles((np.arange(MEANS) + 0.5) / MEANS)[:, None]
    correlation = ((np.arange(CORRELATIONS) + 0.5) / CORRELATIONS) ** 2  # the quantiles of beta(1/2, 1) are squares
    size = 1 / correlation - 1  # a + b
    return quantiles(np.linspace(0, 1, MEANS + 1)), mean * size, (1 - mean) * size


@functools.lru_cache(256)
def _log_likelihood(hits: float, trials: float) -> np.ndarray:
    """Of one prompt's hits in each cell of _grid, but for a constant."""
    from scipy.special import betaln

    _, a, b = _grid()
    return betaln(hits + a, trials - hits + b) - betaln(a, b)


def over_trainings(mean: float, ci95, means) -> list[float]:
    """The 95% interval of a mean over prompts and over trainings of other seeds.

    The half-widths over prompts and over trainings, Student's t, add in quadrature (Zou & Donner 2008: the variance of
    a sum is recovered from the intervals of its parts). benchmarks/coverage.py tells how often it holds.

    Args:
        ci95: over prompts, of the mean over trainings. means: [T] of each training, at least 2.
    """
    from scipy.stats import t

    T = len(means)
    half = t.ppf(TAILS[1], T - 1) * np.std(means, ddof=1) / np.sqrt(T)
    return [float(mean - np.hypot(mean - ci95[0], half)), float(mean + np.hypot(ci95[1] - mean, half))]


def significance_over_trainings(differences, a, b) -> float:
    """The two-sided p-value that two methods have the same mean over prompts and trainings.

    Student's t of the mean difference, whose variance is that over prompts and those over each method's trainings
    together, by Satterthwaite's (1946) degrees of freedom.

    Args:
        differences: [P] of the methods' means over trainings, by prompt, at least 2.
        a, b: the mean over prompts of each training of the two; one number of what was trained once, whose variance is
            not known, or never, which has none.
    """
    from scipy.stats import t

    parts = [(np.var(x, ddof=1) / len(x), len(x) - 1) for x in (differences, a, b) if len(x) > 1]
    mean, variance = float(np.mean(differences)), sum(part for part, _ in parts)
    if variance < EQUAL**2:
        return float(abs(mean) < EQUAL)
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    return float(2 * t.sf(abs(mean) / np.sqrt(variance), freedom))


def significance(a, b, seed: int = 0) -> float:
    """The two-sided p-value of a paired permutation test: swapping a and b, [P], within a prompt changes nothing.

    Equal means with skewed differences are no such case: there it rejects too often.

    All signs of the differences up to EXACT prompts, beyond as many at random. Of n prompts it is at least 2 / 2^n, and
    1 for one.
    """
    difference = np.asarray(a, float) - np.asarray(b, float)
    P, total = len(difference), difference.sum()
    if P < 2 or np.abs(difference).max() < EQUAL:
        return 1.0
    least = np.abs(total) * (1 - EQUAL)  # equal sums may differ in rounding
    extreme = [np.abs(total - 2 * flips @ difference) >= least for flips in _flips(P, seed)]
    return float(np.mean(np.concatenate(extreme)))


def _flips(P: int, seed: int):
    """Which signs change, [n, P] of 0 and 1, in parts of 32 MB at most, the first time none.

    scipy.stats.permutation_test makes samples one by one, which takes twenty times as long.
    """
    if P <= EXACT:
        yield np.arange(2**P)[:, None] >> np.arange(P) & 1
        return
    rng, at_once = np.random.default_rng(seed), max(1, 2**22 // P)
    for start in range(0, 2**EXACT, at_once):
        flips = rng.integers(2, size=(min(at_once, 2**EXACT - start), P), dtype=np.int8)
        flips[0] *= start > 0  # so that p is never 0
        yield flips


def holm(p_values) -> list[float]:
    """The p-values of a family, corrected (Holm 1979): where nothing differs, 5% of families have any below 0.05."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected.tolist()
