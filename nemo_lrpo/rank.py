"""One rank of a training that srun starts: meet the other ranks, then run an entry point.

    srun --ntasks-per-node=8 python -m nemo_lrpo.rank --meet DIR --first-port 15000 nemo_lrpo.train key=value ...

The first rank opens the store on the first port that it can bind, keeps it open and publishes it in DIR, which all
nodes share; so no other process can take the port between its choice and its use.

A run that stops early to be continued ends with EXIT_REQUEUE on every rank, at slightly different moments; srun
would take the first one for a failure and kill the others. So ranks that end like this leave the file `stopped.<start>`
in DIR and exit with 0. Every other exit code is passed on, and srun ends the step at once.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PORT_TRIES = 64
"""Ports tried one after the other."""
MEETING_TIMEOUT_S = 600.0
"""Nodes may take minutes to unpack a container."""
EXIT_REQUEUE = 75
"""As nemo_lrpo.training.stopping says; nothing has begun yet."""


class MeetingError(RuntimeError):
    """The ranks could not find each other."""


def rank_environment(slurm: Mapping[str, str], host: str, port: int) -> dict[str, str]:
    """What torchrun would tell this rank, from what srun tells it. Raises MeetingError outside of srun."""
    try:
        job = f"{slurm['SLURM_JOB_ID']}.{slurm['SLURM_STEP_ID']}"
        ranks, nodes = int(slurm["SLURM_STEP_NUM_TASKS"]), int(slurm["SLURM_STEP_NUM_NODES"])
        rank, local, node = slurm["SLURM_PROCID"], slurm["SLURM_LOCALID"], slurm["SLURM_NODEID"]
    except KeyError as error:
        raise MeetingError(f"{error.args[0]} is not set; start this module with srun.") from None
    if ranks % nodes:
        raise MeetingError(f"{ranks} ranks on {nodes} nodes; give every node as many (--ntasks-per-node).")
    return {
        "RANK": rank,
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": str(ranks // nodes),
        "GROUP_RANK": node,
        "GROUP_WORLD_SIZE": str(nodes),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        # The store is there already: every rank, the first too, is one of its clients.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": job,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }


def open_store(first_port: int, tries: int = PORT_TRIES) -> TCPStore:
    """A store on the first port from `first_port` on that can be bound. Raises MeetingError where none can."""
    from torch.distributed import DistNetworkError, TCPStore

    for port in range(first_port, first_port + tries):
        try:
            return TCPStore("localhost", port, None, True, timedelta(seconds=MEETING_TIMEOUT_S), wait_for_workers=False)
        except DistNetworkError as error:
            refused = error
    last = first_port + tries - 1
    raise MeetingError(f"no port from {first_port} to {last} can be bound ({refused}); set LRPO_PORT_BASE.")


def publish(path: Path, host: str, port: int) -> None:
    """Write where the store is; readers see all of it or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"host": host, "port": port}), encoding="utf-8")
    partial.replace(path)


def await_published(path: Path, timeout_s: float = MEETING_TIMEOUT_S) -> tuple[str, int]:
    """Host and port of the store, once the first rank has published them. Raises MeetingError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return str(found["host"]), int(found["port"])
        except (OSError, ValueError):
            # Shared file systems keep a directory's listing for a while.
            time.sleep(0.2)
    raise MeetingError(
        f"{path} did not appear within {timeout_s:.0f} s. The first rank has not started, or its node does not share "
        "the run's directory."
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m nemo_lrpo.rank", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--meet", type=Path, required=True, metavar="DIR", help="directory that all nodes share")
    parser.add_argument("--first-port", type=int, default=15000, help="the first port to try")
    parser.add_argument("module", help="entry point, for example nemo_lrpo.train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args()
    try:
        _run(options)
    except SystemExit as end:
        if end.code != EXIT_REQUEUE:
            raise
        (options.meet / f"stopped.{_start()}").touch()


def _run(options: argparse.Namespace) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        # Until the entry point listens itself. Ended like this, the job is started again.
        signal.signal(number, _end)
    try:
        environment = rank_environment(os.environ, "", 0)
        path = options.meet / f"meet.{environment['TORCHELASTIC_RUN_ID']}.{_start()}.json"
        if environment["RANK"] == "0":
            # Open for as long as this name refers to it: to the end.
            store = open_store(options.first_port)
            publish(path, socket.gethostname(), store.port)
        host, port = await_published(path)
    except MeetingError as error:
        sys.exit(f"MeetingError: {error}")
    os.environ.update(rank_environment(os.environ, host, port))
    sys.argv = [options.module, *options.arguments]
    runpy.run_module(options.module, run_name="__main__", alter_sys=True)


def _start() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def _end(signum: int, frame: FrameType | None) -> None:
    sys.exit(EXIT_REQUEUE)


if __name__ == "__main__":
    main()
