"""The judge detector counts what transformers' object detectors find."""

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from livo_jax import judges, values
from livo_jax.judges import detector
from tests.judges.test_clip import pictures

GORE, GENDER = values.load(("gore", "gender"))
NAMES = ["person", "dog", "knife"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A random YOLOS of three classes, sure enough of what it finds."""
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    root = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(3)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    labels = dict(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    settings = YolosConfig(image_size=[32, 32], patch_size=16, num_detection_tokens=6, **sizes, **labels)
    model, processor = YolosForObjectDetection(settings), YolosImageProcessorPil(size={"height": 32, "width": 32})
    with torch.no_grad():  # as it is initialised, it finds nothing, and the same everywhere
        for weight in model.parameters():
            weight *= 10
        model.vit.embeddings.detection_tokens += 2 * torch.randn_like(model.vit.embeddings.detection_tokens)
        inputs = processor(list(pictures(10, 32, 32)), return_tensors="pt")
        model.class_labels_classifier.layers[-1].bias -= model.eval()(**inputs).logits.mean((0, 1))
    model.save_pretrained(root)
    processor.save_pretrained(root)
    return root


def judge_of(model, labels=(), principles=()):
    judging = {"model": str(model), "labels": labels}
    return judges.load(ConfigDict({"judge": "detector", "judging": judging}), principles, ())


def test_counts_are_those_of_transformers(published):
    """Each object of a score of LEAST at least, the class beside that of nothing; more images than a batch has."""
    from transformers import AutoImageProcessor, YolosForObjectDetection

    images = pictures(detector.BATCH + 2, 32, 32)
    reading = judge_of(published)(images)
    with torch.no_grad():
        inputs = AutoImageProcessor.from_pretrained(published)(list(images), return_tensors="pt")
        probabilities = YolosForObjectDetection.from_pretrained(published)(**inputs).logits.softmax(-1)[..., :-1]
    best, label = probabilities.max(-1)
    there = best > detector.LEAST
    expected = torch.stack([((label == i) & there).sum(1) for i in range(len(NAMES))]).tolist()
    assert [reading[name].tolist() for name in NAMES] == expected
    assert all(map(any, expected)) and not there.all()
    scores = judge_of(published, ("knife=blood", "dog=blood"), (GORE,))(images)["blood"]
    of_both = torch.where((label != 0) & there, best, 0).max(1).values.numpy()
    np.testing.assert_allclose(scores, of_both, atol=1e-5)


def test_what_cannot_be_counted_is_told(published, tmp_path):
    with pytest.raises(ValueError, match="'gender' is a bias.*"):
        judge_of(published, (), (GENDER,))
    with pytest.raises(ValueError, match="no label 'sword', choose from person, dog, knife; .*no label is of its axis"):
        judge_of(published, ("sword=blood",), (GORE,))
    with pytest.raises(FileNotFoundError, match="no model at"):
        judge_of(tmp_path / "none")
    pinned = judge_of(published).pinned
    assert pinned["least_score"] == detector.LEAST and pinned["weights"].keys() == {"model.safetensors"}
