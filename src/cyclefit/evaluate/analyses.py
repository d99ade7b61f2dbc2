"""The paper's analyses (Li et al., ICCV 2023, arXiv 2212.12249, section 4) of a table of candidates, both directions.

A row is one candidate, with its `scores` by judge and its `metrics`; samples are lists of a model's candidates of one
image (one prompt). Every result is what `metrics.json` holds and the report shows.
"""

import math

import numpy as np

from cyclefit.metrics.statistics import best_of, bootstrap_interval, correlation, paired_bootstrap, ranks, trend

Samples = list[list[dict]]


def estimate(values: list[float]) -> dict[str, float]:
    """The mean of a metric with its bootstrap interval."""
    return dict(zip(("value", "low", "high"), bootstrap_interval(values), strict=True))


def difference(metric: str, a: str, b: str, chosen: dict[str, list[dict]]) -> dict:
    """Paired bootstrap of a metric of two selections, whose rows are of the same samples in the same order."""
    first, second = ([row["metrics"][metric] for row in chosen[name]] for name in (a, b))
    value, low, high, p = paired_bootstrap(first, second)
    relative = value / np.mean(second) if np.mean(second) else 0.0
    return {"metric": metric, "a": a, "b": b, "value": value, "low": low, "high": high, "p": p} | {
        "relative": float(relative)
    }


def gains(metrics: list[str], a: str, b: str, chosen: dict[str, list[dict]]) -> list[dict]:
    """Table 1: what a selection `a` gains over `b` in every metric, absolute and relative, with both means."""
    found = []
    for metric in metrics:
        means = {name: float(np.mean([row["metrics"][metric] for row in chosen[key]])) for name, key in
                 (("a_value", a), ("b_value", b))}  # fmt: skip
        found.append(difference(metric, a, b, chosen) | means)
    return found


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
