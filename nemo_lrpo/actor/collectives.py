"""Collectives over all ranks of the job. Tensors and bytes only: nothing is pickled across ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


def gather_bytes(data: bytes) -> list[bytes]:
    """Every rank's `data`, by rank. Lengths may differ."""
    device = torch.cuda.current_device()
    width = max_over_ranks(len(data))
    own = torch.zeros(8 + width, dtype=torch.uint8)
    own[: 8 + len(data)] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little") + data), dtype=torch.uint8)
    rows = [torch.empty_like(own, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own.to(device))
    blocks = [row.cpu().numpy().tobytes() for row in rows]
    return [block[8 : 8 + int.from_bytes(block[:8], "little")] for block in blocks]


def agree(error: BaseException | None) -> None:
    """Raise on every rank if any rank brings an error, so that none waits for a peer that is gone."""
    failed = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    failed[dist.get_rank()] = error is not None
    ranks = torch.nonzero(sum_over_ranks(failed)).flatten().tolist()
    if error is not None:
        raise error
    if ranks:
        raise PeerError(f"rank(s) {', '.join(map(str, ranks))} failed in this step; their logs name the error.")


@contextmanager
def together() -> Iterator[None]:
    """What fails in this block on one rank fails on all; all ranks pass through it."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree(error)


def refuse_different(what: str, value: str) -> None:
    """Raise PeerError on every rank unless all of them bring the same `value`."""
    values = [block.decode() for block in gather_bytes(value.encode())]
    if len(set(values)) > 1:
        seen = ", ".join(f"rank {rank}: {one or 'none'}" for rank, one in enumerate(values[:8]))
        raise PeerError(f"{what}: the ranks differ ({seen}); is run_dir the same file system on all nodes?")
