"""Evaluations by nemo_lrpo.evaluate, compared question by question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.evaluation import TEST
from tools.reporting.runs import ReportError, read_lines

ALL, MACRO = "all", "mean of languages"
RESAMPLES = 2000
Answers = dict[tuple[str, str], dict[str, Any]]
"""By task and sample id."""


@dataclass(frozen=True)
class Gain:
    """Mean reward of one language before and after, over the same questions, with a 95 % interval of the difference.
    count: questions."""

    language: str
    count: int
    before: float
    after: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0.0 or self.high < 0.0


def read_answers(path: Path) -> Answers:
    """The answers beside an evaluation (`<name>.jsonl` beside `<name>.json`). Raises ReportError."""
    path = path.with_suffix(".jsonl")
    if not path.is_file():
        raise ReportError(f"{path}: no such file; nemo_lrpo.evaluate leaves its answers there, beside its result.")
    notes: list[str] = []
    answers: Answers = {}
    for number, record in read_lines(path, notes):
        missing = [key for key in ("sample_id", "language", "response", "score") if key not in record]
        if missing:
            raise ReportError(f"{path}:{number}: has no {missing[0]!r}; it is no answer of an evaluation.")
        answers[str(record.get("task", TEST)), record["sample_id"]] = record
    if notes or not answers:
        raise ReportError(f"{path}: " + (f"{notes[0]} Let the evaluation end." if notes else "holds no answer."))
    return answers


def gains(before: Answers, after: Answers) -> dict[str, list[Gain]]:
    """By task: over all questions, the mean of languages, and every language; paired by question, whose value is the
    mean over its answers. Intervals are percentiles of a bootstrap over questions, for the mean of languages within
    each. Raises ReportError."""
    pairs: dict[str, dict[str, list[tuple[float, float]]]] = {}
    old = question_rewards(before)
    for (task, question), (language, new) in question_rewards(after).items():
        if (task, question) in old:
            pairs.setdefault(task, {}).setdefault(language, []).append((old[task, question][1], new))
    if not pairs:
        raise ReportError("the two evaluations share no scored question.")
    return {task: _gains(by_language) for task, by_language in pairs.items()}


def question_rewards(answers: Answers) -> dict[tuple[str, str], tuple[str, float]]:
    """By task and question: its language and the mean reward of its answers; questions without any are left out."""
    found: dict[tuple[str, str], tuple[str, list[float]]] = {}
    for (task, sample_id), record in answers.items():
        value = reward(record)
        if value is not None:
            question = task, sample_id.rpartition("/")[0]
            found.setdefault(question, (str(record["language"]), []))[1].append(value)
    return {question: (language, fmean(values)) for question, (language, values) in found.items()}


def reward(record: Mapping[str, Any] | None) -> float | None:
    """The reward of an answer, None where it has none."""
    score = record.get("score") if record is not None else None
    return score.get("reward") if isinstance(score, Mapping) else None


def _gains(pairs: Mapping[str, list[tuple[float, float]]]) -> list[Gain]:
    generator = np.random.default_rng(0)
    values = {language: np.array(pairs[language]) for language in sorted(pairs)}
    whole = np.concatenate(list(values.values()))
    rows = [_gain(ALL, whole, _resampled(whole, generator))]
    means = {language: _resampled(own, generator) for language, own in values.items()}
    center = np.mean([own.mean(axis=0) for own in values.values()], axis=0)
    macro = _gain(MACRO, center[None], np.mean(list(means.values()), axis=0))
    rows.append(Gain(MACRO, len(whole), macro.before, macro.after, macro.low, macro.high))
    return rows + [_gain(language, own, means[language]) for language, own in values.items()]


def _gain(name: str, values: NDArray[np.float64], means: NDArray[np.float64]) -> Gain:
    before, after = values.mean(axis=0).tolist()
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return Gain(name, len(values), before, after, low, high)


def _resampled(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """float64 [RESAMPLES]: mean differences of resampled questions; values [N, 2]."""
    difference = values[:, 1] - values[:, 0]
    # In pieces, so that a large test set needs no more memory than a small one.
    piece = max(1, 1_000_000 // len(difference))
    return np.concatenate(
        [
            difference[generator.integers(len(difference), size=(min(piece, RESAMPLES - done), len(difference)))].mean(
                1
            )
            for done in range(0, RESAMPLES, piece)
        ]
    )
