"""The reward server as a process of its own, with real models, and the client against it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from encoder_fixture import SENTENCES
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nemo_lrpo.config.reward import RewardClientConfig, ServeRewardsConfig
from nemo_lrpo.rewards.scorer import RewardScorer
from nemo_lrpo.serving import schema
from nemo_lrpo.serving.client import RewardClient
from nemo_lrpo.serving.endpoint import Endpoint
from nemo_lrpo.serving.errors import (
    RewardDeadlineExceeded,
    RewardRequestRefused,
    RewardServerMismatch,
    RewardServerUnavailable,
)
from nemo_lrpo.types import Score, ScoreRequest

Serve = Callable[..., AbstractContextManager[Any]]
LANGUAGES = ["en", "de", "fr", "es", "ja", "ru", "ar"]
LONG = "max_text_chars=2000000"
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


@pytest.fixture(scope="module")
def expected(encoder: Path) -> dict[str, Score]:
    """What the scorer says without any server."""
    return {score.sample_id: score for score in RewardScorer(scorer_config(encoder)).score(REQUESTS)}


@pytest.fixture(scope="module")
def servers(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Two servers on one machine, started together; the first wants a token, the second is there to be killed."""
    directory = tmp_path_factory.mktemp("servers")
    token = directory / "token"
    token.write_text("correct horse battery staple\n")
    token.chmod(0o600)
    with ExitStack() as stack:
        first = stack.enter_context(serve(directory / "first", f"token_file={token}", "metrics_port=0", LONG))
        second = stack.enter_context(serve(directory / "second", LONG))
        yield first.wait(), second.wait()
        first.process.terminate()


@pytest.fixture
def connect(servers: tuple[Any, Any]) -> Iterator[Callable[..., RewardClient]]:
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
            close = pytest.approx(value, abs=1e-5) if isinstance(value, (float, dict)) else value
            assert other == close, (sample_id, name)


def test_scores_are_those_of_the_scorer(connect: Callable[..., RewardClient], expected: dict[str, Score]) -> None:
    client = connect()
    client.check_server(["en", "ja"])
    pending = [client.submit(REQUESTS[:20]), client.submit(REQUESTS[20:])]
    assert_equal_scores({**pending[1].result(), **pending[0].result()}, expected)
    assert len({round(score.reward, 6) for score in expected.values()}) > 5
    assert client.submit([]).result() == {}


def test_two_servers_on_one_machine(servers: tuple[Any, Any], expected: dict[str, Score]) -> None:
    first, second = (Endpoint.read(server.endpoint_file) for server in servers)
    assert first.host == second.host == "127.0.0.1"
    assert first.port != second.port
    assert (first.pid, second.pid) == (servers[0].process.pid, servers[1].process.pid)
    client = servers[1].client()
    assert_equal_scores(client.submit(REQUESTS).result(), expected)
    client.close()


def test_the_token_is_demanded(servers: tuple[Any, Any], tmp_path: Path) -> None:
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


def test_nobody_controls_models_from_outside(servers: tuple[Any, Any]) -> None:
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


def test_the_real_scorer_behind_two_replicas_of_which_one_stalls(
    servers: tuple[Any, Any], expected: dict[str, Score]
) -> None:
    files = [str(server.endpoint_file) for server in servers]
    client = RewardClient(RewardClientConfig(endpoint_file=files, deadline_s=30.0, max_texts_per_request=3))
    try:
        client.check_server(["en", "ja"])
        assert client.counters()["replicas_live"] == 2
        for _ in range(10):
            servers[1].process.send_signal(signal.SIGSTOP)
            pending = [client.submit(REQUESTS) for _ in range(3)]
            time.sleep(0.1)
            servers[1].process.send_signal(signal.SIGCONT)
            for each in pending:
                assert_equal_scores(each.result(), expected)
        assert not any(client.counters()[name] for name in ("replica_failures", "missing", "mixed_up", "invalid"))
    finally:
        servers[1].process.send_signal(signal.SIGCONT)
        client.close()


def test_texts_stay_between_the_server_and_its_triton(servers: tuple[Any, Any]) -> None:
    """Who may read or reach what passes between the two processes."""
    process = psutil.Process(servers[0].process.pid)
    family = {each.pid: each for each in [process, *process.children(recursive=True)]}
    names = [each.name() for each in family.values()]
    # No multiprocessing manager, which would unpickle, and no shared memory of PyTriton's.
    assert sum(name.startswith("triton_python_b") for name in names) == 1 and len(names) == 4, names
    endpoint = Endpoint.read(servers[0].endpoint_file)
    listening = {c.laddr for each in family.values() for c in each.net_connections("tcp") if c.status == "LISTEN"}
    assert {address.port for address in listening} == {endpoint.port, endpoint.metrics_port}
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    sockets = [Path(c.laddr) for each in family.values() for c in each.net_connections("unix") if c.laddr]
    workspaces = {path.parents[1] for path in sockets if "lrpo-reward-" in str(path)}
    assert len(workspaces) == 1 and {path.parents[1] for path in sockets} == workspaces
    assert all(workspace.stat().st_mode & 0o077 == 0 for workspace in workspaces)
    mapped = shared_memory(process)
    assert len(mapped) == 1 and all(path.stat().st_mode & 0o077 == 0 for path in mapped)


def shared_memory(process: psutil.Process) -> set[Path]:
    """Files of shared memory that a server and its Triton use."""
    maps = [mapped for each in [process, *process.children(recursive=True)] for mapped in each.memory_maps()]
    return {Path(mapped.path) for mapped in maps if mapped.path.startswith("/dev/shm/lrpo-reward-")}


def test_health_and_metrics_over_http(servers: tuple[Any, Any], connect: Callable[..., RewardClient]) -> None:
    endpoint = Endpoint.read(servers[0].endpoint_file)
    connect().submit(REQUESTS).result()

    def get(path: str, token: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.get(f"http://127.0.0.1:{endpoint.metrics_port}{path}", headers=headers, trust_env=False)

    for path in ("/healthz", "/readyz", "/metrics"):
        assert get(path, "").status_code == get(path, "correct horse").status_code == 401
    token = "correct horse battery staple"
    assert get("/healthz", token).text == get("/readyz", token).text == "ok\n"
    assert get("/", token).status_code == 404
    metrics = get("/metrics", token).text
    for line in (
        r'lrpo_reward_requests_total{kind="score",outcome="ok"} \d',
        r'lrpo_reward_scored_total{label="de"} \d',
        r'lrpo_reward_batch_fill{label=""} 0\.\d',
        r'lrpo_reward_cache_hit_rate{label="reference"} \d',
        r'lrpo_reward_request_seconds_bucket{le="1.0"} \d',
    ):
        assert re.search(line.replace("{", r"\{").replace("}", r"\}"), metrics), (line, metrics)
    # The same without HTTP.
    (over_grpc,) = connect_and_read(connect)
    assert over_grpc['lrpo_reward_scored_total{label="de"}'] >= 1


def connect_and_read(connect: Callable[..., RewardClient]) -> list[dict[str, float]]:
    client = connect()
    client.check_server(["de"])
    return list(client.server_metrics().values())


def test_texts_of_all_kinds(servers: tuple[Any, Any]) -> None:
    texts = {
        "empty": "",
        "white": " \n\t\u3000",
        "surrogate": "Die Währung von Japan ist der Yen.\ud83d",
        "nul": "Der\0 Yen.",
        "right-to-left": "\u202eعملة اليابان هي الين.\u202c עברית",
        "controls": "".join(map(chr, range(0x20))) + "\u2028\u2029\ufeff\uffff",
        "emoji": "👩‍👩‍👧‍👦" * 50,
        "long": "Die Währung von Japan ist der Yen. " * 30_000,
        "one word": "x" * 1_000_000,
    }
    asked = [ScoreRequest(name, text, SENTENCES[1], "de", "de") for name, text in texts.items()]
    asked += [ScoreRequest(f"{name} reference", SENTENCES[1], text, "de", "de") for name, text in texts.items()]
    client = servers[1].client(max_texts_per_request=4)
    try:
        scores = client.submit(asked).result()
        assert scores.keys() == {request.sample_id for request in asked}
        assert all(score.reward is None or 0.0 <= score.reward <= 1.0 for score in scores.values())
        assert scores["empty"].flags == scores["white"].flags == ("empty",)
        assert scores["long"].reward == pytest.approx(1.0, abs=0.2) and scores["long"].language == "de"
        assert {"chunked", "truncated"} & set(scores["long"].flags)
    finally:
        client.close()


def test_foreign_bytes_are_refused_and_the_server_goes_on(
    servers: tuple[Any, Any], connect: Callable[..., RewardClient]
) -> None:
    channel = grpc.insecure_channel(Endpoint.read(servers[0].endpoint_file).address)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    texts = [schema.encode_text(REQUESTS[0])]
    good = schema.encode_score_request("correct horse battery staple", "r", 5.0, texts)
    for data, words in {
        b"": "not a JSON message",
        b"\xff\xfe\x00": "not a JSON message",
        good.replace(b"yen", b"y\xc3n"): "texts[0] is not JSON",
        good[:-5]: "not a JSON message",
        b"\x80\x04\x95\x00": "not a JSON message",
        good.replace(b"battery", b"batterie"): "token is missing or wrong",
        good.replace(b'"schema": 3', b'"schema": 2'): "schema version 2",
        schema.encode_score_request("correct horse battery staple", "r", 5.0, [b"null"]): "texts[0] must have",
    }.items():
        request = service_pb2.ModelInferRequest(model_name=schema.MODEL)
        request.inputs.add(name=schema.REQUEST_TENSOR, datatype="UINT8", shape=[len(data)])
        request.raw_input_contents.append(data)
        (reply,) = stub.ModelStreamInfer(iter([request]), timeout=10.0)
        (content,) = reply.infer_response.raw_output_contents
        assert words in json.loads(content)["error"]["message"], data
    channel.close()
    assert len(connect().submit(REQUESTS).result()) == len(REQUESTS)


def test_the_client_of_the_readme(servers: tuple[Any, Any]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (client,) = re.findall(r"```python\n(from nemo_lrpo.*?)```", readme, re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", client.replace("run/reward.json", "reward.json")],
        capture_output=True, text=True, timeout=60, cwd=servers[1].endpoint_file.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, second = (line.split() for line in result.stdout.splitlines())
    assert first == ["0", "0.0", "0.0", "de"], "not in the language that was asked for"
    assert second[0] == "1" and 0.0 < float(second[1]) <= 1.0 and second[2:] == ["1.0", "ja"]


def test_help_says_how_to_use_it() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "nemo_lrpo.serve_rewards", "--help"],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0
    for words in ("endpoint_file=run/reward.json", "replicas", "metrics_port=9100", "token_file", "max_pending: 64"):
        assert words in result.stdout, result.stdout


def test_a_wrong_server_is_refused(connect: Callable[..., RewardClient]) -> None:
    with pytest.raises(RewardServerMismatch, match=r"does not score ko.*data.languages.*languages="):
        connect().check_server(["en", "ko"])
    with pytest.raises(RewardServerMismatch, match=r"encoder sha256:\w+, not reward.encoder=sha256:other"):
        connect(encoder="sha256:other").check_server(["en"])
    with pytest.raises(RewardServerMismatch, match=r"reward.max_texts_per_request=5000 exceeds the server's 1024"):
        connect(max_texts_per_request=5000).check_server(["en"])


def test_a_sample_id_given_twice_is_refused_at_once(connect: Callable[..., RewardClient]) -> None:
    with pytest.raises(ValueError, match=REQUESTS[0].sample_id):
        connect().submit([REQUESTS[0], REQUESTS[0]])


def test_a_slow_server_ends_in_the_deadline(
    servers: tuple[Any, Any], connect: Callable[..., RewardClient], expected: dict[str, Score]
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
    serve: Serve, servers: tuple[Any, Any], expected: dict[str, Score]
) -> None:
    victim = servers[1]
    client = victim.client(deadline_s=60.0, connect_timeout_s=1.5)
    patient = victim.client(deadline_s=60.0, connect_timeout_s=60.0)
    for each in (client, patient):
        assert len(each.submit(REQUESTS).result()) == len(REQUESTS)
    left_behind = shared_memory(psutil.Process(victim.process.pid))
    assert left_behind
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
    with serve(victim.endpoint_file.parent, LONG) as reborn:
        assert_equal_scores(waiting.result(), expected)
        assert not [path for path in left_behind if path.exists()]
        # The end is orderly: soon (5 s on an idle machine), with success, and nobody is sent to where nothing is.
        reborn.process.terminate()
        assert reborn.process.wait(timeout=30) == 0, reborn.log.read_text()
        assert not reborn.endpoint_file.exists()
    client.close()
    patient.close()


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
