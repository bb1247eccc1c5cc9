"""The judge detector finds what transformers' detectors find, of closed classes, of silhouettes and of any classes."""

import json

import numpy as np
import pytest
import torch

from configs import common
from livo_jax import judges, values
from livo_jax.judges import detector
from livo_jax.judges.detector import COLOURS, Found
from tests.judges.test_clip import pictures
from tests.judges.test_clip import published as published_clip  # noqa: F401, a fixture

GORE, GENDER = values.load(("gore", "gender"))
NAMES = ["person", "dog", "knife"]
LABELS = dict(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A random YOLOS of three classes, sure enough of what it finds."""
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    root = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(3)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    settings = YolosConfig(image_size=[32, 32], patch_size=16, num_detection_tokens=6, **sizes, **LABELS)
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


@pytest.fixture(scope="module")
def of_masks(tmp_path_factory):
    """A random Mask2Former of three classes, as GenEval's detector."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    root = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(5)
    backbone = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    settings = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=8, **LABELS,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(settings)
    with torch.no_grad():
        model.class_predictor.weight *= 30
        model.model.transformer_module.decoder.mask_predictor.mask_embedder.layers[-1].layers[0].weight *= 10
    model.save_pretrained(root)
    Mask2FormerImageProcessorPil(size={"height": 32, "width": 32}, num_labels=3).save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def of_any_classes(tokenizer_dir, tmp_path_factory):
    """A random OWLv2, which looks for the classes that it is asked for."""
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    root = tmp_path_factory.mktemp("owlv2")
    torch.manual_seed(6)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes, **ids, pad_token_id=0)
    vision = dict(image_size=32, patch_size=8, **sizes)
    settings = Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    model = Owlv2ForObjectDetection(settings)
    with torch.no_grad():
        model.class_head.logit_scale.weight *= 100
    model.save_pretrained(root)
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(root)
    return root


def judge_of(model, principles=(), **judging):
    config = common.get_config()
    config.judge = "detector"
    config.judging.update(model=str(model), **judging)
    return judges.load(config, principles, ())


def found_by(judge, images):
    return [json.loads(text) for text in judge(images)["objects"]]


def test_objects_are_those_of_transformers(published):
    """Each of a score above detected_from, the class beside that of nothing; more images than a batch has."""
    from transformers import AutoImageProcessor, YolosForObjectDetection

    images = pictures(detector.BATCH + 2, 32, 64)
    judge = judge_of(published, detected_from=0.5)
    processor, model = AutoImageProcessor.from_pretrained(published), YolosForObjectDetection.from_pretrained(published)
    with torch.no_grad():
        outputs = model(**processor(list(images), return_tensors="pt"))
    best, label = outputs.logits.softmax(-1)[..., :-1].max(-1)
    there, found = best > 0.5, found_by(judge, images)
    assert [len(of) for of in found] == there.sum(1).tolist() and there.any(1).all() and not there.all()
    (x, y, w, h), rows = (outputs.pred_boxes * torch.tensor([64, 32, 64, 32])).unbind(-1), range(len(images))
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    for row, of_image in zip(rows, found):
        order = [i for i in best[row].argsort(descending=True).tolist() if there[row, i]]
        assert [one["class"] for one in of_image] == [NAMES[label[row, i]] for i in order]
        assert [one["counted"] for one in of_image] == [bool(best[row, i] > 0.9) for i in order]
        np.testing.assert_allclose([one["box"] for one in of_image], boxes[row, order], atol=0.02)
        assert "colour" not in of_image[0], "no CLIP tells it"
    labels = ("knife=blood", "dog=blood")
    scores = judge_of(published, (GORE,), labels=labels, detected_from=0.5)(images)["blood"]
    of_both = torch.where((label != 0) & there, best, 0).max(1).values.numpy()
    np.testing.assert_allclose(scores, of_both, atol=1e-5)
    assert judge.objects == tuple(NAMES) and judge.colours == ()
    assert judge(np.zeros((1, 32, 32, 3), np.uint8))["objects"].tolist() == [""], "an image of one colour is not read"


def test_boxes_are_those_of_silhouettes(of_masks):
    """GenEval's kind of detector: transformers' silhouettes, and the least box around each."""
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    images = pictures(3, 48, 48)
    judge = judge_of(of_masks, detected_from=0.1, counted_from=0.3)
    found, (detect, names, is_open) = found_by(judge, images), detector.published(str(of_masks), detector.COCO)
    processor = AutoImageProcessor.from_pretrained(of_masks)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(of_masks)
    with torch.no_grad():
        outputs = model(**processor(list(images), return_tensors="pt"))
    theirs = processor.post_process_instance_segmentation(outputs, threshold=0.1, target_sizes=[(48, 48)] * 3)
    assert [len(of) for of in found] == [len(of["segments_info"]) for of in theirs] and all(found)
    assert names == NAMES and not is_open
    for of_image, ours, of in zip(detect(images, 0.1), found, theirs):
        assert sorted(one["score"] for one in ours) == sorted(round(s["score"], 4) for s in of["segments_info"])
        for one in of_image:
            left, top, right, bottom = map(int, one.box)
            assert one.mask.shape == (48, 48)
            inside = one.mask[top:bottom, left:right]
            assert inside.sum() == one.mask.sum() > 0, "nothing of it is outside"
            assert inside[[0, -1]].any(1).all() and inside[:, [0, -1]].any(0).all(), "and each edge touches it"


def test_an_open_detector_looks_for_the_classes_that_are_named(of_any_classes):
    """And for COCO's where none are."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    images = pictures(detector.BATCH + 1, 32, 32)
    judge = judge_of(of_any_classes, classes=("apple", "baker"), detected_from=0.4, counted_from=0.6)
    processor = AutoProcessor.from_pretrained(of_any_classes)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(of_any_classes)
    texts = [["a photo of an apple", "a photo of a baker"]] * len(images)
    with torch.no_grad():
        outputs = model(**processor(text=texts, images=list(images), return_tensors="pt"))
    best, label = outputs.logits.max(-1)
    best = best.sigmoid()
    found = found_by(judge, images)
    kept = [[min(16, int(((best > 0.4) & (label == i))[row].sum())) for i in (0, 1)] for row in range(len(images))]
    assert [[sum(one["class"] == name for one in of) for name in judge.objects] for of in found] == kept
    assert 0 < sum(map(sum, kept)) < best.numel() and judge.pinned["looked_for"] == ["apple", "baker"]
    assert judge_of(of_any_classes).objects == detector.COCO and len(detector.COCO) == 80


def test_a_colour_is_the_text_that_a_crop_is_most_similar_to(published, published_clip):  # noqa: F811
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = pictures(6, 64, 64)
    judge = judge_of(published, colours=str(published_clip), detected_from=0.4)
    found, crops = found_by(judge, images), []
    for image, of_image in zip(images, found):
        for one in of_image:
            left, top, right, bottom = (int(x) for x in np.clip(np.round(one["box"]), 0, 64))
            crops.append((one["class"], image[top : max(bottom, top + 1), left : max(right, left + 1)]))
    model, tokenizer = CLIPModel.from_pretrained(published_clip), CLIPTokenizer.from_pretrained(published_clip)
    processor, expected = CLIPImageProcessorPil.from_pretrained(published_clip), []
    for name, crop in crops:
        texts = [
            [f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}", f"a photo of a {colour} object"]
            for colour in COLOURS
        ]
        with torch.no_grad():
            cut = dict(padding="max_length", truncation=True, max_length=16, return_tensors="pt")
            tokens = tokenizer(sum(texts, []), **cut)
            of_texts = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
            of_colours = torch.nn.functional.normalize(of_texts.view(len(COLOURS), 3, -1).mean(1), dim=-1)
            of_crop = model.get_image_features(**processor([crop], return_tensors="pt")).pooler_output
        expected.append(COLOURS[int((of_colours @ of_crop[0]).argmax())])
    assert [one["colour"] for of in found for one in of] == expected and len({*expected}) > 1
    assert judge.colours == COLOURS and judge.pinned["colours"]["weights"].keys() == {"model.safetensors"}


def test_a_crop_is_grey_around_its_silhouette():
    image, mask = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3), np.zeros((5, 6), bool)
    mask[1, 2] = mask[2, 3] = True
    crop = detector.crop(image, Found(0, 1.0, (2.0, 1.0, 4.0, 3.0), mask))
    grey = [detector.BEHIND] * 3
    assert crop.tolist() == [[image[1, 2].tolist(), grey], [grey, image[2, 3].tolist()]]
    assert np.array_equal(detector.crop(image, Found(0, 1.0, (1.6, -3.0, 3.4, 2.0))), image[:2, 2:3])
    for box in ((6.2, 5.3, 9.0, 9.0), (2.0, 2.0, 2.1, 2.1), (-4.0, -4.0, -3.0, -2.0)):
        assert detector.crop(image, Found(0, 1.0, box)).shape == (1, 1, 3), "a pixel at least"


def test_the_surest_of_each_class_are_kept():
    many = [Found(0, k / 100, (0, 0, 1, 1)) for k in range(20)] + [Found(1, 0.05, (0, 0, 1, 1))]
    kept = detector.surest(many)
    assert [one.score for one in kept] == [k / 100 for k in range(19, 4, -1)] + [0.05, 0.04] and kept[-2].label == 1


def test_what_cannot_be_read_is_told(published, of_any_classes, published_clip, tmp_path):  # noqa: F811
    told = "'gender' is a bias, of which objects .*; config.judging.detected_from=0.9 and .counted_from=0.5"
    with pytest.raises(ValueError, match=told):
        judge_of(published, (GENDER,), detected_from=0.9, counted_from=0.5)
    with pytest.raises(ValueError, match="classes: .* has classes of its own.*no label 'sword', choose from person, d"):
        judge_of(published, (GORE,), labels=("sword=blood",), classes=("sword",))
    with pytest.raises(FileNotFoundError, match="no model at"):
        judge_of(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no model at"):
        judge_of(published, colours=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no model at '.*none'(.|\n)*no model at '.*nothing'"):
        judge_of(tmp_path / "none", colours=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="holds no object detector that transformers can read"):
        judge_of(published_clip)
    pinned = judge_of(published).pinned
    assert (pinned["detected_from"], pinned["counted_from"]) == (0.3, 0.9)
    assert pinned["weights"].keys() == {"model.safetensors"} and "looked_for" not in pinned
