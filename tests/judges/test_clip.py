"""The judge clip reads what transformers' CLIP, processor included, says."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image

from livo_jax import judges
from livo_jax.judges.clip import BATCH, FILES, preprocess, read_processor
from livo_jax.values.principles import Value
from tests.models.test_clip_vision import clip

SHAPE = Value(
    "shape", "shape equality", "bias", "shape", (), ("round", "square", "wide"),
    classes=("a round baker", "a square baker", "a photo of a cook"),
)  # fmt: skip
BLOODY = Value("bloody", "", "harm", "red", (), harmful_from=0.5, classes=("a bloody baker", "a photo of a baker"))
SUBJECTS = ("cook", "optician", "tailor", "sailor")


@pytest.fixture(scope="module")
def published(tokenizer_dir, tmp_path_factory):
    """A random CLIP as it is published."""
    from transformers import CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    root = tmp_path_factory.mktemp("clip")
    shutil.copytree(tokenizer_dir, root, dirs_exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(root)
    torch.manual_seed(4)
    model = clip(len(tokenizer), tokenizer.eos_token_id)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "position" not in name:
                weight *= 10  # as it is initialised, it hardly tells one image from another
    model.save_pretrained(root)
    sizes = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPImageProcessorPil(**sizes).save_pretrained(root)
    return root


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "clip")


def config(model, subject=True):
    return ConfigDict({"judge": "clip", "judging": {"model": str(model), "subject": subject}})


def pictures(n, H, W):
    """Smooth ones that differ."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (n, 5, 4, 3), np.uint8)
    return np.array([np.asarray(Image.fromarray(x).resize((W, H), Image.Resampling.BICUBIC)) for x in small])


def their_logits(root, images, texts):
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = CLIPImageProcessorPil.from_pretrained(root)(list(images), return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(root)(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        return CLIPModel.from_pretrained(root)(pixel_values=pixels, **tokens).logits_per_image.numpy()


def test_readings_are_those_of_transformers(published):
    """Of more images than a batch has."""
    images = pictures(BATCH + 5, 48, 48)
    reading = judges.load(config(published), (SHAPE, BLOODY), SUBJECTS)(images)
    assert reading.keys() == {"shape", "red", "subject"}
    of_shape = their_logits(published, images, SHAPE.classes)
    of_subject = their_logits(published, images, ["a photo of a cook", "a photo of an optician", "a photo of a tailor",
                                                  "a photo of a sailor"])  # fmt: skip
    for axis, logits, names in (("shape", of_shape, SHAPE.attributes), ("subject", of_subject, SUBJECTS)):
        clear = np.diff(np.sort(logits, axis=1)[:, -2:], axis=1)[:, 0] > 1e-4
        expected = np.array(names)[logits.argmax(1)]
        assert clear.mean() > 0.8 and len(set(expected)) > 1, expected
        np.testing.assert_array_equal(reading[axis][clear], expected[clear])
    logits = their_logits(published, images, BLOODY.classes)
    harm = torch.tensor(logits).softmax(1)[:, 0].numpy()
    np.testing.assert_allclose(reading["red"], harm, atol=1e-4)
    assert np.ptp(harm) > 0.05


def test_an_image_is_read_alike_alone_and_among_others(published):
    judge = judges.load(config(published), (SHAPE, BLOODY), SUBJECTS)
    images = pictures(3, 40, 40)
    whole, alone = judge(images), judge(images[1:2])
    assert whole["shape"][1] == alone["shape"][0] and whole["red"][1] == pytest.approx(alone["red"][0], abs=1e-6)


def test_without_subjects_none_are_read(published):
    assert judges.load(config(published, subject=False), (BLOODY,), SUBJECTS)(pictures(2, 32, 32)).keys() == {"red"}


@pytest.mark.parametrize("shape", [(32, 32), (20, 20), (64, 64), (50, 77), (81, 40), (33, 32)])
def test_preprocessing_is_that_of_transformers(published, shape):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    mean, std = read_processor(published, 32)
    expected = CLIPImageProcessorPil.from_pretrained(published)(list(images), return_tensors="np")["pixel_values"]
    ours = preprocess(images, 32, mean, std)
    assert ours.shape == (2, 32, 32, 3) and ours.dtype == np.float32
    grey_levels = 255 * std * (ours - np.moveaxis(np.array(expected), 1, -1))
    assert np.abs(grey_levels).max() <= 1


def test_old_processor_files_are_read(published, copy):
    """As openai/clip-vit-large-patch14 has it; 32 in place of 224."""
    old = dict(
        crop_size=32, do_center_crop=True, do_normalize=True, do_resize=True, image_mean=[0.5, 0.4, 0.3],
        feature_extractor_type="CLIPFeatureExtractor", image_std=[0.2, 0.3, 0.4], resample=3, size=32,
    )  # fmt: skip
    (copy / "preprocessor_config.json").write_text(json.dumps(old))
    mean, std = read_processor(copy, 32)
    np.testing.assert_allclose([mean, std], [[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]], rtol=1e-6)
    (copy / "preprocessor_config.json").write_text(json.dumps(dict(resample=2, size={"height": 32, "width": 32})))
    with pytest.raises(ValueError) as error:
        read_processor(copy, 32)
    for part in ("size={'height': 32, 'width': 32} (only {'shortest_edge': 32})", "resample=2 (only 3)", "image_std"):
        assert part in str(error.value)


def test_what_is_fetched_from_a_hub_is_enough(published, tmp_path):
    for pattern in FILES:
        for file in published.glob(pattern):
            shutil.copy(file, tmp_path)
    judge, images = judges.load(config(tmp_path), (BLOODY,), SUBJECTS), pictures(2, 32, 32)
    expected = judges.load(config(published), (BLOODY,), SUBJECTS)
    np.testing.assert_array_equal(judge(images)["red"], expected(images)["red"])
    assert judge.pinned["weights"] == expected.pinned["weights"], "of the same content, wherever it lies"
    digest = hashlib.sha256((published / "model.safetensors").read_bytes()).hexdigest()
    assert judge.pinned["weights"] == {"model.safetensors": digest}
    assert judge.pinned["classes"] == {BLOODY.name: list(BLOODY.classes)}
    assert judge.pinned["harmful_from"] == {BLOODY.name: BLOODY.harmful_from}


def test_what_cannot_work_is_said_at_once(published, copy):
    value = Value("colour", "", "bias", "colour", (), ("blue", "green"))
    with pytest.raises(ValueError, match="'colour' has no `classes`.*judging.model is empty"):
        judges.load(config(""), (SHAPE, value), SUBJECTS)
    with pytest.raises(ValueError, match="no value to read"):
        judges.load(config(published), (), SUBJECTS)
    with pytest.raises(FileNotFoundError, match="hf download no/such-clip"):
        judges.load(config("no/such-clip"), (SHAPE,), SUBJECTS)
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json is missing"):
        judges.load(config(copy), (SHAPE,), SUBJECTS)
    for name in ("vocab.json", "merges.txt"):
        (copy / name).unlink()
    with pytest.raises(ValueError, match="a tokenizer of .*: are vocab.json"):
        judges.load(config(copy), (SHAPE,), SUBJECTS)
    with pytest.raises(ValueError, match="judge='human': choose from"):
        judges.load(ConfigDict({"judge": "human"}), (SHAPE,), SUBJECTS)
