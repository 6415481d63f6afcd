"""A mix of languages that never changes: plain GRPO, uniform routing and the fixed baselines of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.checks import ConfigError, unknown_key_message
from nemo_lrpo.config.router import EVERY_LANGUAGE, OWN_LANGUAGE, RouterConfig
from nemo_lrpo.router.policy import Context, Evidence


class FixedMix:
    """p(l|x) = w_l + w_uniform / L + w_question [l is the question's language], weights w that sum to 1."""

    per_question = False
    per_language = True
    state_axes: Mapping[str, tuple[str, ...]] = {}

    def __init__(
        self, config: RouterConfig, languages: Sequence[str], topics: Sequence[str], regions: Sequence[str]
    ) -> None:
        """Raises ConfigError for a mix that names something else than a candidate, `question` or `uniform`."""
        mix = {"monolingual": {OWN_LANGUAGE: 1.0}, "uniform": {EVERY_LANGUAGE: 1.0}}.get(config.name, dict(config.mix))
        accepted = [*languages, OWN_LANGUAGE, EVERY_LANGUAGE]
        for name in mix:
            if name not in accepted:
                raise ConfigError(unknown_key_message(name, accepted, "router.mix"))
        self.name = config.name
        self._columns = {language: i for i, language in enumerate(languages)}
        total = sum(mix.values())
        every = mix.get(EVERY_LANGUAGE, 0.0) / len(languages)
        self._mix = np.array([mix.get(language, 0.0) + every for language in languages]) / total
        self._own = mix.get(OWN_LANGUAGE, 0.0) / total

    def probabilities(
        self, contexts: Sequence[Context], step: int, charges: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """See LanguagePolicy; `charges` change nothing (the configuration refuses a price)."""
        rows = np.tile(self._mix, (len(contexts), 1))
        rows[np.arange(len(contexts)), [self._columns[context.language] for context in contexts]] += self._own
        return rows

    def values(self, contexts: Sequence[Context]) -> NDArray[np.float64]:
        """See LanguagePolicy: there are none."""
        return np.full((len(contexts), len(self._mix)), np.nan)

    def learn(self, evidence: Evidence) -> None:
        """Nothing to learn."""

    def state(self) -> dict[str, Any]:
        """See LanguagePolicy."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """See LanguagePolicy."""

    def metrics(self, step: int) -> dict[str, float]:
        """See LanguagePolicy."""
        return {}
