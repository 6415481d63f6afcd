"""A mix of languages that never changes: plain GRPO, uniform routing and the fixed baselines of the paper."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from nemo_lrpo.config.router import OWN_LANGUAGE, RouterConfig
from nemo_lrpo.router.base import Probabilities
from nemo_lrpo.router.slots import SlotRouter
from nemo_lrpo.types import Observation, Prompt


class FixedMixRouter(SlotRouter):
    """Draws from given weights; the entry `question` goes to the question's own language."""

    def __init__(self, config: RouterConfig, languages: Sequence[str], mix: Mapping[str, float], seed: int) -> None:
        """`mix`: weight per language (or `question`), at least one positive; need not sum to 1."""
        super().__init__(config, languages, seed)
        total = sum(mix.values())
        self._mix = np.array([mix.get(language, 0.0) / total for language in self.languages])
        self._own = mix.get(OWN_LANGUAGE, 0.0) / total

    def _policy_probabilities(self, prompt: Prompt) -> Probabilities:
        probabilities = self._mix.copy()
        probabilities[self._index[prompt.language]] += self._own
        return probabilities

    def _context(self, prompt: Prompt) -> Hashable:
        return prompt.language

    def _learn(self, observations: Sequence[Observation]) -> None:
        """Nothing to learn."""
