"""Which language is best, when each one's value is known up to a normal error: exact probabilities, no sampling."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_REACH = 8.0
"""Standard deviations at which the normal distribution function is taken for 0 or 1 (an error of 1e-15)."""
_PER_UNIT = 800
_TABLE = np.array(
    [
        math.log(0.5 * math.erfc(-i / _PER_UNIT / math.sqrt(2.0)))
        for i in range(int(-_REACH * _PER_UNIT), int(_REACH * _PER_UNIT) + 2)
    ]
)
_SLOPE = np.diff(_TABLE)
_EVEN_POINTS, _LEADING = 33, 4
_NODES = np.array([-3.5, -2.4, -1.6, -0.9, -0.3, 0.3, 0.9, 1.6, 2.4, 3.5])
_NARROWEST = 1e-9
"""Deviations below this share of the row's largest count as this share."""
_CHUNK = 1 << 21
"""Entries of [C, points, L] that are worked on at once: 16 MB an array."""


def log_cdf(z: Array) -> Array:
    """log Phi(z), Phi the standard normal distribution function; absolute error below 3e-7, clipped at |z| = 8.

    Linear interpolation in a table of step 1/800: several times as fast as evaluating an error function.
    """
    place = np.clip(z, -_REACH, _REACH)
    place *= _PER_UNIT
    place += _REACH * _PER_UNIT
    below = place.astype(np.int32)
    place -= below
    place *= _SLOPE[below]
    place += _TABLE[below]
    return place


def probability_best(mean: Array, deviation: Array) -> Array:
    """P(language l has the largest value), values independent and normal. float64 [C, L], rows sum to 1.

    mean, deviation: float64 [C, L], deviation > 0.

    The maximum has the distribution function F(x) = prod_l Phi((x - mean_l) / deviation_l), so that
    P(l best) = integral of F dlog Phi_l. On a grid the growth of F over each interval is shared out in proportion to
    the growth of log Phi_l: rows sum to 1 by construction, and a language whose deviation is far below the grid's step
    still gets its share.
    """
    best = np.empty_like(mean)
    rows = max(1, _CHUNK // (_EVEN_POINTS * 2 * mean.shape[1]))
    for start in range(0, len(mean), rows):
        part = slice(start, start + rows)
        best[part] = _probability_best(mean[part], deviation[part])
    return best


def _probability_best(mean: Array, deviation: Array) -> Array:
    # Relative to the largest value and spread of the row: only their differences count, and neither may be so large
    # or small that the grid's points coincide.
    mean = mean - mean.max(axis=1, keepdims=True)
    deviation = np.maximum(deviation, _NARROWEST * deviation.max(axis=1, keepdims=True))
    grid = _grid(mean, deviation)
    logs = log_cdf((grid[:, :, None] - mean[:, None, :]) / deviation[:, None, :])
    maximum = np.exp(logs.sum(axis=2))
    growth = np.diff(logs, axis=1)
    share = growth / np.maximum(growth.sum(axis=2, keepdims=True), 1e-300)
    best = np.einsum("cp,cpl->cl", np.diff(maximum, axis=1), share)
    return best / best.sum(axis=1, keepdims=True)


def _grid(mean: Array, deviation: Array) -> Array:
    """float64 [C, points], rising: evenly over where the maximum can be, denser where the leading languages lie."""
    # The maximum is neither below the largest of mean - 4.5 deviation nor above the largest of mean + 4.5 deviation.
    low = (mean - 4.5 * deviation).max(axis=1)[:, None]
    high = (mean + 4.5 * deviation).max(axis=1)[:, None]
    even = low + (high - low) * np.linspace(0.0, 1.0, _EVEN_POINTS)
    leading = min(_LEADING, mean.shape[1])
    order = np.argpartition(-(mean + deviation), leading - 1, axis=1)[:, :leading]
    centre, spread = (np.take_along_axis(values, order, axis=1)[:, :, None] for values in (mean, deviation))
    own = np.clip((centre + spread * _NODES).reshape(len(mean), -1), low, high)
    return np.sort(np.concatenate([even, own], axis=1), axis=1)


def sharpened(probabilities: Array, power: float) -> Array:
    """p^power, rows scaled to sum to 1. Powers above 1 explore less than matching the probability to be best."""
    # Relative to the largest entry, so that no row underflows to zeros.
    raised = (probabilities / probabilities.max(axis=1, keepdims=True)) ** power
    return raised / raised.sum(axis=1, keepdims=True)
