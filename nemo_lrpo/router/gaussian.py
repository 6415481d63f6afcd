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
_LAST_PLACE = 2.0 * _REACH * _PER_UNIT
_EVEN_POINTS, _LEADING = 33, 4
_NODES = np.array([-3.5, -2.4, -1.6, -0.9, -0.3, 0.3, 0.9, 1.6, 2.4, 3.5])
_NARROWEST = 1e-9
"""Deviations below this share of the row's largest count as this share."""
_CHUNK = 1 << 14
"""Entries of [C, L, points] that are worked on at once: 128 KB an array, which a core keeps at hand."""


def log_cdf(z: Array) -> Array:
    """log Phi(z), Phi the standard normal distribution function; absolute error below 3e-7, clipped at |z| = 8.

    Linear interpolation in a table of step 1/800: several times as fast as evaluating an error function.
    """
    return _looked_up(np.clip(z * _PER_UNIT + _REACH * _PER_UNIT, 0.0, _LAST_PLACE))


def _looked_up(place: Array) -> Array:
    """log Phi where `place`, overwritten, counts steps of the table from z = -8, up to _LAST_PLACE."""
    whole = np.floor(place)
    place -= whole
    # Several times as fast as straight to intp; "clip", which has nothing to do, as the check of every index.
    below = whole.astype(np.int32).astype(np.intp)
    place *= _SLOPE.take(below, mode="clip")
    place += _TABLE.take(below, mode="clip")
    return place


def probability_best(mean: Array, deviation: Array) -> Array:
    """P(language l has the largest value), values independent and normal. float64 [C, L], rows sum to 1.

    mean, deviation: float64 [C, L], deviation > 0.

    The maximum has the distribution function F(x) = prod_l Phi((x - mean_l) / deviation_l), so that
    P(l best) = integral of F dlog Phi_l. On a grid the growth of F over each interval is shared out in proportion to
    the growth of log Phi_l: rows sum to 1 by construction, and a language whose deviation is far below the grid's step
    still gets its share.
    """
    # Relative to the largest value and spread of the row: only their differences count, and neither may be so large
    # or small that the grid's points coincide.
    mean = mean - mean.max(axis=1, keepdims=True)
    deviation = np.maximum(deviation, _NARROWEST * deviation.max(axis=1, keepdims=True))
    grid = _grid(mean, deviation)
    # In steps of the table.
    scale = _PER_UNIT / deviation
    offset = _REACH * _PER_UNIT - mean * scale
    best = np.empty_like(mean)
    rows = max(1, _CHUNK // (grid.shape[1] * mean.shape[1]))
    for start in range(0, len(mean), rows):
        part = slice(start, start + rows)
        best[part] = _shared_out(grid[part], scale[part], offset[part])
    return best / best.sum(axis=1, keepdims=True)


def _shared_out(grid: Array, scale: Array, offset: Array) -> Array:
    """float64 [C, L]: the growth of F over `grid` [C, points], shared out; scale, offset: [C, L], x to the table."""
    place = grid[:, None, :] * scale[:, :, None]
    place += offset[:, :, None]
    # Points rise, so that the ends tell whether any place lies outside the table.
    if place[:, :, 0].min(initial=0.0) < 0.0 or place[:, :, -1].max(initial=0.0) > _LAST_PLACE:
        np.clip(place, 0.0, _LAST_PLACE, out=place)
    logs = _looked_up(place)
    of_all = logs.sum(axis=1)
    growth = np.diff(of_all)
    share = np.divide(np.diff(np.exp(of_all)), growth, out=np.zeros_like(growth), where=growth > 0.0)
    # Sum over intervals of share times the growth of log Phi_l, in parts: each point's log Phi_l enters twice.
    weight = np.zeros_like(grid)
    weight[:, 1:] = share
    weight[:, :-1] -= share
    return np.maximum((logs @ weight[:, :, None])[:, :, 0], 0.0)


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
