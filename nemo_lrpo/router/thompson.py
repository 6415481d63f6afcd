"""Thompson sampling with decay: each (topic, region, language) on its own, probabilities by integration.

With n discounted rollouts of mean y in a cell, the value of a language there is taken to be normal with

    mean = (n y + 2 m) / (n + 2),      variance = s^2 / (n + 2),

m the mean over everything and s^2 the variance of a rollout within cells: for rewards of 0 and 1, close to a Beta
posterior from a uniform prior. p(l) is the probability that l has the largest value, to the power `sharpness`; what
sampling from the posterior would only draw from is thus known, and is the propensity in the log.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.router.discounted import DiscountedPolicy
from nemo_lrpo.router.gaussian import probability_best, sharpened
from nemo_lrpo.router.policy import Context

Array = NDArray[np.float64]


class ThompsonPolicy(DiscountedPolicy):
    """See the module's docstring."""

    name = "thompson"

    def __init__(
        self, config: RouterConfig, languages: Sequence[str], topics: Sequence[str], regions: Sequence[str]
    ) -> None:
        """Topics and regions need not be declared: each pair begins with its first rollout."""
        super().__init__(config.thompson.discount, len(languages))
        self._settings = config.thompson

    def probabilities(self, contexts: Sequence[Context], step: int, charges: Array | None = None) -> Array:
        """See LanguagePolicy."""
        cells = self._means.read(contexts)
        mean = cells.mean if charges is None else cells.mean - charges
        return sharpened(probability_best(mean, np.sqrt(cells.noise / cells.count)), self._settings.sharpness)
