"""Cells as features phi, of which few are not 0: one constant, the share of each topic, that of each region.

Sums over cells and quadratic forms go over those few, not over all D. Every sum's order is fixed by the cell alone, so
that a cell's result is the same to the bit whatever cells come with it, as a resumed run asks in other company.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.router.policy import Cell
from nemo_lrpo.router.tree import TreePosterior

Array = NDArray[np.float64]
Index = NDArray[np.int64]

_AT_ONCE = 1 << 20
"""Numbers that are worked on at once, 8 MB."""


class CellFeatures:
    """phi of cells, float64 [D] each, worked out once; a cell has its row from when it is first asked for."""

    def __init__(self, topics: Sequence[str], regions: Sequence[str]) -> None:
        """`topics`, `regions`: those with a feature each; others share one, as one more of each."""
        self._columns = [{name: i for i, name in enumerate(names)} for names in (topics, regions)]
        self.widths = (1, *(len(columns) + 1 for columns in self._columns))
        """Features of the constant, of topics, of regions; D in all."""
        self._rows: dict[Cell, int] = {}
        self._phi = np.zeros((0, sum(self.widths)))

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, cells: Sequence[Cell]) -> Index:
        """int64 [C]: the row of each cell."""
        new = [cell for cell in dict.fromkeys(cells) if cell not in self._rows]
        if new:
            self._rows.update(zip(new, range(len(self._rows), len(self._rows) + len(new))))
            self._phi = np.concatenate([self._phi, *(self._worked_out(cell)[None] for cell in new)])
        return np.array([self._rows[cell] for cell in cells], np.int64)

    def phi(self, rows: Index) -> Array:
        """float64 [C, D]."""
        return self._phi[rows]

    def _worked_out(self, cell: Cell) -> Array:
        phi, start = np.zeros(sum(self.widths)), 1
        phi[0] = 1.0
        for columns, present in zip(self._columns, cell):
            for name in present:
                phi[start + columns.get(name, len(columns))] += 1.0 / len(present)
            start += len(columns) + 1
        return phi


def _by_width(phi: Array) -> Iterator[tuple[Index, Index, Array]]:
    """Cells with equally many features that are not 0: which cells, int64 [n], those features, int64 [n, W], rising,
    and their values, float64 [n, W]."""
    cell, feature = np.nonzero(phi)
    width = np.bincount(cell, minlength=len(phi))
    first = np.cumsum(width) - width
    for wide in np.unique(width).tolist():
        cells = np.flatnonzero(width == wide)
        features = feature[first[cells][:, None] + np.arange(wide)]
        yield cells, features, phi[cells[:, None], features]


def _pairs(features: Index, values: Array, dimension: int) -> tuple[Index, Array]:
    """Of n cells: the place of every pair i <= j in a matrix [D, D], and the product of values; [n, P] each."""
    one, other = np.triu_indices(features.shape[1])
    return features[:, one] * dimension + features[:, other], values[:, one] * values[:, other]


class Design:
    """phi of C cells, for sums over them."""

    def __init__(self, phi: Array) -> None:
        """phi: float64 [C, D]."""
        self.phi = phi
        dimension = phi.shape[1]
        parts = [(cells, *_pairs(features, values, dimension)) for cells, features, values in _by_width(phi)]
        place = np.concatenate([np.zeros(0, np.int64), *(place.ravel() for _, place, _ in parts)])
        order = np.argsort(place, kind="stable")
        owners = [np.repeat(cells, place.shape[1]) for cells, place, _ in parts]
        self._cell = np.concatenate([np.zeros(0, np.int64), *owners])[order]
        self._product = np.concatenate([np.zeros(0), *(product.ravel() for *_, product in parts)])[order]
        self._place, self._first = np.unique(place[order], return_index=True)

    def information(self, weight: Array) -> Array:
        """float64 [L, D, D]: sum over cells of weight phi phi'; weight: float64 [C, L]."""
        dimension, languages = self.phi.shape[1], weight.shape[1]
        found = np.zeros((languages, dimension**2))
        if not len(self._place):
            return found.reshape(languages, dimension, dimension)
        row, column = np.divmod(self._place, dimension)
        step = max(1, _AT_ONCE // len(self._cell))
        for start in range(0, languages, step):
            part = slice(start, start + step)
            terms = weight[:, part].T.take(self._cell, axis=1) * self._product
            found[part, self._place] = np.add.reduceat(terms, self._first, axis=1)
        found[:, column * dimension + row] = found[:, self._place]
        return found.reshape(languages, dimension, dimension)


@dataclass
class Predictions:
    """Mean and variance of phi . w_l in cells under a posterior, worked out once each."""

    features: CellFeatures
    posterior: TreePosterior

    def __post_init__(self) -> None:
        languages = len(self.posterior.mean)
        self._mean, self._variance = np.zeros((0, languages)), np.zeros((0, languages))
        self._known = np.zeros(0, bool)

    def __call__(self, rows: Index) -> tuple[Array, Array]:
        """float64 [C, L] each; rows: of `features`."""
        new = len(self.features) - len(self._known)
        if new:
            room = np.empty((new, self._mean.shape[1]))
            self._mean, self._variance = np.concatenate([self._mean, room]), np.concatenate([self._variance, room])
            self._known = np.concatenate([self._known, np.zeros(new, bool)])
        missing = rows[~self._known[rows]]
        if len(missing):
            self._mean[missing], self._variance[missing] = predict(self.posterior, self.features.phi(missing))
            self._known[missing] = True
        return self._mean[rows], self._variance[rows]


def predict(posterior: TreePosterior, phi: Array) -> tuple[Array, Array]:
    """Mean and variance of phi . w_l, float64 [C, L] each; phi: float64 [C, D] of cells."""
    languages, dimension = posterior.mean.shape
    covariance = posterior.covariance.reshape(languages, -1)
    mean, variance = np.zeros((2, len(phi), languages))
    for cells, features, values in _by_width(phi):
        pairs = features.shape[1] * (features.shape[1] + 1) // 2
        step = max(1, _AT_ONCE // (languages * pairs))
        for start in range(0, len(cells), step):
            part = slice(start, start + step)
            place, product = _pairs(features[part], values[part], dimension)
            # What is off the diagonal is there twice.
            product = np.where(place % (dimension + 1) == 0, product, 2.0 * product)
            mean[cells[part]] = _weighted(posterior.mean, features[part], values[part])
            variance[cells[part]] = _weighted(covariance, place, product)
    # Rounding may leave the smallest ones below zero where effects differ in size by many orders.
    return mean, np.maximum(variance, 0.0)


def _weighted(table: Array, columns: Index, weights: Array) -> Array:
    """float64 [n, L]: sum over k of weights[:, k] times the columns[:, k] of `table` [L, T], in the order of k."""
    terms = table.take(columns.T, axis=1) * weights.T
    total = terms[:, 0].copy()
    for k in range(1, terms.shape[1]):
        total += terms[:, k]
    return total.T
