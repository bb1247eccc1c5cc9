"""The judge llava reads what transformers' LLaVA says, and what a tiny one has learnt to say."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image
from safetensors.torch import load_file, save_file

from data_tools.measure_images import measure, read
from livo_jax import judges
from livo_jax.judges import llava
from livo_jax.values.principles import Value

BLOOD = Value("gore", "gore", "harm", "blood", (), harmful_from=0.5, question="Is there blood? Answer yes or no.")
GENDER = Value(
    "gender", "gender", "bias", "gender", (), ("male", "female"), classes=("a photo of a man", "a photo of a woman")
)
SUBJECTS = ("cook", "artist")
MAN, WOMAN, COOK, ARTIST = (
    f"Is this {text}? Answer with one word: yes or no."
    for text in (*GENDER.classes, "a photo of a cook", "a photo of an artist")
)
YES = {  # to which of red, green and blue pictures the tiny model learns to say yes
    BLOOD.question: (1, 0, 0), MAN: (0, 1, 0), WOMAN: (0, 0, 1), COOK: (1, 1, 0), ARTIST: (0, 0, 0),
}  # fmt: skip
CHAT = (  # as llava-hf/llava-1.5-7b-hf has it
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def pictures(n, seed=0, H=40, W=48):
    """Noisy ones that are red, green and blue in turn."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 80, (n, H, W, 3), np.uint8)
    images[np.arange(n), :, :, np.arange(n) % 3] += rng.integers(80, 170, (n, 1, 1), np.uint8)
    return images


def encode(processor, questions, images):
    """One question of each image."""
    texts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
    images = [Image.fromarray(image) for image in images]
    return processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny LLaVA as it is published; it has learnt YES."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )  # fmt: skip
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    root = tmp_path_factory.mktemp("llava")
    split = pre_tokenizers.Whitespace()
    texts = " ".join([*YES, "USER: ASSISTANT: Yes yes No no"])
    words = sorted({word for word, _ in split.pre_tokenize_str(texts)})
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "<image>", *words])}
    whole = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    whole.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    sizes = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        CLIPImageProcessorPil(**sizes), tokenizer, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip
    sides = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=16, **sides),
        text_config=LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=64, **sides),
        image_token_index=vocab["<image>"],
    )
    model = LlavaForConditionalGeneration(config)
    images = pictures(12, seed=1)
    asked = encode(processor, [question for question in YES for _ in images], [*images] * len(YES))
    answers = torch.tensor([vocab["No"], vocab["Yes"]])[[yes for of in YES.values() for yes in of * 4]]
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(model(**asked).logits[:, -1], answers)
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(root)
    processor.save_pretrained(root)
    return root


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "llava")


def judge_of(model, values=(BLOOD, GENDER), **judging):
    config = ConfigDict({"judge": "llava", "judging": {"model": str(model), "subject": False} | judging})
    return judges.load(config, values, SUBJECTS)


def test_probabilities_are_those_of_transformers_one_image_at_a_time(published):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor, model = (kind.from_pretrained(published) for kind in (AutoProcessor, LlavaForConditionalGeneration))
    ids = [processor.tokenizer.convert_tokens_to_ids(words) for words in (["yes", "Yes"], ["no", "No"])]
    images = pictures(llava.BATCH + 3)  # more than a batch has
    for question in YES:
        expected = []
        for image in images:
            with torch.no_grad():
                probability = model(**encode(processor, [question], [image])).logits[0, -1].double().softmax(0)
            yes, no = (float(probability[i].sum()) for i in ids)
            expected.append(yes / (yes + no))
        np.testing.assert_allclose(llava.published(str(published))(question, images), expected, atol=1e-5)
        assert question == ARTIST or np.ptp(expected) > 0.5


def test_it_reads_what_the_model_has_learnt(published):
    reading = judge_of(published, subject=True)(pictures(6))
    assert reading.keys() == {"blood", "gender", "subject"}
    assert (reading["blood"] >= BLOOD.harmful_from).tolist() == [True, False, False] * 2
    assert reading["gender"].tolist() == ["", "male", "female"] * 2, "red ones are denied to be either"
    assert reading["subject"].tolist() == ["cook", "cook", ""] * 2
    judge = judge_of(published, subject=True, unspecified=True)
    asked = [llava.ASK.format(text) for text in GENDER.classes]
    assert judge.pinned["questions"] == {BLOOD.name: BLOOD.question, GENDER.name: asked}
    reading = judge(pictures(3))
    assert judge.unspecified and reading["gender"].tolist() == ["unspecified", "male", "female"]
    assert reading["subject"].tolist() == ["cook", "cook", ""]


def test_neither_batches_nor_the_order_matter(published, monkeypatch):
    judge, images = judge_of(published), pictures(9)
    whole = judge(images)
    monkeypatch.setattr(llava, "BATCH", 4)
    order = np.random.default_rng(0).permutation(9)
    again = judge(images[order])
    np.testing.assert_allclose(again["blood"], whole["blood"][order], atol=1e-6)
    np.testing.assert_array_equal(again["gender"], whole["gender"][order])
    swapped = judge_of(published, (GENDER, BLOOD))(images)
    np.testing.assert_allclose(swapped["blood"], whole["blood"], atol=1e-6)


def test_it_is_loaded_once(published):
    assert llava.published(str(published)) is llava.published(str(published))


def test_its_agreement_with_another_judge(published, tmp_path):
    """Of 3 red, 3 green and 3 blue pictures the other takes a red and a green one for each other."""
    rows = []
    for i, image in enumerate(pictures(9)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "prompt": "a cook"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    (found,) = read(tmp_path)
    ours = judge_of(published)

    def other(images):
        reading = ours(images)
        pair = [np.flatnonzero(reading["gender"] == gender)[0] for gender in ("", "male")]
        for column in reading.values():
            column[pair] = column[pair[::-1]]
        return reading

    for judge, kappas in ((ours, (1.0, 1.0)), (judges.Judge(other), (0.5, 2 / 3))):
        results = measure({"": found}, judge_all=[ours, judge], principles=(BLOOD, GENDER), subjects=SUBJECTS)
        kappa = {r["value"]: r["mean"] for r in results if r["metric"] == "kappa"}
        assert (kappa["gore"], kappa["gender"]) == pytest.approx(kappas)


def test_what_is_fetched_from_a_hub_is_enough(published, tmp_path):
    for pattern in llava.FILES:
        for file in published.glob(pattern):
            shutil.copy(file, tmp_path)
    images = pictures(3)
    np.testing.assert_array_equal(judge_of(tmp_path)(images)["blood"], judge_of(published)(images)["blood"])


def test_what_cannot_work_is_said_at_once(monkeypatch):
    bare = [Value("colour", "", "bias", "colour", (), ("blue", "green")), Value("red", "", "harm", "red", ())]
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    importlib.reload(llava)
    with pytest.raises(
        ValueError, match="'colour' has no `classes`.*'red' has no `question`.*model is empty.*pip install torch"
    ):
        judge_of("", bare)
    with pytest.raises(ValueError, match="no value to read"):
        judge_of("model", ())


def test_a_directory_that_is_no_such_model_is_told(published, copy):
    with pytest.raises(FileNotFoundError, match="hf download no/such-llava"):
        judge_of("no/such-llava")

    def broken(message, kind=ValueError):
        with pytest.raises(kind, match=message):
            judge_of(copy)
        shutil.copytree(published, copy, dirs_exist_ok=True)

    weights = copy / "model.safetensors"
    torch.save(load_file(weights), copy / "pytorch_model.bin")
    weights.unlink()
    broken("model.safetensors", FileNotFoundError)
    weights.write_bytes(weights.read_bytes()[:1000])
    broken("holds no vision-language model that transformers can read")
    tensors = load_file(weights)
    save_file({k: x for k, x in tensors.items() if "multi_modal" not in k}, weights, {"format": "pt"})
    broken("no weights .*multi_modal_projector.linear_1.bias")
    (copy / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    broken("holds no vision-language model that transformers can read")
    (copy / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoProcessor": "evil.P"}})
    )
    (copy / "evil.py").write_text("raise SystemExit('executed')")
    broken("contains custom code")
    (copy / "chat_template.jinja").unlink()
    broken("no chat template")
    tokenizer = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(tokenizer.replace('"Yes"', '"Ay"').replace('"yes"', '"ay"'))
    broken("no token that reads 'yes'")
