"""Distinct numbers among many, by counting where that is less work than sorting."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]

_PLACES_PER_VALUE = 16
"""Up to so many possible numbers for each value a table of all of them is made."""


def numbered(values: Index, bound: int) -> tuple[Index, Index]:
    """The distinct values, rising, and the position of each value among them. values: int64 [N] in [0, bound)."""
    if bound > _PLACES_PER_VALUE * len(values):
        return np.unique(values, return_inverse=True)
    seen = np.zeros(bound, bool)
    seen[values] = True
    distinct = np.flatnonzero(seen)
    position = np.empty(bound, np.int64)
    position[distinct] = np.arange(len(distinct))
    return distinct, position[values]


def numbered_runs(values: NDArray[np.integer]) -> tuple[Index, Index]:
    """Where each run of equal values begins, and the number of the run that each value is in. values: [N]."""
    changes = np.ones(len(values), bool)
    changes[1:] = values[1:] != values[:-1]
    return np.flatnonzero(changes), np.cumsum(changes) - 1
