import numpy as np

from livo_jax import report


def test_a_page_escapes_what_it_shows_and_needs_no_network(tmp_path):
    evil = "<script>alert(1)</script>"
    row = dict(value=evil, split="seen", metric="D1", mean=0.5, ci95=[0.4, 0.6], prompts=2, images=100)
    image = np.zeros((32, 32, 3), np.uint8)
    report.write(
        tmp_path / "report.html",
        title=evil,
        results=[row | {"method": method} for method in ("base", "livo")],
        metrics=[{"step": s, "train/loss": 1.0, "train/active_w": 1.0, "train/active_l": 1.0, "train/margin_w": 0.0,
                  "train/margin_l": 0.0} for s in (1, 2)],
        pictures=[dict(value=evil, split="seen", prompt=evil, harmful=False,
                       sides={"base": [image] * 3, evil: [image] * 3})],
        config={"model": evil},
        curves=[dict(row, method=evil, split="held_out", step=k, seconds=2.0 * k) for k in (1, 2)],
        costs=[dict(method=evil, trained_parameters=12345, training_seconds=6.0, images_per_second=70.0, of_base=0.9)],
    )  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4
    assert "http" not in page.replace("http-equiv", ""), "nothing is fetched"
    assert page.count("data:image/svg+xml") == 2 and "12,345" in page and page.count("data:image/png") == 2


def test_a_sheet_lays_images_out():
    red, blue = np.full((4, 4, 3), (255, 0, 0), np.uint8), np.full((4, 4, 3), (0, 0, 255), np.uint8)
    picture = np.asarray(report.sheet([[red, blue], [None, red]], scale=2, gap=1))
    assert picture.shape == (18, 18, 3)
    assert (picture[0, 0] == (255, 0, 0)).all() and (picture[0, -1] == (0, 0, 255)).all()
    assert (picture[-1, 0] == 255).all() and (picture[-1, -1] == (255, 0, 0)).all()
