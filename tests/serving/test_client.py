"""What the client makes of replicas that fail, hang, refuse and end: here they are objects that do as they are told.

Over the network: test_replicas.py and test_faults.py.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from serving.hash_server import hashed_reward

from nemo_lrpo.config.reward import RewardClientConfig
from nemo_lrpo.serving import replica, schema
from nemo_lrpo.serving.client import RewardClient
from nemo_lrpo.serving.endpoint import Endpoint
from nemo_lrpo.serving.errors import (
    RewardCancelled,
    RewardDeadlineExceeded,
    RewardError,
    RewardRequestRefused,
    RewardServerFailed,
    RewardServerMismatch,
    RewardServerUnavailable,
    WireError,
)
from nemo_lrpo.serving.replica import Connection, ConnectionLost
from nemo_lrpo.types import FLAG_TOO_LONG, Score, ScoreRequest


@dataclasses.dataclass
class Server:
    """mood: what it does with score requests: ok, hang, lost, a kind of refusal, or a function of the sample ids that
    says which of these."""

    mood: str | Callable[[list[str]], str] = "ok"
    there: bool = True
    healthy: bool = True
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    seen: list[list[str]] = dataclasses.field(default_factory=list)
    cancelled: list[str] = dataclasses.field(default_factory=list)

    def answer(self, data: bytes, hold: Callable[[], None]) -> bytes:
        if not self.there:
            raise ConnectionLost("connection refused")
        request = schema.open_request(data)
        kind = schema.kind_of(request)
        if kind == "identity":
            identity = {"languages": ["de", "ja"], **self.limits}
            return schema.encode_message({"identity": identity, "healthy": self.healthy})
        if kind == "cancel":
            self.cancelled += schema.cancelled_ids_of(request)
            return schema.encode_message({"cancelled": 1})
        assert len(data) <= self.limits.get("max_request_bytes", len(data))
        job = schema.score_job_of(request, 1000, self.limits.get("max_text_chars", 10**6))
        ids = [each.sample_id for each in job.requests]
        self.seen.append(ids)
        mood = self.mood if isinstance(self.mood, str) else self.mood(ids)
        if mood == "hang":
            hold()
        if mood == "lost":
            raise ConnectionLost("connection reset")
        if mood == "ok":
            scores = [Score(r.sample_id, reward := hashed_reward(r), reward, 1.0, "ja", 0.9) for r in job.requests]
            return schema.encode_scores(job, scores)
        return schema.encode_refusal(mood, f"it is {mood}")


class Call:
    def __init__(self) -> None:
        self.ended = threading.Event()

    def cancel(self) -> None:
        self.ended.set()


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RewardClient]]:
    """connect([server, ...], key=value) is a client of these."""
    clients: list[RewardClient] = []
    known: dict[str, Server] = {}

    class ToServer(Connection):
        def __init__(self, endpoint: Endpoint, token: str, where: str) -> None:
            self.token, self.limits, self._where = token, {}, where
            self._server = known[endpoint.address]

        def call(self, data: bytes, timeout_s: float, on_start: Any = None) -> dict[str, Any]:
            call = Call()
            if on_start is not None:
                on_start(call)

            def hold() -> None:
                if call.ended.wait(timeout_s):
                    raise ConnectionLost("the call was cancelled")
                raise RewardDeadlineExceeded("no answer")

            return self._answer(self._server.answer(data, hold))

    monkeypatch.setattr(replica, "Connection", ToServer)
    monkeypatch.setattr(replica, "_REST_S", (0.2, 0.4))

    def make(servers: list[Server], **changes: Any) -> RewardClient:
        addresses = [f"h:{len(known) + place + 1}" for place in range(len(servers))]
        known.update(zip(addresses, servers))
        settings = {"deadline_s": 10.0, "max_texts_per_request": 2, "concurrency": 2, **changes}
        clients.append(RewardClient(RewardClientConfig(endpoint=addresses, **settings)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def requests(count: int, response: str = "answer", language: str = "ja") -> list[ScoreRequest]:
    return [ScoreRequest(f"1/q/{n}", f"{response} {n}", "reference", "de", language) for n in range(count)]


def assert_right(found: dict[str, Score], asked: list[ScoreRequest]) -> None:
    assert {key: score.reward for key, score in found.items()} == {r.sample_id: hashed_reward(r) for r in asked}


def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def everyone(client: RewardClient) -> bool:
    return client.counters()["replicas_live"] == len(client._fleet.replicas)


# -- what is too long ----------------------------------------------------------------------------------------------


def test_what_is_too_long_is_left_out_and_counted_and_the_rest_is_scored(
    connect: Callable[..., RewardClient], caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(limits={"max_text_chars": 20})
    client = connect([server])
    good = requests(5)
    long = [
        ScoreRequest("long", "x" * 21, "reference", "de", "ja"),
        ScoreRequest("reference", "x", "r" * 30, "de", "de"),
        ScoreRequest("question", "x", "reference", "de", "de", "q" * 21),
    ]
    found = client.submit([*good[:3], *long, *good[3:]]).result()
    assert_right({key: score for key, score in found.items() if "/" in key}, good)
    for request in long:
        score = found[request.sample_id]
        assert score.reward is None and score.flags == (FLAG_TOO_LONG,) and score.masked
    counters = client.counters()
    assert (counters["too_long"], counters["too_long/de"], counters["too_long/ja"]) == (3, 2, 1)
    assert counters["missing"] == counters["asked_again"] == 0
    assert "max_text_chars=20" in caplog.text and "'long', its response has 21 characters" in caplog.text
    assert not {request.sample_id for request in long} & {sample for ids in server.seen for sample in ids}


def test_a_request_with_too_many_bytes_is_cut(connect: Callable[..., RewardClient]) -> None:
    server = Server(limits={"max_request_bytes": schema.MAX_HEAD_BYTES + 3000})
    client = connect([server], max_texts_per_request=8)
    asked = requests(8, "ü" * 500)
    huge = dataclasses.replace(asked[3], response="y" * 3000)
    found = client.submit([*asked[:3], huge, *asked[4:]]).result()
    assert found.pop(huge.sample_id).flags == (FLAG_TOO_LONG,)
    assert_right(found, [*asked[:3], *asked[4:]])
    assert sorted(map(len, server.seen)) == [1, 2, 2, 2] and client.counters()["too_long"] == 1


def test_replicas_with_other_limits_on_texts_are_refused(connect: Callable[..., RewardClient]) -> None:
    client = connect([Server(limits={"max_text_chars": 20}), Server(limits={"max_text_chars": 30})])
    with pytest.raises(RewardServerMismatch, match="max_text_chars is"):
        client.check_server(["de"])
    same = {"max_text_chars": 20}
    connect([Server(limits={**same, "max_request_bytes": n}) for n in (10**6, 10**7)]).check_server(["de"])


def test_a_server_that_does_not_know_what_the_policy_may_think_in_is_refused(
    connect: Callable[..., RewardClient],
) -> None:
    client = connect([Server()])
    client.check_server(["de"], ["ja"])
    with pytest.raises(RewardServerMismatch, match=r"does not know th, of mode\.seen: .*languages=\[...\]"):
        client.check_server(["de"], ["ja", "th"])


@pytest.mark.parametrize("sample_id", ["a\ud800", "\udfffb"])
def test_a_sample_id_without_a_form_on_the_wire_is_refused_by_name(
    connect: Callable[..., RewardClient], sample_id: str
) -> None:
    with pytest.raises(ValueError, match=r"sample id '.*\\ud\w+.*' has a lone surrogate"):
        connect([Server()]).submit([ScoreRequest(sample_id, "x", "y", "de", "de")])


# -- what fails ----------------------------------------------------------------------------------------------------


def test_scores_that_are_there_are_not_lost_with_a_request_that_failed(
    connect: Callable[..., RewardClient], caplog: pytest.LogCaptureFixture
) -> None:
    client = connect([Server(lambda ids: "internal" if "1/q/3" in ids else "ok")])
    asked = requests(8)
    assert_right(client.submit(asked).result(), asked[:2] + asked[4:])
    assert client.counters()["missing"] == 2 and client.counters()["scoring_failures"] == 1
    assert "2 of 8 rewards are missing" in caplog.text and "failed while scoring: it is internal" in caplog.text
    # Nothing came: that is an error.
    with pytest.raises(RewardServerFailed, match="it is internal"):
        client.submit(asked[2:4]).result()


def test_what_came_before_the_deadline_is_kept(connect: Callable[..., RewardClient]) -> None:
    client = connect([Server(lambda ids: "hang" if "1/q/0" in ids else "ok")], deadline_s=0.5)
    asked = requests(8)
    assert_right(client.submit(asked).result(), asked[2:])
    with pytest.raises(RewardDeadlineExceeded, match=r"reward.deadline_s=0.5"):
        client.submit(asked[:2]).result()


@pytest.mark.parametrize(("mood", "error"), [("token", RewardRequestRefused), ("language", RewardServerMismatch)])
def test_a_mistake_is_raised_whatever_else_came(
    connect: Callable[..., RewardClient], mood: str, error: type[RewardError]
) -> None:
    server = Server(lambda ids: mood if "1/q/3" in ids else "hang" if "1/q/7" in ids else "ok")
    started = time.monotonic()
    with pytest.raises(error, match=f"it is {mood}"):
        connect([server]).submit(requests(8)).result()
    assert time.monotonic() - started < 5.0, "without waiting for the rest"


def test_what_one_replica_cannot_score_another_is_asked(connect: Callable[..., RewardClient]) -> None:
    sick, well = Server("internal"), Server()
    client = connect([sick, well], max_texts_per_request=1)
    client.check_server(["de"])
    asked = requests(20)
    assert_right(client.submit(asked).result(), asked)
    # It is left out soon, and taken back once it says that it is well.
    assert 3 <= len(sick.seen) <= 6 and client.counters()["missing"] == 0
    sick.healthy = False
    until(lambda: "scorer is not at work" in client._fleet.replicas[0].trouble)
    sick.mood, sick.healthy = "ok", True
    until(lambda: everyone(client))
    seen = len(sick.seen)
    until(lambda: bool(client.submit(requests(4)).result()) and len(sick.seen) > seen)


def test_what_two_replicas_cannot_score_is_given_up(connect: Callable[..., RewardClient]) -> None:
    servers = [Server("internal") for _ in range(3)]
    client = connect(servers)
    client.check_server(["de"])
    with pytest.raises(RewardServerFailed, match="it is internal"):
        client.submit(requests(2)).result()
    assert sorted(len(server.seen) for server in servers) == [0, 1, 1]


def test_the_only_replica_is_not_left_out(connect: Callable[..., RewardClient]) -> None:
    sick = Server("internal")
    client = connect([sick], max_texts_per_request=1)
    for _ in range(5):
        with pytest.raises(RewardServerFailed):
            client.submit(requests(1)).result()
    sick.mood = "ok"
    assert_right(client.submit(requests(1)).result(), requests(1))
    assert len(sick.seen) == 6 and client.counters()["replica_failures"] == 0


@pytest.mark.parametrize("mood", ["lost", "cancelled"])
def test_what_a_replica_drops_at_its_end_another_is_asked(connect: Callable[..., RewardClient], mood: str) -> None:
    ending, other = Server(mood), Server()
    client = connect([ending, other])
    client.check_server(["de"])
    assert_right(client.submit(requests(8)).result(), requests(8))
    assert client.counters()["retries"] >= 1


# -- what hangs ----------------------------------------------------------------------------------------------------


def test_a_replica_that_hangs_keeps_no_request(
    connect: Callable[..., RewardClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "_REST_S", (5.0, 5.0))
    hung, well = Server("hang"), Server()
    client = connect([hung, well], deadline_s=2.0)
    client.check_server(["de"])
    asked = requests(8)
    started = time.monotonic()
    assert_right(client.submit(asked).result(), asked)
    # Half of the time, and not all of it; the server is told.
    assert 0.9 < time.monotonic() - started < 1.9
    counters = client.counters()
    assert counters["hedged"] >= 1 and counters["missing"] == counters["cancelled"] == 0
    until(lambda: len(hung.cancelled) == len(hung.seen))
    # Nobody waits for it again while it rests.
    assert client._fleet.replicas[0].connection is None and counters["replica_failures"] >= 1
    started = time.monotonic()
    assert_right(client.submit(asked).result(), asked)
    assert time.monotonic() - started < 0.8


def test_the_first_valid_answer_counts(connect: Callable[..., RewardClient]) -> None:
    """The second replica fails while the first is slow, and not the other way round."""
    hung = Server("hang")
    client = connect([hung, Server("internal")], deadline_s=1.0)
    client.check_server(["de"])
    client._fleet.replicas[1].outstanding += 1000
    started = time.monotonic()
    with pytest.raises(RewardDeadlineExceeded):
        client.submit(requests(2)).result()
    assert 0.9 < time.monotonic() - started < 1.6
    assert client.counters()["hedged"] == 1 and client.counters()["scoring_failures"] == 1


# -- who is not there ----------------------------------------------------------------------------------------------


def test_the_time_for_reconnecting_counts_from_the_loss(connect: Callable[..., RewardClient]) -> None:
    server = Server("busy")
    client = connect([server], connect_timeout_s=1.0)
    pending = client.submit(requests(2))
    # Full for longer than connect_timeout_s, and then away.
    time.sleep(1.3)
    server.there = False
    lost = time.monotonic()
    until(lambda: client.counters()["replicas_live"] == 0, within_s=12.0)
    with pytest.raises(RewardServerUnavailable, match=r"tried again for 1.\d of 1 s"):
        pending.result()
    assert 1.0 <= time.monotonic() - lost
    # Back for a moment: the next loss has its own time.
    server.there, server.mood = True, "ok"
    until(lambda: everyone(client))
    assert_right(client.submit(requests(2)).result(), requests(2))


def test_all_requests_of_a_submission_give_up_together(connect: Callable[..., RewardClient]) -> None:
    client = connect([Server(there=False)], connect_timeout_s=0.5, max_texts_per_request=1, concurrency=1)
    started = time.monotonic()
    with pytest.raises(RewardServerUnavailable):
        client.submit(requests(6)).result()
    assert time.monotonic() - started < 1.5, "not one after the other"


def stream(*replies: Any) -> SimpleNamespace:
    """A stub whose server says this."""
    return SimpleNamespace(ModelStreamInfer=lambda *_, **__: FakeStream(replies))


class FakeStream(list):
    def cancel(self) -> None:
        pass


def test_an_answer_without_output_is_no_reward_server() -> None:
    class NoTriton(Connection):
        def _foreign(self, said: str) -> RewardServerMismatch:
            return RewardServerMismatch(said)

    connection = NoTriton(Endpoint("127.0.0.1", 9), "", "h:9")
    connection._stub = stream(SimpleNamespace(error_message="", infer_response=SimpleNamespace(raw_output_contents=[])))
    with pytest.raises(RewardServerMismatch, match="h:9 gave an answer without an output"):
        connection.call(b"", 1.0)


# -- the end -------------------------------------------------------------------------------------------------------


def test_a_client_is_a_context(connect: Callable[..., RewardClient]) -> None:
    server = Server("hang")
    with connect([server]) as client:
        pending = client.submit(requests(6))
        until(lambda: len(server.seen) == 2)
    assert len(server.cancelled) == 2
    with pytest.raises(RewardCancelled):
        pending.result()
    client.close()


def test_an_unreadable_reply_is_that_replicas_failure(
    connect: Callable[..., RewardClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, reader = Server(), schema.scores_of
    client = connect([Server(), good])
    client.check_server(["de"])
    broken = iter([True])

    def scores_of(*arguments: Any) -> schema.ScoreReply:
        if next(broken, False):
            raise WireError(schema.ERROR_MALFORMED, "scores must be a list")
        return reader(*arguments)

    monkeypatch.setattr(schema, "scores_of", scores_of)
    assert_right(client.submit(requests(2)).result(), requests(2))
    assert client.counters()["scoring_failures"] == 1
