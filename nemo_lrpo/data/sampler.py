"""Which questions a step asks: epochs over the data set, resumable at any step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.seeding import derive_seed
from nemo_lrpo.types import Prompt

STATE_VERSION = 1


class SamplerStateError(ValueError):
    """A saved position that does not fit this data set or is incomplete."""


class PromptSampler:
    """An endless sequence of steps in which every epoch asks every question exactly once.

    The order of an epoch is a function of (seed, epoch, question ids); without shuffling it is that of the file. No
    question is lost at the end of an epoch: the step that reaches it is filled up from the start of the next one,
    passing over questions that it already holds; those come first in the step after. So a step never asks a question
    twice. Every rank draws the same step.
    """

    def __init__(self, prompts: Sequence[Prompt], prompts_per_step: int, seed: int, shuffle: bool = True) -> None:
        """Raises ConfigError where a step is larger than the data set, ValueError for repeated question ids."""
        if not 1 <= prompts_per_step <= len(prompts):
            raise ConfigError(
                f"trainer.lrpo.prompts_per_step={prompts_per_step} with {len(prompts)} questions; it must be >= 1 and "
                "at most the number of questions, since a step asks none twice."
            )
        self._prompts = {prompt.question_id: prompt for prompt in prompts}
        if len(self._prompts) < len(prompts):
            raise ValueError(f"{len(prompts) - len(self._prompts)} question ids occur more than once.")
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = _fingerprint(prompts)
        self._start(0)

    @property
    def epoch(self) -> int:
        """Completed passes over the questions."""
        return self._epoch

    def next(self) -> list[Prompt]:
        """The questions of the next step, `prompts_per_step` different ones."""
        step = self._take(self._prompts_per_step, ())
        if len(step) < self._prompts_per_step:
            self._start(self._epoch + 1)
            step += self._take(self._prompts_per_step - len(step), step)
        if not self._passed_over and self._position == len(self._order):
            self._start(self._epoch + 1)
        return [self._prompts[question_id] for question_id in step]

    def _start(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = self._order_of(epoch)
        self._position = 0
        self._passed_over: list[str] = []

    def _order_of(self, epoch: int) -> list[str]:
        if not self._shuffle:
            return list(self._prompts)
        # A sort by hash, not a library's permutation: the same order with every version of every library.
        return sorted(self._prompts, key=lambda name: (derive_seed("data", self._seed, epoch, name), name))

    def _take(self, count: int, held: Sequence[str]) -> list[str]:
        """Up to `count` ids that the epoch has left and `held` does not contain."""
        taken, self._passed_over = self._passed_over[:count], self._passed_over[count:]
        excluded = set(held)
        while len(taken) < count and self._position < len(self._order):
            question_id = self._order[self._position]
            self._position += 1
            (self._passed_over if question_id in excluded else taken).append(question_id)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position; survives JSON. `passed_over`: questions of the epoch before `position` not asked yet."""
        return {
            **self._identity(),
            "epoch": self._epoch,
            "position": self._position,
            "passed_over": list(self._passed_over),
            "consumed": self._epoch * len(self._order) + self._position - len(self._passed_over),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "questions": len(self._prompts),
            "fingerprint": self._fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position, with the saved or another `prompts_per_step`.

        Raises SamplerStateError, changing nothing, for another data set, seed or shuffling, or an incomplete state.
        """
        for part, expected in self._identity().items():
            if part not in state:
                raise SamplerStateError(f"data position: {part!r} is missing; it is not a complete saved position.")
            if state[part] != expected:
                raise SamplerStateError(
                    f"data position: {part}={state[part]!r} was saved, this run has {expected!r}; continue with the "
                    "data and configuration of the saved run, or start a new one."
                )
        epoch, position, consumed = (_whole_number(state, part) for part in ("epoch", "position", "consumed"))
        passed_over = state.get("passed_over")
        if not isinstance(passed_over, list) or not all(isinstance(name, str) for name in passed_over):
            raise SamplerStateError(f"data position: passed_over={passed_over!r}; expected a list of question ids.")
        order, skipped = self._order_of(epoch), set(passed_over)
        if (
            position > len(order)
            or epoch * len(order) + position - len(passed_over) != consumed
            or len(skipped) < len(passed_over)
            or not skipped <= set(order[:position])
        ):
            raise SamplerStateError(
                f"data position: epoch={epoch}, position={position}, passed_over={passed_over!r} and "
                f"consumed={consumed} contradict each other with {len(order)} questions; the saved position is damaged."
            )
        self._epoch, self._order, self._position, self._passed_over = epoch, order, position, list(passed_over)


def _whole_number(state: Mapping[str, Any], part: str) -> int:
    value = state.get(part)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SamplerStateError(f"data position: {part}={value!r}; expected a whole number >= 0.")
    return value


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of all questions with all their fields, in order: row numbers as ids would not tell data sets apart."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(json.dumps(dataclasses.astuple(prompt)).encode())
    return digest.hexdigest()
