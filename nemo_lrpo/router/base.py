"""The contract of a language router: a stateful sampler with its own, saved randomness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.types import Observation, Prompt, RoutedPrompt

Probabilities = NDArray[np.float64]
"""float64 [L], one entry per candidate language, sums to 1."""


class RouterStateError(ValueError):
    """A saved router state that does not belong to this router. The message names the part, found and expected."""


class LanguageRouter(Protocol):
    """Draws a language per rollout, learns from their rewards, and carries its whole state in `state_dict`."""

    @property
    def languages(self) -> tuple[str, ...]:
        """The L candidate languages, ISO 639-1, in the order of every [L] axis."""

    def route(self, prompts: Sequence[Prompt], num_rollouts: int, step: int) -> list[RoutedPrompt]:
        """Fill `num_rollouts` slots for each prompt; all slots of prompt 0 first, then those of prompt 1, ...

        A draw is a function of (seed, step, question id, slot) and the state: neither the order of the prompts nor
        which of them one rank passes changes it. Changes nothing that the state holds. Raises ValueError, naming the
        question, for a language that is no candidate or a question that occurs twice.
        """

    def observe(self, observations: Sequence[Observation]) -> None:
        """Take in the rewards of one training step; called exactly once per step, with an empty sequence too.

        The order of `observations` does not matter. Every rank must pass those of all ranks. Raises ValueError,
        naming the sample, for a reward that is not finite, an unknown language or a sample given twice; the state is
        then as before.
        """

    def distribution(self, prompt: Prompt) -> Probabilities:
        """What a slot of `prompt` that is not reserved is drawn from now: epsilon/L + (1 - epsilon) p. [L]."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draw and update depend on besides configuration; survives JSON exactly."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, its seed included. Raises RouterStateError, changing nothing, if the state is
        of another version, router, set of languages, topics or regions, or is incomplete."""

    def metrics(self) -> dict[str, float]:
        """Scalars for the log, keys without prefix; probabilities are means over the last call of `route`."""
