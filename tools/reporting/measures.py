"""What an evaluation's result says of each task besides its rewards, as tables: languages seen and unseen in training,
answers by grade, pass@k, and in mode=explang what each thinking language was chosen for and brought."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lrpo.config.mode import EXPLANG
from tools.reporting.runs import ReportError
from tools.reporting.thinking import ORIGINS

GROUPS = ("seen", "unseen")
_FACTS = (
    ("accuracy", "accuracy", 3),
    ("accuracy_strict", "strict", 3),
    ("compliance", "compliance", 3),
    ("tokens", "tokens", 1),
    ("pass_at_k", "pass@k", 3),
)
Tree = Mapping[str, Any]
"""Of a task, as TaskResult.tree writes it."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, and of whom it is in the page's words. tasks: by name."""

    label: str
    tasks: Mapping[str, Tree]


@dataclass(frozen=True)
class Table:
    """head: names of the columns; rows: their cells, the first of which say of what; total: rows that stand for
    several languages. folded: long, so that it is closed at first."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]
    total: list[bool]
    folded: bool = False


def read_result(path: Path) -> dict[str, Tree]:
    """By task, what `<name>.json` says; nothing where there is no such file. Raises ReportError."""
    path = path.with_suffix(".json")
    if not path.is_file():
        return {}
    try:
        tasks = json.loads(path.read_text(encoding="utf-8")).get("tasks", {})
        return {name: {**task, "metric": str(task["metric"])} for name, task in tasks.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ReportError(f"{path}: no result of nemo_lrpo.evaluate ({error!r}).") from error


def tables(task: str, evaluations: Sequence[Evaluated]) -> list[Table]:
    """What there is to say of `task`: one table of each kind, of mode=explang one for each evaluation."""
    found = [(one.label, one.tasks[task]) for one in evaluations if task in one.tasks]
    made = [make(found) for make in (_groups, _answers, _passes, _passes_by_language)]
    return [table for table in [*made, *(_thinking(*one) for one in found)] if table is not None]


def _groups(found: Sequence[tuple[str, Tree]]) -> Table | None:
    """Only where a language is unseen: else the mean of languages says the same."""
    if not any(tree.get("unseen") for _, tree in found):
        return None
    head = ["", "mean of languages", *GROUPS]
    rows = [[label, *(_interval(tree.get(key)) for key in ("macro", *GROUPS))] for label, tree in found]
    metric = found[-1][1]["metric"]
    return _table(
        "Languages seen and unseen in training", f"mean {metric} of the languages, 95 % intervals", head, rows
    )


def _answers(found: Sequence[tuple[str, Tree]]) -> Table | None:
    """Only where an answer is in another language, or a judge has graded."""
    grades = dict.fromkeys(grade for _, tree in found for grade in tree.get("grades") or {})
    if not grades and not any(tree.get("wrong_language") for _, tree in found):
        return None
    head = ["", "answers", "in another language", *grades]
    rows = []
    for label, tree in found:
        own = tree.get("grades") or {}
        # Its mean is over the answers that have a value.
        total = (tree.get("metrics") or {}).get("count") or sum(own.values()) or (tree.get("all") or {}).get("count")
        counts = (tree.get("wrong_language"), *(own.get(grade, 0) if own else None for grade in grades))
        rows.append([label, _number(total, 0), *(_share(count, total) for count in counts)])
    note = "shares of all answers; another language: where an answer's can be said"
    return _table("Answers" + (" by the judge's grade" if grades else ""), note, head, rows)


def _passes(found: Sequence[tuple[str, Tree]]) -> Table | None:
    return _passes_table("pass@k", found, lambda _: [""])


def _passes_by_language(found: Sequence[tuple[str, Tree]]) -> Table | None:
    return _passes_table(
        "pass@k by language", found, lambda passes: sorted({key.partition("/")[2] for key in passes} - {""})
    )


def _passes_table(
    title: str, found: Sequence[tuple[str, Tree]], scopes: Callable[[Mapping[str, float]], list[str]]
) -> Table | None:
    passes = [(label, tree.get("pass_at_k") or {}) for label, tree in found]
    depths = sorted({int(key.partition("/")[0]) for _, own in passes for key in own})
    rows = [
        [label, *([scope] if scope else []), *(_number(own.get(f"{k}/{scope}" if scope else f"{k}")) for k in depths)]
        for label, own in passes
        if own
        for scope in scopes(own)
    ]
    if not rows:
        return None
    folded = len(rows[0]) > 1 + len(depths)
    head = ["", *(["language"] if folded else []), *(f"pass@{k}" for k in depths)]
    note = "probability that one of k answers to a question is right, mean over questions"
    return _table(title, note, head, rows, folded=folded)


def _thinking(label: str, tree: Tree) -> Table | None:
    """By thinking language; a column or a row that has no value is left out."""
    values = {
        key.removeprefix(f"{EXPLANG}/"): value
        for key, value in (tree.get("metrics") or {}).items()
        if key.startswith(f"{EXPLANG}/")
    }
    if not values.get("count"):
        return None
    named = {key.removeprefix("count/") for key in values if key.startswith("count/")}
    languages = sorted(named - {*GROUPS, *ORIGINS})
    scopes = ["", *(name for name in (*GROUPS, *languages) if values.get(f"count/{name}"))]
    # Where the policy was made to think in a language, it has chosen none.
    chooses = any(key.startswith("selected/") for key in values)
    facts = [fact for fact in _FACTS if any(key.partition("/")[0] == fact[0] for key in values)]
    rows = []
    for scope in scopes:
        end = f"/{scope}" if scope else ""
        selected = [_percent(values.get(f"selected{end}", 0.0)) if scope else ""] if chooses else []
        own = [_number(values.get(key + end), digits) for key, _, digits in facts]
        rows.append([scope or "all", _number(values.get(f"count{end}"), 0), *selected, *own])
    if values.get("selected/none"):
        rows.append(["none", "", _percent(values["selected/none"]), *("" for _ in facts)])
    head = ["thinking in", "responses", *(["chosen"] if chooses else []), *(name for _, name, _ in facts)]
    note = "strict: a response that does not keep to its tag counted as wrong; pass@k: questions with a right response"
    return _table(f"Thinking languages, {label}", note, head, rows, ("all", *GROUPS), folded=True)


def _table(
    title: str,
    note: str,
    head: list[str],
    rows: list[list[str]],
    totals: Sequence[str] = (),
    folded: bool = False,
) -> Table:
    return Table(title, note, head, rows, [row[0] in totals for row in rows], folded)


def _interval(one: Tree | None) -> str:
    if one is None or one.get("mean") is None:
        return "–"
    return f"{_number(one['mean'])} ({_number(one.get('low'))} to {_number(one.get('high'))})"


def _share(count: float | None, total: float | None) -> str:
    return "–" if count is None else _number(count, 0) + (f" ({_percent(count / total)})" if total else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
