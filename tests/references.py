"""Numbers of torch-fidelity and lpips that tests/evaluation/test_quality.py compares ours with: references.safetensors.

Both want torchvision, whose wheels do not go with the CPU build of torch; what is computed here does not use it:

    pip install --no-deps torch-fidelity==0.4.0 lpips==0.1.4 && python -m tests.references

Weights and inputs are drawn by NumPy's old generator, which gives the same numbers in every version; Pillow enlarges
the pictures.
"""

import importlib
import itertools
import pathlib
import sys
import tempfile
import zlib
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
from PIL import Image

FILE = pathlib.Path(__file__).with_name("references.safetensors")
INCEPTION_SIZES = ((32, 32), (310, 340))  # of images that are enlarged, and that are made smaller
LPIPS_SIZES = ((32, 32), (61, 47))
WIDTHS = (16, 200)  # of features: fewer than images, and more, where covariances are singular
KID = dict(KID_SUBSETS=10, KID_SUBSET_SIZE=40)


def generator(name: str):
    return np.random.RandomState(zlib.crc32(name.encode()))  # noqa: NPY002


def weights(shapes: dict[str, tuple]) -> dict[str, np.ndarray]:
    """float32 arrays of these published names and shapes; norms are no identities."""

    def weight(name, shape):
        drawn = generator(name).standard_normal(shape)
        if name.endswith("running_var"):
            return 0.5 + abs(drawn)
        if len(shape) == 1:
            return name.endswith("weight") + 0.3 * drawn
        drawn *= (2 / np.prod(shape[1:])) ** 0.5
        return abs(drawn) if name.startswith("lin") else drawn

    return {name: weight(name, shape).astype(np.float32) for name, shape in shapes.items()}


def pictures(n: int, H: int, W: int) -> np.ndarray:
    """[n, H, W, 3] uint8, smooth, no two alike."""
    small = generator("pictures").randint(0, 256, (n, 5, 4, 3)).astype(np.uint8)
    return np.array([np.asarray(Image.fromarray(x).resize((W, H), Image.Resampling.BICUBIC)) for x in small])


def features(D: int) -> tuple[np.ndarray, np.ndarray]:
    rng = generator(f"features of {D}")
    a, b = rng.normal(0, 1, (60, D)), rng.normal(0.3, 1.4, (47, D))
    return a, b @ rng.normal(0, 1, (D, D)) / D**0.5


def logits() -> np.ndarray:
    return generator("logits").normal(0, 2, (57, 20))


# ---------------------------------------------------------------------------- what they compute


def theirs(name: str):
    """A module that imports torchvision, without it."""
    import torch

    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
    alexnet = torch.nn.Sequential(
        conv(3, 64, 11, stride=4, padding=2), relu(), pool(3, 2), conv(64, 192, 5, padding=2), relu(), pool(3, 2),
        conv(192, 384, 3, padding=1), relu(), conv(384, 256, 3, padding=1), relu(), conv(256, 256, 3, padding=1),
        relu(),
    )  # fmt: skip
    for module in ("", ".datasets", ".models", ".transforms", ".transforms.functional"):
        stand_in = MagicMock(alexnet=lambda pretrained: SimpleNamespace(features=alexnet))
        sys.modules.setdefault(f"torchvision{module}", stand_in)
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    return importlib.import_module(name)


def fill(network):
    """Gives it `weights`."""
    import torch

    shapes = {name: tuple(x.shape) for name, x in network.state_dict().items() if not name.endswith("batches_tracked")}
    # lpips lists its layers twice, and keeps the constants that normalise colours among its weights.
    drawn = weights({k: shape for k, shape in shapes.items() if not k.startswith(("lins.", "scaling_layer."))})
    network.load_state_dict({name: torch.tensor(x) for name, x in drawn.items()}, strict=False)
    return network.eval()


def compute() -> dict[str, np.ndarray]:
    import torch

    def to_torch(images):
        return torch.tensor(images).permute(0, 3, 1, 2)

    def distance(a, b):
        return lpips(*(to_torch(x) / 127.5 - 1 for x in (a, b))).flatten().numpy()

    found = {}
    module = theirs("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    with patch.object(module, "load_state_dict"), tempfile.NamedTemporaryFile() as none:
        torch.save({}, none.name)
        inception = module("", ["2048", "logits_unbiased"], feature_extractor_weights_path=none.name)
    fill(inception)
    lpips = fill(theirs("lpips").LPIPS(net="alex", pnet_rand=True, verbose=False))
    with torch.no_grad():
        for size in INCEPTION_SIZES:
            outputs = inception(to_torch(pictures(2, *size)))
            found |= {f"inception.{name}.{size[0]}": x.numpy() for name, x in zip(("features", "logits"), outputs)}
        for size in LPIPS_SIZES:
            a, b = np.split(pictures(6, *size), 2)
            pairs = np.array(list(itertools.combinations(a, 2)))
            found[f"lpips.distance.{size[0]}"] = distance(a, b)
            found[f"lpips.diversity.{size[0]}"] = distance(pairs[:, 0], pairs[:, 1])
    fid, kid, isc = (theirs(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "isc"))
    for D in WIDTHS:
        of = [fid.fid_features_to_statistics(torch.tensor(x)) for x in features(D)]
        found[f"fid.{D}"] = fid.fid_statistics_to_metric(*of, False)["frechet_inception_distance"]
        options = dict(kid_subset_size=KID["KID_SUBSET_SIZE"], kid_subsets=KID["KID_SUBSETS"], verbose=False)
        scores = kid.kid_features_to_metric(*map(torch.tensor, features(D)), **options)
        found[f"kid.{D}"] = scores["kernel_inception_distance_mean"]
    found["isc"] = isc.isc_features_to_metric(torch.tensor(logits()))["inception_score_mean"]
    return {name: np.asarray(x) for name, x in found.items()}


if __name__ == "__main__":
    from safetensors.numpy import save_file

    save_file(compute(), FILE)
