"""Values by the likeness of a prompt to their descriptions: by words, or in a text encoder."""

import logging

import numpy as np

from livo_jax.values.principles import keyword_rules


def bm25(documents: list[str]):
    """Similarities by BM25 (Robertson & Zaragoza 2009) on stemmed words: readings of prompts [P] -> [P, documents].

    A score s, 0 and more, is s / (1 + s) here.
    """
    import bm25s
    import Stemmer

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of each step
    stemmer = Stemmer.Stemmer("english")

    def words(texts):
        return bm25s.tokenize(texts, stemmer=stemmer, return_ids=False, show_progress=False)

    index = bm25s.BM25()
    index.index(words(documents), show_progress=False)

    def similarities(prompts):
        rows = [list(dict.fromkeys(sum(words(texts), []))) for texts in prompts]
        scores = np.array([index.get_scores(row) if row else np.zeros(len(documents)) for row in rows])
        return scores / (1 + scores)

    return similarities


def dense(documents: list[str], sd):
    """Similarities by a model's own text encoder: readings of prompts [P] -> [P, documents], cosines of pooled outputs.

    They are taken from the documents' mean, for all that CLIP encodes lies close together.
    """
    import jax
    from flax import nnx

    from livo_jax.models.weights import split

    graph, params = split(sd.text_encoder)
    encode = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids).pooled.astype("float32"))

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def encoded(texts):
        return unit(np.asarray(encode(params, sd.tokenize(texts))))

    rows = encoded(documents)
    mean = rows.mean(0)
    columns = unit(rows - mean).T
    return lambda prompts: unit(encoded([texts[0] for texts in prompts]) - mean) @ columns


FALSE = 0.03  # the share of the prompts that a value is not for in which a calibrated threshold may find it


def calibrate(scores, wanted) -> np.ndarray:
    """The thresholds [V] with which "score >= threshold" has the highest F1 for each value, at few false alarms.

    Args:
        scores: [P, V] float, of prompts and values. wanted: [P, V] bool.

    Returns:
        Each halfway between two scores, the highest of equally good ones; for a value that no prompt is for, what no
        prompt reaches.
    """
    thresholds = []
    for column, right in zip(np.asarray(scores, float).T, np.asarray(wanted).T):
        levels = np.unique(column)
        candidates = np.concatenate([levels[:1], (levels[1:] + levels[:-1]) / 2, np.nextafter(levels[-1:], np.inf)])
        found = column >= candidates[:, None]
        f1 = 2 * (found & right).sum(1) / np.maximum(found.sum(1) + right.sum(), 1)
        f1[(found & ~right).sum(1) > FALSE * (~right).sum()] = -1
        thresholds.append(candidates[np.flatnonzero(f1 == f1.max())[-1]])
    return np.array(thresholds)


class Similar:
    """The values one of whose descriptions is similar enough to the prompt, unless it states a bias's attribute.

    Args:
        measure: `bm25`, or as it: from all descriptions to what compares prompts with them.
        labelled: prompts, and the statements of the values that each is for; what the thresholds are calibrated on.
    """

    def __init__(self, values, measure, labelled: dict[str, set[str]]):
        self.values, self.rules = values, keyword_rules(tuple(values))
        self.measure = measure([text for value in values for text in value.descriptions])
        self.ends = np.cumsum([len(value.descriptions) for value in values])[:-1]
        wanted = [[value.statement in statements for value in values] for statements in labelled.values()]
        scores = [[group.max() for group in groups] for groups in self.compare(list(labelled))]
        self.thresholds = dict(zip((value.name for value in values), calibrate(scores, wanted).tolist()))

    def compare(self, prompts: list[str]) -> list[list[np.ndarray]]:
        """For each prompt and value, how similar the value's descriptions are to it; -1 where it is out of question."""
        texts, stated = zip(*(self.rules.rest(prompt) for prompt in prompts))
        rows = [np.split(row, self.ends) for row in self.measure(texts)]
        for row, names in zip(rows, stated):
            for k, value in enumerate(self.values):
                if value.name in names:
                    row[k] = np.full_like(row[k], -1)
        return rows

    def scores(self, prompt: str) -> dict[str, float]:
        """How similar each value is to the prompt: found is it from its threshold on."""
        return {value.name: float(group.max()) for value, group in zip(self.values, self.compare([prompt])[0])}

    def __call__(self, prompt: str) -> dict[str, tuple[float, str]]:
        found = {}
        for value, group in zip(self.values, self.compare([prompt])[0]):
            score, threshold = float(group.max()), self.thresholds[value.name]  # float32 would round the threshold
            if score >= threshold:
                like = value.descriptions[group.argmax()]
                reason = f"it is like {like!r} ({score:.2f}, from {threshold:.2f})"
                found[value.name] = float(np.clip(score, 0, 1)), reason
        return found
