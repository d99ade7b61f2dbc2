"""The figures of the report, drawn with matplotlib, and the colours that page and figures share."""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from cyclefit.records import (
    BEAM,
    GREEDY,
    IMAGE_CYCLE,
    ORACLE,
    SINGLE,
    TEXT_CYCLE,
    Candidate,
    Curve,
    Model,
    Row,
    Split,
)
from cyclefit.report.tables import about, known, metric_names, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008); yellow is left out, it vanishes on white.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c")
MARKERS = "os^DvPX"
# The page replaces these by its own variables, so that embedded figures follow light and dark.
INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6470", "#dfe3e8", "#ffffff"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}
THEME[PALETTE[0]] = "var(--blue)"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # A "$" in a model's name is a dollar sign.
    "text.parse_math": False,
}
WIDTH = 4.5
SCORES = {
    IMAGE_CYCLE: "similarity of source and regenerated image",
    TEXT_CYCLE: "similarity of prompt and the image's caption",
}
"""What an axis calls a score."""
TABLE_ONLY = {"CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "R@5", "R@10", "distinct-1", "distinct-2", "self-BLEU"}
"""Metrics without a figure of their own, because it would look like that of a related metric."""
Render = Callable[..., Markup]
"""`render` with the place and the name of a split's figures filled in."""


def color(model: Model) -> str:
    """The model's colour in every table and figure."""
    return PALETTE[model.color_index % len(PALETTE)]


def css_color(model: Model) -> str:
    """The same for the page, which may be dark."""
    return THEME.get(color(model), color(model))


def marker(model: Model) -> str:
    """The model's marker in every figure."""
    return MARKERS[model.color_index % len(MARKERS)]


def slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w-]+", "-", text).strip("-") or "x"


# ---- files


def render(stem: Path, name: str, label: str, draw: Callable[..., "Figure"], *inputs, data: list[dict]) -> Markup:
    """Draw `draw(*inputs)` into `stem`.svg and `stem`.png, and write `data`, the numbers it shows, into `stem`.csv.

    Returns the svg as an element in the page's colours, with ids that begin with `name`.
    """
    import matplotlib

    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": stem.name}):
        figure = draw(*inputs)
        figure.savefig(f"{stem}.svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # keeps the layout: finding it takes as long as drawing
        figure.savefig(f"{stem}.png", dpi=200)
    write_csv(Path(f"{stem}.csv"), data)
    return _inline(Path(f"{stem}.svg").read_text(encoding="utf-8"), name, label)


def _inline(svg: str, name: str, label: str) -> Markup:
    view_box = re.search(r'viewBox="[^"]*"', svg).group()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # Ids are global in a page.
    prefix = re.sub(r"\W", "-", name)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = body.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for drawn, themed in THEME.items():
        body = re.sub(rf"(?<=: ){drawn}\b", themed, body)
    return Markup('<svg {} role="img" aria-label="{}">{}').format(Markup(view_box), label, Markup(body))


# ---- what is drawn of a split


def comparisons(render: Render, rows: list[Row], models: dict[str, Model]) -> list[Markup]:
    """A figure for each metric: all rows of the table."""
    figures = []
    for metric in metric_names(rows):
        shown = [row for row in rows if metric in row.metrics and row.metrics[metric].value is not None]
        if shown and metric.split(" (")[0] not in TABLE_ONLY:
            data = [
                {name: getattr(row, name) for name in ("model", "decoding", "selection")} | known(row.metrics[metric])
                for row in shown
            ]
            name = f"comparison-{slug(metric)}"
            figures.append(render(name, f"{metric} of every row", comparison, shown, metric, models, data=data))
    return figures


def ranks(render: Render, content: Split, models: dict[str, Model]) -> list[Markup]:
    """A figure for each metric and judge: the curves of all models."""
    figures = []
    for metric, selection in dict.fromkeys((curve.metric, curve.selection) for curve in content.rank_curves):
        curves = [curve for curve in content.rank_curves if (curve.metric, curve.selection) == (metric, selection)]
        if any(point.value is not None for curve in curves for point in curve.values):
            name, label = f"rank-{slug(metric)}-{slug(selection)}", f"{metric} against the rank by {selection}"
            figures.append(render(name, label, rank_curves, curves, content.rows, models, data=_points(curves)))
    return figures


def counts(render: Render, curves: list[Curve]) -> list[Markup]:
    """A figure for each model and metric: the curves of all judges."""
    figures = []
    for model, metric in dict.fromkeys((curve.model, curve.metric) for curve in curves):
        own = [curve for curve in curves if (curve.model, curve.metric) == (model, metric)]
        name, label = f"counts-{slug(metric)}-{slug(model)}", f"{metric} of the best of n for {model}"
        figures.append(render(name, label, count_curves, own, data=_points(own)))
    return figures


def _points(curves: list[Curve]) -> list[dict]:
    return [about(curve) | known(point) for curve in curves for point in curve.values]


def boxes(
    render: Render, candidates: list[Candidate], models: dict[str, Model], score: str, metric: str
) -> list[Markup]:
    """A figure for each model of at least 20 candidates: the metric in bins of the score, on a common scale."""
    bins = {}
    for name in models:
        rows = [
            (row.scores[score], row.metrics[metric])
            for row in candidates
            if row.model == name and score in row.scores and metric in row.metrics
        ]
        if len(rows) >= 20:
            bins[name] = score_bins(*np.array(rows, dtype=float).T)
    everything = [values for groups in bins.values() for _, values in groups]
    top = 1.05 * max((float(np.percentile(values, 95)) for values in everything), default=0.0) or 1.0
    return [
        render(
            f"score-{slug(metric)}-{slug(score)}-{slug(name)}",
            f"{metric} in bins of {score} for {name}",
            *(score_boxes, groups, score, metric, name, models[name], top),
            data=[_bin(place, center, values) for place, (center, values) in enumerate(groups, 1)],
        )
        for name, groups in bins.items()
    ]


def _bin(place: int, center: float, values: np.ndarray) -> dict:
    names = ("5th percentile", "1st quartile", "median", "3rd quartile", "95th percentile")
    shown = dict(zip(names, map(float, np.percentile(values, (5, 25, 50, 75, 95))), strict=True))
    return {"bin": place, "mean score": center, "candidates": len(values), "mean": float(values.mean())} | shown


def score_bins(scores: np.ndarray, values: np.ndarray, most: int = 8) -> list[tuple[float, np.ndarray]]:
    """Candidates in at most `most` bins of equal count along the score: (mean score, metric values) per bin.

    Bins hold at least ten candidates where there are ten.
    """
    order = np.argsort(scores, kind="stable")
    parts = np.array_split(order, max(1, min(most, len(order) // 10)))
    return [(float(scores[part].mean()), values[part]) for part in parts]


# ---- drawing


def new_axes(height: float) -> tuple["Figure", "Axes"]:
    """A figure of the page's width and a height in inches, with its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def shorten(name: str, length: int = 24) -> str:
    """A name cut to a length."""
    return name if len(name) <= length else name[: length - 1] + "…"


def comparison(rows: list[Row], metric: str, models: dict[str, Model]) -> "Figure":
    """One dot with its interval per row, grouped by model; the oracle is hollow because it reads the references."""
    positions, labels, y = [], [], 0.0
    figure, axes = new_axes(0.55 + 0.165 * (len(rows) + 1.3 * len({row.model for row in rows})))
    for name, model in models.items():
        group = [row for row in rows if row.model == name]
        if not group:
            continue
        positions.append(y)
        labels.append((shorten(name), True))
        for row in group:
            y += 1
            entry = row.metrics[metric]
            low, high = (entry.value if end is None else end for end in (entry.low, entry.high))
            axes.plot([low, high], [y, y], color=color(model), linewidth=1.6, solid_capstyle="round")
            face = PAPER if row.selection == ORACLE else color(model)
            style = {"markersize": 5, "markeredgewidth": 1.2, "markeredgecolor": color(model), "markerfacecolor": face}
            axes.plot([entry.value], [y], marker(model), **style)
            positions.append(y)
            labels.append((shorten(", ".join(filter(None, (row.decoding, row.selection))), 30), False))
        y += 1.3
    axes.set_yticks(positions, [label for label, _ in labels])
    for tick, (_, heading) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_color(INK if heading else MUTED)
        tick.set_fontweight("bold" if heading else "normal")
    for line, (_, heading) in zip(axes.get_ygridlines(), labels, strict=True):
        line.set_visible(not heading)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(y - 0.5, -0.8)
    axes.set_xlabel(metric)
    return figure


def rank_curves(curves: list[Curve], rows: list[Row], models: dict[str, Model]) -> "Figure":
    """Quality against reconstruction rank, arXiv 2212.12249 Figure 3: rank 1 is the candidate that is kept."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_axes(2.9)
    metric, selection = curves[0].metric, curves[0].selection
    for curve in curves:
        points = [point for point in curve.values if point.value is not None]
        if not points:
            continue
        model = models[curve.model]
        style = {"color": color(model), "linewidth": 1.6}
        band = {"color": color(model), "linewidth": 0}
        rank, value = [point.rank for point in points], [point.value for point in points]
        axes.fill_between(rank, [p.low for p in points], [p.high for p in points], alpha=0.16, **band)
        if len(curves) == 1:
            axes.fill_between(rank, [p.q1 for p in points], [p.q3 for p in points], alpha=0.09, **band)
        axes.plot(rank, value, marker(model) + "-", markersize=4, label=shorten(curve.model), **style)
        axes.axhline(_single(rows, curve.model, metric), linestyle=(0, (4, 3)), alpha=0.8, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(f"rank by {selection} (1 = kept)")
    axes.set_ylabel(metric)
    figure.legend(loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.4)
    return figure


def _single(rows: list[Row], model: str, metric: str) -> float | None:
    """The metric of one sample that nothing chooses."""
    of_model = [row for row in rows if row.model == model and row.selection == SINGLE]
    return next(row.metrics[metric].value for row in of_model if row.decoding not in (GREEDY, BEAM))


def count_curves(curves: list[Curve]) -> "Figure":
    """The best of n against n, one line for each judge; the oracle is dashed."""
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    figure, axes = new_axes(2.9)
    for place, curve in enumerate(curves):
        points = [point for point in curve.values if point.value is not None]
        counts = [point.n for point in points]
        bound = curve.selection == ORACLE
        shade = MUTED if bound else PALETTE[place % len(PALETTE)]
        line = "--" if bound else MARKERS[place % len(MARKERS)] + "-"
        low, high = [point.low for point in points], [point.high for point in points]
        axes.fill_between(counts, low, high, color=shade, alpha=0.12, linewidth=0)
        style = {"color": shade, "linewidth": 1.3, "markersize": 4, "label": shorten(curve.selection, 30)}
        axes.plot(counts, [point.value for point in points], line, **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted({point.n for curve in curves for point in curve.values}))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("candidates chosen from")
    axes.set_ylabel(curves[0].metric)
    figure.legend(loc="outside upper left", ncols=2, handlelength=2.2, columnspacing=1.4)
    return figure


def score_boxes(
    bins: list[tuple[float, np.ndarray]], score: str, metric: str, name: str, model: Model, top: float
) -> "Figure":
    """Quality in bins of the score, arXiv 2212.12249 Figure 4: quartiles, 5th and 95th percentile, mean."""
    figure, axes = new_axes(2.7)
    at = np.arange(1, len(bins) + 1)
    values = [value for _, value in bins]
    line = {"color": color(model), "linewidth": 1}
    axes.boxplot(
        values,
        positions=at,
        widths=0.6,
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": color(model) + "38", "edgecolor": color(model), "linewidth": 1},
        medianprops={"color": color(model), "linewidth": 1.6},
        whiskerprops=line,
        capprops=line,
    )
    axes.plot(at, [value.mean() for value in values], "o-", color=INK, linewidth=1.2, markersize=3.5, label="mean")
    axes.set_xticks(at, [f"{center:.3g}" for center, _ in bins])
    axes.grid(axis="x", visible=False)
    axes.set_ylim(min(0, *(float(value.min()) for value in values)), top)
    axes.set_title(shorten(name, 30))
    axes.set_xlabel(SCORES.get(score, score))
    axes.set_ylabel(metric)
    return figure


def sorted_rows(samples: list[tuple[Path, str, list[tuple[Path, str, str]]]]) -> "Figure":
    """Sources with their candidates from the best score to the worst, arXiv 2212.12249 Figures 5 and 6.

    A sample is its source image, its text, and of each candidate the image, the caption and the numbers.
    """
    import textwrap

    from matplotlib.figure import Figure
    from PIL import Image

    columns = 1 + max(len(candidates) for _, _, candidates in samples)
    figure = Figure(figsize=(1.25 * columns, 1.95 * len(samples)), layout="constrained")
    grid = figure.subplots(len(samples), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, (source, text, candidates) in zip(grid, samples, strict=True):
        for axes, (path, caption, numbers) in zip(row, [(source, text, ""), *candidates], strict=False):
            # What cannot be read the gallery names.
            with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError), Image.open(path) as image:
                axes.imshow(np.asarray(image.convert("RGB")), interpolation="nearest" if image.width < 64 else None)
            axes.set_title(numbers, fontsize=6, fontweight="normal", color=MUTED, loc="left")
            lines = textwrap.wrap(caption, 26)[:5]
            axes.text(0, -0.04, "\n".join(lines), transform=axes.transAxes, fontsize=5.5, va="top")
    return figure
