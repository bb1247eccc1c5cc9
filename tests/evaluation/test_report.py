"""The page of an evaluation, its words and in a real browser; sheets of images."""

import base64
import csv
import io
import pathlib
import re

import numpy as np

from livo_jax.evaluation import report
from livo_jax.files import images

EVIL = "<script>alert(1)</script>"


def write(path, value="shape equality", methods=("base", "livo", "words", "sld"), board=None, **of_row) -> list[dict]:
    image = np.zeros((32, 32, 3), np.uint8)
    row = dict(value=value, split="held_out", prompts=2, images=100) | of_row
    means = dict(zip(methods, (0.8, 0.1, 0.05, 0.6)))
    results = [
        row | dict(method=method, metric=metric, mean=mean, ci95=[mean / 2, mean])
        for metric in ("D1", "recognised", "over_refusal")
        for method, mean in means.items()
    ]
    report.write(
        path,
        title=value,
        results=results,
        metrics=[{"step": s, "train/loss": 1.0, "train/active_w": 1.0, "train/active_l": 1.0, "train/margin_w": 0.0,
                  "train/margin_l": 0.0} for s in (1, 2)],
        pictures=[dict(value=value, split="held_out", prompt=value, harmful=True,
                       sides={method: [image] * 3 for method in methods},
                       applied={methods[0]: [], methods[1]: [1, 3]})],
        config={"model": value},
        curves=[dict(row, metric="D1", method=methods[1], mean=0.5, step=k, seconds=2.0 * k) for k in (1, 2)],
        costs=[dict(method=methods[1], trained_parameters=12345, training_seconds=6.0, images_per_second=70.0,
                    of_base=0.9)],
        numbers={(methods[1], value, "held_out", "D1"): {value: (0.1, 100, None, (0.1, 0.1))}},
        differences=[dict(method=methods[1], other=methods[-1], value=value, split="held_out", metric="D1", prompts=2,
                          difference=-0.123, p_value=0.5, p_holm=0.75, family="one against others")],
        sweeps=[("loss.alpha", [("0", methods[1], ""), (EVIL, "gone", ""), ("1", methods[-1], "")])],
        board=board,
    )  # fmt: skip
    return results


def test_a_page_escapes_what_it_shows_and_needs_no_network(tmp_path):
    write(tmp_path / "report.html", EVIL, ("base", EVIL))
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 6
    assert "http" not in page.replace("http-equiv", ""), "nothing is fetched"
    svgs = [base64.b64decode(uri) for uri in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)]
    assert len(svgs) == 7 and not any(b"<script" in svg for svg in svgs)
    assert "-0.123" in page and "0.5000" in page and "0.7500" in page and len(page.split('download="')) == 9
    assert ": the value is on 0 of 3 images<" in page and ": the value is on 2 of 3 images, number 1, 3<" in page
    assert "12,345" in page and page.count("data:image/png") == 2


def test_a_plot_of_one_split_is_of_held_out_prompts(monkeypatch):
    """Wherever their rows stand: wordings that no pair had are splits too."""
    monkeypatch.setattr(report.charts, "sweep", lambda title, labels, lines, base: lines)
    shares = {"seen": 0.1, "held_out": 0.2, "spelled_around": 0.3}
    rows = [
        dict(method=method, value="harm", split=split, metric="R", mean=mean, ci95=None)
        for split, mean in shares.items()
        for method in ("base", "livo")
    ]
    (lines,) = report._sweeps(rows, ["harm"], [("alpha", [("0", "livo", "")])]).values()
    assert [row["mean"] for row in lines["harm: R"]] == [0.2]


def test_a_board_is_escaped_and_before_all_else(tmp_path):
    table = dict(section=EVIL, title=EVIL, header=[EVIL], lines=[(EVIL, [(EVIL, EVIL)])])
    agreement = [
        dict.fromkeys(("judge", "other", "value", "reads", "method"), EVIL) | dict(mean=0.5, ci95=None, images=4)
    ]
    card = {"asks": EVIL, "not_measured": [EVIL]}
    write(tmp_path / "report.html", board=dict(
        tables=[table], agreement=agreement, card=card, files={"board.md": EVIL}, further=[EVIL],
    ))  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 10 and "several judges read them" in page
    assert page.index("The board") < page.index("Results") < page.index("All numbers of the first judge")
    assert 'download="board.md"' in page and "Not measured" in page


def test_intervals_say_what_they_are_over(tmp_path):
    told = {}
    for name, of_row in {"one": {}, "three": {"trainings": [0.1, 0.2, 0.3]}}.items():
        write(tmp_path / name, **of_row)
        told[name] = " ".join((tmp_path / name).read_text().split())
    assert "of other prompts, not of other trainings. Imbalance" in told["one"]
    assert "of other prompts and of other trainings, of which there are 3. Imbalance" in told["three"]


def test_the_headline_says_what_fell_and_who_is_ahead(tmp_path):
    write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "imbalance 0.80 in images of the base model, 0.10 with LiVO, whose subjects are recognised in 10.0%" in page
    assert "the lowest is words&#39;s, 0.05 at 5.0% recognised." in page


def test_the_headline_says_what_it_costs():
    """Each method on the prompts where it changes the most of what it should leave alone."""
    means = {"seen": dict(base=0.01, livo=0.02, sld=0.5), "other_words": dict(base=0.0, livo=0.03, sld=0.4)}
    cells = {
        ("harm", split, "over_refusal"): {method: {"mean": mean} for method, mean in of.items()}
        for split, of in means.items()
    }
    text = report._cost("harm", cells, ["base", "livo", "sld"])
    assert "set of prompts: 3.0% with LiVO, 50.0% with sld (1.0% of the base model's own cannot be read)." in text
    for of in cells.values():
        of |= {"dpo": {"mean": 0.01}, "words": {"mean": 0.7}}
    text = report._cost("harm", cells, ["base", "livo", "sld", "dpo", "words"])
    assert "prompts: 3.0% with LiVO, the lowest 1.0% with dpo, the highest 70.0% with words (" in text
    assert report._cost("another", cells, ["base", "livo"]) == ""


def test_a_browser_shows_it(tmp_path, browser):
    results = write(tmp_path / "report.html")
    page, messages = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark"), []
    page.on("console", lambda message: messages.append(message.text))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390, "a phone need not scroll sideways"
    decoded = "images => Promise.all(images.map(image => image.decode().then(() => image.naturalWidth)))"
    shown = page.locator("img").evaluate_all(decoded)
    assert len(shown) == 12 and all(shown)

    harmful, filter_of = page.locator("figure.harmful img").first, "image => getComputedStyle(image).filter"
    assert "blur" in harmful.evaluate(filter_of)
    page.get_by_label("show these images").focus()
    page.keyboard.press("Space")
    assert harmful.evaluate(filter_of) == "none"

    with page.expect_download() as download:
        page.get_by_role("link", name="results.csv").click()
    rows = list(csv.DictReader(pathlib.Path(download.value.path()).read_text().splitlines()))
    assert [(r["method"], float(r["mean"]), float(r["ci95_low"])) for r in rows] == [
        (r["method"], r["mean"], r["ci95"][0]) for r in results
    ]
    assert not messages
    page.close()


def test_cells_are_texts_and_numbers_never_formulas():
    rows = [{"prompt": '=HYPERLINK("x")', "red": -1.5}, {"prompt": 'a "b",\n@c', "red": float("nan"), "more": None}]
    text = report.as_csv([*rows, {"prompt": "@SUM(A1)"}, {"prompt": "-2"}])
    assert list(csv.DictReader(io.StringIO(text))) == [
        {"prompt": "'=HYPERLINK(\"x\")", "red": "-1.5", "more": ""}, {"prompt": 'a "b",\n@c', "red": "", "more": ""},
        {"prompt": "'@SUM(A1)", "red": "", "more": ""}, {"prompt": "'-2", "red": "", "more": ""},
    ]  # fmt: skip


def test_a_sheet_lays_images_out():
    red, blue = np.full((4, 4, 3), (255, 0, 0), np.uint8), np.full((4, 4, 3), (0, 0, 255), np.uint8)
    picture = np.asarray(images.sheet([[red, blue], [None, red]], scale=2))
    assert picture.shape == (20, 20, 3)
    assert (picture[0, 0] == (255, 0, 0)).all() and (picture[0, -1] == (0, 0, 255)).all()
    assert (picture[-1, 0] == 255).all() and (picture[-1, -1] == (255, 0, 0)).all()
