"""From probabilities and uniforms to languages, with or without rules on what a group holds already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.router import DiversityConfig

_CELLS_AT_ONCE = 1 << 22
"""Entries of the (groups, languages) counts that are held at a time."""


def inverted(
    probabilities: NDArray[np.float64], row: NDArray[np.integer], points: NDArray[np.float64]
) -> NDArray[np.int64]:
    """int64 [R]: the language at each point of its row's distribution function; never one of probability 0.

    probabilities: float64 [C, L], non-negative, each row with a positive sum, which need not be 1. row: [R], into C.
    points: float64 [R] in [0, 1). One search over all rows, row c of them shifted to [c, c + 1).
    """
    count, languages = probabilities.shape
    cumulative = probabilities.cumsum(axis=1)
    cumulative /= cumulative[:, -1:]
    cumulative += np.arange(count)[:, None]
    shift = row.astype(np.float64)
    # A sum may round up to the next row's 0.
    shifted = np.minimum(points + shift, np.nextafter(shift + 1.0, 0.0))
    return np.searchsorted(cumulative.ravel(), shifted, side="right") - row.astype(np.int64) * languages


@dataclass
class Draws:
    """The rollouts of N groups, R rows, all slots of group 0 first; `diversify` corrects language and probability.

    first, size, reserved: int64 [N], the group's first row, its rows, how many of them are reserved (all: fixed). row:
    int64 [N], the group's row of `mixture`, float64 [C, L]. points: float64 [R], the uniforms. language: int64 [R].
    probability: float64 [R], given the group's earlier slots. restricted: bool [R], drawn under a rule.
    """

    first: NDArray[np.int64]
    size: NDArray[np.int64]
    reserved: NDArray[np.int64]
    row: NDArray[np.int64]
    mixture: NDArray[np.float64]
    points: NDArray[np.float64]
    language: NDArray[np.int64]
    probability: NDArray[np.float64]
    restricted: NDArray[np.bool_]


def diversify(draws: Draws, rules: DiversityConfig) -> None:
    """Draw the slots again that break a rule, slot by slot, among the languages that keep it.

    A slot of which the rules leave the languages A is drawn from q(l) / sum of q over A, l in A, q the group's mixture;
    uniformly over A where q is 0 on all of A. `probability` becomes that value: the propensity given earlier slots.
    Raises ValueError where `max_per_language` cannot be kept.
    """
    active = np.flatnonzero(draws.reserved < draws.size)
    languages = draws.mixture.shape[1]
    cap = rules.max_per_language
    room = (languages - 1) * cap + np.maximum(cap - draws.reserved[active], 0)
    if cap and (room < (draws.size - draws.reserved)[active]).any():
        raise ValueError(
            f"{int(draws.size.max())} rollouts cannot be filled from {languages} languages with "
            f"router.diversity.max_per_language={cap}; raise it."
        )
    chunk = max(1, _CELLS_AT_ONCE // languages)
    for start in range(0, len(active), chunk):
        _diversify(draws, rules, active[start : start + chunk])


def _diversify(draws: Draws, rules: DiversityConfig, groups: NDArray[np.int64]) -> None:
    first, size, reserved = draws.first[groups], draws.size[groups], draws.reserved[groups]
    floor = min(rules.min_languages, draws.mixture.shape[1])
    every_slot = bool(rules.max_per_language or rules.without_replacement)
    # While a group still has as many slots as it may lack languages, the floor alone rules out nothing.
    start = int(reserved.min() if every_slot else np.maximum(reserved, size - floor + 1).min())
    counts = _counts_before(draws, groups, start)
    distinct = (counts > 0).sum(axis=1)
    for slot in range(start, int(size.max())):
        at = np.flatnonzero((slot >= reserved) & (slot < size) & (every_slot | (distinct < floor)))
        lacking = floor - distinct[at] >= size[at] - slot
        lacking &= distinct[at] < floor
        ruled = np.ones(len(at), bool) if every_slot else lacking
        if ruled.any():
            allowed = _allowed(counts[at[ruled]], lacking[ruled], rules)
            _redraw(draws, first[at[ruled]] + slot, draws.row[groups[at[ruled]]], allowed)
        drawn = draws.language[first[at] + slot]
        distinct[at] += counts[at, drawn] == 0
        counts[at, drawn] += 1


def _counts_before(draws: Draws, groups: NDArray[np.int64], slot: int) -> NDArray[np.int32]:
    """int32 [n, L]: slots of each language among a group's first `slot` ones, and all of its reserved ones."""
    languages = draws.mixture.shape[1]
    taken = np.minimum(np.maximum(draws.reserved[groups], slot), draws.size[groups])
    group = np.repeat(np.arange(len(groups)), taken)
    row = np.arange(len(group)) + (draws.first[groups] - (np.cumsum(taken) - taken))[group]
    cells = np.bincount(group * languages + draws.language[row], minlength=len(groups) * languages)
    return cells.reshape(-1, languages).astype(np.int32)


def _allowed(counts: NDArray[np.int32], lacking: NDArray[np.bool_], rules: DiversityConfig) -> NDArray[np.bool_]:
    """bool [n, L]: languages that the rules leave to groups that hold `counts` [n, L]."""
    allowed = np.ones(counts.shape, bool)
    if rules.max_per_language:
        allowed &= counts < rules.max_per_language
    if rules.without_replacement:
        allowed &= counts == np.where(allowed, counts, np.iinfo(np.int32).max).min(axis=1, keepdims=True)
    allowed &= (counts == 0) | ~lacking[:, None]
    return allowed


def _redraw(draws: Draws, rows: NDArray[np.int64], mixture_row: NDArray[np.int64], allowed: NDArray[np.bool_]) -> None:
    bound = ~allowed.all(axis=1)
    rows, mixture_row, allowed = rows[bound], mixture_row[bound], allowed[bound]
    weights = np.where(allowed, draws.mixture[mixture_row], 0.0)
    empty = ~(weights.sum(axis=1) > 0.0)
    weights[empty] = allowed[empty]
    index = np.arange(len(rows))
    language = inverted(weights, index, draws.points[rows])
    draws.language[rows] = language
    draws.probability[rows] = weights[index, language] / weights.sum(axis=1)
    draws.restricted[rows] = True
