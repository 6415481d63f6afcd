"""One run of a router in a world, over the interface that training uses: route, observe."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.loader import compose, to_dataclass
from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.router import build_router
from nemo_lrpo.router.plan import DRAWN
from nemo_lrpo.types import Prompt
from tools.router_worlds.worlds import LANGUAGES, World

Array = NDArray[np.float64]

ROLLOUTS = 8
POLICIES: dict[str, list[str]] = {
    "uniform": ["router=uniform"],
    "published": ["router=published"],
    "ucb": ["router=ucb"],
    "ucb-still": ["router=ucb", "router.ucb.discount=1.0"],
    "thompson": ["router=thompson"],
    "thompson-still": ["router=thompson", "router.thompson.discount=1.0"],
    "default": ["router=default"],
    "default-no-floor": ["router=default", "router.diversity.min_languages=1"],
    "features": ["router=features"],
}
"""Name -> overrides of the shipped configuration; each as conf/router has it, but for `still` (nothing is forgotten)
and `no-floor` (groups may be in one language)."""


@dataclass(frozen=True)
class Outcome:
    """share: of the gap between drawing uniformly and always the best language, in mean true value over the drawn
    slots. languages: mean number of different ones in a group. seconds: of processor time."""

    share: float
    languages: float
    seconds: float


class Questions:
    """The questions of a world, in the order of steps; `seed` and world determine all of them."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._rng = np.random.default_rng([seed, 1])
        self._subject = np.zeros(world.topics, np.int64)
        self.topics = tuple(f"topic {i}" for i in range(world.topics))
        self.regions = tuple(f"region {i}" for i in range(world.regions))
        self._prompts: dict[tuple[int, int, int, int], Prompt] = {}
        if world.subjects:
            self._name_topics()

    def _name_topics(self) -> None:
        """Topics of two words and a number; one word is of the subject's, as are a third of a question's."""
        rng = self._rng
        letters = [np.array(list(group)) for group in ("bcdfghklmnprstvz", "aeiou")]
        words = ["".join(rng.choice(letters[i % 2]) for i in range(6)) for _ in range(200 + 30 * self._world.subjects)]
        self._common, own = np.array(words[:200]), np.array(words[200:])
        self._own = own.reshape(self._world.subjects, -1)
        self._subject = rng.integers(self._world.subjects, size=self._world.topics)
        self.topics = tuple(
            f"{rng.choice(self._own[s])} {rng.choice(self._common)} {i}" for i, s in enumerate(self._subject)
        )

    def _text(self, topic: int) -> str:
        own, common = self._rng.choice(self._own[self._subject[topic]], 12), self._rng.choice(self._common, 12)
        return " ".join(np.where(self._rng.random(12) < 0.33, own, common))

    def draw(self, step: int) -> tuple[list[Prompt], NDArray[np.int64], NDArray[np.int64]]:
        """A step's prompts, and the rows and columns [N] of the truth that they stand in."""
        world, count = self._world, self._world.size.questions
        topic = self._zipf(world.topics, count)
        region = self._zipf(world.regions, count) if world.regions else np.zeros(count, np.int64)
        language = self._zipf(len(LANGUAGES), count)
        met: Counter[tuple[int, int, int]] = Counter()
        prompts = []
        for place in zip(topic.tolist(), region.tolist(), language.tolist()):
            prompts.append(self._prompt(step, *place, met[place]))
            met[place] += 1
        return prompts, (self._subject[topic] if world.subjects else topic), region

    def _prompt(self, step: int, topic: int, region: int, language: int, number: int) -> Prompt:
        """`number` of a step's questions in one place; without words the same one in every step."""
        subjects = self._world.subjects
        key = (topic, region, language, number)
        if subjects or key not in self._prompts:
            name, text = "-".join(map(str, (step, *key) if subjects else key)), self._text(topic) if subjects else ""
            code, regions = LANGUAGES[language], (self.regions[region],) if self.regions else ()
            self._prompts[key] = Prompt(name, text, "", code, code, (self.topics[topic],), regions)
        return self._prompts[key]

    def _zipf(self, size: int, count: int) -> NDArray[np.int64]:
        weights = 1.0 / np.arange(1, size + 1) ** self._world.skew
        return self._rng.choice(size, size=count, p=weights / weights.sum())


@cache
def router_config(world: World, policy: str) -> RouterConfig:
    """The settings of `policy` (a name in POLICIES) in `world`."""
    tree = compose("train", [*POLICIES[policy], f"router.update_every={world.size.update_every}"])
    return to_dataclass(RouterConfig, tree.router, "router")


def play(world: World, policy: str, seed: int) -> Outcome:
    """Run `policy` (a name in POLICIES) from start to end; seed and world determine questions, truth and rewards."""
    start = time.process_time()
    truth = world.truth(np.random.default_rng([seed, 0]), world.size.steps)
    questions, rewards = Questions(world, seed), np.random.default_rng([seed, 2])
    router = build_router(router_config(world, policy), LANGUAGES, questions.topics, questions.regions, seed)
    gained = gap = languages = 0.0
    for step in range(world.size.steps):
        prompts, row, column = questions.draw(step)
        plan = router.route(prompts, ROLLOUTS, step)
        hardness = rewards.normal(0.0, world.difficulty, (len(prompts), 1)) if world.difficulty else 0.0
        values = np.clip(truth(step)[row, column] + hardness, 0.0, 1.0)
        value = values[plan.group, plan.language]
        drawn = plan.origin == DRAWN
        uniform, best = values.mean(axis=1)[plan.group], values.max(axis=1)[plan.group]
        gained += float((value - uniform)[drawn].sum())
        gap += float((best - uniform)[drawn].sum())
        pairs = np.bincount(plan.group * np.int64(len(LANGUAGES)) + plan.language)
        languages += np.count_nonzero(pairs) / len(prompts)
        router.observe(plan, (rewards.random(len(value)) < value).astype(np.float64))
    return Outcome(gained / gap, languages / world.size.steps, time.process_time() - start)
