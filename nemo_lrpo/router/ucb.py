"""Discounted UCB: each (topic, region, language) on its own, optimism instead of chance.

With n discounted rollouts (two of the overall mean included) of mean y, a language's index is

    u_l(n_l) = y_l + exploration * s * sqrt(log(1 + N) / n_l),      N = sum_l n_l,

s^2 the variance of a rollout within cells (Garivier and Moulines 2008). Taking the largest index for every slot until
the next update would put a whole window on one language. So p(l) is the share of the window that l would get if the
rollouts were given out one by one, each to the largest index, counting it at once and leaving the means as they are:

    p(l) = max(0, n_l(u) - n_l) / B,   n_l(u) = exploration^2 s^2 log(1 + N) / (u - y_l)^2,   u such that they sum to B,

B the rollouts that the last window brought per context. Without exploration or noise all goes to the largest mean, in
equal shares where several are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.router.discounted import DiscountedPolicy
from nemo_lrpo.router.policy import Context

Array = NDArray[np.float64]

_HALVINGS = 60


class UcbPolicy(DiscountedPolicy):
    """See the module's docstring."""

    name = "ucb"

    def __init__(
        self, config: RouterConfig, languages: Sequence[str], topics: Sequence[str], regions: Sequence[str]
    ) -> None:
        """Topics and regions need not be declared: each pair begins with its first rollout."""
        super().__init__(config.ucb.discount, len(languages))
        self._settings = config.ucb

    def probabilities(self, contexts: Sequence[Context], step: int, charges: Array | None = None) -> Array:
        """See LanguagePolicy."""
        cells = self._means.read(contexts)
        mean = cells.mean if charges is None else cells.mean - charges
        scale = self._settings.exploration**2 * cells.noise * np.log1p(cells.count.sum(axis=1, keepdims=True))
        return optimistic_shares(mean, cells.count, scale, self._means.window)


def optimistic_shares(mean: Array, count: Array, scale: Array, window: float) -> Array:
    """float64 [C, L], rows sum to 1: p(l) of the module's docstring. mean, count: [C, L]; scale: [C, 1], the squared
    bonus of one rollout; window: B."""
    best = mean.max(axis=1, keepdims=True)
    if not scale.max(initial=0.0) > 1e-12:
        top = (mean == best).astype(np.float64)
        return top / top.sum(axis=1, keepdims=True)
    # At the largest index nothing is given out, at the largest mean infinitely much: halve the gap between them.
    low, high = best, (mean + np.sqrt(scale / count)).max(axis=1, keepdims=True)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        enough = _given(mean, count, scale, middle).sum(axis=1, keepdims=True) >= window
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    given = _given(mean, count, scale, high)
    # Where the window is too small for the precision of `high`, the largest index takes all.
    given += 1e-9 * (mean + np.sqrt(scale / count) >= high)
    return given / given.sum(axis=1, keepdims=True)


def _given(mean: Array, count: Array, scale: Array, index: Array) -> Array:
    """Rollouts that bring each language's index down to `index` [C, 1]."""
    gap = np.maximum(index - mean, 1e-150)
    return np.maximum(scale / gap**2 - count, 0.0)
