"""Worlds: the probability that a rollout is rewarded, by topic, region and language, over the steps of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.router.typology import relatives

Array = NDArray[np.float64]
Truth = Callable[[int], Array]
"""Step -> float64 [T, G, L], probability of reward 1."""

LANGUAGES = tuple("ar de en es fr id it ja ko nl pl pt ru vi zh".split())
TOPICS, REGIONS = 6, 24
BASE, GAP = 0.3, 0.4
SPREAD = 0.12
"""Standard deviation of a topic's and of a region's effect where they add up."""


@dataclass(frozen=True)
class Size:
    """Of a run: steps, questions of a step, training steps between updates."""

    steps: int = 200
    questions: int = 256
    update_every: int = 5


@dataclass(frozen=True)
class World:
    """truth: from a generator and the number of steps. skew: exponent of Zipf's law over topics, regions and question
    languages, 0: all alike. subjects: 0, or the number of hidden subjects that thousands of topics belong to.
    difficulty: standard deviation of what a question adds to the values of all languages."""

    name: str
    says: str
    truth: Callable[[np.random.Generator, int], Truth]
    size: Size = Size()
    skew: float = 0.0
    topics: int = TOPICS
    regions: int = REGIONS
    subjects: int = 0
    difficulty: float = 0.0


def _best_of(best: NDArray[np.int64], gap: float = GAP) -> Array:
    """BASE everywhere but for the best language, [T, G, L] from [T, G]."""
    values = np.full((*best.shape, len(LANGUAGES)), BASE)
    np.put_along_axis(values, best[..., None], BASE + gap, axis=2)
    return values


def _cells(rng: np.random.Generator) -> Array:
    return _best_of(rng.integers(len(LANGUAGES), size=(TOPICS, REGIONS)))


def _regional(rng: np.random.Generator) -> Array:
    best = np.repeat(rng.integers(len(LANGUAGES), size=TOPICS)[:, None], REGIONS, axis=1)
    best[0] = rng.integers(len(LANGUAGES), size=REGIONS)
    return _best_of(best)


def _additive(rng: np.random.Generator, spread: float = SPREAD) -> Array:
    topic = rng.normal(0.0, spread, (TOPICS, 1, len(LANGUAGES)))
    region = rng.normal(0.0, spread, (1, REGIONS, len(LANGUAGES)))
    return np.clip(0.45 + topic + region, 0.02, 0.98)


def _relatives(rng: np.random.Generator) -> Array:
    """As additive, four fifths of every effect's variance in what relatives have in common."""
    groups = np.array(relatives(LANGUAGES))
    effects = []
    for shape in ((TOPICS, 1), (1, REGIONS)):
        common = rng.normal(0.0, SPREAD, (*shape, groups.max() + 1))[..., groups]
        effects.append(0.8**0.5 * common + 0.2**0.5 * rng.normal(0.0, SPREAD, (*shape, len(LANGUAGES))))
    return np.clip(0.45 + effects[0] + effects[1], 0.02, 0.98)


def _small(rng: np.random.Generator) -> Array:
    return _additive(rng, SPREAD / 3)


def _constant(draw: Callable[[np.random.Generator], Array], rng: np.random.Generator, steps: int) -> Truth:
    values = draw(rng)
    return lambda step: values


def _change(rng: np.random.Generator, steps: int) -> Truth:
    before, after = _regional(rng), _regional(rng)
    return lambda step: before if 2 * step < steps else after


def _drift(rng: np.random.Generator, steps: int) -> Truth:
    keep = 0.98
    topic = rng.normal(0.0, SPREAD, (TOPICS, 1, len(LANGUAGES)))
    region = rng.normal(0.0, SPREAD, (1, REGIONS, len(LANGUAGES)))
    values = []
    for _ in range(steps):
        values.append(np.clip(0.45 + topic + region, 0.02, 0.98))
        topic, region = (
            keep * effect + (1.0 - keep**2) ** 0.5 * rng.normal(0.0, SPREAD, effect.shape) for effect in (topic, region)
        )
    return lambda step: values[step]


def _subjects(rng: np.random.Generator, steps: int) -> Truth:
    # Rows are subjects here; topics find theirs by `run.Questions`.
    values = _best_of(rng.integers(len(LANGUAGES), size=(SUBJECTS, 1)))
    return lambda step: values


SUBJECTS = 12
_SPARSE = Size(questions=25)

WORLDS = {
    world.name: world
    for world in (
        World("cells", "every (topic, region) has its own best language", partial(_constant, _cells)),
        World("regional", "regions matter for one topic only", partial(_constant, _regional)),
        World("additive", "topics and regions add up", partial(_constant, _additive)),
        World("change", "regional; all best languages change halfway", _change),
        World("drift", "additive; effects wander, a correlation of 0.98 from step to step", _drift),
        World("sparse cells", "cells, 25 questions a step", partial(_constant, _cells), _SPARSE),
        World("sparse regional", "regional, 25 questions a step", partial(_constant, _regional), _SPARSE),
        World("sparse additive", "additive, 25 questions a step", partial(_constant, _additive), _SPARSE),
        World("sparse change", "change, 25 questions a step", _change, _SPARSE),
        World("relatives", "additive, related languages alike, 25 questions", partial(_constant, _relatives), _SPARSE),
        World("skewed", "cells; topics, regions and languages by Zipf's law", partial(_constant, _cells), skew=1.0),
        World("delayed", "regional, an update every 20 steps", partial(_constant, _regional), Size(update_every=20)),
        World("small gaps", "additive, effects a third as large", partial(_constant, _small)),
        World("hard and easy", "cells; questions differ in difficulty", partial(_constant, _cells), difficulty=0.3),
        World("subjects", f"3,000 topics of {SUBJECTS} hidden subjects that only their words betray", _subjects,
              Size(steps=100), topics=3000, regions=0, subjects=SUBJECTS),
    )
}  # fmt: skip


def shortened(world: World, steps: int, questions: int) -> World:
    """The world with fewer steps and at most `questions` of them a step."""
    return replace(world, size=replace(world.size, steps=steps, questions=min(questions, world.size.questions)))
