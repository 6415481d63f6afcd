"""Reward servers as processes of their own."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
from encoder_fixture import build_tiny_encoder

from nemo_lrpo.config.reward import RewardClientConfig
from nemo_lrpo.serving.client import RewardClient
from nemo_lrpo.serving.errors import RewardServerUnavailable

ROOT = Path(__file__).parents[2]
LANGUAGES = ["en", "de", "fr", "es", "ja", "ru", "ar"]


@dataclasses.dataclass
class Server:
    process: subprocess.Popen
    endpoint_file: Path
    log: Path

    def client(self, **changes: object) -> RewardClient:
        defaults = {"deadline_s": 30.0, "startup_timeout_s": 120.0, "max_texts_per_request": 8}
        config = RewardClientConfig(**{"endpoint_file": str(self.endpoint_file), **defaults, **changes})
        config.check("reward")
        return RewardClient(config)

    def wait(self) -> Server:
        """Returns when it is ready."""
        client = self.client()
        try:
            client.wait_until_ready(120.0)
        except RewardServerUnavailable as error:
            pytest.fail(f"{error}\n{self.log.read_text()}")
        finally:
            client.close()
        return self


@contextmanager
def run_server(directory: Path, command: list[str]) -> Iterator[Server]:
    """Start `command`, to which the endpoint file is added as endpoint_file=...; returns before it is ready."""
    directory.mkdir(parents=True, exist_ok=True)
    endpoint_file, log = directory / "reward.json", directory / "server.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("LRPO_REWARD_TOKEN", None)
    with ExitStack() as stack:
        # Short, for the sockets in it, and removed here, since a killed server cannot.
        environment["TMPDIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="lrpo-"))
        output = stack.enter_context(log.open("w"))
        process = subprocess.Popen(
            [sys.executable, *command, f"endpoint_file={endpoint_file}"],
            stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
        )  # fmt: skip
        try:
            yield Server(process, endpoint_file, log)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder") / "encoder")


@pytest.fixture(scope="session")
def serve(encoder: Path) -> Callable[..., AbstractContextManager[Server]]:
    """serve(directory, *overrides) starts nemo_lrpo.serve_rewards with a tiny encoder."""

    def start(directory: Path, *overrides: str) -> AbstractContextManager[Server]:
        command = ["-m", "nemo_lrpo.serve_rewards", f"languages=[{','.join(LANGUAGES)}]", f"encoder.path={encoder}"]
        return run_server(directory, [*command, "encoder.device=cpu", "calibration.method=none", *overrides])

    return start


@pytest.fixture(scope="session")
def serve_hashes() -> Callable[..., AbstractContextManager[Server]]:
    """serve_hashes(directory, *overrides) starts hash_server.py."""

    def start(directory: Path, *overrides: str) -> AbstractContextManager[Server]:
        return run_server(directory, [str(Path(__file__).with_name("hash_server.py")), *overrides])

    return start
