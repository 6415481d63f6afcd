"""Discounted sums of values by cell (the topics and regions of a question), of any number of models at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.router.base import RouterStateError, finite_array
from nemo_lrpo.router.history import COLUMNS, History
from nemo_lrpo.router.numbering import numbered
from nemo_lrpo.router.policy import NUMBERS_OF_LANGUAGES, Cell, Context, Evidence

Array = NDArray[np.float64]
STATE_AXES: Mapping[str, tuple[str, ...]] = {
    "count": ("", "", "languages"),
    "total": ("", "", "languages"),
    COLUMNS["language"]: (NUMBERS_OF_LANGUAGES,),
}
"""Of a policy that keeps a table in its state, see LanguagePolicy."""

_BITS = 32


class CellTable:
    """Number and sum of values per cell, model and language; a cell gets its row with its first observation.

    count, total: float64 [C, M, L]. What is added to a cell at a time is rounded to 32 significant bits, far more than
    a reward's noise leaves of it, so that it can be saved in as many (see history.py).
    """

    def __init__(self, models: int, languages: int) -> None:
        self._rows: dict[Cell, int] = {}
        self.count = np.zeros((0, models, languages))
        self.total = np.zeros((0, models, languages))
        self._history = History(models, languages)

    @property
    def cells(self) -> list[Cell]:
        """In the order of rows."""
        return list(self._rows)

    def read(self, contexts: Sequence[Context]) -> tuple[Array, Array]:
        """Number and sum of values in each context's cell, float64 [C, M, L]; zeros where it has no row."""
        rows = np.array([self._rows.get(c.cell, -1) for c in contexts], np.int64)
        known = rows >= 0
        if known.all():
            return self.count[rows], self.total[rows]
        found = []
        for table in (self.count, self.total):
            values = np.zeros((len(rows), *table.shape[1:]))
            values[known] = table[rows[known]]
            found.append(values)
        return found[0], found[1]

    def decay(self, kept: Array) -> None:
        """Leave the share kept[m] of what model m holds."""
        self.count *= kept[:, None]
        self.total *= kept[:, None]
        self._history.decay(kept)

    def add(self, contexts: Sequence[Context], count: Array, total: Array) -> None:
        """To every model, numbers and sums of values, float64 [C, L] each."""
        rows = np.array([self._rows.setdefault(c.cell, len(self._rows)) for c in contexts], np.int64)
        new = np.zeros((len(self._rows) - len(self.count), *self.count.shape[1:]))
        self.count, self.total = np.concatenate([self.count, new]), np.concatenate([self.total, new])
        self._history.grow(len(new))
        rows, place = numbered(rows, len(self._rows))
        sums = np.zeros((2, len(rows), self.count.shape[2]))
        np.add.at(sums[0], place, count)
        np.add.at(sums[1], place, total)
        row, language = np.nonzero((sums != 0.0).any(axis=0))
        at, (count, total) = (rows[row], slice(None), language), _rounded(sums[:, row, language])
        self._history.add(rows[row], language, count, total, (self.count[at] == 0.0).all(axis=1))
        self.count[at] += count[:, None]
        self.total[at] += total[:, None]

    def state(self) -> dict[str, Any]:
        """Cells as [topics, regions]; the history, and the arrays without the cells that are whole in it."""
        cells = [[list(topics), list(regions)] for topics, regions in self._rows]
        whole = self._history.whole[:, None]
        arrays = {"count": np.where(whole, 0.0, self.count), "total": np.where(whole, 0.0, self.total)}
        return {"cells": cells, **arrays, **self._history.state()}

    def loaded(self, state: Mapping[str, Any]) -> CellTable:
        """A table like this one with the contents of `state()`. Raises RouterStateError where they are damaged."""
        try:
            cells = [(tuple(map(str, topics)), tuple(map(str, regions))) for topics, regions in state["cells"]]
        except (KeyError, TypeError, ValueError) as error:
            raise RouterStateError(f"router state: 'cells' is missing or damaged ({error}).") from error
        if len(set(cells)) != len(cells):
            raise RouterStateError("router state: 'cells' names a cell twice.")
        table = type(self)(*self.count.shape[1:])
        table._rows = {cell: row for row, cell in enumerate(cells)}
        shape = (len(cells), *self.count.shape[1:])
        table.count, table.total = (finite_array(state, name, shape) for name in ("count", "total"))
        table._history = History.of(state, table.count, table.total)
        cell, language, count, total = table._history.sums()
        table.count[cell, :, language], table.total[cell, :, language] = count, total
        return table


def _rounded(values: Array) -> Array:
    """The nearest numbers of _BITS significant bits."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, _BITS)), exponent - _BITS)


def with_whole_tables(learned: Mapping[str, Any]) -> Mapping[str, Any]:
    """A policy's state with `count` and `total` of all cells, where it has such tables. Raises RouterStateError."""
    count = learned.get("count")
    if not isinstance(count, np.ndarray) or count.ndim != 3 or "cells" not in learned:
        return learned
    table = CellTable(*count.shape[1:]).loaded(learned)
    return {**learned, "count": table.count, "total": table.total}


def pairs_of(contexts: Sequence[Context]) -> tuple[list[Context], NDArray[np.int64]]:
    """Every (topic, region) of the contexts as a context of its own, and int64 [P], the context that it belongs to.

    A context without regions pairs its topics with none.
    """
    pairs, owner = [], []
    for row, context in enumerate(contexts):
        regions = [(region,) for region in context.regions] or [()]
        for topic, region in product(context.topics, regions):
            pairs.append(Context((topic,), region))
            owner.append(row)
    return pairs, np.array(owner, np.int64)


class PairTable(CellTable):
    """One model's sums per (topic, region, language); a question with several topics or regions is shared out evenly
    among its pairs and reads all of them."""

    def read(self, contexts: Sequence[Context]) -> tuple[Array, Array]:
        """Number and sum of values over each context's pairs, float64 [C, M, L]."""
        pairs, owner = pairs_of(contexts)
        found = []
        for values in super().read(pairs):
            total = np.zeros((len(contexts), *values.shape[1:]))
            np.add.at(total, owner, values)
            found.append(total)
        return found[0], found[1]

    def add(self, contexts: Sequence[Context], count: Array, total: Array) -> None:
        """Numbers and sums of values, float64 [C, L] each."""
        pairs, owner = pairs_of(contexts)
        share = 1.0 / np.bincount(owner, minlength=len(contexts))[owner][:, None]
        super().add(pairs, count[owner] * share, total[owner] * share)


def window_sums(evidence: Evidence, languages: int) -> tuple[Array, Array, float]:
    """Number and sum of a window's values per context and language, float64 [C, L], and the sum of their squared
    differences from the mean of their context and language."""
    cell = evidence.context.astype(np.int64) * languages + evidence.language
    size = len(evidence.contexts) * languages
    count, total = (np.bincount(cell, weights, size).astype(np.float64) for weights in (None, evidence.value))
    within = evidence.value - (total / np.maximum(count, 1.0))[cell]
    return count.reshape(-1, languages), total.reshape(-1, languages), float((within**2).sum())
