"""Megatron-Core's distributed checkpoint writer against a later torch."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

import torch.multiprocessing
from torch.distributed.checkpoint import filesystem

from nemo_lrpo.cpu.replacement import Replacement

_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
_TAKES_FORMAT = "serialization_format" in inspect.signature(filesystem._write_item).parameters


def _make_write_item(original: Callable[..., Any]) -> Callable[..., Any]:
    """The four arguments that Megatron-Core passes, for a torch that wants stream transforms and a format too."""
    transforms = filesystem._StorageWriterTransforms()

    @functools.wraps(original)
    def write_item(stream: Any, data: Any, item: Any, storage_key: str) -> Any:
        return original(transforms, stream, data, item, storage_key, filesystem.SerializationFormat.TORCH_SAVE)

    return write_item


def _end_with_parent() -> None:
    """In a forked process: end when the parent is killed, which can then neither shut it down nor answer it."""
    parent = torch.multiprocessing.parent_process()

    def watch() -> None:
        while parent is not None and os.getppid() == parent.pid:
            time.sleep(1.0)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _make_write_data(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def write_data(*arguments: Any) -> None:
        _end_with_parent()
        original(*arguments)

    return staticmethod(write_data)


def _make_results_queue(original: Callable[[], Any]) -> Callable[[], Any]:
    @functools.cache
    def results_queue() -> Any:
        """One queue per process, in a forked manager.

        Megatron-Core spawns the manager because CUDA does not survive a fork. Spawning imports the whole stack once
        more, which takes several seconds on every rank at its first save.
        """
        manager = SyncManager(ctx=torch.multiprocessing.get_context("fork"))
        manager.start(_end_with_parent)
        return manager.Queue()

    return results_queue


_WRITE_ITEM = Replacement(f"{_WRITER}._write_item", "torch 2.8 added arguments to a private function", _make_write_item)

REPLACEMENTS: tuple[Replacement, ...] = (_WRITE_ITEM,) if _TAKES_FORMAT else ()

CPU_REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement(f"{_WRITER}._get_write_results_queue", "without CUDA a fork is safe and quick", _make_results_queue),
    Replacement(
        f"{_WRITER}.FileSystemWriterAsync.write_preloaded_data",
        "a writing process waits for ever for a rank that was killed",
        _make_write_data,
    ),
)
