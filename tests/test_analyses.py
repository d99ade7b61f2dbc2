"""The analyses of an evaluation: trends, correlations, the best of n, gains, failures."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from cyclefit.metrics.statistics import best_of, correlation, ranks, trend


def test_the_best_of_n_is_the_mean_over_all_draws():
    random = np.random.default_rng(0)
    scores, values = random.integers(0, 4, (6, 7)).astype(float), random.normal(size=(6, 7))
    scores += np.arange(7) * -1e-9  # equal scores: the first sampled is kept, in every draw
    for n in range(1, 8):
        draws = [
            values[np.arange(6), np.array(draw)[scores[:, draw].argmax(1)]]
            for draw in map(list, combinations(range(7), n))
        ]
        np.testing.assert_allclose(best_of(scores, values, n), np.mean(draws, axis=0), atol=1e-12)
    np.testing.assert_allclose(best_of(scores, values, 1), values.mean(1))
    with pytest.raises(ValueError, match="best of 8 cannot be had from 7"):
        best_of(scores, values, 8)


def test_correlations_are_torchmetrics():
    random = np.random.default_rng(1)
    x = random.integers(0, 9, 300).astype(float)
    y = x + random.normal(scale=4, size=300)
    groups = np.arange(300) // 5
    tensors = torch.tensor(x), torch.tensor(y)
    assert correlation(x, y, groups)[0] == pytest.approx(float(pearson_corrcoef(*tensors)), abs=1e-12)
    assert correlation(ranks(x), ranks(y), groups)[0] == pytest.approx(float(spearman_corrcoef(*tensors)), abs=1e-6)
    np.testing.assert_array_equal(ranks([2, 1, 2, 7, 2]), [3, 1, 3, 5, 3])
    value, low, high = correlation(x, y, groups)
    assert low < value < high
    # A far mean costs no digits.
    assert correlation(x + 1e6, y, groups)[0] == pytest.approx(value, abs=1e-7)
    assert np.isnan(correlation(np.full(300, 0.1), y, groups)).all()


def test_a_correlations_interval_covers_and_knows_the_groups():
    """Of two correlated normals in images of ten alike candidates, 95 % of the intervals hold the truth."""
    random, covered, narrow = np.random.default_rng(2), [], []
    for seed in range(200):
        image = random.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], size=80).repeat(10, axis=0)
        x, y = (image + 0.1 * random.normal(size=image.shape)).T
        for intervals, groups in ((covered, np.arange(800) // 10), (narrow, np.arange(800))):
            _, low, high = correlation(x, y, groups, n=300, seed=seed)
            intervals.append(low <= 0.5 / 1.01 <= high)
    assert 0.88 <= np.mean(covered) <= 0.99
    assert np.mean(narrow) < 0.6


def test_a_trend_is_the_slope_of_the_means_and_its_test_holds_its_level():
    random = np.random.default_rng(3)
    matrix = random.normal(size=(50, 10)) - 0.2 * np.arange(10)
    slope, low, high, p = trend(matrix)
    assert slope == pytest.approx(np.polyfit(np.arange(10), matrix.mean(0), 1)[0])
    assert low < slope < high < 0
    assert p < 0.01
    found = [trend(random.normal(size=(40, 10)), n=400, seed=seed)[3] < 0.05 for seed in range(200)]
    assert 0.01 <= np.mean(found) <= 0.11
    with pytest.raises(ValueError, match="two ranks"):
        trend([[1.0], [2.0]])
