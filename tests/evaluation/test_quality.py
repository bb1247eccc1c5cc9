"""Features, distances and scores are those of torch-fidelity, lpips and transformers, with the same weights."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from livo_jax.evaluation import quality
from livo_jax.evaluation.networks.inception import InceptionV3
from livo_jax.evaluation.networks.lpips import LPIPS
from livo_jax.models.weights import one_key, split, to_published
from tests import references
from tests.conftest import relative_error
from tests.judges.test_clip import pictures, published, their_logits  # noqa: F401


@pytest.fixture(scope="module")
def known():
    """What torch-fidelity and lpips computed (tests/references.py)."""
    return load_file(references.FILE)


def file_of(network, folder):
    """A file of weights for a network, those of the references."""
    _, shapes = split(nnx.eval_shape(lambda: network(rngs=one_key())))
    named = to_published(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes))
    file = folder / "weights.safetensors"
    save_arrays(references.weights({name: x.shape for name, x in named.items()}), file)
    return file


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    return file_of(InceptionV3, tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    return file_of(LPIPS, tmp_path_factory.mktemp("lpips"))


@pytest.mark.parametrize("size", references.INCEPTION_SIZES)
def test_inception_features_are_those_of_torch_fidelity(inception, known, size):
    """Of images that are enlarged and that are made smaller."""
    ours = quality.inception(inception)(references.pictures(2, *size))
    features = known[f"inception.features.{size[0]}"]
    assert relative_error(ours.features, features) < 2e-6
    assert relative_error(ours.logits, known[f"inception.logits.{size[0]}"]) < 4e-6
    assert relative_error(features[:1], features[1:]) > 1e-3, "the two images differ by far more than this"


@pytest.mark.parametrize("D", references.WIDTHS)
def test_distances_of_features_are_those_of_torch_fidelity(known, D, monkeypatch):
    """Of more images than features, and of fewer, where covariances are singular."""
    a, b = references.features(D)
    assert quality.frechet_distance(a, b) == pytest.approx(float(known[f"fid.{D}"]), rel=1e-6)
    assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    for name, number in references.KID.items():
        monkeypatch.setattr(quality, name, number)
    assert quality.kernel_distance(a, b) == pytest.approx(float(known[f"kid.{D}"]), rel=1e-9)


def test_inception_score_is_that_of_torch_fidelity(known):
    assert quality.inception_score(references.logits()) == pytest.approx(float(known["isc"]), rel=1e-12)


def test_distances_between_gaussians_by_hand():
    """Equal covariances S, 4 S, and means 3 apart: |m|^2 + tr(S + 4 S - 2 * 2 S)."""
    x = np.random.default_rng(0).normal(0, 1, (50, 5))
    wanted = 5 * 9 + np.trace(np.cov(x.T))
    assert quality.frechet_distance(x - x.mean(0), 2 * (x - x.mean(0)) + 3) == pytest.approx(wanted)


@pytest.mark.parametrize("size", references.LPIPS_SIZES)
def test_distances_are_those_of_lpips(lpips, known, size):
    a, b = np.split(references.pictures(6, *size), 2)
    distance, diversity = quality.lpips(lpips)
    assert relative_error(distance(a, b), known[f"lpips.distance.{size[0]}"]) < 1e-5
    assert float(diversity(a)) == pytest.approx(known[f"lpips.diversity.{size[0]}"].mean(), rel=1e-5)
    np.testing.assert_allclose(distance(a, a), 0, atol=1e-12)


def test_clip_score_is_the_cosine_of_transformers(published):  # noqa: F811
    images, texts = pictures(7, 48, 48), [f"a photo of a {name}" for name in ("cook", "optician", "tailor") * 3][:7]
    from transformers import CLIPModel

    scale = float(CLIPModel.from_pretrained(published).logit_scale.detach().exp())
    cosine = their_logits(published, images, texts).diagonal() / scale
    score, tokenize = quality.clip_score(published)
    ours = quality.in_batches(score, 4, images, tokenize(texts))
    np.testing.assert_allclose(ours, 100 * np.maximum(cosine, 0), rtol=1e-4, atol=1e-4)
    assert (cosine > 0).any()


def test_weights_that_are_not_there_or_of_another_network(tmp_path):
    with pytest.raises(FileNotFoundError, match="lpips.safetensors: no such file"):
        quality.lpips(tmp_path / "lpips.safetensors")
    save_file(
        {"fc.bias": torch.zeros(1008), "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.safetensors"
    )
    with pytest.raises(ValueError, match=r"(?s)torchvision.safetensors.*Mixed_5b.branch1x1.conv.weight.*misshapen fc"):
        quality.inception(tmp_path / "torchvision.safetensors")


def test_small_images_have_no_distance(lpips):
    distance, _ = quality.lpips(lpips)
    with pytest.raises(ValueError, match="31 pixels"):
        distance(*[references.pictures(1, 30, 64)] * 2)
