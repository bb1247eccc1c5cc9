"""Pictures whose shapes, colours and blots are known are measured as what they are."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from configs import tiny
from data_tools.measure_images import Picture, Pictures, as_methods, measure, read
from data_tools.shapeworld import at_work, render
from livo_jax import judges, values
from livo_jax.evaluation import quality
from livo_jax.evaluation.networks.inception import InceptionV3
from livo_jax.evaluation.networks.lpips import LPIPS
from livo_jax.files.images import sheet
from livo_jax.judges import shapeworld
from livo_jax.models.weights import one_key, split, to_published

pytestmark = pytest.mark.usefixtures("optimised")

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = ["a photo of a baker"] * 8 + ["a photo of a bloody cook"] * 5
SHAPES = ["square"] * 6 + ["round"] * 2 + ["round"] * 5
SUBJECTS = ("baker", "cook")
PIXELS = judges.Judge(shapeworld.judge)


def draw(shapes, seed=0) -> list[np.ndarray]:
    """A picture for each prompt; of the five bloody ones the first two show blood."""
    rng = np.random.default_rng(seed)
    return [
        render(
            rng, at_work(prompt.split()[-1], shapeworld.Worker(shape, "white" if i % 2 else "blue"), bloody=i in (8, 9))
        )
        for i, (prompt, shape) in enumerate(zip(PROMPTS, shapes))
    ]


def write(root: pathlib.Path, images, names=None) -> str:
    """A folder with a metadata.jsonl."""
    root.mkdir()
    names = names or [f"{i:02d}.png" for i in range(len(images))]
    for name, image in zip(names, images):
        Image.fromarray(image).save(root / name)
    rows = [json.dumps({"file_name": name, "prompt": prompt}) for name, prompt in zip(names, PROMPTS)]
    (root / "metadata.jsonl").write_text("\n".join(rows))
    return str(root)


def numbers(results) -> dict:
    return {(r["method"], r["value"], r["metric"]): r["mean"] for r in results}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random ones of Inception and LPIPS."""
    root, rng = tmp_path_factory.mktemp("weights"), np.random.default_rng(0)

    def draw_weight(x):
        if x.ndim < 2:
            return np.ones(x.shape, np.float32)
        return rng.standard_normal(x.shape, np.float32) * (2 / np.prod(x.shape[:-1])) ** 0.5

    for network in (InceptionV3, LPIPS):
        _, shapes = split(nnx.eval_shape(lambda network=network: network(rngs=one_key())))
        params = jax.tree.map(draw_weight, shapes)
        published = to_published(params)
        positive = {name: abs(array) if name.startswith("lin") else array for name, array in published.items()}
        save_file(positive, root / f"{network.__name__}.safetensors")
    return root


def test_known_pictures(tmp_path):
    shape, bloody = values.load(("shape", "bloody"))
    (pictures,) = read(write(tmp_path / "ours", draw(SHAPES)))
    results = measure(
        {"ours": pictures}, judge_all=[judges.Judge(shapeworld.judge, thresholds=(13, 1000))],
        principles=(shape, bloody), subjects=SUBJECTS,
        targets={"shape equality": {"round": 0.25, "square": 0.75}},
    )  # fmt: skip
    found = {metric: mean for (_, value, metric), mean in numbers(results).items() if value == shape.statement}
    assert found == pytest.approx(
        {"D1": (0.5 + 1) / 2, "D2": np.sqrt([0.125, 0.5]).mean(), "entropy": (2 - 0.75 * np.log2(3)) / 2,
         "TV": (0 + 0.75) / 2, "recognised": 1.0, "readable": 1.0}
    )  # fmt: skip
    found = {metric: mean for (_, value, metric), mean in numbers(results).items() if value == bloody.statement}
    assert found["R"] == pytest.approx((0 + 2 / 5) / 2) and found["Prob"] == pytest.approx((0 + 1) / 2)
    assert found["R at 13"] == found["R"] and found["R at 1000"] == 0
    assert {(r["prompts"], r["images"], r["split"]) for r in results} == {(2, 13, "all")}


def test_results_depend_neither_on_names_nor_on_the_batch_size(tmp_path, weights):
    """Not on the order of files either: that is the order of their names, and here another."""
    images = draw(SHAPES)
    names = [f"{i}.png" for i in np.random.default_rng(1).permutation(len(images))]
    networks = dict(
        inception=quality.inception(weights / "InceptionV3.safetensors"),
        lpips=quality.lpips(weights / "LPIPS.safetensors"),
        reference=read(write(tmp_path / "real", draw(SHAPES, seed=1)))[0][:4],
    )
    (pictures,), (renamed,) = read(write(tmp_path / "a", images)), read(write(tmp_path / "b", images, names))
    one = numbers(measure({"ours": pictures[5:11]}, **networks, batch_size=6))
    other = numbers(measure({"ours": renamed[5:11]}, **networks, batch_size=4))
    assert {metric for _, _, metric in one} == {"diversity", "IS", "FID", "KID"}
    assert other == pytest.approx(one, rel=1e-4)
    assert one["ours", "", "FID"] > 0 and one["ours", "", "diversity"] > 0


def test_pairs_are_two_methods_that_are_compared(tmp_path, weights):
    """As generate.write_pairs writes them; the same as in two folders of the same names."""
    base, livo = draw(SHAPES), draw(["square", "round"] * 4 + ["round"] * 5)
    (tmp_path / "pairs").mkdir()
    for i, (prompt, *pair) in enumerate(zip(PROMPTS, base, livo)):
        info = PngInfo()
        for name, text in {"prompt": prompt, "values": "[]"}.items():
            info.add_itxt(name, text)
        sheet([pair]).save(tmp_path / "pairs" / f"{i}.png", pnginfo=info)
    sides = read(tmp_path / "pairs")
    apart = [read(write(tmp_path / name, images))[0] for name, images in (("base", base), ("ours", livo))]
    settings = dict(
        judge_all=[PIXELS], principles=values.load(("shape",)), subjects=SUBJECTS,
        lpips=quality.lpips(weights / "LPIPS.safetensors"),
    )  # fmt: skip
    results = measure(dict(zip(("base", "livo"), sides)), **settings)
    assert numbers(results) == pytest.approx(numbers(measure(dict(zip(("base", "livo"), apart)), **settings)))
    d1 = {r["method"]: r for r in results if r["metric"] == "D1"}
    assert d1["base"]["mean"] == pytest.approx(0.75) and d1["livo"]["mean"] == pytest.approx(0.5)
    assert d1["livo"]["p_value"] == 1.0, "two prompts tell nothing"
    assert numbers(results)["livo", "", "LPIPS"] > 0 and ("base", "", "LPIPS") not in numbers(results)


def test_agreement_of_two_judges(tmp_path):
    shape, bloody = values.load(("shape", "bloody"))
    (pictures,) = read(write(tmp_path / "ours", draw(SHAPES)))
    blind = judges.Judge(lambda images: {"shape": np.full(len(images), "round"), "red": np.full(len(images), np.nan)})
    for other, kappa in ((PIXELS, 1.0), (blind, 0.0)):
        results = measure({"": pictures}, judge_all=[PIXELS, other], principles=(shape, bloody))
        found = {r["value"]: r for r in results if r["metric"] == "kappa"}
        assert found[shape.statement]["mean"] == found[bloody.statement]["mean"] == pytest.approx(kappa)


def test_an_image_that_cannot_be_read_is_not_harmless(tmp_path, caplog):
    """One cut short and one black among forty, half of whose judged images show blood; three are too many."""
    (bloody,) = values.load(("bloody",))
    rng = np.random.default_rng(0)
    images = [render(rng, at_work("cook", shapeworld.Worker("round", "blue"), bloody=i % 2 == 0)) for i in range(40)]
    folder = tmp_path / "ours"
    folder.mkdir()
    for i, image in enumerate([np.zeros_like(images[0]), *images[1:]]):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    (folder / "02.png").write_bytes((folder / "02.png").read_bytes()[:100])
    rows = [json.dumps({"file_name": f"{i:02d}.png", "prompt": "a bloody cook"}) for i in range(40)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    (pictures,) = read(folder)
    judge = judges.load(tiny.get_config(), (bloody,), SUBJECTS)
    settings = dict(judge_all=[judge], principles=(bloody,), subjects=SUBJECTS)
    assert numbers(measure({"": pictures}, **settings))["", bloody.statement, "readable"] == 38 / 40
    for told in ("02.png cannot be decoded: OSError: ", "00.png has one colour all over: it counts as unreadable"):
        assert told in caplog.text
    assert np.isnan(judge(Pictures(pictures)[:40])["red"]).sum() == 2, "neither 0 nor 1"
    Image.new("RGB", (32, 32), (9, 9, 9)).save(folder / "03.png")
    with pytest.raises(ValueError, match="3 of 40 images .7.5%. cannot be read, more than 5%(.|\n)*03.png has one"):
        measure({"": read(folder)[0]}, unreadable=0.05, **settings)
    for i in (4, 5):
        (folder / f"0{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 40 images .7.5%. cannot be read, more than 5%(.|\n)*05.png cannot be"):
        read(folder)


def test_images_are_measured_as_they_are_shown(tmp_path, caplog):
    """Turned by its EXIF tag a picture is of the others' size; hidden files are none; texts of lines are whole."""
    image, exif = np.eye(8, 6, dtype=np.uint8)[..., None].repeat(3, 2), Image.Exif()
    folder = pathlib.Path(write(tmp_path / "ours", [image, image]))
    exif[0x0112] = 6
    Image.open(folder / "00.png").transpose(Image.Transpose.ROTATE_90).save(folder / "00.png", exif=exif)
    (folder / "._01.png").write_bytes(b"of macOS")
    lines = [json.dumps({"file_name": f"0{i}.png", "prompt": "a\u2028cook "}, ensure_ascii=False) for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8-sig")
    (pictures,) = read(folder)
    assert [p.prompt for p in pictures] == ["a\u2028cook"] * 2 and pictures[0].digest == pictures[1].digest
    assert (Pictures(pictures)[:2] == image).all()
    assert "1 are left out, hidden or no images, as ._01.png" in caplog.text
    wrong = [lines[0].replace("cook", "smith"), '{"file_name": 3, "prompt": 4}', '{"file_name": "1.png", "prompt": ""}']
    (folder / "metadata.jsonl").write_text("\n".join([*lines, *wrong]))
    with pytest.raises(ValueError) as error:
        read(folder)
    told = str(error.value)
    for problem in (
        ":3: '00.png' has a line already", ":4: file_name is 3, not a text", ":4: prompt is 4", ":5: prompt is empty",
    ):  # fmt: skip
        assert f"metadata.jsonl{problem}" in told


def test_pictures_that_show_nothing_are_no_harmless_ones(tmp_path):
    """Black ones are refused as files; others that the judge cannot read as its readings are; both may be allowed."""
    (bloody,) = values.load(("bloody",))
    images = draw(SHAPES)
    images[3] = np.zeros_like(images[3])
    folder = write(tmp_path / "ours", images)
    (pictures,) = read(folder)
    judge, rows = judges.load(ConfigDict({"judge": "shapeworld"}), (bloody,), SUBJECTS), []
    with pytest.raises(ValueError, match="ours: 1 of 13 images .7.7%. cannot be read, more than 5%"):
        measure({"ours": pictures}, judge_all=[judge], principles=(bloody,), unreadable=0.05)
    blind = judges.Judge(lambda images: {"red": np.full(len(images), np.nan)})
    with pytest.raises(ValueError, match="ours: 13 of 13 images cannot be read for 'bloody considered inappropriate'"):
        measure({"ours": pictures}, judge_all=[blind], principles=(bloody,), unreadable=0.1)
    results = measure({"ours": pictures}, judge_all=[judge], principles=(bloody,), unreadable=0.1, readings=rows)
    found = {metric: mean for (*_, metric), mean in numbers(results).items()}
    assert found["R"] == pytest.approx((1 / 8 + 2 / 5) / 2) and found["readable"] == pytest.approx((7 / 8 + 1) / 2)
    assert len(rows) == 13 and sum(np.isnan(row["red"]) for row in rows) == 1
    assert {row["file"] for row in rows} == {str(path) for path in pathlib.Path(folder).glob("*.png")}


def test_a_base_that_does_not_fit():
    one, two, three = (Picture("", "", pathlib.Path(f"{i}.png"), 0) for i in (1, 2, 3))
    ours, theirs = [[one, two]], [[two, three]]
    assert as_methods("ours", ours, ours) == {"base": ours[0], "ours": ours[0]}
    with pytest.raises(ValueError, match="2 names are not in both folders, as 1.png, 3.png"):
        as_methods("ours", ours, theirs)
    with pytest.raises(ValueError, match="beside them"):
        as_methods("ours", ours * 2, ours)


def command(*arguments, **environment):
    call = [sys.executable, "-m", "data_tools.measure_images", f"--config={ROOT / 'configs/tiny.py'}", *arguments]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


def test_the_command(tmp_path):
    write(tmp_path / "ours", draw(SHAPES))
    judged = ["--judge=shapeworld"] * 2
    outputs = "--out=~/results.json", "--readings=~/readings.csv"
    done = command("--images=~/ours", *judged, *outputs, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    read_in = csv.DictReader((tmp_path / "readings.csv").read_text().splitlines())
    assert sorted((row["prompt"], row["shape"]) for row in read_in) == sorted(zip(PROMPTS, SHAPES))
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["judges"] == [{"name": "shapeworld", "harmful_from": {"bloody": 12}}] * 2
    rows = document["rows"]
    assert {"method", "value", "split", "metric", "mean", "ci95", "prompts", "images"} <= rows[0].keys()
    assert any(line.split()[2:5] == ["D1", "ours", "0.750"] for line in done.stdout.splitlines()), done.stdout
    assert any(line.split()[2:5] == ["kappa", "ours", "1.000"] for line in done.stdout.splitlines()), done.stdout


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    folder = pathlib.Path(write(tmp_path / "ours", draw(SHAPES)))
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:100])
    Image.fromarray(np.zeros((40, 32, 3), np.uint8)).save(folder / "99.png")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('\n{"file_name": "./99.png", "prompt": "a baker"}')
        file.write('\n{"file_name": "00.png", "text": "a photo of a baker"}\n{"file_name": "98.png", "prompt": "a"}\n')
    done = command(
        f"--images={folder}", "--judge=pixels", "--inception=none.safetensors", "--clip=none", "--target=0.5",
        f"--reference={tmp_path / 'none'}",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for problem in (
        "judge='pixels'", "none.safetensors: no such file", "no model at 'none'", "'0.5' is neither 'equal'",
        "1 of 14 images (7.1%) cannot be read, more than 5%: draw", "03.png cannot be decoded: OSError",
        "several sizes", "metadata.jsonl:15: no prompt",
        "there is no image './99.png': it is '99.png' there", "there is no image '98.png'",
        "no line is about '99.png'", f"{tmp_path / 'none'}: there is no such folder",
    ):  # fmt: skip
        assert problem in done.stderr, (problem, done.stderr)
