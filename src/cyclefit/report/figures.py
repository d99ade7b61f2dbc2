"""The figures of the report, drawn with matplotlib; and the units and colours that page and figures share."""

import csv
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
WIDTH = 4.5
SCORES = {
    "image cycle": "similarity of source and regenerated image",
    "text cycle": "similarity of prompt and the image's caption",
}
"""What an axis calls a score."""


def is_percentage(metric: str) -> bool:
    """Whether a metric is on the scale of 100 that papers print, and written with one decimal."""
    names = ("CIDEr", "BLEU", "ROUGE", "METEOR", "SPICE", "R@", "self-BLEU", "CHAIR", "object recall")
    return metric.startswith((*names, "truth", "coverage", "false captions", "false images"))


def metric_names(rows: list[dict]) -> list[str]:
    """The metrics of all rows, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def color(model: dict) -> str:
    """The model's colour in every table and figure."""
    return PALETTE[model["color_index"] % len(PALETTE)]


def render(stem: Path, name: str, label: str, draw: Callable[..., "Figure"], *inputs, data: list[dict]) -> str:
    """Draw into `stem`.svg and `stem`.png, what is drawn into `stem`.csv.

    Returns the svg as an element in the page's colours, ids under `name`.
    """
    import matplotlib

    style = {
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelcolor": MUTED,
        "axes.edgecolor": MUTED,
        "axes.facecolor": PAPER,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.unicode_minus": True,
        "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": stem.name,
        # A "$" in a model's name is a dollar sign.
        "text.parse_math": False,
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(style):
        figure = draw(*inputs)
        figure.savefig(f"{stem}.svg", metadata={"Date": None})
        figure.savefig(f"{stem}.png", dpi=200)
    write_csv(Path(f"{stem}.csv"), data)
    return _inline(Path(f"{stem}.svg").read_text(encoding="utf-8"), name, label)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows as a table, their columns in order of first appearance; numbers as they are, no unit changed."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), restval="")
        table.writeheader()
        table.writerows(rows)


def _inline(svg: str, name: str, label: str) -> str:
    from html import escape

    view_box = re.search(r'viewBox="[^"]*"', svg).group()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # Ids are global in a page.
    prefix = re.sub(r"\W", "-", name)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = body.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for drawn, themed in THEME.items():
        body = re.sub(rf"(?<=: ){drawn}\b", themed, body)
    return f'<svg {view_box} role="img" aria-label="{escape(label)}">{body}'


def _axes(height: float) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _shorten(name: str, length: int = 30) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def comparison(rows: list[dict], metric: str, models: dict[str, dict]) -> "Figure":
    """One dot with its interval per row, grouped by model; the oracle hollow, for it reads the references."""
    rows = [row for row in rows if row["metrics"].get(metric, {}).get("value") is not None]
    positions, labels, y = [], [], 0.0
    figure, axes = _axes(0.55 + 0.165 * (len(rows) + 1.3 * len({row["model"] for row in rows})))
    for name, model in models.items():
        group = [row for row in rows if row["model"] == name]
        if not group:
            continue
        positions.append(y)
        labels.append((_shorten(name, 24), True))
        for row in group:
            y += 1
            entry = row["metrics"][metric]
            value = entry["value"]
            low, high = (entry[side] if entry.get(side) is not None else value
                         for side in ("low", "high"))  # fmt: skip
            axes.plot([low, high], [y, y], color=color(model), linewidth=1.6, solid_capstyle="round")
            axes.plot(
                [value],
                [y],
                MARKERS[model["color_index"] % len(MARKERS)],
                markersize=5,
                markeredgewidth=1.2,
                markeredgecolor=color(model),
                markerfacecolor=PAPER if row["selection"] == "oracle" else color(model),
            )
            positions.append(y)
            labels.append((_shorten(", ".join(filter(None, (row["decoding"], row["selection"])))), False))
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


def rank_curves(curves: list[dict], rows: list[dict], metric: str, selection: str, models: dict[str, dict]) -> "Figure":
    """Quality against reconstruction rank, arXiv 2212.12249 Figure 3: rank 1 is the candidate that is kept."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(2.9)
    for curve in curves:
        entries = [entry for entry in curve["values"] if entry["value"] is not None]
        if not entries:
            continue
        model = models[curve["model"]]
        style = {"color": color(model), "linewidth": 1.6}
        rank = [entry["rank"] for entry in entries]
        value = np.array([entry["value"] for entry in entries])
        if all(entry.get("low") is not None and entry.get("high") is not None for entry in entries):
            low, high = (np.array([entry[side] for entry in entries]) for side in ("low", "high"))
            axes.fill_between(rank, low, high, color=color(model), alpha=0.16, linewidth=0)
        if len(curves) == 1 and all("q1" in entry for entry in entries):
            low, high = (np.array([entry[side] for entry in entries]) for side in ("q1", "q3"))
            axes.fill_between(rank, low, high, color=color(model), alpha=0.09, linewidth=0)
        marker = MARKERS[model["color_index"] % len(MARKERS)]
        axes.plot(rank, value, marker + "-", markersize=4, label=_shorten(curve["model"], 24), **style)
        axes.axhline(_single(rows, curve["model"], metric, value.mean()), linestyle=(0, (4, 3)), alpha=0.8, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(f"rank by {selection} (1 = kept)")
    axes.set_ylabel(metric)
    figure.legend(loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.4)
    return figure


def _single(rows: list[dict], model: str, metric: str, otherwise: float) -> float:
    """What one sample is worth: the table's row where there is one, else the mean over all ranks."""
    for row in rows:
        sampled = row["selection"] == "single" and row["decoding"] not in ("greedy", "beam")
        value = row["metrics"].get(metric, {}).get("value")
        if row["model"] == model and sampled and value is not None:
            return value
    return otherwise


def count_curves(curves: list[dict], metric: str, model: dict) -> "Figure":
    """What the best of n is worth, one line for each way to choose it; the oracle dashed."""
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    figure, axes = _axes(2.9)
    for place, curve in enumerate(curves):
        entries = [entry for entry in curve["values"] if entry["value"] is not None]
        counts = [entry["n"] for entry in entries]
        value = np.array([entry["value"] for entry in entries])
        low, high = (np.array([entry[side] for entry in entries]) for side in ("low", "high"))
        bound = curve["selection"] == "oracle"
        shade = MUTED if bound else PALETTE[place % len(PALETTE)]
        axes.fill_between(counts, low, high, color=shade, alpha=0.12, linewidth=0)
        axes.plot(
            counts, value, "--" if bound else MARKERS[place % len(MARKERS)] + "-", color=shade, linewidth=1.3,
            markersize=4, label=_shorten(curve["selection"]),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted({entry["n"] for curve in curves for entry in curve["values"]}))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("candidates chosen from")
    axes.set_ylabel(metric)
    figure.legend(loc="outside upper left", ncols=2, handlelength=2.2, columnspacing=1.4)
    return figure


def sorted_rows(samples: list[tuple[Path | None, str, list[tuple[Path, str, str]]]]) -> "Figure":
    """Sources with their candidates from the best score to the worst, arXiv 2212.12249 Figures 5 and 6.

    A sample is its source image, its text, and of each candidate the image, the caption and the numbers.
    """
    import textwrap

    from matplotlib.figure import Figure
    from PIL import Image

    columns = 1 + max(len(candidates) for _, _, candidates in samples)
    figure = Figure(figsize=(1.25 * columns, 1.95 * len(samples)), layout="constrained")
    grid = figure.subplots(len(samples), columns, squeeze=False)
    for row, (source, text, candidates) in zip(grid, samples, strict=True):
        cells = [(source, text, ""), *candidates]
        for axes, (path, caption, numbers) in zip(
            row, [*cells, *[(None, "", "")] * (columns - len(cells))], strict=True
        ):
            axes.axis("off")
            if path is not None:
                # What cannot be read the gallery names.
                with (
                    suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError),
                    Image.open(path) as image,
                ):
                    axes.imshow(np.asarray(image.convert("RGB")), interpolation="nearest" if image.width < 64 else None)
            lines = textwrap.wrap(caption, 26)[:5]
            axes.set_title(numbers, fontsize=6, fontweight="normal", color=MUTED, loc="left")
            axes.text(0, -0.04, "\n".join(lines), transform=axes.transAxes, fontsize=5.5, va="top")
    return figure


def score_bins(scores: np.ndarray, values: np.ndarray, most: int = 8) -> list[tuple[float, np.ndarray]]:
    """Candidates in bins of equal count along the score: (mean score, metric values) per bin.

    Bins keep at least ten candidates where there are ten.
    """
    order = np.argsort(scores, kind="stable")
    parts = np.array_split(order, max(1, min(most, len(order) // 10)))
    return [(float(scores[part].mean()), values[part]) for part in parts]


def score_boxes(
    bins: list[tuple[float, np.ndarray]], score: str, metric: str, name: str, model: dict, top: float
) -> "Figure":
    """Quality in bins of the score, arXiv 2212.12249 Figure 4: quartiles, 5th and 95th percentile, mean."""
    figure, axes = _axes(2.7)
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
    means = [value.mean() for value in values]
    axes.plot(at, means, "o-", color=INK, linewidth=1.2, markersize=3.5, label="mean")
    axes.set_xticks(at, [f"{center:.3g}" for center, _ in bins])
    axes.grid(axis="x", visible=False)
    axes.set_ylim(min(0, *(float(value.min()) for value in values)), top)
    axes.set_title(_shorten(name))
    axes.set_xlabel(SCORES.get(score, score))
    axes.set_ylabel(metric)
    return figure
