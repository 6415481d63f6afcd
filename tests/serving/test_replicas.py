"""Several replicas behind one client, and what a client and a server do when there is too much or nobody waits."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from serving.conftest import ROOT
from serving.hash_server import hashed_reward

from nemo_lrpo.config.reward import RewardClientConfig
from nemo_lrpo.serving import schema
from nemo_lrpo.serving.client import RewardClient, estimated_tokens
from nemo_lrpo.serving.endpoint import Endpoint
from nemo_lrpo.serving.errors import RewardCancelled, RewardDeadlineExceeded, RewardServerFailed, RewardServerMismatch
from nemo_lrpo.types import Score, ScoreRequest

Serve = Callable[..., AbstractContextManager[Any]]
SECOND_HOST = "::1" if Path("/proc/net/if_inet6").is_file() else "127.0.0.2"


def requests(count: int, response: str = "answer", step: int = 1) -> list[ScoreRequest]:
    return [ScoreRequest(f"{step}/q/{n}", f"{response} {n}", "reference", "de", "ja") for n in range(count)]


def assert_right(found: dict[str, Score], asked: list[ScoreRequest]) -> None:
    assert {key: score.reward for key, score in found.items()} == {r.sample_id: hashed_reward(r) for r in asked}


@pytest.fixture(scope="module")
def servers(serve_hashes: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """two that are the same, the second at an IPv6 address where there is one; slow: two seconds for a request; tight:
    one at a time, and one may wait."""
    directory = tmp_path_factory.mktemp("replicas")
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(serve_hashes(directory / name, *overrides))
            for name, overrides in {
                "one": ["delay_s=0.02"],
                "two": ["delay_s=0.02", f"host={SECOND_HOST}"],
                "slow": ["delay_s=2"],
                "tight": ["delay_s=0.05", "concurrency=1", "max_pending=1"],
            }.items()
        }
        for server in started.values():
            server.wait()
        yield started
        for server in started.values():
            server.process.terminate()


@pytest.fixture
def connect(servers: dict[str, Any]) -> Iterator[Callable[..., RewardClient]]:
    """connect("one", "two", key=value) is a client of these servers."""
    clients: list[RewardClient] = []

    def make(*names: str, **changes: Any) -> RewardClient:
        files = [str(servers[name].endpoint_file) for name in names]
        config = RewardClientConfig(**{"endpoint_file": files, "deadline_s": 30.0, **changes})
        config.check("reward")
        clients.append(RewardClient(config))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def outcome(client: RewardClient, name: str) -> float:
    """Score requests that ended so on the client's servers."""
    key = f'lrpo_reward_requests_total{{kind="score",outcome="{name}"}}'
    return sum(metrics.get(key, 0.0) for metrics in client.server_metrics().values())


def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_the_load_is_shared_by_tokens(connect: Callable[..., RewardClient]) -> None:
    client = connect("one", "two", max_texts_per_request=1, concurrency=4)
    client.check_server(["de"])
    before = client.server_metrics()
    asked = requests(200)
    assert_right(client.submit(asked).result(), asked)
    after = client.server_metrics()
    shares = [after[where]["lrpo_reward_texts_total"] - before[where]["lrpo_reward_texts_total"] for where in after]
    assert sum(shares) == 200 and min(shares) >= 60, shares
    assert client.counters()["replicas_live"] == 2

    # To the one with more tokens on their way nothing goes.
    client._fleet.replicas[0].outstanding += 10**6
    assert_right(client.submit(asked[:20]).result(), asked[:20])
    client._fleet.replicas[0].outstanding -= 10**6
    last = client.server_metrics()
    shares = [last[where]["lrpo_reward_texts_total"] - after[where]["lrpo_reward_texts_total"] for where in after]
    assert shares == [0, 20]


def test_tokens_are_estimated_alike_in_all_scripts() -> None:
    latin = ScoreRequest("a", "x" * 400, "", "de", "de")
    japanese = ScoreRequest("a", "円" * 133, "", "de", "ja")
    assert estimated_tokens(latin) == 108
    assert abs(estimated_tokens(japanese) - 108) < 3


def test_replicas_that_would_not_score_alike_are_refused(
    serve_hashes: Serve, connect: Callable[..., RewardClient], servers: dict[str, Any], tmp_path: Path
) -> None:
    with serve_hashes(tmp_path / "other", "name=other") as other:
        other.wait()
        servers["other"] = other
        client = connect("one", "other")
        with pytest.raises(
            RewardServerMismatch, match=r"would not give the rewards of .*encoder is 'sha256:\w+', not"
        ) as e:
            client.check_server(["de"])
        assert "gate.kind is" in str(e.value) and "reward.endpoint_file[" in str(e.value)
        # In the middle of a run the one that it began with goes on alone.
        asked = requests(20)
        late = connect("one", "other", max_texts_per_request=2)
        late._fleet.replicas[1]._accept = lambda *_: time.sleep(0.5) or late._fleet.accept(*_)
        assert_right(late.submit(asked).result(), asked)
        until(lambda: late._fleet.replicas[1].refusal is not None)
        assert_right(late.submit(asked).result(), asked)
        assert late.counters()["replicas_live"] == 1


def test_a_replica_that_dies_is_left_out_and_taken_back(
    serve_hashes: Serve, connect: Callable[..., RewardClient], servers: dict[str, Any], tmp_path: Path
) -> None:
    with serve_hashes(tmp_path / "mortal", "delay_s=0.02") as mortal:
        servers["mortal"] = mortal.wait()
        client = connect("one", "mortal", max_texts_per_request=1, connect_timeout_s=5.0)
        client.check_server(["de"])
        # Stopped first, so that requests have arrived there and no reply leaves.
        mortal.process.send_signal(signal.SIGSTOP)
        asked = requests(30)
        pending = client.submit(asked)
        until(lambda: client._fleet.replicas[1].outstanding > 0)
        mortal.process.kill()
        started = time.monotonic()
        assert_right(pending.result(), asked)
        assert time.monotonic() - started < 5.0
        counters = client.counters()
        assert counters["replica_failures"] == 1 and counters["retries"] >= 1 and counters["replicas_live"] == 1
        assert_right(client.submit(asked).result(), asked)
    with serve_hashes(tmp_path / "mortal", "delay_s=0.02"):
        until(lambda: client.counters()["replicas_live"] == 2, within_s=60.0)
        assert_right(client.submit(asked).result(), asked)


def test_cancelling_tells_the_server(connect: Callable[..., RewardClient]) -> None:
    client = connect("slow", max_texts_per_request=1)
    client.check_server(["de"])
    before = outcome(client, "cancelled")
    pending = client.submit(requests(6))
    until(lambda: client.server_metrics().popitem()[1]["lrpo_reward_in_progress"] == 4)
    started = time.monotonic()
    pending.cancel()
    assert time.monotonic() - started < 0.1
    with pytest.raises(RewardCancelled):
        pending.result()
    until(lambda: outcome(client, "cancelled") == before + 4)
    assert time.monotonic() - started < 1.9, "before they would have been scored"
    # A client that closes says so too.
    watcher = connect("slow")
    watcher.check_server(["de"])
    pending = client.submit(requests(4))
    until(lambda: watcher.server_metrics().popitem()[1]["lrpo_reward_in_progress"] == 4)
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 1.5
    with pytest.raises(RewardCancelled):
        pending.result()
    with pytest.raises(RewardCancelled):
        client.submit(requests(1)).result()
    until(lambda: outcome(watcher, "cancelled") == before + 8, within_s=1.5)


def test_no_call_outlives_its_deadline_and_the_server_drops_it(connect: Callable[..., RewardClient]) -> None:
    client = connect("slow", deadline_s=0.5, max_texts_per_request=1, concurrency=8)
    client.check_server(["de"])
    before = client.server_metrics().popitem()[1]["lrpo_reward_texts_total"]
    started = time.monotonic()
    with pytest.raises(RewardDeadlineExceeded, match=r"reward.deadline_s=0.5"):
        client.submit(requests(8)).result()
    assert time.monotonic() - started < 0.8
    until(lambda: client.server_metrics().popitem()[1]["lrpo_reward_in_progress"] == 0, within_s=1.0)
    assert client.server_metrics().popitem()[1]["lrpo_reward_texts_total"] == before, "nothing was scored in vain"


def test_submitting_waits_while_too_much_is_on_its_way(connect: Callable[..., RewardClient]) -> None:
    limits = {"max_texts_per_request": 2, "max_outstanding_texts": 4}
    client = connect("one", **limits)
    asked = requests(40)
    pending = client.submit(asked)
    assert client.counters()["outstanding_texts"] <= 4
    assert_right(pending.result(), asked)
    late = connect("slow", deadline_s=1.0, **limits)
    late.check_server(["de"])
    started = time.monotonic()
    pending = late.submit(requests(8))
    assert 0.9 < time.monotonic() - started < 1.3, "the deadline bounds submitting too"
    with pytest.raises(RewardDeadlineExceeded):
        pending.result()
    until(lambda: late.counters()["outstanding_texts"] == 0, within_s=1.0)


def test_a_full_server_is_asked_again_later(connect: Callable[..., RewardClient]) -> None:
    client = connect("tight", max_texts_per_request=1, concurrency=6)
    asked = requests(30)
    assert_right(client.submit(asked).result(), asked)
    assert client.counters()["busy"] > 0 and client.counters()["retries"] == 0


def test_an_error_while_scoring_fails_its_request_only(connect: Callable[..., RewardClient]) -> None:
    client = connect("one", "two")
    bad = ScoreRequest("1/q/0", "crash", "", "de", "de")
    good = requests(4)
    pending = client.submit([bad]), client.submit(good)
    with pytest.raises(RewardServerFailed, match=r"1\]?:\d+ .*ArithmeticError: the encoder fell over; see its log"):
        pending[0].result()
    assert_right(pending[1].result(), good)
    counters = client.counters()
    assert counters["scoring_failures"] == 2 and counters["retries"] == counters["replica_failures"] == 0


def test_a_run_begins_without_a_replica_that_is_not_there(
    servers: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [str(servers["one"].endpoint_file), str(tmp_path / "none.json")]
    client = RewardClient(RewardClientConfig(endpoint_file=files, deadline_s=30.0))
    try:
        client.check_server(["de"])
        assert "beginning without the reward server reward.endpoint_file[1]" in caplog.text
        assert client.counters()["replicas_live"] == 1
        assert_right(client.submit(requests(5)).result(), requests(5))
    finally:
        client.close()


def test_a_triton_that_is_no_reward_server_is_refused_at_once(
    connect: Callable[..., RewardClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "MODEL", "another")
    started = time.monotonic()
    with pytest.raises(RewardServerMismatch, match=r"unknown model.*it is triton \d.*nemo_lrpo.serve_rewards"):
        connect("one", startup_timeout_s=60.0).check_server(["de"])
    assert time.monotonic() - started < 10.0


def test_a_run_that_fails_ends_at_once_and_the_server_is_told(
    connect: Callable[..., RewardClient], servers: dict[str, Any]
) -> None:
    watcher = connect("slow")
    watcher.check_server(["de"])
    before = outcome(watcher, "cancelled")
    script = """
import sys, time
from nemo_lrpo.config.reward import RewardClientConfig
from nemo_lrpo.serving.client import RewardClient
from nemo_lrpo.types import ScoreRequest
client = RewardClient(RewardClientConfig(endpoint_file=sys.argv[1], max_texts_per_request=1))
client.check_server(["de"])
pending = client.submit([ScoreRequest(str(n), "x", "y", "de", "de") for n in range(40)])
while client.server_metrics().popitem()[1]["lrpo_reward_in_progress"] < 4:
    time.sleep(0.01)
print(time.time(), flush=True)
raise SystemExit("the run fails here")
"""
    command = [sys.executable, "-c", script, str(servers["slow"].endpoint_file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    ended = time.time()
    assert result.returncode == 1 and result.stderr == "the run fails here\n"
    assert ended - float(result.stdout) < 4.0, "and not after the 20 seconds that scoring takes"
    until(lambda: outcome(watcher, "cancelled") == before + 4, within_s=1.5)


def test_addresses_in_place_of_files(servers: dict[str, Any]) -> None:
    addresses = [Endpoint.read(servers[name].endpoint_file).address for name in ("one", "two")]
    config = RewardClientConfig(endpoint=addresses)
    config.check("reward")
    client = RewardClient(config)
    try:
        client.check_server(["de", "ja"])
        assert set(client.server_metrics()) == {f"{a} (reward.endpoint[{n}]={a})" for n, a in enumerate(addresses)}
    finally:
        client.close()
