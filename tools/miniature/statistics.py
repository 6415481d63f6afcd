"""Means over seeds with 95 % intervals, of arms and of their paired differences to a baseline."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t

from tools.miniature.outcomes import Measure, Outcome

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean over `count` seeds and Student's interval [low, high] of it; NaN ends for a single seed, a NaN mean for
    none."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    @property
    def apart(self) -> bool:
        """Of a difference: whether the interval leaves out 0."""
        return self.low > 0.0 or self.high < 0.0


def estimate(values: Sequence[float]) -> Estimate:
    """mean +- t(0.975, n - 1) * s / sqrt(n), s the sample's standard deviation."""
    if not values:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean, count = fmean(values), len(values)
    if count == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Of the differences seed by seed, over the seeds that both have."""
    return estimate([values[seed] - baseline[seed] for seed in sorted(values) if seed in baseline])


def macro(by_language: Mapping[str, float], languages: Collection[str] | None = None) -> float:
    """The mean of the languages' means, of all or of some."""
    return fmean(value for language, value in by_language.items() if languages is None or language in languages)


def language_groups(taught: Mapping[str, float]) -> dict[str, list[str]]:
    """The third of the languages that were taught most of their questions (`rich`), the third taught least (`poor`),
    and the others (`middle`); equals by name."""
    order = sorted(taught, key=lambda language: (-taught[language], language))
    third = max(1, len(order) // 3)
    return {
        "rich": sorted(order[:third]),
        "middle": sorted(order[third : len(order) - third]),
        "poor": sorted(order[len(order) - third :]),
    }


def figures(outcome: Outcome) -> dict[str, float]:
    """All single numbers of a run, by name: what is averaged over seeds. `_asked`, `_unasked`: over the languages in
    which training asked questions, and the others. `asked_drawn`: of the drawn rollouts, the share in the
    former."""
    measure = outcome.measure
    found = {
        "accuracy": macro(measure.accuracy),
        "reward": macro(measure.reward),
        "known": macro(measure.known),
        "unknown": macro(measure.unknown),
        "wrong_language": measure.wrong_language,
        "true_somewhere": measure.true_somewhere,
        **_by_group(measure),
    }
    if (training := outcome.training) is not None:
        unasked = sorted(measure.accuracy.keys() - set(training.asked))
        for name, values in (("accuracy", measure.accuracy), ("reward", measure.reward)):
            if unasked:
                found |= {f"{name}_asked": macro(values, training.asked), f"{name}_unasked": macro(values, unasked)}
        found |= {
            "knowing": training.knowing,
            "tokens": float(training.tokens),
            "processor_seconds": training.processor_seconds,
            "step_seconds": training.step_seconds,
        }
        if training.knowing_drawn is not None:
            found["knowing_drawn"] = training.knowing_drawn
            asked = sum(training.drawn.get(language, 0) for language in training.asked)
            found["asked_drawn"] = asked / sum(training.drawn.values())
    return found


def _by_group(measure: Measure) -> dict[str, float]:
    groups = language_groups(measure.taught)
    return {
        f"{name}_{group}": macro(values, languages)
        for name, values in (("accuracy", measure.accuracy), ("reward", measure.reward))
        for group, languages in groups.items()
        if languages
    }


@dataclass(frozen=True)
class Summary:
    """An arm over its seeds: each figure, and its difference to the baseline's of the same seed (empty where that was
    not run)."""

    arm: str
    seeds: list[int]
    figures: dict[str, Estimate]
    differences: dict[str, Estimate]


def summarise(arm: str, outcomes: Sequence[Outcome], baseline: Sequence[Outcome]) -> Summary:
    """`outcomes` are those of `arm`."""
    own = {outcome.seed: figures(outcome) for outcome in outcomes}
    other = {outcome.seed: figures(outcome) for outcome in baseline}
    names = sorted({name for found in own.values() for name in found})
    values = {name: {seed: found[name] for seed, found in own.items() if name in found} for name in names}
    theirs = {name: {seed: found[name] for seed, found in other.items() if name in found} for name in names}
    return Summary(
        arm,
        sorted(own),
        {name: estimate(list(values[name].values())) for name in names},
        {name: paired(values[name], theirs[name]) for name in names if values[name].keys() & theirs[name].keys()},
    )
