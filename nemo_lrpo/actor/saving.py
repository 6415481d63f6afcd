"""A policy on its ranks as whoever saves it sees it: agreement between the ranks, shards, and the .nemo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from nemo_lrpo.actor import collectives
from nemo_lrpo.actor.setup import Policy, export_nemo, plan_shards


class SavedPolicy:
    """What nemo_lrpo.training.protocols.Actor has for checkpoints and exports; all methods are collective."""

    def __init__(self, policy: Policy, on_progress: Callable[[str], None] = lambda _: None):
        """on_progress: called, with a name for what comes next, wherever this rank has got on."""
        self._policy = policy
        self._on_progress = on_progress

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, error: BaseException | None) -> None:
        self._on_progress("agreeing with the other ranks")
        collectives.agree(error)

    def max_over_ranks(self, value: int) -> int:
        return collectives.max_over_ranks(value)

    def save_shards(self, directory: Path) -> None:
        self._on_progress("writing a checkpoint")
        plan_shards(self._policy, directory)
        self._policy.shards.write()

    def begin_shards(self, directory: Path) -> None:
        self._on_progress("beginning a checkpoint")
        plan_shards(self._policy, directory)
        self._policy.shards.begin()

    def end_shards(self, wait: bool) -> bool:
        if wait:
            self._on_progress("ending a checkpoint")
        return self._policy.shards.end(wait)

    def export(self, path: Path, artifacts: Mapping[str, str]) -> None:
        self._on_progress("exporting the model")
        export_nemo(self._policy, path, artifacts, self.is_main)

    def barrier(self) -> None:
        self._on_progress("waiting for the other ranks")
        dist.barrier()
