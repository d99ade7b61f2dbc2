"""The paper's analyses (Li et al., ICCV 2023, arXiv 2212.12249, section 4) of a table of candidates, both directions.

A row is one candidate, with its `scores` by judge and its `metrics`; samples are lists of a model's candidates of one
image (one prompt). Every result is what `metrics.json` holds and the report shows.
"""

import math

import numpy as np

from cyclefit.metrics.facts import KINDS, FactCheck, counts_of
from cyclefit.metrics.statistics import (
    best_of,
    bootstrap_interval,
    correlation,
    paired_bootstrap,
    paired_ratio_bootstrap,
    ranks,
    trend,
)

Samples = list[list[dict]]


def estimate(values: list[float]) -> dict[str, float]:
    """The mean of a metric with its bootstrap interval."""
    return dict(zip(("value", "low", "high"), bootstrap_interval(values), strict=True))


def checks(rows: list[dict]) -> list[FactCheck]:
    """What the evaluation found of each row's facts."""
    return [FactCheck.read(row["facts"]) for row in rows]


def difference(metric: str, a: str, b: str, chosen: dict[str, list[dict]], kind: str | None = None) -> dict:
    """Paired bootstrap of a metric of two selections, whose rows are of the same samples in the same order.

    Of truth and coverage, which are shares of all facts together (of one `kind`, if given), each resample is of the
    sums. The means are `a_value` and `b_value`; where a share is of nothing, everything is None.
    """
    first, second = chosen[a], chosen[b]
    if metric in ("truth", "coverage"):
        sides = [np.array([counts_of(row["facts"], metric, kind) for row in rows]).T for rows in (first, second)]
        if not all(wholes.any() for _, wholes in sides):
            return {"metric": metric, "a": a, "b": b} | dict.fromkeys(
                ("value", "low", "high", "p", "a_value", "b_value", "relative")
            )
        means = [100 * parts.sum() / wholes.sum() for parts, wholes in sides]
        value, low, high, p = paired_ratio_bootstrap(*sides)
        value, low, high = 100 * value, 100 * low, 100 * high
    else:
        sides = [[row["metrics"][metric] for row in rows] for rows in (first, second)]
        means = [np.mean(side) for side in sides]
        value, low, high, p = paired_bootstrap(*sides)
    relative = value / means[1] if means[1] else 0.0
    return {"metric": metric, "a": a, "b": b, "value": value, "low": low, "high": high, "p": p} | {
        "a_value": float(means[0]),
        "b_value": float(means[1]),
        "relative": float(relative),
    }


def taken_apart(a: str, b: str, chosen: dict[str, list[dict]], names: tuple[str, ...]) -> dict:
    """A difference by kind of fact and by length: of each kind facts stated per caption, truth and coverage."""
    kinds = {}
    for kind in KINDS:
        stated = [float(np.mean([check.counts(kind)["truth"][1] for check in checks(chosen[name])])) for name in (a, b)]
        found = {name: difference(name, a, b, chosen, kind) for name in names}
        if any(stated) or any(of["value"] is not None for of in found.values()):
            kinds[kind] = {"a_stated": stated[0], "b_stated": stated[1]} | found
    lengths = "words" in chosen[a][0]["metrics"]
    return {"a": a, "b": b, "kinds": kinds, "words": difference("words", a, b, chosen) if lengths else None}


def gains(metrics: list[str], a: str, b: str, chosen: dict[str, list[dict]]) -> list[dict]:
    """Table 1: what a selection `a` gains over `b` in every metric, absolute and relative, with both means."""
    return [difference(metric, a, b, chosen) for metric in metrics]


def _matrix(samples: Samples, field: str, name: str) -> np.ndarray:
    return np.array([[row[field][name] for row in sample] for sample in samples], dtype=float)


def rank_curve(model: str, judge: str, metric: str, samples: Samples) -> dict:
    """Figure 3: a metric's mean and spread over samples at each rank by a judge, 1 the best, and the ranks' trend."""
    matrix = _matrix([sorted(sample, key=lambda row: -row["scores"][judge]) for sample in samples], "metrics", metric)
    spread = [dict(zip(("q1", "q3"), map(float, np.percentile(column, (25, 75))), strict=True)) for column in matrix.T]
    values = [{"rank": k} | estimate(column) | spread[k - 1] for k, column in enumerate(matrix.T, 1)]
    slope = dict(zip(("value", "low", "high", "p"), trend(matrix), strict=True))
    return {"model": model, "selection": judge, "metric": metric, "values": values, "trend": slope}


def count_curve(model: str, judge: str, metric: str, samples: Samples) -> dict:
    """What the judge's favourite of n candidates is worth, n = 1, 2, 4, ... and all, over all draws from one pool."""
    values, most = _matrix(samples, "metrics", metric), len(samples[0])
    scores = values if judge == "oracle" else _matrix(samples, "scores", judge)
    counts = sorted({2**k for k in range(most.bit_length())} - {0} | {most})
    points = [{"n": n} | estimate(best_of(scores, values, n)) for n in counts if n <= most]
    return {"model": model, "selection": judge, "metric": metric, "values": points}


def correlations(model: str, judge: str, metric: str, samples: Samples) -> dict | None:
    """Figure 4's in numbers: how a score and a metric of all candidates go together; None where one is constant.

    Pearson's and Spearman's over all candidates, and Pearson's `within` samples: of the deviations from a sample's
    means, for a reranker has to know which of one image's captions is better and not which image is easy. Intervals
    resample samples.
    """
    scores, values = _matrix(samples, "scores", judge), _matrix(samples, "metrics", metric)
    groups = np.arange(len(samples)).repeat(scores.shape[1])
    centred = (matrix - matrix.mean(1, keepdims=True) for matrix in (scores, values))
    pairs = {
        "pearson": (scores, values),
        "spearman": (ranks(scores.ravel()), ranks(values.ravel())),
        "within": tuple(centred),
    }
    found = {
        name: dict(zip(("value", "low", "high"), correlation(x.ravel(), y.ravel(), groups), strict=True))
        for name, (x, y) in pairs.items()
    }
    if not all(math.isfinite(entry["value"]) for entry in found.values()):
        return None
    return {"model": model, "selection": judge, "metric": metric, "candidates": scores.size} | found


def failures(model: str, judge: str, metric: str, samples: Samples, count: int = 12) -> dict:
    """The candidates on which a score and a metric disagree most, by the difference of their ranks among all.

    `overrated` have a high score and a low metric, `underrated` the reverse; one candidate of a sample at most.
    """
    rows = [row for sample in samples for row in sample]
    score, value = (
        ranks([row[field][name] for row in rows]) / len(rows)
        for field, name in (("scores", judge), ("metrics", metric))
    )
    found = {"model": model, "selection": judge, "metric": metric}
    for kind, gap in (("overrated", score - value), ("underrated", value - score)):
        places = [i for i in np.argsort(-gap, kind="stable") if gap[i] > 0]
        first = {rows[i]["key"]: i for i in reversed(places)}
        worst = sorted(first.values(), key=lambda i: -gap[i])[:count]
        found[kind] = [
            {"key": rows[i]["key"], "index": rows[i]["index"], "caption": rows[i]["caption"]}
            | {"score": rows[i]["scores"][judge], "score_rank": float(score[i])}
            | {"value": rows[i]["metrics"][metric], "value_rank": float(value[i])}
            for i in worst
        ]
    return found
