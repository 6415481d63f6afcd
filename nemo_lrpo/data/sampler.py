"""What a step takes of a data set, questions or preference pairs: epochs over it, resumable at any step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.data.pairs import PreferencePair
from nemo_lrpo.seeding import derive_seed
from nemo_lrpo.types import Prompt

STATE_VERSION = 1


class SamplerStateError(ValueError):
    """A saved position that does not fit this data set or is incomplete."""


T = TypeVar("T")


class EpochSampler(Generic[T]):
    """An endless sequence of steps in which every epoch has every item exactly once.

    The order of an epoch is a function of (seed, epoch, ids); without shuffling it is that of the file. No item is lost
    at the end of an epoch: the step that reaches it is filled up from the start of the next one, passing over items
    that it already holds; those come first in the step after. So a step never has an item twice. Every rank draws the
    same step.
    """

    ITEM: str
    """What one is called, in messages and in the saved position."""
    KEY: str
    """The configuration's name for how many a step takes."""

    def __init__(self, items: Sequence[T], ids: Iterable[str], per_step: int, seed: int, shuffle: bool = True) -> None:
        """items: dataclasses, of which `ids` has one each. Raises ConfigError where a step is larger than the data set,
        ValueError for repeated ids."""
        if not 1 <= per_step <= len(items):
            raise ConfigError(
                f"{self.KEY}={per_step} with {len(items)} {self.ITEM}s; it must be >= 1 and at most the number of "
                f"{self.ITEM}s, since a step has none twice."
            )
        self._items = dict(zip(ids, items, strict=True))
        if len(self._items) < len(items):
            raise ValueError(f"{len(items) - len(self._items)} {self.ITEM} ids occur more than once.")
        self._per_step = per_step
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = _fingerprint(items)
        self._start(0)

    @property
    def epoch(self) -> int:
        """Completed passes over the data set."""
        return self._epoch

    def next(self) -> list[T]:
        """The items of the next step, different ones."""
        step = self._take(self._per_step, ())
        if len(step) < self._per_step:
            self._start(self._epoch + 1)
            step += self._take(self._per_step - len(step), step)
        if not self._passed_over and self._position == len(self._order):
            self._start(self._epoch + 1)
        return [self._items[name] for name in step]

    def _start(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = self._order_of(epoch)
        self._position = 0
        self._passed_over: list[str] = []

    def _order_of(self, epoch: int) -> list[str]:
        if not self._shuffle:
            return list(self._items)
        # A sort by hash, not a library's permutation: the same order with every version of every library.
        return sorted(self._items, key=lambda name: (derive_seed("data", self._seed, epoch, name), name))

    def _take(self, count: int, held: Sequence[str]) -> list[str]:
        """Up to `count` ids that the epoch has left and `held` does not contain."""
        taken, self._passed_over = self._passed_over[:count], self._passed_over[count:]
        excluded = set(held)
        while len(taken) < count and self._position < len(self._order):
            name = self._order[self._position]
            self._position += 1
            (self._passed_over if name in excluded else taken).append(name)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position; survives JSON. `passed_over`: items of the epoch before `position` not asked yet."""
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
            f"{self.ITEM}s": len(self._items),
            "fingerprint": self._fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position, with the saved or another number of items in a step.

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
            raise SamplerStateError(f"data position: passed_over={passed_over!r}; expected a list of ids.")
        order, skipped = self._order_of(epoch), set(passed_over)
        if (
            position > len(order)
            or epoch * len(order) + position - len(passed_over) != consumed
            or len(skipped) < len(passed_over)
            or not skipped <= set(order[:position])
        ):
            raise SamplerStateError(
                f"data position: epoch={epoch}, position={position}, passed_over={passed_over!r} and "
                f"consumed={consumed} contradict each other with {len(order)} {self.ITEM}s; the saved position is "
                "damaged."
            )
        self._epoch, self._order, self._position, self._passed_over = epoch, order, position, list(passed_over)


class PromptSampler(EpochSampler[Prompt]):
    """Which questions a step asks."""

    ITEM, KEY = "question", "trainer.lrpo.prompts_per_step"

    def __init__(self, prompts: Sequence[Prompt], prompts_per_step: int, seed: int, shuffle: bool = True) -> None:
        super().__init__(prompts, (prompt.question_id for prompt in prompts), prompts_per_step, seed, shuffle)


class PairSampler(EpochSampler[PreferencePair]):
    """Which preference pairs a step trains on."""

    ITEM, KEY = "pair", "trainer.lrpo.pairs_per_step"

    def __init__(self, pairs: Sequence[PreferencePair], pairs_per_step: int, seed: int, shuffle: bool = True) -> None:
        super().__init__(pairs, (pair.pair_id for pair in pairs), pairs_per_step, seed, shuffle)


def _whole_number(state: Mapping[str, Any], part: str) -> int:
    value = state.get(part)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SamplerStateError(f"data position: {part}={value!r}; expected a whole number >= 0.")
    return value


def _fingerprint(items: Sequence[Any]) -> str:
    """Hash of all items with all their fields, in order: row numbers as ids would not tell data sets apart."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps(dataclasses.astuple(item)).encode())
    return digest.hexdigest()
