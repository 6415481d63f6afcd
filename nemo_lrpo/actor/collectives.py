"""Collectives over all ranks of the job. Tensors only: nothing is pickled across ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist


class PeerError(RuntimeError):
    """Another rank failed and this one stops with it."""


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` (same shape everywhere) over all ranks; returned on the CPU."""
    result = tensor.to(torch.cuda.current_device())
    dist.all_reduce(result)
    return result.cpu()


def max_over_ranks(value: int) -> int:
    """Largest of the ranks' integers."""
    result = torch.tensor(value, dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return int(result.item())


def agree(error: BaseException | None) -> None:
    """Raise on every rank if any rank brings an error, so that none waits for a peer that is gone."""
    failed = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    failed[dist.get_rank()] = error is not None
    ranks = torch.nonzero(sum_over_ranks(failed)).flatten().tolist()
    if error is not None:
        raise error
    if ranks:
        raise PeerError(f"rank(s) {', '.join(map(str, ranks))} failed in this step; their logs name the error.")
