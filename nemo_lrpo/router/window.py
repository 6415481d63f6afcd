"""The rollouts between two updates of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.router.base import RouterStateError, whole_number
from nemo_lrpo.router.numbering import numbered_runs
from nemo_lrpo.router.policy import Context, Evidence

_COLUMNS = {"context": np.int32, "language": np.int16, "value": np.float64, "group": np.int32}


class Window:
    """Rows of the steps since the last update, see Evidence."""

    def __init__(self) -> None:
        self.steps = 0
        self._contexts: dict[Context, int] = {}
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._groups = 0

    def add(
        self,
        contexts: Sequence[Context],
        context: NDArray[np.integer],
        language: NDArray[np.integer],
        value: NDArray[np.float64],
        group: NDArray[np.integer],
    ) -> None:
        """One step's rows in their order; `context` [N] is into `contexts`, group [N], rising, its groups."""
        rows = np.array([self._contexts.setdefault(c, len(self._contexts)) for c in contexts], np.int32)
        first, run = numbered_runs(group)
        columns = {
            "context": rows[context] if len(rows) else np.zeros(0, np.int32),
            "language": language,
            "value": value,
            "group": run + self._groups,
        }
        self._parts.append({name: columns[name].astype(dtype) for name, dtype in _COLUMNS.items()})
        self._groups += len(first)
        self.steps += 1

    def evidence(self) -> Evidence:
        """All rows so far."""
        columns = {
            name: np.concatenate([part[name] for part in self._parts] or [np.zeros(0, dtype)])
            for name, dtype in _COLUMNS.items()
        }
        return Evidence(contexts=list(self._contexts), steps=self.steps, **columns)

    def state(self) -> dict[str, Any]:
        """JSON values and arrays; a context is [topics, regions, language, question]."""
        evidence = self.evidence()
        contexts = [[list(c.topics), list(c.regions), c.language, c.question] for c in evidence.contexts]
        return {"steps": self.steps, "contexts": contexts} | {name: getattr(evidence, name) for name in _COLUMNS}

    @staticmethod
    def of(state: Mapping[str, Any], columns: NDArray[np.int64]) -> Window:
        """The window that was saved; `columns` [L saved] is where its languages are now. Raises RouterStateError."""
        window = Window()
        try:
            contexts = [Context(tuple(t), tuple(g), str(x), str(q)) for t, g, x, q in state["contexts"]]
            rows = {name: np.asarray(state[name], dtype) for name, dtype in _COLUMNS.items()}
            if len(set(contexts)) < len(contexts):
                raise ValueError("a context is there twice")
            steps = whole_number(state, "steps")
            for name, bound in (("context", len(contexts)), ("language", len(columns))):
                if rows[name].size and not (rows[name].min() >= 0 and rows[name].max() < bound):
                    raise ValueError(f"{name} out of range")
            if len({part.shape for part in rows.values()}) > 1 or rows["value"].ndim != 1:
                raise ValueError("columns differ in length")
            if not np.isfinite(rows["value"]).all():
                raise ValueError("a value is not finite")
        except (KeyError, TypeError, ValueError) as error:
            raise RouterStateError(f"router state: 'window' is missing a part or damaged ({error}).") from error
        rows["language"] = columns[rows["language"]].astype(np.int16) if len(columns) else rows["language"]
        window._contexts = {context: row for row, context in enumerate(contexts)}
        window._parts = [rows]
        window._groups = int(rows["group"].max(initial=-1)) + 1
        window.steps = steps
        return window
