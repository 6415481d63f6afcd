"""The contract of what a router learns: probabilities of the languages in a context, from evidence of what paid.

A policy knows neither slots nor exploration nor windows; `BanditRouter` does all of that, the same for every policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Cell = tuple[tuple[str, ...], tuple[str, ...]]
"""(topics, regions)."""

NUMBERS_OF_LANGUAGES = "numbers of languages"
"""In `state_axes`: the elements of the array, and not its places, stand for languages."""


@dataclass(frozen=True)
class Context:
    """What a policy may tell questions apart by.

    topics, regions: names in the data's order, without repetition; regions may be empty; either may hold names that the
    router was not built with. language: that of the question, for policies with `per_language`, else "".
    question: its text, for policies with `per_question`, else "".
    """

    topics: tuple[str, ...]
    regions: tuple[str, ...]
    language: str = ""
    question: str = ""

    @cached_property
    def cell(self) -> Cell:
        """The part that tables tell apart, whatever the order of its names."""
        return tuple(sorted(self.topics)), tuple(sorted(self.regions))


@dataclass(frozen=True)
class Evidence:
    """What a window of training steps brought: N rollouts with a value, those that teach (`router.teach`).

    contexts: distinct. context: int32 [N], index into contexts. language: int16 [N], index into the candidates. value:
    float64 [N], the objective's value (`router.objective`; the reward by default), finite. group: int32 [N], the same
    for rollouts of one question in one step. steps: training steps in the window, also where N is 0.

    Rows come by step, question id and slot, so that sums are the same to the bit whatever order they were observed in.
    """

    contexts: list[Context]
    context: NDArray[np.int32]
    language: NDArray[np.int16]
    value: NDArray[np.float64]
    group: NDArray[np.int32]
    steps: int


class LanguagePolicy(Protocol):
    """A learner over L languages; built as `Policy(config: RouterConfig, languages, topics, regions)`.

    All of NumPy, float64, deterministic. Topics and regions named at construction are the data's; a context may name
    others, or no region at all, and L is 2 to 500.
    """

    name: str
    """The value of `router.name`."""
    per_question: bool
    """Whether contexts carry the question's text; then every question is a context of its own."""
    per_language: bool
    """Whether contexts carry the question's language; without it, far fewer contexts differ."""
    state_axes: Mapping[str, tuple[str, ...]]
    """Entry of `state()` -> a name per axis of that array: "languages", "topics", "regions", or "" for any other. The
    router fits these arrays to the run before `load` when names were added or change places: what is new is filled
    with the values of the policy as it was built where all axes named "" have the same length there, else with 0.
    (NUMBERS_OF_LANGUAGES,) is an array [N] of languages' numbers. Entries that are not listed depend on none of the
    three."""

    def probabilities(
        self, contexts: Sequence[Context], step: int, charges: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """float64 [C, L], rows sum to 1: p(l|x) without the router's epsilon. A pure read: creates nothing.

        `step`: training steps observed so far, for schedules. `charges`: float64 [L], what a rollout in each language
        costs in units of the values, None while nothing does; it is subtracted from the values before the choice.
        """

    def values(self, contexts: Sequence[Context]) -> NDArray[np.float64]:
        """float64 [C, L]: the estimate of each language, for logs; NaN where there is none. A pure read."""

    def learn(self, evidence: Evidence) -> None:
        """Take in a window; called once per `router.update_every` steps. The order of rows within a step must not
        matter beyond rounding (but for the released per-cell update, which is defined by it)."""

    def state(self) -> dict[str, Any]:
        """Everything learned: JSON values and arrays (finite). Flat; keys need no version."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, arrays fitted to this run; version, name and languages were checked.

        Raises RouterStateError, changing nothing, if a part is missing or damaged.
        """

    def metrics(self, step: int) -> dict[str, float]:
        """Finite scalars for the log that are the policy's own (weights of memories, a noise level); may be empty."""
