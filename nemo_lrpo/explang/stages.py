"""Exploration first, then exploitation: which weights a step has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_lrpo.config.explang import ExplangConfig, StageConfig

EXPLORATION = "exploration"
EXPLOITATION = "exploitation"


@dataclass(frozen=True)
class Stage:
    """`name` is EXPLORATION or EXPLOITATION."""

    name: str
    weights: StageConfig


def exploration_steps(config: ExplangConfig, total_steps: int) -> int:
    """How many steps are exploration: the share of `total_steps`, rounded up."""
    # Rounded before: 0.07 * 100 is a little more than 7.
    return math.ceil(round(config.exploration_share * total_steps, 6))


def stage_of(config: ExplangConfig, step: int, exploring: int) -> Stage:
    """The stage of `step`, counted from 0, in a run whose first `exploring` steps are exploration."""
    if step < exploring:
        return Stage(EXPLORATION, config.exploration)
    return Stage(EXPLOITATION, config.exploitation)
