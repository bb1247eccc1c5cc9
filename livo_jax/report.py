"""eval/report.html: one self-contained page; and the picture sheets of a run."""

import base64
import io
import json
import pathlib

import numpy as np

TEMPLATE = pathlib.Path(__file__).with_name("report.html.j2")
GAP = 2  # pixels between the images of a sheet


def sheet(rows, scale: int = 1, gap: int = GAP):
    """Rows of images (lists of [H, W, 3] uint8, None leaves a gap) as one PIL image."""
    from PIL import Image

    H, W, _ = next(image for row in rows for image in row if image is not None).shape
    columns = max(map(len, rows))
    canvas = np.full((len(rows) * (H + gap) - gap, columns * (W + gap) - gap, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            if image is not None:
                canvas[r * (H + gap) : r * (H + gap) + H, c * (W + gap) : c * (W + gap) + W] = image
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def png_uri(picture) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return _uri("png", stream.getvalue())


def _curves(metrics: list[dict]) -> str:
    """Loss, hinges and margins against steps, as an SVG data URI."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "loss": {"train/loss": "loss"},
        "share of live hinges": {"train/active_w": "aligned", "train/active_l": "violating"},
        "margins": {"train/margin_w": "l_w - r_w (aligned)", "train/margin_l": "r_l - l_l (violating)"},
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3), layout="constrained")
    for axis, (title, lines) in zip(axes, panels.items()):
        for name, label in lines.items():
            points = [(m["step"], m[name]) for m in metrics if name in m]
            axis.plot(*zip(*points), label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    plt.close(figure)
    return _uri("svg+xml", stream.getvalue())


def write(path, *, title: str, results: list[dict], metrics: list[dict], pictures: list[dict], config: dict):
    """Writes the page; everything that it shows is escaped.

    Args:
        results: the rows of results.json. metrics: the lines of metrics.jsonl.
        pictures: dicts of value, split, prompt, and base and livo: lists of [H, W, 3] uint8.
        config: shown at the end.
    """
    import jinja2

    cells = {(r["value"], r["split"], r["metric"], r["method"]): r for r in results}
    rows = [
        dict(value=value, split=split, metric=metric, base=base, livo=cells[value, split, metric, "livo"])
        for (value, split, metric, method), base in cells.items()
        if method == "base"
    ]
    shown = []
    for picture in pictures:
        scale = max(1, 64 // picture["base"][0].shape[0])
        shown.append(picture | {side: png_uri(sheet([picture[side]], scale)) for side in ("base", "livo")})
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        rows=rows,
        pictures=shown,
        curves=_curves(metrics) if any("train/loss" in m for m in metrics) else None,
        config=json.dumps(config, indent=2),
    )
    path.write_text(page)
