"""Collectives over all ranks of the job. Tensors and bytes only: nothing is pickled across ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nemo_lrpo.types import RankFailure

_TOLD_RANKS = 8
_TOLD_BYTES = 2000
"""Of each rank's error, at most so many are told to the others."""


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
    """Raise on every rank if any rank brings an error, so that none waits for a peer that is gone.

    Where there is one, it is the own error; on the others RankFailure with the words of those who failed.
    """
    failed = sum_over_ranks(torch.tensor(int(error is not None)))
    if not failed:
        return
    own = b"" if error is None else _words(error).encode("utf-8", "replace")
    told = [words.decode("utf-8", "replace") for words in gather_bytes(own[:_TOLD_BYTES]) if words]
    if error is not None:
        raise error
    more = f"; and {len(told) - _TOLD_RANKS} more ranks" if len(told) > _TOLD_RANKS else ""
    raise RankFailure("; ".join(told[:_TOLD_RANKS]) + more)


def agree_alike(error: Exception | None) -> None:
    """As `agree`, but it is RankFailure on the ranks that bring an error too, with that as its cause."""
    try:
        agree(error)
    except RankFailure:
        raise
    except Exception as own:
        raise RankFailure(_words(own)) from own


def _words(error: BaseException) -> str:
    who = f"rank {dist.get_rank()}: " if dist.get_world_size() > 1 else ""
    return f"{who}{type(error).__name__}: {error}"
