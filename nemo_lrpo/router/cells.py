"""Running statistics by cell, the topics and regions of a question in any order. Only observing gives a cell a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.router.base import RouterStateError, finite_array
from nemo_lrpo.router.policy import Cell, Context
from nemo_lrpo.router.state import Fit


class Cells:
    """Rows of cells, and float64 arrays [C] or [C, L] that grow with them."""

    def __init__(self, languages: int, **axes: tuple[str, ...]) -> None:
        """`languages`: L. `axes`: name of each array -> its axes behind that of cells, none or "languages"."""
        self._rows: dict[Cell, int] = {}
        self._axes = axes
        self.arrays: dict[str, NDArray[np.float64]] = {
            name: np.zeros((0, *(languages for _ in behind))) for name, behind in axes.items()
        }

    def find(self, contexts: Sequence[Context]) -> NDArray[np.int64]:
        """int64 [N]: the row of each context's cell, -1 where it has none; creates nothing."""
        return np.array([self._rows.get(c.cell, -1) for c in contexts], np.int64)

    def claim(self, contexts: Sequence[Context]) -> NDArray[np.int64]:
        """int64 [N]: the row of each context's cell; new cells get rows of zeros."""
        rows = [self._rows.setdefault(c.cell, len(self._rows)) for c in contexts]
        for name, array in self.arrays.items():
            grown = np.zeros((len(self._rows) - len(array), *array.shape[1:]))
            self.arrays[name] = np.concatenate([array, grown])
        return np.array(rows, np.int64)

    def state(self) -> dict[str, Any]:
        """JSON values and arrays; a cell is [topics, regions]."""
        cells = [[list(topics), list(regions)] for topics, regions in self._rows]
        return {"cells": cells} | {name: array.copy() for name, array in self.arrays.items()}

    def restore(self, part: str, saved: Mapping[str, Any], fit: Fit) -> None:
        """Continue from `state()`. Raises RouterStateError, naming `part`, for a state that is damaged."""
        try:
            cells = [Context(tuple(topics), tuple(regions)).cell for topics, regions in saved["cells"]]
        except (KeyError, TypeError, ValueError) as error:
            raise RouterStateError(f"router state: {part!r} is missing its cells or damaged ({error}).") from error
        # Older states kept cells apart by the order of their names: the first one counts.
        first: dict[Cell, int] = {}
        for row, cell in enumerate(cells):
            first.setdefault(cell, row)
        arrays = {}
        for name, behind in self._axes.items():
            array = finite_array(saved, name, (len(cells), *(len(fit.places[axis]) for axis in behind)))
            arrays[name] = fit.array(f"{part}.{name}", array, ("", *behind))[list(first.values())]
        self._rows, self.arrays = {cell: row for row, cell in enumerate(first)}, arrays
