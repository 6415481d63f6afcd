"""Thompson sampling with decay: each (topic, region, language) on its own, probabilities by integration.

With n discounted rollouts of mean y in a cell, the value of a language there is taken to be normal with

    mean = (n y + 2 m) / (n + 2),      variance = s^2 / (n + 2),

m the mean over everything and s^2 the variance of a rollout within cells: for rewards of 0 and 1, close to a Beta
posterior from a uniform prior. p(l) is the probability that l has the largest value, to the power `sharpness`; what
sampling from the posterior would only draw from is thus known, and is the propensity in the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.router.discounted import STATE_AXES, DiscountedMeans
from nemo_lrpo.router.gaussian import probability_best, sharpened
from nemo_lrpo.router.policy import Context, Evidence

Array = NDArray[np.float64]


class ThompsonPolicy:
    """See the module's docstring."""

    name = "thompson"
    per_question = False
    per_language = False
    state_axes = STATE_AXES

    def __init__(
        self, config: RouterConfig, languages: Sequence[str], topics: Sequence[str], regions: Sequence[str]
    ) -> None:
        """Topics and regions need not be declared: each pair begins with its first rollout."""
        self._settings = config.thompson
        self._means = DiscountedMeans(config.thompson.discount, len(languages))

    def probabilities(self, contexts: Sequence[Context], step: int, charges: Array | None = None) -> Array:
        """See LanguagePolicy."""
        cells = self._means.read(contexts)
        mean = cells.mean if charges is None else cells.mean - charges
        return sharpened(probability_best(mean, np.sqrt(cells.noise / cells.count)), self._settings.sharpness)

    def values(self, contexts: Sequence[Context]) -> Array:
        """See LanguagePolicy: means of the rollouts themselves."""
        return self._means.values(contexts)

    def learn(self, evidence: Evidence) -> None:
        """See LanguagePolicy."""
        self._means.learn(evidence)

    def state(self) -> dict[str, Any]:
        """See LanguagePolicy."""
        return self._means.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """See LanguagePolicy."""
        self._means.load(state)

    def metrics(self, step: int) -> dict[str, float]:
        """None of its own."""
        return {}
