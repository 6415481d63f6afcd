"""Training runs of one or several ranks with faults put into them, started as srun starts them: each rank a process of
its own, and nobody ends a rank because another has ended.

    python faults_worker.py RUNS.json RESULTS.json

RUNS.json: a list of {name, ranks, and either overrides of conf/demo.yaml, perhaps with a fault and a reward server, or
replay, the arguments of tools/replay.py, perhaps of a copy spoilt before}. The stack is imported once and every rank
forked from there. RESULTS.json: by name, for each rank its exit code, seconds and output.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_lrpo.actor.platform import ensure_platform

ensure_platform()

from safetensors.torch import load_file, save_file  # noqa: E402

from nemo_lrpo import train  # noqa: E402
from nemo_lrpo.actor import actor as actor_module  # noqa: E402
from nemo_lrpo.actor.generation import MegatronEngine  # noqa: E402
from nemo_lrpo.config.loader import compose, load_train_config  # noqa: E402
from nemo_lrpo.data.errors import DataError  # noqa: E402
from nemo_lrpo.data.prompts import PromptRenderer  # noqa: E402
from nemo_lrpo.serving import client  # noqa: E402
from nemo_lrpo.training import trainer  # noqa: E402, F401
from nemo_lrpo.types import Score, ScoreRequest  # noqa: E402

LIMIT_S = 240


class HashRewards:
    """A reward service in the process: rewards are hashes of the answers."""

    def __init__(self, config: object) -> None:
        pass

    def check_server(self, languages: Sequence[str], thinking: Sequence[str] = ()) -> None:
        pass

    def identity(self) -> dict[str, object]:
        return {}

    def submit(self, requests: Sequence[ScoreRequest]) -> HashRewards:
        values = {r.sample_id: hashlib.sha256(r.response.encode()).digest()[0] / 255 for r in requests}
        self.__dict__.setdefault("scores", {}).update(
            {key: Score(key, value, value, 1.0, "de", 0.9) for key, value in values.items()}
        )
        return self

    def result(self) -> dict[str, Score]:
        return self.scores

    def cancel(self) -> None:
        pass

    def counters(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def hang() -> None:
    while True:
        time.sleep(1)


def fail() -> None:
    raise RuntimeError("the injected fault")


def refuse() -> None:
    raise DataError("question 'de1' in 'de': the injected fault.")


FAULTS: dict[str, Callable[[], None]] = {
    "raise": fail,
    "refuse": refuse,
    "hang": hang,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
PLACES = {
    "generate": (MegatronEngine, "generate"),
    "update": (actor_module.MegatronActor, "accumulate"),
    "render": (PromptRenderer, "render_all"),
}


def inject(place: str, kind: str, call: int, times: int = 1) -> None:
    """The `call`-th call of `place` in this process, counted from 1, meets the fault, and those that follow it."""
    owner, name = PLACES[place]
    whole, calls = getattr(owner, name), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if call <= calls < call + times:
            FAULTS[kind]()
        return whole(*args, **kwargs)

    def not_finite(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        metrics = whole(*args, **kwargs)
        return {**metrics, "loss": math.nan} if calls == call else metrics

    def other_policy(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        generated = whole(*args, **kwargs)
        if calls == call:
            generated.logprobs = generated.logprobs - 0.3
        return generated

    setattr(owner, name, {"not finite": not_finite, "other policy": other_policy}.get(kind, faulty))


def one_rank(rank: int, port: int, run: dict[str, Any], log: Path) -> None:
    """The process of one rank; does not return."""
    code = 0
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    ranks = run["ranks"]
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="faults")
    try:
        if run.get("replay"):
            from tools import replay

            code = replay.main(run["replay"]) or 0
        else:
            if not run.get("server"):
                client.RewardClient = HashRewards
            fault = run.get("fault")
            if fault and fault.pop("rank") == rank:
                inject(**fault)
            with train.exit_readably():
                tree = compose("demo", run["overrides"])
                train.run(load_train_config(tree), tree, train.set_up)
    except SystemExit as stop:
        if not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr, flush=True)
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def spoil(source: str, copy: str) -> None:
    """Copy a dump, elsewhere than its run's checkpoints, with the last advantage in use made infinite."""
    shutil.copytree(source, copy)
    file = Path(copy) / "tensors.safetensors"
    tensors = load_file(file)
    tensors["advantages"][int(tensors["use"].nonzero()[-1])] = float("inf")
    save_file(tensors, file)


def start(run: dict[str, Any], directory: Path) -> list[dict[str, Any]]:
    """All ranks of one run, to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, processes = time.monotonic(), {}
    for rank in range(run["ranks"]):
        log = directory / f"{run['name']}.rank{rank}.log"
        child = os.fork()
        if not child:
            one_rank(rank, port, run, log)
        processes[child] = (rank, log)
    results: list[dict[str, Any]] = [{} for _ in processes]
    deadline = started + LIMIT_S
    while processes:
        child, status, used = os.wait4(-1, os.WNOHANG)
        if not child:
            time.sleep(0.02)
            if time.monotonic() > deadline:
                for each in processes:
                    os.kill(each, signal.SIGKILL)
            continue
        if child not in processes:
            continue
        rank, log = processes.pop(child)
        results[rank] = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - started,
            "ended": time.monotonic(),
            "cpu": used.ru_utime + used.ru_stime,
            "output": log.read_text(errors="replace"),
        }
    return results


def main() -> None:
    runs, results = (Path(name) for name in sys.argv[1:])
    found = {}
    for run in json.loads(runs.read_text()):
        if run.get("spoilt"):
            spoil(*run["spoilt"])
        found[run["name"]] = start(run, results.parent)
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
