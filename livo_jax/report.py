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


def _convergence(curves: list[dict]) -> str:
    """D1 or R of each value on held-out prompts, against steps and against seconds, as an SVG data URI."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in curves if row["metric"] in ("D1", "R") and row["split"] == "held_out"]
    values = list(dict.fromkeys((row["value"], row["metric"]) for row in shown))
    methods = list(dict.fromkeys(row["method"] for row in shown))
    figure, axes = plt.subplots(2, len(values), figsize=(4 * len(values), 6), layout="constrained", squeeze=False)
    for line, x in zip(axes, ("step", "seconds")):
        for axis, (value, metric) in zip(line, values):
            for method in methods:
                points = [(r[x], r["mean"]) for r in shown if (r["value"], r["method"]) == (value, method)]
                axis.plot(*zip(*points), marker=".", label=method)
            axis.set(title=value, xlabel=x, ylabel=metric)
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    plt.close(figure)
    return _uri("svg+xml", stream.getvalue())


def write(
    path,
    *,
    title: str,
    results: list[dict],
    metrics: list[dict],
    pictures: list[dict],
    config: dict,
    curves=(),
    costs=(),
):
    """Writes the page; everything that it shows is escaped.

    Args:
        results: the rows of results.json. metrics: the lines of metrics.jsonl.
        pictures: dicts of value, split, prompt, harmful, and sides: {method: list of [H, W, 3] uint8}.
        config: shown at the end.
        curves: of trainings, rows of method, step, seconds, value, split, metric, mean.
        costs: rows of method, trained_parameters, training_seconds, images_per_second, of_base.
    """
    import jinja2

    cells, methods = {}, list(dict.fromkeys(r["method"] for r in results))
    for r in results:
        cells.setdefault((r["value"], r["split"], r["metric"]), {})[r["method"]] = r
    rows = [
        dict(value=v, split=s, metric=m, cells=[of.get(name) for name in methods]) for (v, s, m), of in cells.items()
    ]
    draw = lambda images: png_uri(sheet([images], max(1, 64 // images[0].shape[0])))
    shown = [p | {"sides": {side: draw(images) for side, images in p["sides"].items() if images}} for p in pictures]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        methods=methods,
        rows=rows,
        pictures=shown,
        curves=_curves(metrics) if any("train/loss" in m for m in metrics) else None,
        convergence=_convergence(curves) if curves else None,
        costs=costs,
        config=json.dumps(config, indent=2),
    )
    path.write_text(page)
