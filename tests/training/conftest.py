"""What the training runs of these tests share: a model, questions, a reward server and a process to fork from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import ROOT
from training_runs import Runs, settings_for, write_questions
from warm_start import Starter


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def hash_rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A reward server whose rewards are functions of the text alone, to the last bit: endpoint file, process id."""
    directory = tmp_path_factory.mktemp("hashes")
    endpoint_file, log = directory / "reward.json", directory / "server.log"
    script = ROOT / "tests" / "serving" / "hash_server.py"
    with tempfile.TemporaryDirectory(prefix="lrpo-") as scratch, log.open("w") as output:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": scratch, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(
            [sys.executable, str(script), f"endpoint_file={endpoint_file}"],
            env=environment,
            stdout=output,
            stderr=output,
        )
        try:
            deadline = time.monotonic() + 120
            while not endpoint_file.exists():
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield endpoint_file, server.pid
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=30)


@pytest.fixture(scope="session")
def runs(starter: Starter, tiny_nemo: Path, data: Path, hash_rewards: tuple[Path, int]) -> Runs:
    return Runs(starter, settings_for(tiny_nemo, data, hash_rewards[0]))
