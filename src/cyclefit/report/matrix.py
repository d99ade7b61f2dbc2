"""The page of a matrix of captioners and generators, and what its `metrics.json` contains."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cyclefit.files import write_atomic
from cyclefit.records import Difference, Estimate
from cyclefit.report.figures import render, slug
from cyclefit.report.gallery import thumbnails
from cyclefit.report.page import IMAGE_BUDGET, render_page
from cyclefit.report.tables import known, limits, number, p_value, reading, signed, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TO_SOURCE, TO_EACH_OTHER = "truth to the source", "truth to each other"
TITLES = {"images": "image → caption → image", "texts": "prompt → image → caption"}
"""Of the directions."""
AXES = {"images": ("captioner", "generator"), "texts": ("generator", "captioner")}
"""What rows and columns are, by direction."""
METRICS = {
    "images": {
        "image similarity": "cosine similarity of the source image and the redrawn one under the scorer.",
        TO_SOURCE: "of the facts that the prompt (the first reference) states, the share that the redrawn image shows.",
        TO_EACH_OTHER: "of the facts that the caption states, the share that the image drawn from it shows.",
    },
    "texts": {
        "text similarity": "cosine similarity of the prompt and the caption of its image under the scorer.",
        "CIDEr": "agreement of the caption with the references of the prompt's own image.",
        TO_SOURCE: "of the facts that the caption states, the share that is right of the prompt's own image.",
        TO_EACH_OTHER: "of the facts that the caption states, the share that the drawn image shows.",
    },
}
"""What the metrics are, by direction, without the scorer's name."""


@dataclass
class Cells:
    """A metric of every pair."""

    cells: dict[str, dict[str, Estimate]]
    """By row and column."""
    best: list[Difference]
    """Of each row, the best column against the second best."""
    kinds: Estimate | None = None
    """How much better pairs of a kind do than their members do with everyone; None where no kinds are given."""


@dataclass
class Direction:
    """The pairs in one direction: what a row makes, a column takes up."""

    rows: list[str]
    columns: list[str]
    metrics: dict[str, Cells]


@dataclass
class Split:
    """The results of one split."""

    num_images: int
    directions: dict[str, Direction]
    """`images`, image to caption to image, and `texts`, prompt to image to caption."""


@dataclass
class Matrix:
    """What `metrics.json` contains."""

    splits: dict[str, Split]
    created: str = ""
    kinds: dict[str, str] = field(default_factory=dict)
    """Labels of members."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of the members' weights and settings."""
    metadata: dict = field(default_factory=dict)
    kind: str = "matrix"


@dataclass
class Trip:
    """An input on the page: its source image, and what every pair makes of it."""

    key: str
    references: list[str]
    source: str
    captions: dict[str, tuple[str, dict[str, str]]]
    """By captioner: its caption of the source, and by generator the image drawn from that."""
    drawings: dict[str, tuple[str, dict[str, str]]]
    """By generator: its image of the prompt, and by captioner the caption of that."""

    def images(self) -> list[str]:
        """The files of all its images."""
        redrawn = [image for _, images in self.captions.values() for image in images.values()]
        return [self.source, *redrawn, *(image for image, _ in self.drawings.values())]


def table(split: Split) -> list[dict]:
    """The cells of a split, one to a row."""
    return [
        {"direction": name, "row": row, "column": column, "metric": metric} | known(cell)
        for name, direction in split.directions.items()
        for metric, of in direction.metrics.items()
        for row, cells in of.cells.items()
        for column, cell in cells.items()
    ]


def sentences(metric: str, of: Cells) -> list[str]:
    """The best of each row, and what kinds do, in words."""
    found = [reading(difference) for difference in of.best]
    if (kinds := of.kinds) is not None:
        low, high = limits(kinds, metric)
        side = "better" if kinds.value > 0 else "worse"
        if kinds.low <= 0 <= kinds.high:
            side = "neither clearly better nor clearly worse"
        found.append(
            f"Models of a kind understand each other {side} in {metric} than models of different kinds: "
            f"{signed(kinds.value, metric)} [{low}, {high}], p {p_value(kinds.p)}."
        )
    return found


def write_page(folder: Path, results: Matrix, trips: dict[str, list[Trip]]) -> Path:
    """Write `report.html`, `table-SPLIT.csv` and the figures into `folder`."""
    budget, parts = IMAGE_BUDGET // max(1, len(trips)), {}
    for split, content in results.splits.items():
        write_csv(folder / f"table-{split}.csv", table(content))
        images, _ = thumbnails(folder, {name: 1 for trip in trips[split] for name in trip.images()}, budget)
        parts[split] = {
            "content": content,
            "figures": {name: _figures(folder, split, name, of) for name, of in content.directions.items()},
            "trips": trips[split],
            "images": images,
        }
    page = render_page(
        "matrix.html.j2",
        title="Who understands whom?",
        byline=[text for text in (results.created, results.metadata.get("machine")) if text],
        results=results,
        parts=parts,
        titles=TITLES,
        axes=AXES,
        metrics=METRICS,
        sentences=sentences,
    )
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def _figures(folder: Path, split: str, name: str, direction: Direction) -> list:
    figures = []
    for metric, of in direction.metrics.items():
        stem, label = f"{split}-{name}-{slug(metric)}", f"{metric}, {TITLES[name]}, {split}"
        data = [
            {"row": row, "column": column} | known(cell) for row in of.cells for column, cell in of.cells[row].items()
        ]
        figures.append(render(folder / "figures" / stem, stem, label, heat_map, metric, name, direction, data=data))
    return figures


def heat_map(metric: str, name: str, direction: Direction) -> "Figure":
    """The values of all cells with their intervals, in colours of even steps of lightness (viridis)."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows, columns, cells = direction.rows, direction.columns, direction.metrics[metric].cells
    values = np.array([[cells[row][column].value for column in columns] for row in rows], float)
    figure = Figure(figsize=(1.6 + 1.05 * len(columns), 1.0 + 0.55 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap="viridis", edgecolors="#8c8c8c", linewidth=0.4)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            cell = cells[row][column]
            red, green, blue, _ = colormaps["viridis"](mesh.norm(values[i, j]))
            # Colours of their own: the page replaces those of the text, and the cells stay as they are.
            ink = "#101010" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "#fdfdfd"
            if cell.value is None:
                ink = "#808080"
            center = {"ha": "center", "color": ink}
            axes.text(j + 0.5, i + 0.46, number(cell.value, metric), va="center", fontweight="bold", **center)
            if ends := limits(cell, metric):
                axes.text(j + 0.5, i + 0.76, f"{ends[0]} to {ends[1]}", va="center", fontsize=5.5, **center)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=0 if max(map(len, columns)) < 15 else 20)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_ylabel(AXES[name][0])
    axes.set_xlabel(AXES[name][1])
    axes.set_title(metric)
    return figure
