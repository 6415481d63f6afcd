"""The reward server as a process of its own, with real models, and the client against it."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from encoder_fixture import SENTENCES, build_tiny_encoder

from nemo_lrpo.config.reward import RewardClientConfig, ServeRewardsConfig
from nemo_lrpo.rewards.scorer import RewardScorer
from nemo_lrpo.serving.client import RewardClient
from nemo_lrpo.serving.endpoint import Endpoint
from nemo_lrpo.serving.errors import (
    RewardDeadlineExceeded,
    RewardRequestRefused,
    RewardServerFailed,
    RewardServerMismatch,
    RewardServerUnavailable,
)
from nemo_lrpo.serving.server import RewardServer
from nemo_lrpo.types import Score, ScoreRequest

LANGUAGES = ["en", "de", "fr", "es", "ja", "ru", "ar"]
REQUESTS = [
    # Every sentence against every other: right and wrong languages, so that scores differ.
    ScoreRequest(f"3/q{i}/{j}", response, reference, LANGUAGES[i], LANGUAGES[(j + i) % 2])
    for i, reference in enumerate(SENTENCES)
    for j, response in enumerate(SENTENCES)
]


def scorer_config(encoder: Path, **changes: object) -> ServeRewardsConfig:
    config = ServeRewardsConfig(languages=LANGUAGES, **changes)
    config.encoder.path, config.encoder.device, config.calibration.method = str(encoder), "cpu", "none"
    config.check()
    return config


@dataclasses.dataclass
class Server:
    process: subprocess.Popen
    endpoint_file: Path
    log: Path

    def client(self, **changes: object) -> RewardClient:
        defaults = {"deadline_s": 30.0, "startup_timeout_s": 120.0, "max_texts_per_request": 8}
        return RewardClient(RewardClientConfig(endpoint_file=str(self.endpoint_file), **{**defaults, **changes}))


@contextmanager
def serve(encoder: Path, directory: Path, *overrides: str) -> Iterator[Server]:
    """Start nemo_lrpo.serve_rewards; returns before it is ready."""
    directory.mkdir(parents=True, exist_ok=True)
    endpoint_file, log = directory / "reward.json", directory / "server.log"
    arguments = [
        f"languages=[{','.join(LANGUAGES)}]",
        f"encoder.path={encoder}",
        "encoder.device=cpu",
        "calibration.method=none",
        f"endpoint_file={endpoint_file}",
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("LRPO_REWARD_TOKEN", None)
    with ExitStack() as stack:
        # Short, for the sockets in it, and removed here, since a killed server cannot.
        environment["TMPDIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="lrpo-"))
        output = stack.enter_context(log.open("w"))
        process = subprocess.Popen(
            [sys.executable, "-m", "nemo_lrpo.serve_rewards", *arguments],
            stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=Path(__file__).parents[2],
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


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder") / "encoder")


@pytest.fixture(scope="module")
def expected(encoder: Path) -> dict[str, Score]:
    """What the scorer says without any server."""
    return {score.sample_id: score for score in RewardScorer(scorer_config(encoder)).score(REQUESTS)}


@pytest.fixture(scope="module")
def servers(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Two servers on one machine, started together; the first wants a token, the second is there to be killed."""
    directory = tmp_path_factory.mktemp("servers")
    token = directory / "token"
    token.write_text("correct horse battery staple\n")
    token.chmod(0o600)
    with ExitStack() as stack:
        first = stack.enter_context(serve(encoder, directory / "first", f"token_file={token}"))
        second = stack.enter_context(serve(encoder, directory / "second"))
        for server in (first, second):
            client = server.client()
            try:
                client.check_server(LANGUAGES)
            except RewardServerUnavailable as error:
                pytest.fail(f"{error}\n{server.log.read_text()}")
            finally:
                client.close()
        yield first, second


@pytest.fixture
def connect(servers: tuple[Server, Server]) -> Iterator[Callable[..., RewardClient]]:
    """Makes clients of the first server."""
    clients: list[RewardClient] = []

    def make(**changes: object) -> RewardClient:
        clients.append(servers[0].client(**changes))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def assert_equal_scores(found: dict[str, Score], expected: dict[str, Score]) -> None:
    assert found.keys() == expected.keys()
    for sample_id, score in expected.items():
        for name, value in dataclasses.asdict(score).items():
            other = getattr(found[sample_id], name)
            # Batches are cut differently, which moves the last bits of an embedding.
            assert other == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), (sample_id, name)


def test_scores_are_those_of_the_scorer(connect: Callable[..., RewardClient], expected: dict[str, Score]) -> None:
    client = connect()
    client.check_server(["en", "ja"])
    pending = [client.submit(REQUESTS[:20]), client.submit(REQUESTS[20:])]
    assert_equal_scores({**pending[1].result(), **pending[0].result()}, expected)
    assert len({round(score.reward, 6) for score in expected.values()}) > 5
    assert client.submit([]).result() == {}


def test_two_servers_on_one_machine(servers: tuple[Server, Server], expected: dict[str, Score]) -> None:
    first, second = (Endpoint.read(server.endpoint_file) for server in servers)
    assert first.host == second.host == "127.0.0.1"
    assert first.port != second.port
    assert (first.pid, second.pid) == (servers[0].process.pid, servers[1].process.pid)
    client = servers[1].client()
    assert_equal_scores(client.submit(REQUESTS).result(), expected)
    client.close()


def test_the_token_is_demanded(servers: tuple[Server, Server], tmp_path: Path) -> None:
    endpoint = Endpoint.read(servers[0].endpoint_file)
    assert "horse" not in servers[0].endpoint_file.read_text()
    wrong = tmp_path / "token"
    wrong.write_text("correct horse battery stable")
    wrong.chmod(0o600)
    for token_file in (str(wrong), None):
        client = RewardClient(RewardClientConfig(endpoint=endpoint.address, token_file=token_file, deadline_s=10.0))
        for ask in (lambda c: c.submit(REQUESTS[:1]).result(), lambda c: c.check_server(["en"])):
            with pytest.raises(RewardRequestRefused, match=r"token.*reward.token_file"):
                ask(client)
        client.close()


def test_nobody_controls_models_from_outside(servers: tuple[Server, Server]) -> None:
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    with InferenceServerClient(Endpoint.read(servers[0].endpoint_file).address) as triton:
        for attempt in (
            lambda: triton.load_model("score"),
            lambda: triton.unload_model("score"),
            triton.get_model_repository_index,
            lambda: triton.update_log_settings({"log_verbose_level": 1}),
            lambda: triton.update_trace_settings(settings={"trace_level": "TENSORS"}),
            triton.get_system_shared_memory_status,
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                attempt()


def test_a_wrong_server_is_refused(connect: Callable[..., RewardClient]) -> None:
    with pytest.raises(RewardServerMismatch, match=r"does not score ko.*data.languages.*languages="):
        connect().check_server(["en", "ko"])
    with pytest.raises(RewardServerMismatch, match=r"encoder sha256:\w+, not reward.encoder=sha256:other"):
        connect(encoder="sha256:other").check_server(["en"])
    with pytest.raises(RewardServerMismatch, match=r"reward.max_texts_per_request=5000 exceeds the server's 1024"):
        connect(max_texts_per_request=5000).check_server(["en"])


def test_limits_are_refused_by_name(connect: Callable[..., RewardClient]) -> None:
    long = dataclasses.replace(REQUESTS[0], response="x" * 70_000)
    with pytest.raises(RewardRequestRefused, match=r"texts\[1\].response has 70000 characters; 65536 allowed"):
        connect().submit([REQUESTS[1], long]).result()


def test_a_sample_id_given_twice_is_refused_at_once(connect: Callable[..., RewardClient]) -> None:
    with pytest.raises(ValueError, match=REQUESTS[0].sample_id):
        connect().submit([REQUESTS[0], REQUESTS[0]])


def test_a_slow_server_ends_in_the_deadline(
    servers: tuple[Server, Server], connect: Callable[..., RewardClient], expected: dict[str, Score]
) -> None:
    client = connect(deadline_s=1.0)
    client.check_server(["en"])
    servers[0].process.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        pending = client.submit(REQUESTS)
        assert time.monotonic() - started < 0.5, "submit must not wait"
        with pytest.raises(RewardDeadlineExceeded, match=r"127.0.0.1:\d+ .*reward.deadline_s=1 s"):
            pending.result()
        assert time.monotonic() - started < 1.5
    finally:
        servers[0].process.send_signal(signal.SIGCONT)
    # It goes on as if nothing had happened.
    assert_equal_scores(connect().submit(REQUESTS).result(), expected)


def test_nobody_listens(tmp_path: Path) -> None:
    client = RewardClient(RewardClientConfig(endpoint="127.0.0.1:9", deadline_s=30.0, connect_timeout_s=1.0))
    started = time.monotonic()
    with pytest.raises(RewardServerUnavailable, match=r"127.0.0.1:9 \(reward.endpoint=127.0.0.1:9\)"):
        client.submit(REQUESTS).result()
    assert 0.1 < time.monotonic() - started < 2.0
    missing = RewardClient(RewardClientConfig(endpoint_file=str(tmp_path / "none.json"), startup_timeout_s=0.5))
    with pytest.raises(RewardServerUnavailable, match=r"reward.endpoint_file=.*none.json.*does not exist"):
        missing.check_server(["en"])


def test_a_restarted_server_is_found_and_a_killed_one_named(
    encoder: Path, servers: tuple[Server, Server], expected: dict[str, Score]
) -> None:
    victim = servers[1]
    client = victim.client(deadline_s=60.0, connect_timeout_s=1.5)
    patient = victim.client(deadline_s=60.0, connect_timeout_s=60.0)
    assert len(patient.submit(REQUESTS).result()) == len(REQUESTS)
    # Killed while it scores: stopped first, so that the requests have arrived and no reply has left.
    victim.process.send_signal(signal.SIGSTOP)
    pending = client.submit(REQUESTS)
    time.sleep(0.5)
    victim.process.kill()
    started = time.monotonic()
    with pytest.raises(RewardServerUnavailable, match=r"127.0.0.1:\d+ \(reward.endpoint_file=.*reward.json\)"):
        pending.result()
    assert time.monotonic() - started < 10.0, "far below the deadline"
    waiting = patient.submit(REQUESTS)
    with serve(encoder, victim.endpoint_file.parent) as reborn:
        assert_equal_scores(waiting.result(), expected)
        # The end is orderly: soon (5 s on an idle machine), with success, and nobody is sent to where nothing is.
        reborn.process.terminate()
        assert reborn.process.wait(timeout=30) == 0, reborn.log.read_text()
        assert not reborn.endpoint_file.exists()
    client.close()
    patient.close()


class Disorderly(RewardScorer):
    """The real scorer, its replies permuted and spoilt in ways that a buggy or foreign server might."""

    def score(self, requests: list[ScoreRequest]) -> list[Score]:
        if any(request.response == "crash" for request in requests):
            raise ArithmeticError("the encoder fell over")
        first, second, third, *rest = super().score(requests)
        stranger = dataclasses.replace(first, sample_id="9/foreign/0")
        return [*reversed(rest), stranger, dataclasses.replace(first, reward=math.nan), second, second, third]


def test_permuted_and_spoilt_replies(encoder: Path, expected: dict[str, Score], caplog) -> None:
    config = scorer_config(encoder)
    server = RewardServer(config, Disorderly(config))
    endpoint = server.start()
    client = RewardClient(RewardClientConfig(endpoint=endpoint.address, deadline_s=30.0, max_texts_per_request=7))
    try:
        found = client.submit(REQUESTS).result()
        # Of every seven, the first is not a number and the second comes twice.
        kept = [request.sample_id for index, request in enumerate(REQUESTS) if index % 7 >= 2]
        assert_equal_scores(found, {sample_id: expected[sample_id] for sample_id in kept})
        assert "14 of 49 rewards are missing" in caplog.text
        assert "7 with an unknown id, 7 ids given twice, 7 invalid" in caplog.text
        with pytest.raises(RewardServerFailed, match=r"ArithmeticError: the encoder fell over"):
            client.submit([dataclasses.replace(REQUESTS[0], response="crash")]).result()
    finally:
        client.close()
        server.stop()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("encoder.path=nowhere", "encoder.path='nowhere': no such directory"),
        ("+prt=1", "unknown key 'prt'. Did you mean 'port'"),
        ("port=70000", "port=70000 is out of range"),
        ("host=0.0.0.0", "needs a token"),
    ],
)
def test_a_bad_configuration_is_refused_before_models_load(override: str, words: str, encoder: Path) -> None:
    arguments = [f"encoder.path={encoder}", "calibration.method=none", override]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nemo_lrpo.serve_rewards", *arguments],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if k != "LRPO_REWARD_TOKEN"},
    )  # fmt: skip
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert " torch\n" not in result.stderr, "imported before the configuration was checked"
