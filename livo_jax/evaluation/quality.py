"""How good images are: FID, KID and Inception Score, CLIPScore, LPIPS and diversity; their statistics in float64.

The networks' weights are safetensors files, made once of what their authors publish:

    import lpips, torch, torch_fidelity  # with pip install torch-fidelity lpips
    from safetensors.torch import save_file, save_model

    url = torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3
    weights = torch.hub.load_state_dict_from_url(url, weights_only=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, "inception.safetensors")
    save_model(lpips.LPIPS(net="alex"), "lpips.safetensors")
"""

import pathlib

import jax
import numpy as np
from flax import nnx

from livo_jax.evaluation.networks.inception import InceptionV3
from livo_jax.evaluation.networks.lpips import LEAST, LPIPS
from livo_jax.files.repositories import open_tensors
from livo_jax.judges import clip
from livo_jax.models.clip import unit
from livo_jax.models.weights import from_published, one_key, split

KID_SUBSETS, KID_SUBSET_SIZE, SPLITS = 100, 1000, 10  # torch-fidelity's, and the papers'
SEED = 2020  # torch-fidelity's, of KID's subsets and the Inception Score's splits, which NumPy's old generator draws


# ---------------------------------------------------------------------------- networks


def load_network(network, file) -> tuple[nnx.GraphDef, dict]:
    """InceptionV3 or LPIPS with the weights of a safetensors file, as `split` has it.

    Raises:
        FileNotFoundError: there is no such file; the message says how it is made.
        ValueError: it is damaged or of another network; the message names it.
    """
    if not pathlib.Path(file).is_file():
        raise FileNotFoundError(
            f"{file}: no such file. The docstring of livo_jax/evaluation/quality.py has the lines that make it"
        )
    graph, abstract = split(nnx.eval_shape(lambda: network(rngs=one_key())))
    try:
        return graph, from_published(open_tensors([pathlib.Path(file)]), abstract)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def in_batches(function, batch_size: int, *columns):
    """function(*columns) of rows that do not depend on each other, `batch_size` at once.

    Args:
        function: of arrays [batch_size, ...], to a tree of such arrays: one size is compiled.
        columns: arrays, or what has a length and gives one when it is sliced, so that all need not be in memory.
    """
    results = []
    for start in range(0, len(columns[0]), batch_size):
        batch = [np.asarray(column[start : start + batch_size]) for column in columns]
        n = len(batch[0])
        whole = [np.concatenate([rows, np.repeat(rows[-1:], batch_size - n, axis=0)]) for rows in batch]
        results.append(jax.tree.map(lambda x, n=n: np.asarray(x)[:n], function(*whole)))
    return jax.tree.map(lambda *x: np.concatenate(x), *results)


def inception(file):
    """The function features(images [B, H, W, 3] uint8) -> InceptionOutput, of weights as `load_network` takes them."""
    graph, params = load_network(InceptionV3, file)
    compute = jax.jit(lambda params, images: nnx.merge(graph, params)(images))
    return lambda images: compute(params, images)


def lpips(file):
    """The functions distance(a, b), [B] of images [B, H, W, 3] uint8, and diversity(images), their mean over all pairs.

    The weights are those that `load_network` takes. Images of fewer than LEAST pixels raise ValueError.
    """
    graph, params = load_network(LPIPS, file)
    distance = jax.jit(lambda params, a, b: nnx.merge(graph, params)(a, b))
    diversity = jax.jit(lambda params, images: nnx.merge(graph, params).diversity(images))

    def checked(function, *images):
        if min(images[0].shape[1:3]) < LEAST:
            raise ValueError(f"LPIPS needs images of {LEAST} pixels and more, not {images[0].shape[1:3]}")
        return function(params, *images)

    return lambda a, b: checked(distance, a, b), lambda images: checked(diversity, images)


def clip_score(path_or_hub_id):
    """The function score(images [B, H, W, 3] uint8, ids [B, L]) -> [B], and tokenize(prompts) -> ids.

    CLIPScore (Hessel et al. 2021) is the cosine of an image and its prompt, 0 where it is negative, times 100. Errors
    as judges.clip.published has them.
    """
    model, tokenize, preprocess = clip.published(path_or_hub_id)
    graph, params = split(model)

    @jax.jit
    def compute(params, pixels, ids):
        model = nnx.merge(graph, params)
        cosine = (unit(model.image_features(pixels)) * unit(model.text_features(ids))).sum(-1)
        return 100 * jax.numpy.maximum(cosine, 0)

    return lambda images, ids: compute(params, preprocess(images), ids), tokenize


# ---------------------------------------------------------------------------- statistics of features


def frechet_distance(a, b) -> float:
    """FID (Heusel et al. 2017) of features [N, D] and [M, D], N and M at least 2."""
    from scipy.linalg import svdvals

    mean, root = [], []  # root: [min(N, D), D] whose square root.T @ root is the covariance
    for x in (np.asarray(a, np.float64), np.asarray(b, np.float64)):
        mean.append(x.mean(0))
        root.append(np.linalg.qr((x - mean[-1]) / np.sqrt(len(x) - 1), mode="r"))
    # The trace of the root of the product of the covariances, without a root of a matrix that is all but singular.
    cross = svdvals(root[0] @ root[1].T).sum()
    return float(((mean[0] - mean[1]) ** 2).sum() + sum((r**2).sum() for r in root) - 2 * cross)


def kernel_distance(a, b) -> float:
    """KID (Binkowski et al. 2018) of features [N, D] and [M, D], N and M at least 2.

    The mean over KID_SUBSETS draws of KID_SUBSET_SIZE images of each, or as many as both have.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    size = min(KID_SUBSET_SIZE, len(a), len(b))

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_within(x):
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (size * (size - 1))  # of pairs of two images: the diagonal is of one

    rng = np.random.RandomState(SEED)  # noqa: NPY002
    draws = ((a[rng.choice(len(a), size, False)], b[rng.choice(len(b), size, False)]) for _ in range(KID_SUBSETS))
    return float(np.mean([mean_within(x) + mean_within(y) - 2 * kernel(x, y).mean() for x, y in draws]))


def inception_score(logits) -> float:
    """The Inception Score (Salimans et al. 2016) of logits [N, K]: the mean over SPLITS parts of the images."""
    from scipy.special import log_softmax

    order = np.random.RandomState(SEED).permutation(len(logits))  # noqa: NPY002
    log_p = log_softmax(np.asarray(logits, np.float64)[order], axis=1)
    N, splits = len(log_p), min(SPLITS, len(log_p))
    parts = [log_p[i * N // splits : (i + 1) * N // splits] for i in range(splits)]
    scores = []
    for part in parts:
        p = np.exp(part)
        divergence = (p * (part - np.log(p.mean(0)))).sum(1)  # of each image's classes from those of all
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))
