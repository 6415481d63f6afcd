"""One step's rewards in an order of their own, whatever order they came in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.router.plan import LanguagePlan
from nemo_lrpo.router.policy import Context
from nemo_lrpo.types import Prompt

Values = NDArray[np.float64]
Index = NDArray[np.integer]


@dataclass(frozen=True)
class GroupSpread:
    """Per group: count int64 [G], mean and std float64 [G]; std over n - 1, exactly 0 where n < 2 or all are equal."""

    count: NDArray[np.int64]
    mean: Values
    std: Values

    @staticmethod
    def of(rewards: Values, group: Index, groups: int) -> GroupSpread:
        """rewards: float64 [N], finite. group: [N], into `groups`."""
        count = np.bincount(group, minlength=groups)
        mean = np.bincount(group, rewards, groups) / np.maximum(count, 1)
        squares = np.bincount(group, (rewards - mean[group]) ** 2, groups)
        highest, lowest = np.full(groups, -np.inf), np.full(groups, np.inf)
        np.maximum.at(highest, group, rewards)
        np.minimum.at(lowest, group, rewards)
        # Rounding of the mean alone makes the squares of equal rewards positive.
        varied = highest > lowest
        return GroupSpread(count, mean, np.where(varied, np.sqrt(squares / np.maximum(count - 1, 1)), 0.0))


@dataclass(frozen=True)
class Observed:
    """The n rollouts of a step that have a reward, by question id and slot.

    contexts: distinct, in the order of their first row. context: int64 [n], into contexts. group: int64 [n], rising,
    below `groups`. unknown: topics and regions of the rows that were not declared, counted by row. language: int16 [n].
    drawn: bool [n], the router chose the language. reward: float64 [n], finite.
    """

    contexts: list[Context]
    context: NDArray[np.int64]
    group: NDArray[np.int64]
    groups: int
    unknown: int
    language: NDArray[np.int16]
    drawn: NDArray[np.bool_]
    reward: NDArray[np.float64]

    @cached_property
    def spread(self) -> GroupSpread:
        """Of the rewards of each group."""
        return GroupSpread.of(self.reward, self.group, self.groups)


def refuse_repeated(prompts: Sequence[Prompt], what: str) -> None:
    """Raise ValueError, naming the question, if one is there twice."""
    if len({prompt.question_id for prompt in prompts}) == len(prompts):
        return
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.question_id in seen:
            raise ValueError(f"question {prompt.question_id!r} {what}.")
        seen.add(prompt.question_id)


def rewarded_rows(plan: LanguagePlan, rewards: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of `plan` whose reward is no NaN, by question id and slot; and [N] the place of each question.

    Raises ValueError, naming the sample, for an infinite reward or a row that is there twice, and for another number
    of rewards than rows.
    """
    if rewards.shape != (len(plan),):
        raise ValueError(f"rewards have shape {rewards.shape}; expected one for each of {len(plan)} rows.")
    refuse_repeated(plan.prompts, "was observed twice in one step")
    infinite = np.flatnonzero(np.isinf(rewards))
    if len(infinite):
        row = int(infinite[0])
        raise ValueError(f"sample {plan.sample_ids[row]!r}: reward {rewards[row]} is not finite; NaN means none.")
    ids = [prompt.question_id for prompt in plan.prompts]
    by_id = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
    place = np.empty(len(ids), np.int64)
    place[by_id] = np.arange(len(ids))
    order = _by_question_and_slot(plan, by_id, place)
    return order[~np.isnan(rewards[order])], place


def _by_question_and_slot(plan: LanguagePlan, by_id: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows in that order. by_id: int64 [N], the questions by id; place: its inverse."""
    group, slot = plan.group, plan.slot
    same = group[1:] == group[:-1]
    if ((group[1:] > group[:-1]) | (same & (slot[1:] > slot[:-1]))).all():
        # As plans are made: whole groups change places.
        size = np.bincount(group, minlength=len(by_id))
        first, taken = (np.cumsum(size) - size)[by_id], size[by_id]
        return np.repeat(first - (np.cumsum(taken) - taken), taken) + np.arange(len(group))
    order = np.lexsort((slot, place[group]))
    group, slot = group[order], slot[order]
    twice = np.flatnonzero((group[1:] == group[:-1]) & (slot[1:] == slot[:-1]))
    if len(twice):
        raise ValueError(f"sample {plan.sample_ids[order[twice[0]]]!r} was observed twice in one step.")
    return order


def first_seen(values: NDArray[np.int64]) -> tuple[list[int], NDArray[np.int64]]:
    """The distinct values in the order of their first occurrence, and the position of each value among them."""
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    return distinct[order].tolist(), position[inverse]
