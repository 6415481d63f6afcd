"""What a rollout is worth to the router, by `router.objective.name`. Rewards r of one step, groups g of one question.

reward     y = r                              the published objective: route to where answers are good
advantage  y = |r - mean_g| / (std_g + 1e-6)  how far it moves the policy; std over n - 1, as GRPO's advantages
variance   y = (r - mean_g)^2                 what it adds to the spread of its group, without which GRPO has no signal
progress   y = r - m[c, l]                    by how much the context's topics and regions c got better in language l:
                                              m is the slow mean m <- (1 - rate) m + rate * (mean r of the step in c, l)
                                              as it was before the step; it starts at the first step's mean

advantage and variance compare within the group, whatever its languages: a group of one reward says nothing and teaches
nothing; one whose rewards are all equal is worth 0. They, too, are independent of the order of rows.
"""

from __future__ import annotations

import numpy as np

from nemo_lrpo.config.router import ObjectiveConfig
from nemo_lrpo.router.cells import Cells
from nemo_lrpo.router.observed import GroupSpread, Index, Observed, Values

_EPS = 1e-6


def group_values(name: str, rewards: Values, group: Index, spread: GroupSpread) -> Values:
    """float64 [N]: y of advantage or variance; NaN where the rollout teaches nothing."""
    deviation = np.where(spread.std[group] > 0.0, rewards - spread.mean[group], 0.0)
    values = deviation**2 if name == "variance" else np.abs(deviation) / (spread.std[group] + _EPS)
    return np.where(spread.count[group] > 1, values, np.nan)


class Objective:
    """The configured objective, with the slow means of progress, [C, L], by topics and regions."""

    def __init__(self, config: ObjectiveConfig, languages: int) -> None:
        self._config = config
        self.means = Cells(languages, mean=("languages",), seen=("languages",))
        """mean: the slow mean. seen: 1 where it has started, else 0."""

    def values(self, rows: Observed) -> Values:
        """float64 [n]: y of each rollout, NaN where it teaches nothing; moves the slow means."""
        if self._config.name == "reward":
            return rows.reward
        if self._config.name != "progress":
            return group_values(self._config.name, rows.reward, rows.group, rows.spread)
        cell = self.means.claim(rows.contexts)[rows.context]
        mean, seen = self.means.arrays["mean"], self.means.arrays["seen"] > 0.0
        at = cell * mean.shape[1] + rows.language
        count = np.bincount(at, minlength=mean.size).reshape(mean.shape)
        now = np.bincount(at, rows.reward, mean.size).reshape(mean.shape) / np.maximum(count, 1)
        before = np.where(seen, mean, now)
        here = count > 0
        mean[here] = ((1.0 - self._config.rate) * before + self._config.rate * now)[here]
        self.means.arrays["seen"][here] = 1.0
        return rows.reward - before.ravel()[at]
