"""`algorithm`: from rewards to the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_lrpo.config.checks import check_choice, check_range


@dataclass
class AlgorithmConfig:
    """GRPO over the group of one question's rollouts, whatever their languages; defaults of the published run."""

    advantage_scaling: str = "std"
    """std: (r - mean) / (std + eps), sample standard deviation; mean: r - mean; leave_one_out: r minus the mean of the
    group's other rollouts."""
    advantage_eps: float = 1e-6
    """eps of advantage_scaling=std."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low where the advantage is negative."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high where the advantage is positive."""
    kl_coefficient: float = 0.001
    """Weight of the divergence from the initial policy, inside the loss; 0 keeps no reference policy at all."""
    kl_estimator: str = "k3"
    """Per-token estimator, d = log pi_ref - log pi: k1: -d; k2: d^2 / 2; k3: exp(d) - d - 1."""
    aggregation: str = "token_mean"
    """token_mean: every token of the update weighs the same; sequence_mean: every answer weighs the same."""
    num_updates: int = 1
    """Optimizer updates per training step; each takes its share of the questions, whole groups."""

    def check(self, key: str) -> None:
        """Raise ConfigError, naming the field, for a value that cannot train."""
        check_choice(f"{key}.advantage_scaling", self.advantage_scaling, ("std", "mean", "leave_one_out"))
        check_range(f"{key}.advantage_eps", self.advantage_eps, above=0.0, below=math.inf)
        check_range(f"{key}.clip_low", self.clip_low, above=0.0, at_most=1.0)
        check_range(f"{key}.clip_high", self.clip_high, above=0.0, below=math.inf)
        check_range(f"{key}.kl_coefficient", self.kl_coefficient, at_least=0.0, below=math.inf)
        check_choice(f"{key}.kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        check_choice(f"{key}.aggregation", self.aggregation, ("token_mean", "sequence_mean"))
        check_range(f"{key}.num_updates", self.num_updates, at_least=1)
