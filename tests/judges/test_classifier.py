"""The judge classifier reads what transformers' image classifiers say, by the labels that the config tells of."""

import json
import shutil

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from safetensors.torch import load_file, save_file

from livo_jax import judges, values
from livo_jax.evaluation import metrics
from livo_jax.judges import _labels, classifier
from tests.judges.test_clip import pictures

GENDER, RACE, NUDITY = values.load(("gender", "race", "nudity"))
RACES = ["Black", "East Asian", "Indian", "Latino_Hispanic", "Middle Eastern", "Southeast Asian", "White"]


def publish(root, names, **settings):
    """A random image classifier of these labels as it is published."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(2)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    labels = dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **sizes, **labels, **settings))
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 10  # as it is initialised, it hardly tells one image from another
        inputs = processor(list(pictures(16, 32, 32)), return_tensors="pt")
        model.classifier.bias -= model.eval()(**inputs).logits.mean(0)
    model.save_pretrained(root)
    processor.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def races(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("races"), RACES)


def judge_of(model, labels, principles=(RACE,)):
    judging = {"model": str(model), "labels": tuple(labels)}
    return judges.load(ConfigDict({"judge": "classifier", "judging": judging}), principles, ())


def their_probabilities(root, images):
    from transformers import AutoImageProcessor, ViTForImageClassification

    inputs = AutoImageProcessor.from_pretrained(root)(list(images), return_tensors="pt")
    with torch.no_grad():
        return ViTForImageClassification.from_pretrained(root)(**inputs).logits.softmax(1).numpy()


def test_fairface_and_what_is_none_of_its_attributes(races):
    """More images than a batch has; the two Asian labels are one attribute together."""
    images = pictures(classifier.BATCH + 8, 40, 48)
    judge = judge_of(races, ["fairface"])
    reading = judge(images)["race"]
    by_name = dict(zip(RACES, their_probabilities(races, images).T))
    ours = {
        "white": by_name["White"], "black": by_name["Black"], "indian": by_name["Indian"],
        "asian": by_name["East Asian"] + by_name["Southeast Asian"], "latino": by_name["Latino_Hispanic"],
        "unspecified": by_name["Middle Eastern"],
    }  # fmt: skip
    columns = np.stack([*ours.values()], axis=1)
    assert reading.tolist() == [list(ours)[k] for k in columns.argmax(1)]
    assert "unspecified" in reading and len(set(reading)) > 2
    assert judge.unspecified and judge.pinned["classes"][-1] == "Middle Eastern=race:unspecified"
    found = metrics.prompt_metrics(RACE, "", {"race": reading}, unspecified=judge.unspecified)
    share = np.mean(reading == "unspecified")
    assert found["unspecified"] == pytest.approx(share) and found["readable"] == pytest.approx(1 - share)


def test_a_harm_is_the_probability_of_its_labels(tmp_path):
    root, images = publish(tmp_path, ["drawing", "porn", "sexy"]), pictures(3, 32, 32)
    judge = judge_of(root, ["porn=nudity", "sexy=nudity"], (NUDITY,))
    probabilities = their_probabilities(root, images)
    np.testing.assert_allclose(judge(images)["nudity"], probabilities[:, 1:].sum(1), rtol=1e-4)
    assert not judge.unspecified


def test_a_label_of_nothing_that_is_ahead_makes_a_bias_unreadable():
    labels, _ = _labels.parse(["Man=gender:male", "Woman=gender:female"], ["Man", "Woman", "Cat"], (GENDER,))
    scores = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    reading = _labels.read(labels, ["Man", "Woman", "Cat"], (GENDER,), scores, exclusive=True)
    assert reading["gender"].tolist() == ["", "male"]


def test_what_cannot_work_is_said_at_once(races, tmp_path):
    with pytest.raises(ValueError, match="labels is empty.*model is empty"):
        judge_of("", ())
    with pytest.raises(ValueError, match="no label 'nsfw', choose from Black.*'nudity': no label is of its axis"):
        judge_of(races, ["nsfw=nudity"], (NUDITY,))
    with pytest.raises(ValueError, match="'White' is 'pale'.*'race': no label is 'white', 'black', 'indian', 'asian'"):
        judge_of(races, ["White=race:pale", "Latino_Hispanic=race:latino"])
    with pytest.raises(FileNotFoundError, match="hf download no/such-classifier"):
        judge_of("no/such-classifier", ["fairface"])


def test_a_directory_that_is_no_such_model_is_told(races, tmp_path):
    copy = shutil.copytree(races, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    bare = {name: x for name, x in tensors.items() if not name.startswith("classifier")}
    save_file(bare, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="no weights classifier.bias, classifier.weight: it is no trained"):
        judge_of(copy, ["fairface"])
    (copy / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    classifier.published.cache_clear()
    with pytest.raises(ValueError, match="holds no image classifier that transformers can read"):
        judge_of(copy, ["fairface"])
