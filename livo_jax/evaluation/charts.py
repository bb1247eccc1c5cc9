"""The plots of eval/report.html (report.py), each an SVG as bytes, legible on light and on dark pages."""

import functools
import io
import itertools

import numpy as np

INK = "#010203"  # of text and axes until the SVG is written, where it becomes the viewer's own
THEME = "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"
STYLE = {name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
STYLE |= {name: "none" for name in ("figure.facecolor", "axes.facecolor", "legend.facecolor", "legend.edgecolor")}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
STYLE |= {"grid.color": INK, "axes.titlesize": 11, "legend.fontsize": 9, "svg.hashsalt": "livo_jax"}
WIDTH = 5.2  # inches, as wide as a phone shows it readably
# At least 3:1 on white and on the page's dark (WCAG 1.4.11). The base is the first of results, LiVO has its own.
GREY, GREEN = "#858585", "#22915a"
COLOURS = (
    "#4a86d8", "#d0692c", "#a45fc4", "#cf4a60", "#a67f14", "#2f8f93", "#94705c", "#6f78d0", "#c55f9c", "#66892f",
    "#b8603f", "#5a84a0",
)  # fmt: skip
MARKERS = "osD^vP<>XphH*"


def looks(methods) -> dict[str, dict]:
    """The colour and the marker of each method, the base first."""
    others = [method for method in methods[1:] if method != "livo"]
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(others)}
    colours |= {methods[0]: GREY, "livo": GREEN}
    return {m: dict(color=colours[m], marker=MARKERS[i % len(MARKERS)]) for i, m in enumerate(methods)}


def _svg(height: float, draw) -> bytes:
    """What draw(figure, axis) draws. Equal plots are equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, and no window system is looked for

    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, height), layout="constrained")
        draw(figure, figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue().replace(INK, "currentColor")
    return svg.replace("<defs>", THEME + "<defs>", 1).encode()


def _legend(figure, axis, columns: int = 3):
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def effects(title: str, rows: list[dict], methods: dict[str, str], splits: dict[str, str]) -> bytes:
    """A metric of every method with its 95% intervals, a mark for each split.

    Args:
        rows: of results.json, of one value and metric.
        methods, splits: the names of those that are shown, and their labels.
    """

    def draw(figure, axis):
        shift = np.linspace(-0.15, 0.15, len(splits)) if len(splits) > 1 else [0.0]
        for place, (method, look) in enumerate(looks(list(methods)).items()):
            for split, dy in zip(splits, shift):
                for row in (r for r in rows if (r["method"], r["split"]) == (method, split)):
                    low, high = row["ci95"] or [row["mean"]] * 2
                    face = look["color"] if split == [*splits][-1] else "none"
                    axis.hlines(place + dy, low, high, look["color"], linewidth=2)
                    axis.plot(row["mean"], place + dy, "o", color=look["color"], markerfacecolor=face)
        for split, label in splits.items():
            face = INK if split == [*splits][-1] else "none"
            axis.plot([], [], "o", color=INK, markerfacecolor=face, label=label)
        axis.set_yticks(range(len(methods)), methods.values())
        axis.invert_yaxis()
        axis.set(title=title, xlim=(min(0, axis.get_xlim()[0]), None))
        _legend(figure, axis)

    return _svg(1.3 + 0.3 * len(methods), draw)


def tradeoff(title: str, points: dict[str, tuple[float, float]], methods: dict[str, str], x: str, y: str) -> bytes:
    """A mark for each method.

    Args:
        points: method -> its place; x and y name the axes.
    """

    def draw(figure, axis):
        for method, look in looks(list(methods)).items():
            if method in points:
                axis.plot(*points[method], linestyle="", markersize=8, label=methods[method], **look)
        axis.set(title=title, xlabel=x, ylabel=y)
        _legend(figure, axis)

    return _svg(3.4 + 0.2 * len(points) / 3, draw)


def convergence(title: str, rows: list[dict], methods: dict[str, str], against: str, unit: str) -> bytes:
    """Lines of a metric, one for each method.

    Args:
        rows: dicts of method, mean, what it is drawn `against`, step or seconds, and perhaps trainings, the mean of
            each: the band from the least to the highest; of one value and metric.
    """

    def draw(figure, axis):
        for method, look in looks(list(methods)).items():
            of_method = sorted((r for r in rows if r["method"] == method), key=lambda r: r[against])
            if of_method:
                x = [r[against] for r in of_method]
                trainings = [r.get("trainings", [r["mean"]]) for r in of_method]
                axis.plot(x, [r["mean"] for r in of_method], markersize=4, label=methods[method], **look)
                axis.fill_between(x, [*map(min, trainings)], [*map(max, trainings)], alpha=0.15, color=look["color"])
        axis.set(title=title, xlabel=unit, ylim=(min(0, axis.get_ylim()[0]), None))
        _legend(figure, axis)

    return _svg(3.2, draw)


def sweep(title: str, labels: list[str], lines: dict[str, list[dict | None]], base: dict[str, float]) -> bytes:
    """Metrics, with their 95% intervals, of the settings of a sweep.

    Args:
        labels: of the settings, in the order of the axis.
        lines: for each metric the row of results.json of each setting, None where there is none.
        base: of each metric, drawn as a dotted line.
    """

    def draw(figure, axis):
        shift = np.linspace(-0.12, 0.12, len(lines)) if len(lines) > 1 else [0.0]
        between = all(label.replace(".", "", 1).isdigit() for label in labels)  # names have nothing between them
        for (name, rows), colour, marker, dx in zip(lines.items(), (GREEN, *COLOURS), MARKERS, shift):
            shown = [(p + dx, row["mean"], row["ci95"] or [row["mean"]] * 2) for p, row in enumerate(rows) if row]
            x, y, ends = zip(*shown)
            axis.vlines(x, *zip(*ends), colour, linewidth=1.5)
            axis.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=between, label=name)
            axis.axhline(base[name], color=colour, linestyle=":", linewidth=1)
        axis.set_xticks(range(len(labels)), labels)
        axis.set(title=title, xlim=(-0.5, len(labels) - 0.5), ylim=(min(0, axis.get_ylim()[0]), None))
        _legend(figure, axis, columns=1)  # statements are long

    return _svg(3 + 0.2 * len(lines), draw)


def shares(lines: dict[str, tuple], x: str, y: str) -> bytes:
    """Lines of shares against shares, as of a curve over thresholds.

    Args:
        lines: label -> the places on both axes, 0 to 1; x and y name the axes.
    """

    def draw(figure, axis):
        for (label, places), colour in zip(lines.items(), itertools.cycle((GREEN, *COLOURS))):
            axis.plot(*places, color=colour, marker=".", markersize=3, linewidth=1.5, label=label)
        axis.set(xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        _legend(figure, axis, columns=2)

    return _svg(4 + 0.1 * len(lines), draw)


def training(metrics: list[dict]) -> dict[str, bytes]:
    """Loss, hinges and margins of the lines of metrics.jsonl against steps, by what they show."""
    panels = {
        "loss": {"train/loss": "loss"},
        "share of live hinges": {"train/active_w": "aligned", "train/active_l": "violating"},
        "margins": {"train/margin_w": "l_w - r_w (aligned)", "train/margin_l": "r_l - l_l (violating)"},
    }

    def draw(title, lines, figure, axis):
        for (name, label), colour in zip(lines.items(), (GREEN, COLOURS[1])):
            points = [(m["step"], m[name]) for m in metrics if name in m]
            axis.plot(*zip(*points), color=colour, label=label)
        axis.set(title=title, xlabel="step")
        _legend(figure, axis)

    shown = {title: lines for title, lines in panels.items() if any(name in m for m in metrics for name in lines)}
    return {title: _svg(2.8, functools.partial(draw, title, lines)) for title, lines in shown.items()}
