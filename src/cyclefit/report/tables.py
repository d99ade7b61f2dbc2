"""Numbers as the page writes them, differences in words, and the tables beside the page as CSV."""

import csv
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from cyclefit.records import FALSE, ORACLE, Analysis, Difference, Estimate, Row, Split

NO_DIRECTION = {"words", "length"}
LOWER_IS_BETTER = {"FID", "KID", "CMMD", "captioner NLL", "self-BLEU", "CHAIRi", "CHAIRs", *FALSE.values()}
CORRELATIONS = ("pearson", "spearman", "within")
COSTS = ("generator_calls", "denoiser_calls", "seconds")
NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def is_percentage(metric: str) -> bool:
    """Whether a metric is on the scale of 100 that papers print, and written with one decimal."""
    names = ("CIDEr", "BLEU", "ROUGE", "METEOR", "SPICE", "CAPTURE", "R@", "self-BLEU", "CHAIR", "object recall")
    names += ("Soft-TIFA",)
    return metric.startswith((*names, "truth", "coverage", "false captions", "false images"))


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better, under whatever scorer."""
    return metric.partition(" (")[0] in LOWER_IS_BETTER


def metric_names(rows: Iterable) -> list[str]:
    """The metrics of all rows, or candidates, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def number(value: float | None, metric: str = "", places: int | None = None) -> str:
    """A metric's value as text; a dash for None."""
    if value is None:
        return NONE
    if places is None:
        places = decimals(metric, value)
    return f"{value:.{places}f}".replace("-", MINUS)


def signed(value: float | None, metric: str = "", places: int | None = None) -> str:
    """A difference as text."""
    return "+" * (value is not None and value > 0) + number(value, metric, places)


def decimals(metric: str, value: float) -> int:
    """How many decimals a value of the metric is written with."""
    return 1 if is_percentage(metric) or metric in NO_DIRECTION or abs(value) >= 10 else 3


def limits(entry: Estimate | Difference, metric: str, places: int | None = None) -> tuple[str, str] | None:
    """Both ends of the interval as text; without decimals where it is at least ten units wide."""
    if entry.low is None or entry.high is None:
        return None
    if places is None:
        places = 0 if entry.high - entry.low >= 10 else decimals(metric, entry.high)
    return number(entry.low, metric, places), number(entry.high, metric, places)


def count(value: float | None) -> str:
    """Calls, seconds or samples as text."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def short(value: float) -> str:
    """A score beside an image."""
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"


def plural(value: float, noun: str) -> str:
    """`3 images`."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def percent(ratio: float | None) -> str:
    """A relative change, `+12.3%`."""
    return NONE if ratio is None else f"{100 * ratio:+.1f}%".replace("-", MINUS)


def p_value(p: float | None) -> str:
    """A p-value as text."""
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def reading(difference: Difference) -> str:
    """A difference in words: `cycle beats plain by 41 CIDEr, 95% interval 33 to 50`."""
    metric, value = difference.metric, difference.value
    (a, *details), (b, *others) = difference.a.split(" · "), difference.b.split(" · ")
    if details == others:
        under = f" ({', '.join(details)})" if details else ""
    else:
        a, b, under = difference.a, difference.b, ""
    if value is None:
        return f"{a} and {b} could not be compared in {metric}{under}."
    if difference.low <= 0 <= difference.high:
        low, high = limits(difference, metric)
        return f"No clear difference in {metric} between {a} and {b}: 95% interval {low} to {high}{under}."
    ends = (-difference.high, -difference.low) if value < 0 else (difference.low, difference.high)
    interval = "95% interval {} to {}".format(*limits(Estimate(abs(value), *ends), metric))
    wide = difference.high - difference.low >= 10
    size = number(abs(value), metric, 0 if wide else None)
    if metric in NO_DIRECTION:
        return f"{a} has {size} {'more' if value > 0 else 'fewer'} {metric} than {b}, {interval}{under}."
    verb = "beats" if (value > 0) != lower_is_better(metric) else "falls behind"
    noun = "" if metric[:1].isupper() else " in"
    return f"{a} {verb} {b} by {size}{noun} {metric}, {interval}{under}."


def best_value(rows: list[Row], metric: str) -> float | None:
    """The best of a metric; oracle rows do not count, nor metrics of which neither more nor less is better."""
    found = [row.metrics[metric].value for row in rows if row.selection != ORACLE and metric in row.metrics]
    if metric in NO_DIRECTION:
        return None
    best = min if lower_is_better(metric) else max
    return best((value for value in found if value is not None), default=None)


def by_scorer(rows: list[Row]) -> dict[str, list[str]]:
    """The metrics of rows by the scorer in brackets at the end of their names; first, under "", those without one."""
    groups: dict[str, list[str]] = {"": []}
    for metric in metric_names(rows):
        scorer = metric[metric.index(" (") + 2 : -1] if metric.endswith(")") and " (" in metric else ""
        groups.setdefault(scorer, []).append(metric)
    return groups


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows as a table with the columns in order of first appearance, the numbers unrounded and in their own units."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), restval="")
        table.writeheader()
        table.writerows(rows)


def main_table(rows: list[Row]) -> list[dict]:
    """The rows of a split as flat ones, with all metrics in each."""
    metrics, main = metric_names(rows), []
    for row in rows:
        cells = {"model": row.model, "decoding": row.decoding, "selection": row.selection}
        cells |= estimates({metric: row.metrics.get(metric, Estimate(None)) for metric in metrics})
        main.append(cells | {name: getattr(row, name) for name in COSTS})
    return main


def write_tables(folder: Path, split: str, content: Split) -> None:
    """The tables of a split as CSV: the main one, and the analyses of which there are any."""
    tables = {
        "table": main_table(content.rows),
        "differences": [known(row) for row in content.differences],
        "gains": [known(row) for row in content.gains],
        "trends": [about(curve) | known(curve.trend) for curve in content.rank_curves if curve.trend],
        "correlations": [
            about(found) | estimates({of: getattr(found, of) for of in CORRELATIONS}) for found in content.correlations
        ],
        "failures": [
            {"kind": kind} | about(found) | known(row)
            for found in content.failures
            for kind in ("overrated", "underrated")
            for row in getattr(found, kind)
        ],
    }
    for name, rows in tables.items():
        if rows or name == "table":
            write_csv(folder / f"{name}-{split}.csv", rows)


def about(analysis: Analysis) -> dict[str, str]:
    """Which model, judge and metric an analysis is of."""
    return {name: getattr(analysis, name) for name in ("model", "selection", "metric")}


def known(record) -> dict:
    """The fields of a record that are not None."""
    return {name: value for name, value in asdict(record).items() if value is not None}


def estimates(named: dict[str, Estimate]) -> dict[str, float | None]:
    """The cells of estimates: of each its value and the ends of its interval."""
    cells = {}
    for name, entry in named.items():
        cells |= {name: entry.value, f"{name} low": entry.low, f"{name} high": entry.high}
    return cells
