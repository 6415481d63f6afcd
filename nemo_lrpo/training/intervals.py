"""Means by language with 95 % intervals: a bootstrap over questions, all languages resampled together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.seeding import derive_seed

LEVEL = 0.95
REPLICATES = 2000
_CELLS_AT_ONCE = 1 << 22
"""Entries of the matrix of weights that is drawn at once: 32 MB."""


@dataclass(frozen=True)
class Interval:
    """A mean over `count` values and the interval [low, high] of its bootstrap distribution; NaN without values."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Averages:
    """all: mean over the values; macro: mean over the languages' means, over the seen languages, over the unseen ones;
    None where there is no such language."""

    languages: Mapping[str, Interval]
    all: Interval
    macro: Interval
    seen: Interval | None
    unseen: Interval | None


def averages(
    values: Sequence[float],
    languages: Sequence[str],
    parallel: Sequence[str],
    *,
    unseen: Collection[str],
    seed: int,
    replicates: int = REPLICATES,
) -> Averages:
    """Means of `values`, by `languages`, with percentile intervals.

    `parallel` names the question of each value: values of one question (in several languages) are resampled together,
    since a question that is hard in one language is hard in the others too. Questions are resampled among those that
    are asked in the same languages, so that the number of questions of a language stays as it is. Questions count as
    drawn at random, languages as given. A question may have several values in one language: they are resampled together
    too, each weighs alike in the means, and each counts. The draws are a function of `seed` alone.
    """
    table = _Table(values, languages, parallel)
    draws = table.resampled(replicates, np.random.Generator(np.random.Philox(key=seed)))
    points = table.language_means(np.ones((1, len(table.questions))))[0]
    counts = table.counts.sum(axis=0).astype(int)

    def interval(mean: float, sample: NDArray[np.float64], count: int) -> Interval:
        if not count:
            return Interval(float("nan"), float("nan"), float("nan"), 0)
        low, high = np.quantile(sample, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(mean), float(low), float(high), int(count))

    def macro(chosen: list[int]) -> Interval | None:
        if not chosen:
            return None
        return interval(points[chosen].mean(), draws[:, chosen].mean(axis=1), counts[chosen].sum())

    everyone = list(range(len(table.languages)))
    total = max(counts.sum(), 1)
    return Averages(
        languages={language: interval(points[i], draws[:, i], counts[i]) for i, language in enumerate(table.languages)},
        all=interval(points @ counts / total, draws @ counts / total, counts.sum()),
        macro=macro(everyone) or interval(0.0, draws[:, 0:0], 0),
        seen=macro([i for i in everyone if table.languages[i] not in unseen]),
        unseen=macro([i for i in everyone if table.languages[i] in unseen]),
    )


def bootstrap_seed(seed: int, task: str) -> int:
    """The key of a task's draws."""
    return derive_seed("bootstrap", seed, task)


class _Table:
    """Sums and counts of the values by question and language, questions grouped by the languages they are asked in."""

    def __init__(self, values: Sequence[float], languages: Sequence[str], parallel: Sequence[str]):
        self.languages = sorted(set(languages))
        self.questions = sorted(set(parallel))
        column = {language: i for i, language in enumerate(self.languages)}
        row = {question: i for i, question in enumerate(self.questions)}
        at = np.array([row[q] for q in parallel], np.intp), np.array([column[x] for x in languages], np.intp)
        shape = len(self.questions), len(self.languages)
        self.sums, self.counts = np.zeros(shape), np.zeros(shape)
        np.add.at(self.sums, at, np.asarray(values, np.float64))
        np.add.at(self.counts, at, 1.0)
        strata: dict[bytes, list[int]] = {}
        for i, asked in enumerate(self.counts):
            # Not by how many values: questions that lack one each would be strata of their own, which never vary.
            strata.setdefault((asked > 0).tobytes(), []).append(i)
        self._strata = [np.array(rows) for rows in strata.values()]

    def language_means(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """[B, L] of weights [B, Q]."""
        return (weights @ self.sums) / (weights @ self.counts)

    def resampled(self, replicates: int, generator: np.random.Generator) -> NDArray[np.float64]:
        """[replicates, L]: the languages' means over questions drawn with replacement, as many as there are."""
        step = max(1, _CELLS_AT_ONCE // max(1, len(self.questions)))
        parts = [np.zeros((0, len(self.languages)))]
        for start in range(0, replicates, step):
            weights = np.zeros((min(step, replicates - start), len(self.questions)))
            for rows in self._strata:
                even = np.full(len(rows), 1.0 / len(rows))
                weights[:, rows] = generator.multinomial(len(rows), even, size=len(weights))
            parts.append(self.language_means(weights))
        return np.concatenate(parts)
