"""Hard and easy questions: what the rollouts of one question have in common says nothing of their languages.

The value of rollout i of question q in context c and language l is taken to be f_l(c) + b_q + noise. A group's rollouts
share b_q, so that the six of them that drew one language are far fewer than six observations of it, while languages
within a group compare without it. With s^2 the variance of the noise, v that of b, K rollouts in the group and G groups
in its context this window, r the mean over a group (a context's groups) of value - expected value:

    b_q = k (r_group - r_context),   k = v / (v + s^2 / K),   variance left of b: u = v ((1 - k)(1 - 1/G) + 1/G),

and the m rollouts of a group in one language count m s^2 / (s^2 + m u), their mean less b_q the value. s^2 is the
variance within (group, language), v what the means of a context's groups vary beyond s^2 / K, both over all contexts
and the last tens of steps. Where questions do not differ, v is near 0 and every rollout counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.router.numbering import numbered
from nemo_lrpo.router.policy import Evidence
from nemo_lrpo.router.tables import window_sums

Array = NDArray[np.float64]

_LEAST_NOISE = 1e-6
"""s^2 in units of v, at least."""
_KEPT = 0.97
"""Share of the sums behind s^2 and v that a training step leaves."""


class WindowSums(NamedTuple):
    """count, total: float64 [C, L], effective number of rollouts and sum of their values less the questions' effects.
    squares, freedom: sum of squared differences that are noise alone, and its degrees of freedom."""

    count: Array
    total: Array
    squares: float
    freedom: float


@dataclass
class QuestionEffects:
    """The running sums: squares and freedom within (group, language), squares and freedom of the means of groups within
    contexts, and what s^2 adds to the squares of those per unit. float64 [5]."""

    sums: Array

    @staticmethod
    def unknown() -> QuestionEffects:
        """Before any data."""
        return QuestionEffects(np.zeros(5))

    @property
    def variances(self) -> tuple[float, float]:
        """(s^2, v); v is 0 while nothing tells them apart."""
        squares, freedom, between, groups, share = self.sums.tolist()
        if freedom < 1.0 or groups < 1.0:
            return 0.0, 0.0
        noise = squares / freedom
        return noise, max((between - share * noise) / groups, 0.0)

    def take_out(self, evidence: Evidence, expected: Array) -> WindowSums:
        """Sums of a window, questions' effects taken out. `expected`: float64 [C, L], values expected before it."""
        languages = expected.shape[1]
        context, language = evidence.context.astype(np.int64), evidence.language.astype(np.int64)
        _, group = numbered(evidence.group.astype(np.int64), int(evidence.group.max(initial=-1)) + 1)
        size = np.bincount(group).astype(np.float64)
        of_group = np.zeros(len(size), np.int64)
        of_group[group] = context
        groups = np.bincount(of_group, minlength=len(expected)).astype(np.float64)
        surprise = np.bincount(group, evidence.value - expected[context, language]) / size
        away = surprise - (np.bincount(of_group, surprise, len(expected)) / np.maximum(groups, 1.0))[of_group]
        pair, row = numbered(group * languages + language, len(size) * languages)
        number = np.bincount(row).astype(np.float64)
        mean = np.bincount(row, evidence.value) / number
        squares, freedom = float(((evidence.value - mean[row]) ** 2).sum()), float((number - 1.0).sum())
        spread = [(away**2).sum(), np.maximum(groups - 1.0, 0.0).sum(), ((1.0 - 1.0 / groups[of_group]) / size).sum()]
        self.sums = self.sums * _KEPT**evidence.steps + [squares, freedom, *spread]
        noise, between = self.variances
        if not between > 0.0:
            count, total, within = window_sums(evidence, languages)
            # Also without repeated languages in a group, where only cells tell the noise.
            return WindowSums(count, total, within, float(np.maximum(count - 1.0, 0.0).sum()))
        # Rewards that never differ within a language would leave rollouts that count for nothing.
        noise = max(noise, _LEAST_NOISE * between)
        known = between / (between + noise / size)
        left = between * ((1.0 - known) * (1.0 - 1.0 / groups[of_group]) + 1.0 / groups[of_group])
        group_of, language_of = np.divmod(pair, languages)
        effective = number * noise / (noise + number * left[group_of])
        cell = of_group[group_of] * languages + language_of
        value = effective * (mean - (known * away)[group_of])
        sums = (np.bincount(cell, weights, expected.size).reshape(expected.shape) for weights in (effective, value))
        return WindowSums(*sums, squares, freedom)
