"""A process that is killed while it saves or loads: the next start finds a whole checkpoint, at most one save older.

Each of the children forked here goes on from the newest checkpoint, as a run does, and is killed with SIGKILL: before
the n-th time that it opens, makes, renames or removes something, in the middle of what it writes, or after a time.
"""

from __future__ import annotations

import builtins
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_lrpo.config.training import CheckpointConfig
from nemo_lrpo.training.checkpoint import CheckpointStore, load
from nemo_lrpo.training.checkpoint_files import complete_checkpoints

KILLS = 200
CALLS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"})
CONFIG = CheckpointConfig(keep_best=1)
SHARDS = 3


class OneRank:
    """Writes a few shards that follow from the step."""

    is_main = True

    def __init__(self, step: int):
        self._step = step

    def save_shards(self, directory: Path) -> None:
        for index in range(SHARDS):
            with (directory / f"__0_{index}.distcp").open("wb") as file:
                file.write(shard(self._step, index))

    def agree(self, error: BaseException | None) -> None:
        if error is not None:
            raise error


def shard(step: int, index: int) -> bytes:
    return random.Random(f"{step} {index}").randbytes(200 + 7 * step % 90)


def state(step: int) -> dict[str, Any]:
    """With an array that goes beside the JSON, most of it filled."""
    values = np.zeros(3000)
    values[: step + 5] = np.random.default_rng(step).random(step + 5)
    router = {"values": values, "step": step}
    return {"step": step, "updates": step, "seed": 1, "data": {}, "router": router, "languages": ["de"], "layout": {}}


def assert_whole(found: Any, path: Path) -> None:
    """State and shards are those of the checkpoint's step, to the bit."""
    step = found["step"]
    expected = state(step)
    assert found["router"].pop("values").tobytes() == expected["router"].pop("values").tobytes()
    assert found == expected
    for index in range(SHARDS):
        assert (path / "shards" / f"__0_{index}.distcp").read_bytes() == shard(step, index)


def go_on(directory: Path, report: Callable[[int], None], steps: int) -> None:
    """Load, and save the next steps, the last of them twice."""
    store = CheckpointStore(directory, 2, CONFIG)
    newest = store.latest()
    first = 1 + (0 if newest is None else newest.state["step"])
    for step in [*range(first, first + steps), first + steps - 1]:
        metrics = {"reward": random.Random(step).random()}
        store.save(OneRank(step), state(step), metrics)
        report(step)


def kill_at_call(number: int) -> None:
    """End this process before its `number`-th call of the file system."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in CALLS:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_in_write(number: int) -> None:
    """End this process when it opens its `number`-th file for writing, after half of what goes into it."""
    seen, plain = 0, builtins.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        nonlocal seen
        handle = plain(file, mode, *arguments, **options)
        if "w" in mode:
            seen += 1
            if seen == number:
                return Torn(handle)
        return handle

    class Torn:
        def __init__(self, handle: Any):
            self._handle = handle

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *error: object) -> None:
            self._handle.close()

        def write(self, content: Any) -> None:
            self._handle.write(content[: len(content) // 2])
            self._handle.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    import io

    io.open = opened
    builtins.open = opened


def run_and_kill(work: Callable[[Callable[[int], None]], None], arm: Callable[[], None], after: float | None) -> int:
    """Fork, `arm`, `work`; kill after so many seconds. Returns the last step that was reported saved, 0 for none."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            arm()
            work(lambda step: os.write(writing, step.to_bytes(4, "little")) and None)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the child failed before it was killed"
    return int.from_bytes(said[-4:], "little")


def kills(seed: int) -> Mapping[str, Any]:
    """How the `seed`-th child ends. One that nobody kills makes about 240 calls and writes about 18 files."""
    dice = random.Random(seed)
    if seed % 2 == 0:
        # Spread evenly, so that no part of a save is left out by chance.
        number = int(1.25 * (seed % KILLS)) + dice.randrange(1, 3)
        return {"arm": lambda: kill_at_call(number), "after": None}
    if seed % 4 == 1:
        number = dice.randrange(1, 19)
        return {"arm": lambda: kill_in_write(number), "after": None}
    return {"arm": lambda: None, "after": dice.uniform(0.0, 0.08)}


def test_killed_at_200_points_of_saving_and_loading(tmp_path: Path) -> None:
    killed = 0
    saved = 0
    for seed in range(3 * KILLS):
        reported = run_and_kill(lambda report: go_on(tmp_path, report, steps=2), **kills(seed))
        newest = CheckpointStore(tmp_path, 2, CONFIG).latest()
        known = max(reported, saved)
        assert newest is not None or known == 0, f"kill {seed}: nothing left of step {known}"
        step = 0 if newest is None else newest.state["step"]
        assert known <= step <= known + 1, f"kill {seed}: found step {step}, step {known} was saved"
        if newest is not None:
            assert_whole(newest.state, newest.path)
        # One that came to its end was quicker than its kill: it does not count.
        killed += reported != saved + 2
        saved = step
        for path in complete_checkpoints(tmp_path):
            load(path)
        if killed == KILLS:
            break
    assert killed == KILLS and saved > 20, "children must be killed, and some of them get far"
    # What the kills left behind goes with the next save: two of the newest and the best stay.
    go_on(tmp_path, lambda step: None, steps=1)
    assert 2 <= len(list(tmp_path.iterdir())) <= 3


@pytest.mark.parametrize("name", ["step_00000001.partial", "step_00000009"])
def test_what_was_never_completed_is_passed_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    go_on(tmp_path, lambda step: None, steps=1)
    (tmp_path / name / "shards").mkdir(parents=True)
    newest = CheckpointStore(tmp_path, 2).latest()
    assert newest is not None and newest.state["step"] == 1
    assert f"{name}: was never completed; passed over" in caplog.text
