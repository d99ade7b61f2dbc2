"""The page of a run, or of a folder of runs: what they are, how far, and their learning curves."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cyclefit.files import write_atomic
from cyclefit.progress import truth_first
from cyclefit.report import figures
from cyclefit.report.page import render_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = dict[str, dict[int, float]]
"""Logged values by name and step."""
NOT_LEARNED = ("epoch", "started", "gpus")


def write_page(
    page: Path, title: str, facts: dict[str, str], commands: dict[str, str], rows: list[dict], runs: dict[str, Metrics]
) -> None:
    """Writes `page` and, beside it, its figures: a curve of each run for everything that was logged.

    `facts` and `commands` are those of a single run, `rows` a table of several.
    """
    logged = dict.fromkeys(name for metrics in runs.values() for name in metrics if name not in NOT_LEARNED)
    validation = [f"val/{name}" for name in truth_first({n.removeprefix("val/"): 0 for n in logged if "val/" in n})]
    groups = {"Validation": validation, "Training": [name for name in logged if name not in validation]}
    drawn = {title: [_curve(page.parent, name, runs) for name in names] for title, names in groups.items()}
    text = render_page(
        "runs.html.j2",
        title=title,
        byline=[],
        facts=facts,
        commands=commands,
        rows=rows,
        groups={title: found for title, found in drawn.items() if found},
    )
    write_atomic(page, text)


def _curve(folder: Path, name: str, runs: dict[str, Metrics]):
    # A run that has not logged it keeps its place, so that a run has one colour in all figures.
    curves = {run: sorted(metrics.get(name, {}).items()) for run, metrics in runs.items()}
    data = [{"run": run, "step": step, name: value} for run, points in curves.items() for step, value in points]
    stem = f"curve-{figures.slug(name)}"
    draw = partial(learning_curve, name, curves)
    return figures.render(folder / "figures" / stem, stem, f"{name} against the step", draw, data=data)


def learning_curve(name: str, curves: dict[str, list[tuple[int, float]]]) -> "Figure":
    """A logged value against the step, one line for each run."""
    figure, axes = figures.new_axes(2.4)
    for place, (run, points) in enumerate(curves.items()):
        if not points:
            continue
        color, marker = (of[place % len(of)] for of in (figures.PALETTE, figures.MARKERS))
        style = {"marker": marker, "markersize": 3.5} if len(points) <= 30 else {}
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.3, label=figures.shorten(run), **style)
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    if len(curves) > 1:
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.4)
    return figure
