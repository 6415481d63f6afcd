"""The project's entry points as processes: reward servers that stay, trainings and evaluations that come and go."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 300.0


class ProcessFailed(RuntimeError):
    """A process ended with another exit code than 0; the message holds the end of its log."""


def environment() -> dict[str, str]:
    """Of every process: one thread each, since the products are small and several processes share the cores."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
    }


class EntryPoints:
    """Starts entry points in forks of one process that has imported the stack: the imports take as long as three
    training steps. With a GPU each is a process of its own, since CUDA does not survive a fork."""

    def __init__(self) -> None:
        self._warm = not Path("/dev/nvidiactl").exists()
        self._context = multiprocessing.get_context("forkserver")
        self._running: set[multiprocessing.process.BaseProcess] = set()
        self._stopped = False
        self._lock = threading.Lock()
        if self._warm:
            self._context.set_forkserver_preload(["tools.miniature.preload"])
            with mock.patch.dict(os.environ, environment()):
                multiprocessing.forkserver.ensure_running()

    def __call__(self, module: str, arguments: Sequence[str], log: Path) -> float:
        """Run `python -m module arguments` to its end, with `log` appended to; returns its processor seconds, those of
        earlier starts with that log included. Raises ProcessFailed."""
        log.parent.mkdir(parents=True, exist_ok=True)
        usage = log.with_suffix(".seconds")
        process = self._context.Process(
            target=_run_here if self._warm else _run_apart, args=(module, list(arguments), str(log), str(usage))
        )
        with self._lock:
            if self._stopped:
                raise ProcessFailed(f"{module} was not started: told to stop.")
            process.start()
            self._running.add(process)
        try:
            process.join()
        finally:
            with self._lock:
                self._running.discard(process)
        if process.exitcode:
            raise ProcessFailed(f"{module} ended with exit code {process.exitcode}; {log} ends:\n{tail(log)}")
        return sum(map(float, usage.read_text().split()))

    def stop(self) -> None:
        """Tell what runs to end, and start nothing more; a training saves first."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                if process.is_alive():
                    process.terminate()


def _run_here(module: str, arguments: list[str], log: str, usage: str) -> None:
    """Body of a child: the entry point as the command line starts it."""
    os.chdir(ROOT)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [module, *arguments]
    try:
        importlib.import_module(module).main()
    finally:
        _write_usage(usage, resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def _run_apart(module: str, arguments: list[str], log: str, usage: str) -> None:
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment(), stdout=file, stderr=file
        )
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        code = process.wait()
    _write_usage(usage, resource.RUSAGE_CHILDREN)
    sys.exit(code)


def _write_usage(path: str, *whose: int) -> None:
    found = [resource.getrusage(one) for one in whose]
    with open(path, "a") as file:
        file.write(f"{sum(one.ru_utime + one.ru_stime for one in found):.2f}\n")


class RewardServers:
    """One reward server for each setting, started when it is first asked for; a context manager that ends them."""

    def __init__(self, settings: Sequence[str], directory: Path, config: str = "demo_rewards") -> None:
        """`settings`: overrides of `config`, a file of conf, that all have."""
        self._config = config
        self._settings = settings
        self._directory = directory
        self._servers: dict[tuple[str, ...], tuple[subprocess.Popen[bytes], Path]] = {}
        self._lock = threading.Lock()

    def endpoint(self, overrides: tuple[str, ...]) -> Path:
        """The endpoint file of a server with `overrides`, when it is ready. Raises ProcessFailed."""
        with self._lock:
            if overrides not in self._servers:
                self._servers[overrides] = self._start(overrides)
            process, path = self._servers[overrides]
        deadline = time.monotonic() + START_TIMEOUT_S
        log = path.with_suffix(".log")
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ProcessFailed(f"no reward server with {' '.join(overrides) or 'its defaults'}:\n{tail(log)}")
            time.sleep(0.2)
        if process.poll() is not None:
            raise ProcessFailed(f"the reward server ended; {log} ends:\n{tail(log)}")
        return path

    def _start(self, overrides: tuple[str, ...]) -> tuple[subprocess.Popen[bytes], Path]:
        name = "_".join(one.replace(".", "-").replace("=", "-") for one in overrides) or "default"
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{name}.json"
        path.unlink(missing_ok=True)
        own = [*self._settings, f"endpoint_file={path}", f"triton_log={path.with_suffix('.triton.log')}", *overrides]
        with path.with_suffix(".log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "nemo_lrpo.serve_rewards", "--config-name", self._config, *own],
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=log,
            )
        return process, path

    def __enter__(self) -> RewardServers:
        return self

    def __exit__(self, *_: object) -> None:
        for process, _ in self._servers.values():
            process.terminate()
        for process, _ in self._servers.values():
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log."""
    if not log.exists():
        return "(nothing was written)"
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
