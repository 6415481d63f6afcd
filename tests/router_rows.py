"""Rollouts with rewards, written row by row, for the router's tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_lrpo.router import LanguagePlan
from nemo_lrpo.router.router import BanditRouter
from nemo_lrpo.types import ORIGIN_DRAWN, Prompt, RoutedPrompt


@dataclass(frozen=True)
class Seen:
    """One scored rollout of a question of its own, unless several rows share `name`; `slot` then tells them apart."""

    name: str
    language: str
    reward: float
    topics: tuple[str, ...] = ("Chat",)
    regions: tuple[str, ...] = ()
    origin: str = ORIGIN_DRAWN
    slot: int = 0

    def routed(self, step: int = 0) -> RoutedPrompt:
        prompt = Prompt(self.name, "question", "answer", "en", "en", self.topics, self.regions)
        return RoutedPrompt(prompt, step, self.slot, self.language, self.origin, 0.5)


def plan_of(rows: Sequence[Seen], languages: Sequence[str]) -> LanguagePlan:
    return LanguagePlan.of([row.routed() for row in rows], languages)


def observe(router: BanditRouter, rows: Sequence[Seen]) -> None:
    """One training step that brought `rows`."""
    router.observe(plan_of(rows, router.languages), np.array([row.reward for row in rows], np.float64))
