"""Model and optimizer shards by Megatron's distributed checkpoint, so that a rank that fails to write stops all ranks.

Megatron plans a save over all ranks, writes on each rank for itself, and gathers what was written. An error between two
of its collectives would leave the other ranks waiting in the next one; here the ranks agree before each. Writing is a
function of its own, which may run in a forked process: on a GPU from a copy in host memory, on CPU from the memory as
it was at the fork.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import StateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, DistributedAsyncCaller
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonSaveStrategy
from nemo.utils.callbacks.dist_ckpt_io import DistributedCheckpointIO

from nemo_lrpo.actor import collectives
from nemo_lrpo.config.checks import ConfigError

FORMAT = "torch_dist"


class ShardIO(_WrappingCheckpointIO):
    """Lightning's plugin that reads and writes checkpoints: reads as NeMo does, writes in two acts.

    `save_checkpoint` plans and keeps what is to be written; `write`, or `begin` and `end`, do it.
    """

    def __init__(self, model_config: Any):
        """Raises ConfigError for another format than torch_dist."""
        name = model_config.get("dist_ckpt_format", FORMAT)
        if name != FORMAT:
            raise ConfigError(f"model.dist_ckpt_format={name!r} is not supported; accepted: {FORMAT!r}.")
        super().__init__(DistributedCheckpointIO.from_config(model_config, async_save=True))
        register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _CommonWriter("torch", 1))
        self._request: AsyncRequest | None = None
        self._directory = Path()
        self._caller: DistributedAsyncCaller | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """All ranks: plan the save of `checkpoint` into `path`, which is there and empty. Called by NeMo's strategy."""
        self._directory = Path(path)
        with collectives.together():
            # Megatron would say so on the main rank alone.
            if torch.distributed.get_rank() == 0 and any(self._directory.iterdir()):
                raise OSError(f"{self._directory} is not empty")
        strategy = self.checkpoint_io.save_sharded_strategy
        # A wrapper that spreads the work over data-parallel ranks has the writing strategy inside.
        getattr(strategy, "base_strategy", strategy)._get_save_and_finalize_callbacks = _agreed_callbacks
        self._request = self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    def write(self) -> None:
        """All ranks: write what was planned, to the end. An error of one rank is raised on all."""
        request = self._request
        assert request is not None, "nothing was planned"
        with collectives.together():
            if request.async_fn is not None:
                request.async_fn(*request.async_fn_args)
        self._finalize()

    def begin(self) -> None:
        """All ranks: write what was planned in a forked process."""
        assert self._request is not None, "nothing was planned"
        self._caller = DistributedAsyncCaller()
        with collectives.together():
            self._caller.schedule_async_call(self._request.async_fn, self._request.async_fn_args)

    def end(self, wait: bool) -> bool:
        """All ranks: whether what was begun is written everywhere; `wait` until it is. An error is raised on all."""
        assert self._caller is not None, "nothing was begun"
        if not self._caller.is_current_async_call_done(blocking=wait):
            return False
        self._caller = None
        self._finalize()
        return True

    def _finalize(self) -> None:
        request, self._request = self._request, None
        assert request is not None
        # Ours. Those that Megatron and NeMo add write one more file, past which the ranks would wait for the main one.
        request.finalize_fns[0]()
        strategy = self.checkpoint_io.save_sharded_strategy
        with collectives.together():
            if torch.distributed.get_rank() == 0:
                save_config(CheckpointingConfig(strategy.backend, strategy.version), str(self._directory))


def _agreed_callbacks(writer: Any, planned: Any) -> AsyncRequest:
    """In place of the strategy's own: gathers and writes the metadata with an agreement before each collective."""
    _, metadata, group = planned
    names = [bucket[1] for bucket in writer.write_buckets or ()]

    def finalize() -> None:
        with collectives.together():
            try:
                written = writer.retrieve_write_results()
            except RuntimeError as error:
                # Torch's archive writer says what it met, not why; a full disk is the usual reason.
                raise OSError(f"{writer.path}: a shard was not written: {error.__cause__ or error}") from error
        everyone = group.gather_object(written)
        with collectives.together():
            if group.is_coordinator:
                writer.finish(metadata, everyone)
        _check_listed(Path(writer.path), names)

    return AsyncRequest(*writer.get_save_function_and_args(), [finalize])


def _check_listed(directory: Path, own: list[str]) -> None:
    """All ranks: the main rank sees every file that any rank says it wrote."""
    blocks = collectives.gather_bytes(json.dumps(own).encode())
    with collectives.together():
        if torch.distributed.get_rank() == 0:
            listed = [name for block in blocks for name in json.loads(block)]
            missing = [name for name in listed if not (directory / name).is_file()]
            if missing:
                raise OSError(f"{directory}: {', '.join(missing)} vanished after being written")


class _CommonWriter(TorchCommonSaveStrategy):
    """Writes what is not sharded on the main rank; its error is that of all ranks."""

    def save_common(self, common_state_dict: StateDict, checkpoint_dir: Path) -> None:
        with collectives.together():
            if torch.distributed.get_rank() == 0:
                buffer = io.BytesIO()
                torch.save(common_state_dict, buffer)
                # Not by torch: a full disk would be a RuntimeError of its archive writer.
                with (Path(checkpoint_dir) / COMMON_STATE_FNAME).open("wb") as file:
                    file.write(buffer.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
