"""Bootstrap intervals over images and over seeds, in numpy.

Percentile intervals of the mean (Efron and Tibshirani 1993, chapter 13), the same for the same arguments.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

CHUNK = 2**22
"""Indices drawn at a time, which bounds the memory (32 MB of indices) whatever the number of samples."""


def bootstrap_interval(
    values: ArrayLike, n: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of per-sample scores (samples,) with its bootstrap interval: (mean, low, high).

    `n` resamples, `level` in (0, 1). Raises ValueError where values are empty, not finite or not (samples,).
    """
    values = _checked(values, 1, "Values")
    return float(values.mean()), *_percentiles(_resampled_means(values, n, seed), level)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, n: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float, float]:
    """Mean of a - b over the same samples, its interval and two-sided p-value: (difference, low, high, p).

    p = 2 min(P(d* <= 0), P(d* >= 0)) over the resampled mean differences d*, counts and `n` raised by one so
    that p is never 0 (Davison and Hinkley 1997, section 4.2). Raises ValueError where lengths differ.
    """
    a, b = _checked(a, 1, "Values a"), _checked(b, 1, "Values b")
    if len(a) != len(b):
        raise ValueError(f"A paired bootstrap needs the same samples: a has {len(a)} values, b has {len(b)}.")
    difference = a - b
    means = _resampled_means(difference, n, seed)
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return float(difference.mean()), *_percentiles(means, level), min(1.0, 2 * (tail + 1) / (n + 1))


def seed_interval(matrix: ArrayLike, n: int = 2000, seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of scores (seeds, images) with a bootstrap interval over both levels: (mean, low, high).

    Seeds and images are resampled independently, one draw of images for all seeds since the columns are the
    same images (pigeonhole bootstrap, Owen 2007, doi 10.1214/07-AOAS122). The variance between S seeds enters
    with the factor (S - 1) / S, so that a few seeds give too narrow an interval where it dominates. For the
    difference of two methods give the matrix of differences. Raises ValueError as `bootstrap_interval`.
    """
    matrix = _checked(matrix, 2, "The matrix of scores")
    seeds, images = matrix.shape
    random = np.random.default_rng(seed)
    means = []
    for rows in _chunks(n, images):
        by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=rows) / seeds
        by_image = random.multinomial(images, np.full(images, 1 / images), size=rows) / images
        means.append(np.einsum("ri,ri->r", by_seed @ matrix, by_image))
    return float(matrix.mean()), *_percentiles(np.concatenate(means), level)


def _resampled_means(values: np.ndarray, n: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.concatenate(
        [
            values[random.integers(len(values), size=(rows, len(values)))].mean(axis=1)
            for rows in _chunks(n, len(values))
        ]
    )


def _chunks(n: int, samples: int) -> Iterator[int]:
    """Row counts of index matrices with at most CHUNK entries that add up to n."""
    if n < 1:
        raise ValueError(f"A bootstrap needs at least 1 resample, not {n}.")
    rows = max(1, CHUNK // samples)
    return (min(rows, n - start) for start in range(0, n, rows))


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"The level of an interval lies between 0 and 1, {level} does not.")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _checked(values: ArrayLike, dimensions: int, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != dimensions or not values.size:
        shape = "(samples,)" if dimensions == 1 else "(seeds, images)"
        raise ValueError(f"{name} must be {shape} and not empty, not of shape {values.shape}.")
    if not np.isfinite(values).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"{name} hold {values[index]} at index {index}: leave that sample out or repair it.")
    return values
