"""Features, distances and scores are those of torch-fidelity, lpips and transformers, with the same weights.

torch-fidelity and lpips ask for torchvision, whose wheels on PyPI do not go with the CPU build of torch. What is
compared here does not use it:  pip install --no-deps torch-fidelity lpips
"""

import importlib
import itertools
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model

from livo_jax import quality
from tests.conftest import relative_error
from tests.judges.test_clip import pictures, published, their_logits  # noqa: F401

TORCHVISION = ("", ".datasets", ".models", ".transforms", ".transforms.functional")


def alexnet(pretrained):
    """torchvision's convolutions of AlexNet, with random weights."""
    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
    layers = (
        conv(3, 64, 11, stride=4, padding=2), relu(), pool(3, 2), conv(64, 192, 5, padding=2), relu(), pool(3, 2),
        conv(192, 384, 3, padding=1), relu(), conv(384, 256, 3, padding=1), relu(), conv(256, 256, 3, padding=1),
        relu(),
    )  # fmt: skip
    return SimpleNamespace(features=torch.nn.Sequential(*layers))


def theirs(name):
    """A module that imports torchvision, without it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in TORCHVISION:
            patch.setitem(sys.modules, f"torchvision{module}", MagicMock(alexnet=alexnet))
        sys.modules["torchvision"].models = sys.modules["torchvision.models"]
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            pytest.skip("pip install --no-deps torch-fidelity lpips")


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's network with random weights, and a file of them."""
    module = theirs("torch_fidelity.feature_extractor_inceptionv3")
    root = tmp_path_factory.mktemp("inception")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, root / "none.pth")
        names = ["2048", "logits_unbiased"]
        network = module.FeatureExtractorInceptionV3("", names, feature_extractor_weights_path=root / "none.pth")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in network.state_dict().items():
            if name.endswith("running_var"):
                weight.uniform_(0.5, 2)
            elif weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            elif weight.ndim > 1:
                torch.nn.init.kaiming_normal_(weight)
    save_file(network.state_dict(), root / "inception.safetensors")
    return network, root / "inception.safetensors"


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    """The network of lpips, its trunk with random weights, and a file of it."""
    module = theirs("lpips")
    torch.manual_seed(0)
    network = module.LPIPS(net="alex", pnet_rand=True, verbose=False)
    file = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_model(network, file)
    return network, file


def to_torch(images):
    return torch.tensor(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(32, 32), (310, 340)])
def test_inception_features_are_those_of_torch_fidelity(inception, size):
    """Of images that are enlarged and that are made smaller."""
    network, file = inception
    images = pictures(2, *size)
    with torch.no_grad():
        features, logits = network(to_torch(images))
    ours = quality.inception(file)(images)
    assert relative_error(ours.features, features) < 2e-6
    assert relative_error(ours.logits, logits) < 4e-6
    assert relative_error(features[:1], features[1:]) > 1e-3, "the two images differ by far more than this"


@pytest.mark.parametrize("D", [16, 200])
def test_distances_of_features_are_those_of_torch_fidelity(D, monkeypatch):
    """Of more images than features, and of fewer, where covariances are singular."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (60, D)), rng.normal(0.3, 1.4, (47, D)) @ rng.normal(0, 1, (D, D)) / D**0.5
    fid, kid = theirs("torch_fidelity.metric_fid"), theirs("torch_fidelity.metric_kid")
    of = [fid.fid_features_to_statistics(torch.tensor(x)) for x in (a, b)]
    wanted = fid.fid_statistics_to_metric(*of, False)["frechet_inception_distance"]
    assert quality.frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    options = dict(kid_subset_size=40, kid_subsets=10, verbose=False)
    wanted = kid.kid_features_to_metric(torch.tensor(a), torch.tensor(b), **options)
    monkeypatch.setattr(quality, "KID_SUBSETS", 10)
    monkeypatch.setattr(quality, "KID_SUBSET_SIZE", 40)
    assert quality.kernel_distance(a, b) == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-9)


def test_inception_score_is_that_of_torch_fidelity():
    logits = np.random.default_rng(0).normal(0, 2, (57, 20))
    wanted = theirs("torch_fidelity.metric_isc").isc_features_to_metric(torch.tensor(logits))
    assert quality.inception_score(logits) == pytest.approx(wanted["inception_score_mean"], rel=1e-12)


def test_distances_between_gaussians_by_hand():
    """Equal covariances S, 4 S, and means 3 apart: |m|^2 + tr(S + 4 S - 2 * 2 S)."""
    x = np.random.default_rng(0).normal(0, 1, (50, 5))
    wanted = 5 * 9 + np.trace(np.cov(x.T))
    assert quality.frechet_distance(x - x.mean(0), 2 * (x - x.mean(0)) + 3) == pytest.approx(wanted)


@pytest.mark.parametrize("size", [(32, 32), (61, 47)])
def test_distances_are_those_of_lpips(lpips, size):
    network, file = lpips
    a, b = np.split(pictures(6, *size), 2)
    distance, diversity = quality.lpips(file)
    with torch.no_grad():
        their = lambda a, b: network(*(to_torch(x) / 127.5 - 1 for x in (a, b))).flatten().numpy()
        assert relative_error(distance(a, b), their(a, b)) < 1e-5
        pairs = np.array(list(itertools.combinations(a, 2)))
        assert float(diversity(a)) == pytest.approx(their(pairs[:, 0], pairs[:, 1]).mean(), rel=1e-5)
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
    distance, _ = quality.lpips(lpips[1])
    with pytest.raises(ValueError, match="31 pixels"):
        distance(pictures(1, 30, 64), pictures(1, 30, 64))
