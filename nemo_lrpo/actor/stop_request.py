"""A stop in the middle of a generation, on which all ranks agree without waiting for each other's batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from nemo_aligner.utils import parallel_state as aligner_state

from nemo_lrpo.actor import collectives
from nemo_lrpo.types import StepAbandoned

_KEY = "lrpo/stop"


class StopRequest:
    """Asked by every rank before each of its batches, and settled by all ranks after the last.

    A signal may reach one rank only, and ranks of different data-parallel groups have different numbers of batches. So
    the rank that wants to stop leaves word in the process group's store, where the others look without waiting; only
    the ranks that generate a batch together agree on it by a collective, at a moment that they have in common anyway.
    """

    def __init__(self, wanted: Callable[[], bool] | None):
        """`wanted` is asked on this rank; None: nobody will stop, and nothing is exchanged."""
        self._wanted = wanted
        self._group = aligner_state.get_model_parallel_group()
        self._store = dist.distributed_c10d._get_default_store() if dist.get_world_size() > 1 else None
        self._stops = False

    def stops(self) -> bool:
        """Whether the ranks that share this batch leave it undone, and all further ones."""
        if self._wanted is None or self._stops:
            return self._stops
        word = self._wanted()
        if self._store is not None:
            if word:
                self._store.set(_KEY, "1")
            else:
                word = self._store.check([_KEY])
        flag = torch.tensor(int(word), device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        self._stops = bool(flag.item())
        return self._stops

    def settle(self) -> None:
        """All ranks: raise StepAbandoned on every rank if any has left batches undone."""
        if self._wanted is not None and collectives.max_over_ranks(int(self._stops)):
            raise StepAbandoned("told to stop between two batches of rollouts.")
