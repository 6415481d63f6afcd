"""A bank of models that differ in how fast they forget, weighted by how well each predicts the next window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.router.base import RouterStateError
from nemo_lrpo.router.gaussian import probability_best, sharpened

Array = NDArray[np.float64]

_SWITCH = 0.02
"""Probability per window that another memory becomes the right one (fixed share, Herbster and Warmuth): no weight
falls below this share of the uniform one, so that a memory that was wrong for long can come back at once."""
_NEGLIGIBLE = 2.0 * _SWITCH
"""Memories of less than this share of the uniform weight do not enter the probabilities, nor their cost the time."""


class Memories:
    """Weights of M models. Model m keeps `keep[m]` of what it learned per training step."""

    def __init__(self, keep: list[float]) -> None:
        self.keep = np.asarray(keep, np.float64)
        self.weights = np.full(len(keep), 1.0 / len(keep))

    def judge(self, log_likelihoods: Array) -> None:
        """Reweight by the models' log-likelihoods of a window, float64 [M], each before it learned the window."""
        logs = np.log(self.weights) + log_likelihoods
        weights = np.exp(logs - logs.max())
        self.weights = (1.0 - _SWITCH) * weights / weights.sum() + _SWITCH / len(weights)

    def mean(self, means: Array) -> Array:
        """float64 [C, L]: the models' means, float64 [M, C, L], by weight."""
        return np.tensordot(self.weights, means, 1)

    def probabilities(
        self, predicted: Callable[[int], tuple[Array, Array]], charges: Array | None, sharpness: float
    ) -> Array:
        """float64 [C, L]: P(language has the largest value less its charge) under the mixture, to the power
        `sharpness`, rows sum to 1. `predicted`: a model's number to the means and variances of the values, float64
        [C, L] each; `charges`: [L] in units of the values."""
        parts = []
        for m in np.flatnonzero(self.weights * len(self.weights) > _NEGLIGIBLE).tolist():
            mean, variance = predicted(m)
            best = probability_best(mean if charges is None else mean - charges, np.sqrt(variance))
            parts.append(self.weights[m] * best)
        return sharpened(sum(parts[1:], parts[0]), sharpness)


def normal_log_likelihood(value: Array, mean: Array, variance: Array) -> float:
    """Sum of log N(value; mean, variance), without the constant."""
    return float(-0.5 * ((value - mean) ** 2 / variance + np.log(variance)).sum())


def check_same(state: Mapping[str, Any], part: str, expected: object, key: str) -> None:
    """RouterStateError unless `state[part]` is what the configuration `key` makes it in this run."""
    if state.get(part) != expected:
        raise RouterStateError(
            f"router state: {part}={state.get(part)!r} was saved, this run has {expected!r}; set {key} to what was "
            "saved, or start a new run."
        )
