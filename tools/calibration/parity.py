"""How fair a calibration is between languages, and how well it tells right from wrong, on given comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import CalibrationConfig
from nemo_lrpo.rewards.calibration import Calibration, calibration_from
from nemo_lrpo.rewards.statistics import KINDS, Pair, PairStatistics

from .comparisons import Cosines

METHODS = ("none", "mean", "quantile", "affine")


@dataclass(frozen=True)
class Fairness:
    """Of one calibration, over comparisons by (reference language, response language).

    means: mean r_qual of equivalent responses by their language, over all references. std: standard deviation of r_qual
    over all equivalents. std_all: over equivalents, mismatches and hardest negatives in equal parts, as answers of any
    quality have it. auc: by kind of negative, then response language. pairs: mean s' of equivalents; value_std: the
    standard deviation of s' over all of them. reordered: pairs of languages in which two responses changed their order.
    """

    means: Mapping[str, float]
    std: float
    std_all: float
    auc: Mapping[str, Mapping[str, float]]
    pairs: Mapping[Pair, float]
    value_std: float
    reordered: int

    @property
    def spread(self) -> float:
        """Largest difference of two languages' means, in r_qual."""
        return max(self.means.values()) - min(self.means.values())

    @property
    def parity(self) -> float:
        """Spread in standard deviations of the reward of equivalent answers."""
        return self.spread / self.std

    @property
    def parity_all(self) -> float:
        """Spread in standard deviations of the reward of answers of any quality."""
        return self.spread / self.std_all


def fairness(calibration: Calibration, cosines: Mapping[Pair, Cosines]) -> Fairness:
    """`cosines` as compare_all gives them."""
    qualities: dict[str, dict[Pair, NDArray[np.float64]]] = {kind: {} for kind in KINDS}
    means: dict[Pair, float] = {}
    values: list[float] = []
    reordered = 0
    for pair, found in cosines.items():
        parts = {kind: [calibration.apply(s, *pair) for s in found.kind(kind).tolist()] for kind in KINDS}
        for kind, calibrated in parts.items():
            qualities[kind][pair] = np.array([one.quality for one in calibrated])
        means[pair] = float(np.mean([one.value for one in parts["equivalent"]]))
        values += [one.value for one in parts["equivalent"]]
        before = np.concatenate([found.kind(kind) for kind in KINDS])
        after = np.concatenate([qualities[kind][pair] for kind in KINDS])
        order = np.argsort(before)
        # Cosines nearer than their rounding are no ranking.
        apart = np.diff(before[order]) > 1e-9
        reordered += bool((np.diff(after[order])[apart] <= 0).any())

    def spoken(kind: str, language: str) -> NDArray[np.float64]:
        return np.concatenate([found for (_, response), found in qualities[kind].items() if response == language])

    languages = sorted({response for _, response in cosines})
    auc: dict[str, dict[str, float]] = {kind: {} for kind in KINDS[1:]}
    for kind, by_language in auc.items():
        for language in languages:
            right, wrong = spoken("equivalent", language), spoken(kind, language)
            if wrong.size:
                labels = np.repeat([1, 0], [right.size, wrong.size])
                by_language[language] = float(roc_auc_score(labels, np.concatenate([right, wrong])))
    every = {kind: np.concatenate(list(qualities[kind].values())) for kind in KINDS}
    return Fairness(
        means={language: float(spoken("equivalent", language).mean()) for language in languages},
        std=float(every["equivalent"].std()),
        std_all=_std_of_equal_parts([part for part in every.values() if part.size]),
        auc=auc,
        pairs=means,
        value_std=float(np.std(values)),
        reordered=reordered,
    )


def _std_of_equal_parts(parts: list[NDArray[np.float64]]) -> float:
    center = np.mean([part.mean() for part in parts])
    return float(np.sqrt(np.mean([np.mean((part - center) ** 2) for part in parts])))


def compare_methods(statistics: PairStatistics, cosines: Mapping[Pair, Cosines]) -> dict[str, Fairness]:
    """Fairness of every method that `statistics` have enough for, other settings at their defaults."""
    found = {}
    for method in METHODS:
        try:
            calibration = calibration_from(CalibrationConfig(method=method), statistics)
        except ConfigError:
            continue
        found[method] = fairness(calibration, cosines)
    return found
