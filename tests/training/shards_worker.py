"""The real writer of shards under a store, on one or two ranks: kills and faults. Writes what it saw as JSON.

The stack is imported once; every run is a fork of this process, with a process group of its own.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_lrpo.actor.platform import ensure_platform

ensure_platform()

import psutil  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

from nemo_lrpo.actor import collectives, shards  # noqa: E402
from nemo_lrpo.actor.shards import ShardIO  # noqa: E402
from nemo_lrpo.config.training import CheckpointConfig  # noqa: E402
from nemo_lrpo.training.checkpoint import CheckpointStore, load  # noqa: E402

KILLS = 24
WIDTH = 2048
LIMIT = 4096
"""Bytes that a file may have on a rank whose disk is full."""


class Rank:
    """The part of the actor that a store uses, around a tensor [ranks, WIDTH] that holds the step."""

    def __init__(self, rank: int, ranks: int):
        self.is_main = rank == 0
        self._rank, self._ranks = rank, ranks
        self._io = ShardIO({})
        self.values = torch.zeros(WIDTH)

    def tree(self) -> dict[str, Any]:
        """What is saved, and the form of what is loaded."""
        rows = ShardedTensor.from_rank_offsets("values", self.values[None], (0, self._rank, self._ranks))
        return {"values": rows, "common": list(range(500))}

    def save_shards(self, directory: Path) -> None:
        self._io.save_checkpoint(self.tree(), directory)
        self._io.write()

    def begin_shards(self, directory: Path) -> None:
        self._io.save_checkpoint(self.tree(), directory)
        self._io.begin()

    def end_shards(self, wait: bool) -> bool:
        return self._io.end(wait)

    def agree(self, error: BaseException | None) -> None:
        collectives.agree(error)


def state(step: int) -> dict[str, Any]:
    parts = dict.fromkeys(("updates", "seed", "data", "router", "languages", "layout"), step)
    return {"step": step, **parts}


def fork(work: Callable[[Rank], Any], directory: Path, ranks: int = 1) -> list[tuple[int, Path]]:
    """Start `work` on so many ranks; returns process ids and the files that their results go to."""
    store_file = directory / f"group_{time.monotonic_ns()}"
    children = []
    for rank in range(ranks):
        result = store_file.with_suffix(f".{rank}")
        child = os.fork()
        if not child:
            try:
                group = dist.FileStore(str(store_file), ranks)
                dist.init_process_group("gloo", store=group, rank=rank, world_size=ranks)
                result.write_text(json.dumps(work(Rank(rank, ranks))))
            except BaseException:
                traceback.print_exc()
            # Nothing of the parent's is torn down.
            os._exit(0)
        children.append((child, result))
    return children


def join(children: list[tuple[int, Path]], seconds: float = 60.0) -> list[Any]:
    """Results by rank; a rank that does not end in time is killed, and its result is "hung"."""
    deadline = time.monotonic() + seconds
    results = []
    for child, result in children:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        results.append(json.loads(result.read_text()) if result.exists() else "hung or failed")
    return results


def go_on(actor: Rank, directory: Path, steps: int) -> list[float]:
    """Load the newest, save the next ones; returns the seconds that each took."""
    store = CheckpointStore(directory, 2)
    newest = store.latest()
    first = 1
    if newest is not None:
        first += newest.state["step"]
        loaded = dist_checkpointing.load(actor.tree(), str(newest.shards))
        assert bool((loaded["values"] == newest.state["step"]).all()), "shards are of another step than the state"
    seconds = []
    for step in range(first, first + steps):
        actor.values.fill_(step)
        store.save(actor, state(step))
        seconds.append(store.last_save_seconds or 0.0)
    return seconds


def kills(directory: Path) -> dict[str, Any]:
    """Kill one rank at random moments of saving; what was newest before and after each."""
    runs = directory / "killed"
    (seconds,) = join(fork(lambda actor: go_on(actor, runs, 2), directory))
    steps = [2]
    dice = random.Random(0)
    for _ in range(KILLS):
        ((child, _),) = fork(lambda actor: go_on(actor, runs, 3), directory)
        time.sleep(dice.uniform(0.0, 4.0 * min(seconds)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        newest = CheckpointStore(runs, 2).latest()
        steps.append(0 if newest is None else newest.state["step"])
    (last,) = join(fork(lambda actor: go_on(actor, runs, 1), directory))
    return {"steps": steps, "seconds": seconds, "went_on": isinstance(last, list), "left": len(list(runs.iterdir()))}


def fault(actor: Rank, directory: Path, full: str, background: bool) -> dict[str, Any]:
    """Save, save with a fault on one rank, save again."""
    store = CheckpointStore(directory, 2, CheckpointConfig(async_save=background))
    actor.values.fill_(1.0)
    store.save(actor, state(1))
    seen: dict[str, Any] = {}
    plain = resource.getrlimit(resource.RLIMIT_FSIZE)
    rank = dist.get_rank()
    if full == f"rank {rank}":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, plain[1]))
    save_config = shards.save_config
    if full == "metadata" and rank == 0:
        shards.save_config = _no_space
    started = time.monotonic()
    try:
        store.save(actor, state(2), wait=not background)
        store.finish(actor)
        seen["error"] = None
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    seen["seconds"] = time.monotonic() - started
    resource.setrlimit(resource.RLIMIT_FSIZE, plain)
    shards.save_config = save_config
    dist.barrier()
    newest = store.latest()
    seen["newest"] = None if newest is None else newest.state["step"]
    actor.values.fill_(2.0)
    store.save(actor, state(2))
    newest = store.latest()
    seen["after"] = None if newest is None else newest.state["step"]
    return seen


def _no_space(*arguments: Any) -> None:
    """In place of what writes the last file of the shards, when all ranks have written."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metadata.json")


def background(actor: Rank, directory: Path) -> dict[str, Any]:
    """What is saved in the background is the moment of the save, whatever training does meanwhile."""
    store = CheckpointStore(directory, 2, CheckpointConfig(async_save=True))
    actor.values.fill_(5.0)
    store.save(actor, state(5), wait=False)
    actor.values.fill_(6.0)
    polls = 0
    while not store.finish(actor, wait=False):
        polls += 1
        time.sleep(0.005)
    newest = store.latest()
    assert newest is not None
    loaded = dist_checkpointing.load(actor.tree(), str(newest.shards))
    return {"step": newest.state["step"], "values": sorted(set(loaded["values"].flatten().tolist())), "polls": polls}


def main() -> None:
    directory = Path(sys.argv[1])
    os.chdir(directory)
    results: dict[str, Any] = {"kills": kills(directory)}
    for full, behind in (("rank 0", False), ("rank 1", False), ("rank 1", True), ("metadata", False)):
        place = directory / f"{full} {behind}"
        work = functools.partial(fault, directory=place, full=full, background=behind)
        results[f"{full} {behind}"] = join(fork(work, directory, 2))
    results["background"] = join(fork(lambda actor: background(actor, directory / "background"), directory, 2))
    killed = directory / "killed"
    results["files"] = sorted(load(next(iter(killed.glob("step_*")))).manifest.files)
    deadline = time.monotonic() + 10
    while (left := of_this_script()) and time.monotonic() < deadline:
        time.sleep(0.2)
    results["processes"] = [process.pid for process in left]
    (directory / "result.json").write_text(json.dumps(results))


def of_this_script() -> list[psutil.Process]:
    """Other processes of this run, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.cmdline() == psutil.Process().cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    main()
