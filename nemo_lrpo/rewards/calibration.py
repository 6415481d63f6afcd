"""Similarities of different language pairs brought to one scale.

An encoder places equivalent texts of some language pairs closer together than those of others. With s the cosine, n the
samples of the pair, k = shrinkage_k, mu and nu the pair's means of equivalent and of mismatched texts, and
lambda_n = n / (n + k):

mean (paper, calibration section)
    s' = s - lambda_n (mu_pair - mu_ref), mu_ref the count-weighted mean of mu over all pairs.
affine
    s' = U + (s - u_ab) (U - V) / (u_ab - v_ab). For two languages u_ab = u + lambda_n e_a + lambda_n' e_b, the
    count-weighted least squares fit of u + e_a + e_b to mu, n and n' the samples of the pairs that a and b are in, and
    v_ab likewise to nu: any two languages that were measured have a line, their pair measured or not. Pairs of one
    language do not enter the fit (a text compared with itself says nothing of e_a); they keep lambda_n of their own mu
    and nu, and the rest of such pairs' mean. U and V are the count-weighted means of mu and nu over all pairs.
    (U - V) / (u_ab - v_ab) is at most MAX_SLOPE; where that binds, equivalents still come to U.
quantile
    s' = 2 F(s) - 1 with F = lambda_n F_pair + (1 - lambda_n) F_pooled; F_pair the distribution of equivalents,
    mismatches and hardest negatives in equal parts, F_pooled that of all pairs of its kind (one language, or two).
    Linear between the stored quantiles; a value that many samples share stands at the middle of its step, so that a
    text compared with itself is worth as much as the average equivalent. A share UNIFORM of a uniform distribution
    keeps F strictly increasing where there is no sample. Where equivalents overlap with the rest, their mean of F is
    lower than elsewhere; with anchor, F^g takes the place of F, g being the pair's (or kind's) exponent for which its
    equivalents have the mean that those of all pairs have together.

Pairs are unordered. How s' becomes r_qual in [0, 1]: quantile, F itself (or F^g); mean and affine with bounds=rescale,

    r_qual = (s' - low) / (high - low), low and high the least and greatest s' of any pair, for s in [-1, 1],

and with bounds=clip, as published, (s' + 1) / 2 with s' clipped to [-1, 1].
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import CalibrationConfig
from nemo_lrpo.rewards.statistics import (
    Moments,
    Pair,
    PairStatistics,
    language_pair,
    read_statistics,
    weighted_mean,
)

log = logging.getLogger(__name__)

MAX_SLOPE = 2.0
"""affine: at most this factor on a difference of cosines, however close a pair's equivalents and mismatches lie."""
UNIFORM = 0.01
"""quantile: share of a uniform distribution over [-1, 1] in every F."""
_POOLED_POINTS = 513


@dataclass(frozen=True)
class Calibrated:
    """value: s', about [-1, 1]. quality: r_qual in [0, 1], the same increasing function of s' for all pairs. known:
    whether the pair has statistics."""

    value: float
    quality: float
    known: bool


class Calibration(Protocol):
    """Brings similarities to one scale. May be shared by threads."""

    def apply(self, similarity: float, reference_language: str, response_language: str) -> Calibrated:
        """One comparison; `similarity` is finite."""


class Line(NamedTuple):
    """s' = offset + slope * s."""

    offset: float
    slope: float

    def __call__(self, similarity: float) -> float:
        return self.offset + self.slope * similarity


IDENTITY = Line(0.0, 1.0)


class NoCalibration:
    """s' = s."""

    def apply(self, similarity: float, reference_language: str, response_language: str) -> Calibrated:
        """See Calibration."""
        return Calibrated(similarity, _unit((similarity + 1.0) / 2.0), True)


class LinearCalibration:
    """A line per pair; `unknown` are those of pairs without statistics: of two languages, of one."""

    def __init__(self, lines: Mapping[Pair, Line], unknown: tuple[Line, Line], bounds: str = "rescale"):
        every = [*lines.values(), *unknown]
        self._lines = dict(lines)
        self._unknown = unknown
        self._clip = bounds == "clip"
        self._low = min(line(-1.0) for line in every)
        self._width = max(line(1.0) for line in every) - self._low

    def apply(self, similarity: float, reference_language: str, response_language: str) -> Calibrated:
        """See Calibration."""
        line = self._lines.get(language_pair(reference_language, response_language))
        known = line is not None
        if line is None:
            line = self._unknown[reference_language == response_language]
        value = line(similarity)
        if self._clip:
            value = min(1.0, max(-1.0, value))
            return Calibrated(value, (value + 1.0) / 2.0, known)
        return Calibrated(value, _unit((value - self._low) / self._width), known)


def mean_calibration(
    statistics: PairStatistics, shrinkage_k: float = 0.0, unknown_pair: str = "reference", bounds: str = "rescale"
) -> LinearCalibration:
    """The module's equation `mean`; the other arguments as in CalibrationConfig."""
    pairs = statistics.equivalent
    mu_ref = weighted_mean(pairs.values())

    def of_kind(same: bool) -> Line:
        kind = [m for pair, m in pairs.items() if (pair[0] == pair[1]) is same]
        return Line(mu_ref - weighted_mean(kind), 1.0) if kind and unknown_pair != "raw" else IDENTITY

    lines = {pair: Line(-m.count / (m.count + shrinkage_k) * (m.mean - mu_ref), 1.0) for pair, m in pairs.items()}
    return LinearCalibration(lines, (of_kind(False), of_kind(True)), bounds)


def affine_calibration(
    statistics: PairStatistics, shrinkage_k: float = 0.0, unknown_pair: str = "reference", bounds: str = "rescale"
) -> LinearCalibration:
    """The module's equation `affine`. Raises ConfigError where mismatches were not measured, or are as similar as
    equivalents."""
    equivalent, mismatch = statistics.equivalent, statistics.mismatch
    if not mismatch:
        raise ConfigError("method=affine needs the mismatches of each pair, and the statistics hold none.")
    top, bottom = weighted_mean(equivalent.values()), weighted_mean(mismatch.values())
    if top <= bottom:
        raise ConfigError(
            f"method=affine: equivalent texts (mean cosine {top:.4f}) are no more similar than mismatched ones "
            f"({bottom:.4f}) under this encoder."
        )

    def line(upper: float, lower: float) -> Line:
        slope = (top - bottom) / max(upper - lower, (top - bottom) / MAX_SLOPE)
        return Line(top - slope * upper, slope)

    ends = equivalent.keys() & mismatch.keys()
    of_one = [pair for pair in ends if pair[0] == pair[1]]

    def end(side: Mapping[Pair, Moments], pair: Pair) -> float:
        return _shrunk(side[pair], weighted_mean(side[other] for other in of_one), shrinkage_k)

    own = {pair: (end(equivalent, pair), end(mismatch, pair)) for pair in of_one}
    upper, lower = main_effects(equivalent, shrinkage_k), main_effects(mismatch, shrinkage_k)
    languages = sorted(upper.effects.keys() & lower.effects.keys())
    across = {(a, b): (upper(a, b), lower(a, b)) for i, a in enumerate(languages) for b in languages[i + 1 :]}

    def of_kind(kind: Mapping[Pair, tuple[float, float]]) -> Line:
        known = [pair for pair in kind if pair in ends]
        if not known or unknown_pair == "raw":
            return IDENTITY
        return line(*(weighted_mean(side[pair] for pair in known) for side in (equivalent, mismatch)))

    lines = {pair: line(*both) for pair, both in {**own, **across}.items()}
    return LinearCalibration(lines, (of_kind(across), of_kind(own)), bounds)


def _shrunk(sample: Moments, common: float, shrinkage_k: float) -> float:
    return common + sample.count / (sample.count + shrinkage_k) * (sample.mean - common)


@dataclass(frozen=True)
class MainEffects:
    """level + effects[a] + effects[b] for a pair of two languages."""

    level: float
    effects: Mapping[str, float]

    def __call__(self, a: str, b: str) -> float:
        return self.level + self.effects[a] + self.effects[b]


def main_effects(samples: Mapping[Pair, Moments], shrinkage_k: float = 0.0) -> MainEffects:
    """Count-weighted least squares of the means of pairs of two languages; of all best fits the one with the smallest
    effects, each then shrunk by n / (n + shrinkage_k), n the samples of the language's pairs. Without such pairs no
    language has an effect."""
    pairs = [pair for pair in samples if pair[0] != pair[1]]
    languages = sorted({language for pair in pairs for language in pair})
    if not pairs:
        return MainEffects(0.0, {})
    means = np.array([samples[pair].mean for pair in pairs])
    weights = np.sqrt([samples[pair].count for pair in pairs])
    design = np.array([[float(language in pair) for language in languages] for pair in pairs])
    # The level is not estimable beside the effects: it is taken off first.
    level = weighted_mean(samples[pair] for pair in pairs)
    effects = np.linalg.lstsq(design * weights[:, None], (means - level) * weights, rcond=None)[0]
    counts = (design * (weights**2)[:, None]).sum(axis=0)
    return MainEffects(level, dict(zip(languages, (effects * counts / (counts + shrinkage_k)).tolist(), strict=True)))


class Distribution:
    """F at increasing points x from -1 to 1, linear between them: float64 [N] both."""

    def __init__(self, x: NDArray[np.float64], level: NDArray[np.float64]):
        self.x = x
        self.level = level
        # np.interp takes several times as long for a single value.
        self._points: list[float] = x.tolist()
        self._levels: list[float] = level.tolist()

    def __call__(self, similarity: float) -> float:
        right = bisect.bisect_right(self._points, similarity, 1, len(self._points) - 1)
        left, low = self._points[right - 1], self._levels[right - 1]
        return low + (self._levels[right] - low) * (similarity - left) / (self._points[right] - left)


class QuantileCalibration:
    """The module's equation `quantile`. `statistics` hold the quantiles of all their samples."""

    def __init__(
        self,
        statistics: PairStatistics,
        shrinkage_k: float = 0.0,
        unknown_pair: str = "reference",
        anchor: bool = False,
    ):
        pairs = statistics.equivalent
        self._own = {pair: mixed_distribution(statistics.kinds(pair).values()) for pair in pairs}
        self._share = {pair: m.count / (m.count + shrinkage_k) for pair, m in pairs.items()}
        self._raw = unknown_pair == "raw"
        self._pooled = tuple(self._pool(statistics, same) for same in (False, True))
        self._exponent: dict[Pair, float] = {}
        self._exponents_of_kind = (1.0, 1.0)
        if anchor:
            self._anchor(pairs)

    def _anchor(self, pairs: Mapping[Pair, Moments]) -> None:
        """Exponents for which equivalents have one mean: float64 [Q] levels of each pair's own quantiles."""
        levels = {pair: np.array([_unit(self._level(s, pair)) for s in m.quantiles]) for pair, m in pairs.items()}
        counts = [m.count for m in pairs.values()]
        common = float(np.average([_mean_of_quantiles(level) for level in levels.values()], weights=counts))
        self._exponent = {pair: _exponent(level, common) for pair, level in levels.items()}
        found = []
        for same in (False, True):
            kind = [pair for pair in pairs if (pair[0] == pair[1]) is same] or list(pairs)
            found.append(float(np.average([self._exponent[p] for p in kind], weights=[pairs[p].count for p in kind])))
        self._exponents_of_kind = (found[0], found[1])

    def _level(self, similarity: float, pair: Pair) -> float:
        """F of a pair that has statistics."""
        own, share = self._own[pair](similarity), self._share[pair]
        return own if share == 1.0 else share * own + (1.0 - share) * self._pooled[pair[0] == pair[1]](similarity)

    def _pool(self, statistics: PairStatistics, same: bool) -> Distribution:
        kind = [pair for pair in self._own if (pair[0] == pair[1]) is same] or list(self._own)
        # Where the samples are, there are the points; a bounded number of them, whatever the number of pairs.
        every = np.concatenate([self._own[pair].x for pair in kind])
        x = np.unique([*np.quantile(every, np.linspace(0.0, 1.0, _POOLED_POINTS)), -1.0, 1.0])
        counts = [statistics.equivalent[pair].count for pair in kind]
        levels = [np.interp(x, self._own[pair].x, self._own[pair].level) for pair in kind]
        return Distribution(x, np.average(levels, axis=0, weights=counts))

    def apply(self, similarity: float, reference_language: str, response_language: str) -> Calibrated:
        """See Calibration."""
        pair = language_pair(reference_language, response_language)
        known = pair in self._own
        if known:
            quality = _unit(self._level(similarity, pair)) ** self._exponent.get(pair, 1.0)
        elif self._raw:
            quality = _unit((similarity + 1.0) / 2.0)
        else:
            same = pair[0] == pair[1]
            quality = _unit(self._pooled[same](similarity)) ** self._exponents_of_kind[same]
        return Calibrated(2.0 * quality - 1.0, quality, known)


_LARGEST_EXPONENT = 16.0


def _mean_of_quantiles(values: NDArray[np.float64]) -> float:
    """Of a distribution with `values` at evenly spaced levels, linear between them."""
    return float(values.mean()) if len(values) < 2 else float(((values[1:] + values[:-1]) / 2.0).mean())


def _exponent(levels: NDArray[np.float64], mean: float) -> float:
    """g with mean(levels^g) = `mean`, by bisection of log g; at most _LARGEST_EXPONENT either way."""
    low, high = -math.log(_LARGEST_EXPONENT), math.log(_LARGEST_EXPONENT)
    for _ in range(60):
        middle = (low + high) / 2.0
        # Levels are at most 1, so the mean falls as the exponent grows.
        if _mean_of_quantiles(levels ** math.exp(middle)) > mean:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2.0)


def mixed_distribution(samples: Iterable[Moments]) -> Distribution:
    """Of samples in equal parts, and a share UNIFORM of a uniform distribution. Each sample has quantiles."""
    steps = [_steps(m.quantiles) for m in samples]
    x = np.unique(np.concatenate([*(points for points, _ in steps), [-1.0, 1.0]]))
    mixed = np.mean([np.interp(x, points, level, left=0.0, right=1.0) for points, level in steps], axis=0)
    return Distribution(x, (1.0 - UNIFORM) * mixed + UNIFORM * (x + 1.0) / 2.0)


def _steps(quantiles: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distinct values and the level of each; one that several quantiles share has the mean of their levels."""
    values, place, counts = np.unique(np.asarray(quantiles), return_inverse=True, return_counts=True)
    levels = np.linspace(0.0, 1.0, len(quantiles))
    return values, np.bincount(place, weights=levels) / counts


def _unit(value: float) -> float:
    """`value` without the rounding that leads out of [0, 1]."""
    return 0.0 if value < 0.0 else 1.0 if value > 1.0 else value


def calibration_from(config: CalibrationConfig, statistics: PairStatistics) -> Calibration:
    """The calibration that `config` asks for, from `statistics`; its path is not read. Raises ConfigError where the
    statistics lack what the method needs."""
    if config.method == "none":
        return NoCalibration()
    if config.method == "mean":
        return mean_calibration(statistics, config.shrinkage_k, config.unknown_pair, config.bounds)
    if config.method == "affine":
        return affine_calibration(statistics, config.shrinkage_k, config.unknown_pair, config.bounds)
    bare = [pair for pair in statistics.equivalent if not all(m.quantiles for m in statistics.kinds(pair).values())]
    if bare:
        raise ConfigError(f"method=quantile needs quantiles, and the statistics hold none of {'-'.join(min(bare))}.")
    return QuantileCalibration(statistics, config.shrinkage_k, config.unknown_pair, config.anchor)


def _languages(statistics: PairStatistics) -> list[str]:
    return sorted({language for pair in statistics.equivalent for language in pair})


def build_calibration(config: CalibrationConfig, encoder: str, languages: Sequence[str]) -> Calibration:
    """The calibration that `config` asks for, of the encoder with identity `encoder`.

    Raises ConfigError for statistics of another encoder, for those that lack what the method needs, for those of other
    languages altogether and, with unknown_pair=error, for pairs of `languages` without statistics; warns of the latter
    otherwise.
    """
    config.check("calibration")
    if config.method == "none":
        return NoCalibration()
    statistics = read_statistics(str(config.path))
    if statistics.encoder != encoder:
        raise ConfigError(
            f"calibration.path={config.path!r} was measured with encoder {statistics.encoder}, this one is {encoder}; "
            "measure it again with tools/calibrate.py (and the same settings of encoder)."
        )
    try:
        calibration = calibration_from(config, statistics)
    except ConfigError as error:
        raise ConfigError(
            f"calibration.path={config.path!r}: {error} Measure it again with tools/calibrate.py, or choose "
            "calibration.method=mean."
        ) from error
    pairs = [(a, b) for a in languages for b in languages if a <= b]
    missing = [f"{a}-{b}" for a, b in pairs if not calibration.apply(0.0, a, b).known]
    if missing and (config.unknown_pair == "error" or len(missing) == len(pairs)):
        raise ConfigError(
            f"calibration.path={config.path!r} has no statistics for {', '.join(missing)}, and "
            + (
                "calibration.unknown_pair=error asks for all; measure them, or choose reference or raw."
                if config.unknown_pair == "error"
                else f"so for none of `languages`; it has {', '.join(_languages(statistics))}."
            )
        )
    if missing:
        log.warning(
            "calibration.path=%s has no statistics for %d of %d pairs of `languages`, which are treated by "
            "calibration.unknown_pair=%s: %s",
            config.path,
            len(missing),
            len(pairs),
            config.unknown_pair,
            ", ".join(missing),
        )
    return calibration
