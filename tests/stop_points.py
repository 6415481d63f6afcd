"""Ends of a training process at exact points: functions for warm_start's `before`, which wrap what the process runs.

They exist in the tests alone; functools.partial gives them their arguments.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def on_call(owner: type, name: str, number: int, action: Callable[..., bool]) -> None:
    """Before the `number`-th call (from 1) of `owner.name` run `action` on its arguments; False leaves the call out."""
    original, calls = getattr(owner, name), iter(range(1, 1 << 30))

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number and not action(*arguments, **named):
            return None
        return original(*arguments, **named)

    setattr(owner, name, wrapped)


def send(number: int) -> Callable[..., bool]:
    """An action: this process gets a signal."""

    def action(*arguments: Any, **named: Any) -> bool:
        os.kill(os.getpid(), number)
        return True

    return action


def of_this_rank(rank: int | None) -> bool:
    return rank is None or int(os.environ.get("RANK", "0")) == rank


def in_generation(batch: int, number: int, rank: int | None = None) -> None:
    """Signal `number` as the `batch`-th batch of rollouts of this start begins, on one rank or on all."""
    from nemo_lrpo.actor.generation import MegatronEngine

    if of_this_rank(rank):
        on_call(MegatronEngine, "generate", batch, send(number))


def heard_by_the_other_rank(batch: int, last: int) -> None:
    """SIGTERM to rank 1 as its `batch`-th batch begins; rank 0, slow from there on, must not come to the `last`-th."""
    from nemo_lrpo.actor.generation import MegatronEngine

    def slow(*arguments: Any, **named: Any) -> bool:
        time.sleep(0.5)
        return True

    if of_this_rank(1):
        return on_call(MegatronEngine, "generate", batch, send(signal.SIGTERM))
    for number in range(batch, last):
        on_call(MegatronEngine, "generate", number, slow)
    on_call(MegatronEngine, "generate", last, lambda *arguments, **named: os._exit(3))


def after_the_optimizer(update: int) -> None:
    """SIGKILL when the optimizer has made its `update`-th step of this start and nobody has learned of it."""
    from nemo_lrpo.router.router import BanditRouter

    on_call(BanditRouter, "observe", update, send(signal.SIGKILL))


def before_the_save(save: int) -> None:
    """SIGKILL as the `save`-th save of this start begins."""
    from nemo_lrpo.training.checkpoint import CheckpointStore

    on_call(CheckpointStore, "save", save, send(signal.SIGKILL))


def in_the_line(kind: str, step: int) -> None:
    """SIGKILL in the middle of a line, and of a character where it has one of several bytes: a record of `kind`
    ("train", "validation", or "rollout") and `step`."""
    from nemo_lrpo.training.metrics import JsonLines

    original = JsonLines.write

    def write(self: Any, record: Any) -> None:
        if record.get("kind", "rollout") != kind or record["step"] != step:
            return original(self, record)
        file = Path(self._file.name)
        end = file.stat().st_size
        original(self, record)
        line = file.read_bytes()[end:]
        inside = [index for index, byte in enumerate(line) if byte >= 0xC0]
        os.truncate(file, end + (inside[len(inside) // 2] + 1 if inside else len(line) // 2))
        os.kill(os.getpid(), signal.SIGKILL)

    JsonLines.write = write


def twice(batch: int) -> None:
    """SIGUSR1 in a batch of rollouts, and SIGTERM in the save that follows."""
    from nemo_lrpo.actor.actor import MegatronActor
    from nemo_lrpo.actor.generation import MegatronEngine

    def usr1_then_term(*arguments: Any, **named: Any) -> bool:
        os.kill(os.getpid(), signal.SIGUSR1)
        on_call(MegatronActor, "save_shards", 1, send(signal.SIGTERM))
        return True

    on_call(MegatronEngine, "generate", batch, usr1_then_term)


def with_the_reward_server(submission: int) -> None:
    """SIGTERM to this process, and the reward server is gone too."""
    from nemo_lrpo.serving.client import RewardClient
    from nemo_lrpo.serving.errors import RewardServerUnavailable

    def gone(*arguments: Any, **named: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RewardServerUnavailable("no reward server answers.")

    on_call(RewardClient, "submit", submission, gone)


def while_the_model_loads() -> None:
    """SIGTERM before there is a policy."""
    from nemo_lrpo.actor.policy import LrpoActorModel

    on_call(LrpoActorModel, "__init__", 1, send(signal.SIGTERM))
