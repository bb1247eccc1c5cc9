"""The judges q16 and mhsc score what their published code does in PyTorch; their pickles are read, not executed."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import save_file

from data_tools.convert_judge import convert
from livo_jax import judges
from livo_jax.judges import mhsc, q16
from livo_jax.values.principles import Value
from tests.judges.test_clip import pictures, published  # noqa: F401

UNSAFE = Value("unsafe", "", "harm", "inappropriate", (), harmful_from=0.5)
SEXUAL, VIOLENT = (Value(name, "", "harm", name, (), harmful_from=0.5) for name in ("sexual", "violent"))
RNG = np.random.default_rng(0)


def judge_of(kind, file, values, labels=()):
    return judges.load(ConfigDict({"judge": kind, "judging": {"model": str(file), "labels": labels}}), values, ())


def features_of(root, images):
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = CLIPImageProcessorPil.from_pretrained(root)(list(images), return_tensors="pt")["pixel_values"]
    model = CLIPModel.from_pretrained(root)
    with torch.no_grad():
        return model.visual_projection(model.vision_model(pixels).pooler_output)


@pytest.fixture(scope="module")
def width(published):  # noqa: F811
    return features_of(published, pictures(1, 32, 32)).shape[1]


def published_q16(path, width, protocol=4):
    rng = np.random.default_rng(0)  # two texts that lie close together, so that the softmax is not at its ends
    prompts = (rng.standard_normal(width) + 0.05 * rng.standard_normal((2, width))).astype(np.float16)
    path.write_bytes(pickle.dumps(prompts, protocol=protocol))
    return torch.tensor(prompts.astype(np.float32))


def published_mhsc(folder, width):
    """The five heads as its code makes and saves them."""
    torch.manual_seed(0)
    heads = {}
    for name in mhsc.NAMES:
        head = torch.nn.Sequential(
            torch.nn.Linear(width, 384), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(384),
            torch.nn.Linear(384, 1),
        )  # fmt: skip
        head(torch.randn(64, width))  # for the running statistics
        torch.save(head.state_dict(), folder / f"{name}.pt")
        heads[name] = head.eval()
    return heads


def test_q16_is_that_of_its_code(published, width, tmp_path):  # noqa: F811
    prompts, images = published_q16(tmp_path / "prompts.p", width), pictures(5, 40, 48)
    convert("q16", tmp_path / "prompts.p", tmp_path / "q16.safetensors", str(published))
    judge = judge_of("q16", tmp_path / "q16.safetensors", (UNSAFE,))
    features = features_of(published, images)
    unit = torch.nn.functional.normalize
    expected = (100 * unit(features) @ unit(prompts).T).softmax(1)[:, 1].numpy()
    np.testing.assert_allclose(judge(images)["inappropriate"], expected, atol=1e-4)
    assert np.ptp(expected) > 0.05
    weights = judge.pinned["weights"]
    assert judge.pinned["name"] == "q16" and weights["heads"].keys() == {"q16.safetensors"}
    assert weights["clip"].keys() == {"model.safetensors"}
    with safe_open(tmp_path / "q16.safetensors", "numpy") as heads:
        assert heads.metadata()["clip"] == os.path.relpath(published, tmp_path), "no path of this machine"
    sexual = judge_of("q16", tmp_path / "q16.safetensors", (SEXUAL,), ("inappropriate=sexual",))
    np.testing.assert_allclose(sexual(images)["sexual"], expected, atol=1e-4)


def test_mhsc_is_that_of_its_code(published, width, tmp_path):  # noqa: F811
    heads, images = published_mhsc(tmp_path, width), pictures(5, 40, 48)
    convert("mhsc", tmp_path, tmp_path / "mhsc.safetensors", str(published))
    reading = judge_of("mhsc", tmp_path / "mhsc.safetensors", (SEXUAL, VIOLENT))(images)
    assert reading.keys() == {"sexual", "violent"}
    for name, scores in reading.items():
        with torch.no_grad():
            expected = heads[name](features_of(published, images)).sigmoid()[:, 0].numpy()
        np.testing.assert_allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_every_pickle_are_read(tmp_path, protocol):
    prompts = published_q16(tmp_path / "prompts.p", 6, protocol)
    old = (tmp_path / "prompts.p").read_bytes().replace(b"numpy._core.", b"numpy.core.")  # of NumPy 1
    if protocol == 2:  # whose texts have no lengths
        (tmp_path / "prompts.p").write_bytes(old)
    convert("q16", tmp_path / "prompts.p", tmp_path / "out.safetensors", "")
    found, clip = judges._heads.read_heads(str(tmp_path / "out.safetensors"), "q16", q16.SHAPES)
    np.testing.assert_array_equal(found["prompts"], prompts)
    assert clip == "openai/clip-vit-large-patch14"


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_that_want_to_run_are_refused(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "prompts.p").write_bytes(pickle.dumps(Evil(str(ran))))
    with pytest.raises(ValueError, match="it asks for posix.mkdir, which is no part of an array: not executed"):
        convert("q16", tmp_path / "prompts.p", tmp_path / "out.safetensors", "")
    for name in mhsc.NAMES:
        torch.save({"0.weight": Evil(str(ran))}, tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match="(?s)sexual.pt is no state dict of tensors.*posix.mkdir.*political.pt"):
        convert("mhsc", tmp_path, tmp_path / "out.safetensors", "")
    assert not ran.exists() and not (tmp_path / "out.safetensors").exists()


def test_what_was_not_published_is_told(tmp_path):
    for array, told in (
        (np.zeros((3, 4), np.float32), "prompts of shape .3, 4. in place of .2, 'features'."),
        (np.full((2, 4), np.nan), "numbers of prompts that are not finite"),
        (np.zeros(2, int), "holds a ndarray, not an array of numbers"),
        ([1.0], "holds a list"),
    ):
        (tmp_path / "prompts.p").write_bytes(pickle.dumps(array))
        with pytest.raises(ValueError, match=told):
            convert("q16", tmp_path / "prompts.p", tmp_path / "out.safetensors", "")
    (tmp_path / "prompts.p").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="is no pickled array"):
        convert("q16", tmp_path / "prompts.p", tmp_path / "out.safetensors", "")
    published_q16(tmp_path / "prompts.p", 4)
    with pytest.raises(ValueError, match="--clip=.*none: there is no such directory"):
        convert("q16", tmp_path / "prompts.p", tmp_path / "out.safetensors", str(tmp_path / "none"))
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ValueError, match="sexual.pt is missing.*political.pt is missing"):
        convert("mhsc", tmp_path, tmp_path / "out.safetensors", "")


def test_weights_of_another_kind_are_told(published, tmp_path):  # noqa: F811
    file = tmp_path / "heads.safetensors"
    prompts = {"prompts": np.ones((2, 5), np.float32)}
    for kind, model, told in (
        (
            "q16",
            "none.safetensors",
            "no such file, make it by .*convert_judge --kind=q16 --source=.* --out=q16.safetensors",
        ),
        ("mhsc", file, "heads.safetensors is of q16: make it by .*--kind=mhsc"),
        ("q16", file, "of a CLIP of 5 features, and"),
    ):
        save_file(prompts, file, {"judge": "q16", "clip": os.path.relpath(published, tmp_path)})
        with pytest.raises(ValueError, match=told):
            judge_of(kind, model, (UNSAFE,) if kind == "q16" else (SEXUAL,))
    np.savez(tmp_path / "heads.npz", **prompts)
    (tmp_path / "heads.npz").rename(tmp_path / "renamed.safetensors")
    with pytest.raises(ValueError, match="renamed.safetensors is no safetensors file: .*: make it by"):
        judge_of("q16", tmp_path / "renamed.safetensors", (UNSAFE,))
    save_file(prompts, file)
    with pytest.raises(ValueError, match="no label is of its axis 'sexual'.*is of something else"):
        judge_of("q16", file, (SEXUAL,))


def test_the_command(tmp_path):
    published_q16(tmp_path / "prompts.p", 6)
    call = [sys.executable, "-m", "data_tools.convert_judge", "--kind=q16", f"--source={tmp_path / 'prompts.p'}"]
    done = subprocess.run([*call, f"--out={tmp_path / 'q16.safetensors'}"], capture_output=True, text=True)
    assert done.returncode == 0 and "--config.judge=q16 --config.judging.model=" in done.stdout, done.stderr
