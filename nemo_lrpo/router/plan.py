"""The languages of one step as columns: a row per rollout, objects only where somebody asks for one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.types import ORIGIN_DRAWN, ORIGIN_FIXED, ORIGIN_RESERVED, Prompt, RoutedPrompt, RoutedRows

ORIGINS = (ORIGIN_DRAWN, ORIGIN_RESERVED, ORIGIN_FIXED)
"""What `LanguagePlan.origin` counts in."""
DRAWN, RESERVED, FIXED = range(3)


@dataclass(frozen=True, eq=False)
class LanguagePlan(RoutedRows):
    """R rollouts of N questions: all slots of question 0, then those of question 1, ...; groups may differ in size.

    prompts: the N questions. step: the training step. languages: the L candidates, ISO 639-1. Columns [R]: group int32
    (index into prompts), slot int16 (from 0 in each group), language int16 (index into languages), origin int8 (index
    into ORIGINS), probability float64 (see RoutedPrompt). Rows read as a sequence are RoutedPrompt objects.
    """

    prompts: tuple[Prompt, ...]
    step: int
    languages: tuple[str, ...]
    group: NDArray[np.int32]
    slot: NDArray[np.int16]
    language: NDArray[np.int16]
    origin: NDArray[np.int8]
    probability: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.group)

    @overload
    def __getitem__(self, index: int) -> RoutedPrompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[RoutedPrompt]: ...

    def __getitem__(self, index: int | slice) -> RoutedPrompt | list[RoutedPrompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return RoutedPrompt(
            self.prompts[self.group[index]],
            self.step,
            int(self.slot[index]),
            self.languages[self.language[index]],
            ORIGINS[self.origin[index]],
            float(self.probability[index]),
        )

    def __iter__(self) -> Iterator[RoutedPrompt]:
        columns = (self.group, self.slot, self.language, self.origin, self.probability)
        for group, slot, language, origin, probability in zip(*(column.tolist() for column in columns)):
            yield RoutedPrompt(
                self.prompts[group], self.step, slot, self.languages[language], ORIGINS[origin], probability
            )

    def asked(self) -> tuple[list[str], list[str]]:
        """See RoutedRows."""
        questions = [prompt.question for prompt in self.prompts]
        return [questions[i] for i in self.group.tolist()], [self.languages[i] for i in self.language.tolist()]

    @cached_property
    def sample_ids(self) -> tuple[str, ...]:
        """Of every row, as RoutedPrompt.sample_id."""
        ids = [f"{self.step}/{prompt.question_id}/" for prompt in self.prompts]
        return tuple(f"{ids[group]}{slot}" for group, slot in zip(self.group.tolist(), self.slot.tolist()))

    @staticmethod
    def of(rows: Sequence[RoutedPrompt], languages: Sequence[str], step: int = 0) -> LanguagePlan:
        """The plan that reads as `rows`, in their order. `step` is that of an empty plan.

        Raises ValueError for rows of several steps or in a language that is no candidate.
        """
        if isinstance(rows, LanguagePlan) and rows.languages == tuple(languages):
            return rows
        steps = {row.step for row in rows} or {step}
        if len(steps) > 1:
            raise ValueError(f"rows of several steps are no plan: {sorted(steps)}.")
        index = {language: i for i, language in enumerate(languages)}
        unknown = next((row for row in rows if row.language not in index), None)
        if unknown is not None:
            raise ValueError(
                f"sample {unknown.sample_id!r}: language {unknown.language!r} is not a candidate of the router; "
                f"accepted: {', '.join(languages)}."
            )
        groups: dict[Prompt, int] = {}
        return LanguagePlan(
            group=np.array([groups.setdefault(row.prompt, len(groups)) for row in rows], np.int32),
            prompts=tuple(groups),
            step=steps.pop(),
            languages=tuple(languages),
            slot=np.array([row.slot for row in rows], np.int16),
            language=np.array([index[row.language] for row in rows], np.int16),
            origin=np.array([ORIGINS.index(row.origin) for row in rows], np.int8),
            probability=np.array([row.probability for row in rows], np.float64),
        )

    @staticmethod
    def joined(plans: Sequence[LanguagePlan]) -> LanguagePlan:
        """The plans of several ranks as one, rows in their order.

        Raises ValueError unless there is one and all are of one step and set of languages.
        """
        if len({(plan.step, plan.languages) for plan in plans}) != 1:
            raise ValueError("plans are joined within one step and set of languages, at least one.")
        offsets = np.cumsum([0, *(len(plan.prompts) for plan in plans)])
        return LanguagePlan(
            prompts=tuple(prompt for plan in plans for prompt in plan.prompts),
            step=plans[0].step,
            languages=plans[0].languages,
            group=np.concatenate([plan.group + np.int32(offset) for plan, offset in zip(plans, offsets)]),
            slot=np.concatenate([plan.slot for plan in plans]),
            language=np.concatenate([plan.language for plan in plans]),
            origin=np.concatenate([plan.origin for plan in plans]),
            probability=np.concatenate([plan.probability for plan in plans]),
        )
