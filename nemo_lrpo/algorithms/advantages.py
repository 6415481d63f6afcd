"""Group-relative advantages: each reward against the other rollouts of its question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALINGS = ("std", "mean", "leave_one_out")


@dataclass(frozen=True)
class GroupStatistics:
    """Per group, in ascending order of its index, over valid rollouts only.

    index: int64 [G]. count: int64 [G]. mean, std: float64 [G]; std is the sample standard deviation (n - 1), 0 below
    two rollouts, mean is 0 of none. zero_variance: bool [G], two rollouts or more with one and the same reward.
    undersized: bool [G], fewer than two rollouts, so nothing to compare with.
    """

    index: Tensor
    count: Tensor
    mean: Tensor
    std: Tensor
    zero_variance: Tensor
    undersized: Tensor


def group_advantages(
    rewards: Tensor, group_index: Tensor, valid: Tensor, scaling: str = "std", eps: float = 1e-6
) -> tuple[Tensor, GroupStatistics]:
    """Advantages of N rollouts over their groups.

    rewards: float [N]. group_index: int64 [N], equal for the rollouts of one question in one step, whatever their
    languages. valid: bool [N]; the others enter no statistic, get advantage 0, and their rewards are never read.

    With n valid rollouts r_1..r_n in a group:
      std            (r_i - mean) / (std + eps); std over n - 1 as is usual in GRPO implementations
      mean           r_i - mean
      leave_one_out  r_i - mean of the other n - 1, which is n / (n - 1) (r_i - mean)
    Computed in float64; a group of one valid rollout, or whose rewards are all equal, gets exactly 0.

    Returns advantages [N] in the rewards' dtype, and the group statistics. Raises ValueError for an unknown scaling,
    shapes that differ, or a valid reward that is not finite.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling={scaling!r} is not known; accepted: {', '.join(SCALINGS)}.")
    if not rewards.shape == group_index.shape == valid.shape or rewards.dim() != 1:
        shapes = [tuple(t.shape) for t in (rewards, group_index, valid)]
        raise ValueError(f"rewards, group_index and valid must have one shape [N]; got {shapes}.")
    if not bool(torch.isfinite(rewards[valid]).all()):
        rows = torch.nonzero(valid & ~torch.isfinite(rewards)).flatten().tolist()
        raise ValueError(f"rewards of rows {rows} are not finite; mask them in `valid` or mend the reward.")

    index, group = torch.unique(group_index, return_inverse=True)
    reward = torch.where(valid, rewards, 0.0).double()
    zeros = reward.new_zeros(len(index))
    count = torch.zeros_like(index).index_add_(0, group, valid.long())
    mean = zeros.index_add(0, group, reward) / count.clamp(min=1)
    deviation = torch.where(valid, reward - mean[group], 0.0)
    std = (zeros.index_add(0, group, deviation**2) / (count - 1).clamp(min=1)).sqrt()
    # Not std == 0: rounding of the mean alone makes std nonzero, and dividing by eps would blow that up.
    highest = torch.full_like(zeros, -torch.inf).scatter_reduce(0, group[valid], reward[valid], "amax")
    lowest = torch.full_like(zeros, torch.inf).scatter_reduce(0, group[valid], reward[valid], "amin")
    undersized = count < 2
    zero_variance = ~undersized & (highest == lowest)
    std = torch.where(undersized | zero_variance, 0.0, std)

    if scaling == "std":
        scale = 1.0 / (std + eps)
    elif scaling == "leave_one_out":
        scale = count.double() / (count - 1).clamp(min=1)
    else:
        scale = torch.ones_like(std)
    learns = valid & ~(undersized | zero_variance)[group]
    advantages = torch.where(learns, deviation * scale[group], 0.0).to(rewards.dtype)
    return advantages, GroupStatistics(index, count, mean, std, zero_variance, undersized)
