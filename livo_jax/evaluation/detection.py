"""How well values are found in prompts: shares with intervals, curves over a threshold, calibration."""

import numpy as np

from livo_jax.evaluation.uncertainty import TAILS, confidence

RESAMPLES = 2000  # of the bootstrap of macro-F1
BINS = 10  # of scores, for the calibration


def share(hits) -> tuple[float, list[float]] | None:
    """The share of hits among [n] bool and its 95% interval, of Jeffreys' posterior; None of nothing."""
    hits = np.asarray(hits, float)
    return confidence(hits, trials=np.ones(len(hits))) if len(hits) else None


def macro_f1(wanted: np.ndarray, found: np.ndarray) -> tuple[float, list[float]] | None:
    """The mean F1 of the values that some prompt is for, and its 95% interval: percentiles of resampled prompts.

    Args:
        wanted, found: [P, V] bool.
    """
    known = wanted.any(0)
    if not known.any():
        return None
    answers = np.concatenate([wanted[:, known], found[:, known]], axis=1)
    kinds, times = np.unique(answers, axis=0, return_counts=True)  # many prompts are answered alike
    right, answered = np.split(kinds, 2, axis=1)
    draws = np.random.default_rng(0).multinomial(len(answers), times / len(answers), RESAMPLES)

    def mean_f1(counts):
        either = counts @ (right.astype(int) + answered)
        f1 = 2 * (counts @ (right & answered)) / np.maximum(either, 1)
        return f1.sum(-1) / np.maximum((either > 0).sum(-1), 1)  # a value that a draw lacks has no F1 in it

    return float(mean_f1(times)), np.quantile(mean_f1(draws), TAILS).tolist()


def measure(wanted, found) -> dict[str, tuple[float, list[float]] | None]:
    """What answers are worth, each figure with its 95% interval, None where there is nothing that it is of.

    Args:
        wanted: [P, V] bool, the values that each prompt is for. found: [P, V] bool, those that were found.

    Returns:
        recall: of the values to be found. precision: of those that were found. macro_f1: the mean over the values of
        their F1. over_trigger: the share of the prompts for no value in which one was found.
    """
    wanted, found = np.asarray(wanted, bool), np.asarray(found, bool)
    return {
        "recall": share(found[wanted]),
        "precision": share(wanted[found]),
        "macro_f1": macro_f1(wanted, found),
        "over_trigger": share(found[~wanted.any(1)].any(1)),
    }


def curves(scores, wanted) -> dict[str, np.ndarray]:
    """What each threshold comes to, from the highest score down: a value is found from the threshold on.

    Args:
        scores: [P] float. wanted: [P] bool, with some of each.

    Returns:
        threshold, recall, false_positives (a share of what is not wanted) and precision, each [T].
    """
    scores, wanted = np.asarray(scores, float), np.asarray(wanted, bool)
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores are found together
    hits, found = np.cumsum(wanted[order])[last], last + 1
    return {
        "threshold": scores[order][last],
        "recall": hits / wanted.sum(),
        "false_positives": (found - hits) / (~wanted).sum(),
        "precision": hits / found,
    }


def areas(points: dict[str, np.ndarray]) -> tuple[float, float]:
    """The area under the ROC curve, and the average precision, of `curves`."""
    recall, false = (np.append(0, points[name]) for name in ("recall", "false_positives"))
    return float(np.trapezoid(recall, false)), float(np.diff(recall) @ points["precision"])


def calibration(scores, wanted) -> tuple[np.ndarray, float]:
    """Whether a score is the share of the prompts with this score that the value is for.

    Args:
        scores: [P] float, 0 to 1. wanted: [P] bool.

    Returns:
        For each tenth of the scores that occurs, the mean score, the share, and the number of prompts, [bins, 3]; and
        the expected calibration error: the mean distance of the first two, weighed by the third (Naeini et al. 2015).
    """
    scores, wanted = np.asarray(scores, float), np.asarray(wanted, bool)
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    rows = [(scores[bins == k].mean(), wanted[bins == k].mean(), (bins == k).sum()) for k in np.unique(bins)]
    mean, of_them, number = np.array(rows).T
    return np.array(rows), float(np.abs(mean - of_them) @ number / number.sum())
