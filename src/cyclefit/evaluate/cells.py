"""The cells of a matrix of captioners and generators: what they measure, with intervals over inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from cyclefit.evaluate.round_trips import RoundTrips, Sample
from cyclefit.metrics.captions import References
from cyclefit.metrics.facts import check
from cyclefit.metrics.statistics import paired_ratio_bootstrap, ratio_interval
from cyclefit.records import Difference, Estimate
from cyclefit.report import matrix as page
from cyclefit.report.matrix import TO_EACH_OTHER, TO_SOURCE
from cyclefit.report.tables import limits, number

RESAMPLES, AT_ONCE = 2000, 100


@dataclass
class Counts:
    """A metric of every cell and input: over inputs, the value of a cell is sum(parts) / sum(wholes)."""

    parts: Float[np.ndarray, "rows columns n"]
    wholes: Float[np.ndarray, "rows columns n"]


def counts(trips: RoundTrips, samples: list[Sample]) -> dict[str, dict[str, Counts]]:
    """By direction and metric: of `images` by captioner and generator, of `texts` by generator and captioner."""
    found: dict[str, dict[str, Counts]] = {"images": {}, "texts": {}}

    def add(direction: str, metric: str, measure: Callable[[str, str], tuple | list]) -> None:
        """`measure` of a generator and a captioner gives parts and wholes (2, n), or values (n,)."""
        grid = np.array([[measure(g, c) for c in trips.captioners] for g in trips.generators], float)
        if direction == "images":
            grid = grid.swapaxes(0, 1)
        sides = (grid, np.ones_like(grid)) if grid.ndim == 3 else (grid[:, :, 0], grid[:, :, 1])
        found[direction][metric] = Counts(*sides)

    for name in trips.scorers:
        values = [trips.similarities(one, name) for one in samples]
        for direction in values[0]:
            metric = f"{direction.removesuffix('s')} similarity ({name})"
            add(direction, metric, lambda g, c, of=values, to=direction: [value[to][f"{g}/{c}"] for value in of])
    again = {(g, c): [trips.text(one, c, (g,)) for one in samples] for g, c in trips.pairs}
    references = References([one.references for one in samples])
    add("texts", "CIDEr", lambda g, c: references.measure(again[g, c]).each["CIDEr"])
    facts = [one.facts for one in samples]
    if all(facts):
        add("texts", TO_SOURCE, lambda g, c: _truth(again[g, c], facts))
    if trips.reader is not None:
        first = {c: [trips.text(one, c) for one in samples] for c in trips.captioners}
        read = {of: [trips.facts(one, of) for one in samples] for of in trips.drawings}
        add("images", TO_SOURCE, lambda g, c: _truth([trips.text(one) for one in samples], read[g, c]))
        add("images", TO_EACH_OTHER, lambda g, c: _truth(first[c], read[g, c]))
        add("texts", TO_EACH_OTHER, lambda g, c: _truth(again[g, c], read[(g,)]))
    return found


def _truth(texts: list[str], facts: list[dict]) -> tuple[list[float], list[float]]:
    """Of each text, 100 times how many of the facts that it states are right, and how many it states."""
    pairs = [check(text, known).counts()["truth"] for text, known in zip(texts, facts, strict=True)]
    return [100.0 * right for right, _ in pairs], [float(stated) for _, stated in pairs]


def directions(
    found: dict[str, dict[str, Counts]], trips: RoundTrips, kinds: Mapping[str, str]
) -> dict[str, page.Direction]:
    """The cells with their intervals, the best of each row, and whether those of a kind understand each other better.

    All intervals of a metric are of the same resamples of the inputs (paired bootstrap).
    """
    captioners, generators = list(trips.captioners), list(trips.generators)
    sides = {"images": (captioners, generators), "texts": (generators, captioners)}
    return {
        direction: page.Direction(
            rows, columns, {metric: _table(metric, rows, columns, of, kinds) for metric, of in found[direction].items()}
        )
        for direction, (rows, columns) in sides.items()
    }


def _table(metric: str, rows: list[str], columns: list[str], of: Counts, kinds: Mapping[str, str]) -> page.Cells:
    cells, best = {}, []
    for row, parts, wholes in zip(rows, of.parts, of.wholes, strict=True):
        pairs = list(zip(parts, wholes, strict=True))
        cells[row] = {name: _known(*ratio_interval(*pair)) for name, pair in zip(columns, pairs, strict=True)}
        known = [i for i, name in enumerate(columns) if cells[row][name].value is not None]
        if len(known) > 1:
            a, b = sorted(known, key=lambda i: -cells[row][columns[i]].value)[:2]
            names = [f"{row} → {columns[i]}" for i in (a, b)]
            best.append(Difference(metric, *names, *paired_ratio_bootstrap(pairs[a], pairs[b])))
    same = np.array([[row in kinds and kinds[row] == kinds.get(column) for column in columns] for row in rows])
    return page.Cells(cells, best, interaction(of, same))


def interaction(found: Counts, same: np.ndarray, n: int = RESAMPLES, seed: int = 0) -> Estimate | None:
    """How much better pairs of a kind do than their members do with everyone: mean, 95 % interval and p-value.

    With m_rc the value of the cell of row r and column c,

        e_rc = m_rc - mean_c m_rc - mean_r m_rc + mean_rc m_rc

    is the interaction of a two-way table with one value a cell (Scheffe 1959, "The Analysis of Variance", section 4.1),
    which a good captioner or generator alone does not raise; returned is its mean over the cells in `same` (rows,
    columns). Inputs are resampled, the same for all cells. None where it is not defined: with a single row or column,
    with no cell or every cell in `same`, or where a cell has no value.
    """

    def effect(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            m = parts / wholes
        e = m - m.mean(-1, keepdims=True) - m.mean(-2, keepdims=True) + m.mean((-2, -1), keepdims=True)
        return e[..., same].mean(-1)

    if min(same.shape) < 2 or same.all() or not same.any():
        return None
    value, size = effect(found.parts.sum(-1), found.wholes.sum(-1)), found.parts.shape[-1]
    random, resampled = np.random.default_rng(seed), []
    for start in range(0, n, AT_ONCE):
        weights = random.multinomial(size, np.full(size, 1 / size), size=min(AT_ONCE, n - start)).T
        resampled.append(effect(*((side @ weights).transpose(2, 0, 1) for side in (found.parts, found.wholes))))
    values = np.concatenate(resampled)
    values = values[np.isfinite(values)]
    if not np.isfinite(value) or not len(values):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    tail = min(np.count_nonzero(values <= 0), np.count_nonzero(values >= 0))
    return Estimate(float(value), float(low), float(high), min(1.0, 2 * (tail + 1) / (len(values) + 1)))


def _known(value: float, low: float, high: float) -> Estimate:
    """None for a share of nothing."""
    return Estimate(value, low, high) if np.isfinite(value) else Estimate(None)


def print_tables(results: page.Matrix) -> None:
    """Prints a table for each split and direction, the best of each row, and what kinds do."""
    console = Console()
    console.width = max(console.width, 140)
    for split, content in results.splits.items():
        for name, direction in content.directions.items():
            table = Table("pair", title=f"{split}, {page.TITLES[name]}: {content.num_images} images")
            for metric in direction.metrics:
                table.add_column(metric, justify="right")
            for row in direction.rows:
                for column in direction.columns:
                    cells = [(metric, of.cells[row][column]) for metric, of in direction.metrics.items()]
                    table.add_row(f"{row} → {column}", *(_cell(metric, cell) for metric, cell in cells))
            console.print(table)
            for metric, of in direction.metrics.items():
                for sentence in page.sentences(metric, of):
                    console.print(sentence, highlight=False, soft_wrap=True)


def _cell(metric: str, cell: Estimate) -> str:
    ends = limits(cell, metric)
    return number(cell.value, metric) + (f" [{ends[0]}, {ends[1]}]" if ends else "")
