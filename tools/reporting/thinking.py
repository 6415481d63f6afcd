"""Of runs in mode=explang: which languages the policy chose to think in, by stage, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.reporting.charts import Series
from tools.reporting.runs import Run

PREFIX = "explang"
CURVES = (
    ("explang/accuracy", "Accuracy", "share of right answers; dots: validation"),
    ("explang/accuracy_strict", "Accuracy, strict", "a response that does not keep to its tag counted as wrong"),
    ("explang/pass_at_k", "Pass@k", "share of questions with a right answer; dots: validation"),
    ("explang/compliance", "Compliance", "thinking blocks in the language of their tag; dots: validation"),
    ("explang/well_formed", "Whole outputs", "share of tag, thinking block and answer as they should be"),
    ("explang/languages_effective", "Languages chosen", "effective number: n where n are chosen equally often"),
)
_GROUPS = ("seen", "unseen")
ORIGINS = ("chosen", "forced")
"""Of thinking languages; no groups of them."""
_STAGES = (("exploration", 1.0), ("exploitation", 0.0))
"""With the value of the metric `exploration`."""
_FACTS = ("accuracy", "accuracy_strict", "compliance", "tokens", "pass_at_k")


@dataclass(frozen=True)
class Thinking:
    """A thinking language, or the seen or unseen ones together. exploration, exploitation: share of that stage's
    rollouts that chose it, NaN without such steps. facts: means over the last fifth of the steps."""

    name: str
    exploration: float
    exploitation: float
    facts: dict[str, float]

    @property
    def group(self) -> bool:
        """Whether it stands for several languages."""
        return self.name in _GROUPS


def thinking_languages(runs: Sequence[Run]) -> list[str]:
    """All that a response of the runs has thought in, sorted."""
    start = f"{PREFIX}/count/"
    keys = {key for run in runs for record in (*run.train, *run.validation) for key in record if key.startswith(start)}
    return sorted({key.removeprefix(start) for key in keys} - {*_GROUPS, *ORIGINS})


def in_explang(run: Run) -> bool:
    """Whether it is a run in mode=explang."""
    logged = any(key.startswith(f"{PREFIX}/") for record in (*run.train, *run.validation) for key in record)
    return logged or run.settings().get("mode.name") == PREFIX


def proposes(run: Run) -> bool:
    """Whether its router has a say: in mode=explang only with forced rollouts."""
    forced = run.settings().get("mode.forced_rollouts") or np.nansum(run.series(f"{PREFIX}/forced")[1])
    return not in_explang(run) or bool(forced)


def chosen(run: Run, key: str, validation: bool = False) -> Series:
    """Steps and values [N] of a metric selected.../<language>: a record that says what was chosen and does not name the
    language has chosen it never; NaN in records that say nothing of it."""
    records = run.validation if validation else run.train
    steps, values = run.series(key, validation)
    says = [any(name.startswith(f"{PREFIX}/selected/") for name in record) for record in records]
    return steps, np.where(np.array(says, bool) & np.isnan(values), 0.0, values)


def thinking_rows(run: Run) -> list[Thinking]:
    """A row for each language, and for the seen and the unseen ones; empty for a run in another mode."""
    languages = thinking_languages([run])
    return [_row(run, name) for name in (*_GROUPS, *languages)] if languages else []


def _row(run: Run, name: str) -> Thinking:
    exploring = run.series(f"{PREFIX}/exploration")[1]
    shares = [_share(run, f"selected_{stage}/{name}", exploring == value) for stage, value in _STAGES]
    count = max(1, len(run.train) // 5)
    facts = {}
    for fact in _FACTS:
        values = run.series(f"{PREFIX}/{fact}/{name}")[1][-count:]
        facts[fact] = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
    return Thinking(name, *shares, facts)


def _share(run: Run, key: str, steps: NDArray[np.bool_]) -> float:
    """Mean over those of `steps` in which any language could be chosen."""
    values = chosen(run, f"{PREFIX}/{key}")[1][steps]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
