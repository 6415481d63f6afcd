"""Who is let in, who waits, who is dropped: the desk with a scorer that does what the test says."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nemo_lrpo.config.reward import RewardServerConfig
from nemo_lrpo.serving import schema
from nemo_lrpo.serving.desk import RewardDesk
from nemo_lrpo.types import Score, ScoreRequest, ScoringAbandoned


class Scorer:
    """Scores 0.5; a response `hold` is held until `release`, `deaf` likewise and without asking whether to stop."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.at_work = 0
        self.ill = False
        self.seen: list[str] = []

    def score(self, requests: list[ScoreRequest], should_stop: Callable[[], bool]) -> list[Score]:
        self.at_work += 1
        self.seen += [request.sample_id for request in requests]
        responses = {request.response for request in requests}
        while responses & {"hold", "deaf"} and not self.release.wait(0.005):
            if "deaf" not in responses and should_stop():
                raise ScoringAbandoned
        if "crash" in responses:
            raise ArithmeticError("the encoder fell over")
        scores = [Score(r.sample_id, None if r.response == "mask" else 0.5, 0.5, 1.0, "de", 0.9) for r in requests]
        return scores[1:] if "short" in responses else scores

    def identity(self) -> dict[str, object]:
        return {"languages": ["de"]}

    def healthy(self) -> bool:
        return not self.ill

    def counts(self) -> dict[str, float]:
        return {
            "abstained/de": 3.0, "cache_hits/reference": 3.0, "cache_misses/reference": 1.0,
            "encoder_tokens": 30.0, "encoder_capacity_tokens": 40.0,
        }  # fmt: skip


@contextmanager
def open_desk(**changes: Any) -> Iterator[tuple[RewardDesk, Scorer]]:
    scorer = Scorer()
    config = RewardServerConfig(**changes)
    config.check()
    desk = RewardDesk(config, scorer)
    try:
        yield desk, scorer
    finally:
        scorer.release.set()
        desk.close()


def ask(desk: RewardDesk, request_id: str, response: str = "text", deadline_s: float = 10.0) -> Awaitable[dict]:
    request = ScoreRequest(f"{request_id}/0", response, "reference", "de", "de")
    return send(desk, schema.encode_score_request("", request_id, deadline_s, [schema.encode_text(request)]))


async def send(desk: RewardDesk, data: bytes) -> dict[str, Any]:
    message = json.loads(await desk.answer(data))
    return message.get("error", message)


async def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.005)


def test_several_are_scored_at_once_and_more_wait_their_turn() -> None:
    async def go(desk: RewardDesk, scorer: Scorer) -> None:
        held = [asyncio.create_task(ask(desk, f"r{number}", "hold")) for number in range(5)]
        await until(lambda: scorer.at_work == 3)
        await asyncio.sleep(0.05)
        assert scorer.at_work == 3
        metrics = desk.metrics.flat()
        assert (metrics["lrpo_reward_in_progress"], metrics["lrpo_reward_waiting"]) == (3, 2)
        scorer.release.set()
        for number, reply in enumerate(await asyncio.gather(*held)):
            assert reply["request_id"] == f"r{number}" and reply["scores"][0]["reward"] == 0.5

    with open_desk(concurrency=3) as (desk, scorer):
        asyncio.run(go(desk, scorer))


def test_who_comes_when_the_queue_is_full_is_told_when_to_come_back() -> None:
    async def go(desk: RewardDesk, scorer: Scorer) -> None:
        held = [asyncio.create_task(ask(desk, f"r{number}", "hold")) for number in range(3)]
        await until(lambda: desk.metrics.flat()["lrpo_reward_waiting"] == 2)
        assert not desk.accepting
        refusal = await ask(desk, "late")
        assert refusal["kind"] == "busy" and "max_pending=2" in refusal["message"]
        assert 0 < refusal["retry_after_s"] <= 10
        # What needs no scoring is answered nevertheless.
        assert "identity" in await send(desk, schema.encode_request("identity", ""))
        scorer.release.set()
        await asyncio.gather(*held)
        assert "scores" in await ask(desk, "late")

    with open_desk(concurrency=1, max_pending=2) as (desk, scorer):
        asyncio.run(go(desk, scorer))


def test_what_waits_past_its_deadline_is_never_scored() -> None:
    async def go(desk: RewardDesk, scorer: Scorer) -> None:
        held = asyncio.create_task(ask(desk, "first", "hold"))
        await until(lambda: scorer.at_work == 1)
        started = time.monotonic()
        refusal = await ask(desk, "hasty", deadline_s=0.1)
        assert refusal["kind"] == "expired" and 0.05 < time.monotonic() - started < 1.0
        assert desk.metrics.flat()["lrpo_reward_waiting"] == 0, "it keeps no place"
        scorer.release.set()
        await held
        await ask(desk, "next")
        assert (await ask(desk, "too late", deadline_s=-1.0))["kind"] == "expired"
        assert scorer.seen == ["first/0", "next/0"]

    with open_desk(concurrency=1) as (desk, scorer):
        asyncio.run(go(desk, scorer))


@pytest.mark.parametrize("response", ["hold", "deaf"])
def test_what_is_scored_past_its_deadline_is_abandoned(response: str) -> None:
    async def go(desk: RewardDesk) -> None:
        started = time.monotonic()
        assert (await ask(desk, "r", response, deadline_s=0.1))["kind"] == "expired"
        assert time.monotonic() - started < 1.0

    with open_desk(concurrency=1) as (desk, _):
        asyncio.run(go(desk))


def test_cancelled_requests_are_dropped_wherever_they_are() -> None:
    async def go(desk: RewardDesk, scorer: Scorer) -> None:
        scored, waiting = (asyncio.create_task(ask(desk, name, "hold")) for name in ("scored", "waiting"))
        await until(lambda: scorer.at_work == 1 and desk.metrics.flat()["lrpo_reward_waiting"] == 1)
        (message,) = schema.encode_cancel("", ["scored", "waiting", "unknown"])
        assert (await send(desk, message))["cancelled"] == 2
        assert [(await task)["kind"] for task in (waiting, scored)] == ["cancelled"] * 2
        scorer.release.set()
        assert "scores" in await ask(desk, "next")
        assert scorer.seen == ["scored/0", "next/0"]

    with open_desk(concurrency=1) as (desk, scorer):
        asyncio.run(go(desk, scorer))


def test_a_failing_request_fails_alone() -> None:
    async def go(desk: RewardDesk) -> None:
        replies = await asyncio.gather(*[ask(desk, name, name) for name in ("crash", "good", "short")])
        assert "ArithmeticError: the encoder fell over" in replies[0]["message"]
        assert "0 scores, not one for each of 1 answers" in replies[2]["message"]
        assert [reply.get("kind") for reply in replies] == ["internal", None, "internal"]

    with open_desk() as (desk, _):
        asyncio.run(go(desk))


def test_an_id_in_use_is_refused() -> None:
    async def go(desk: RewardDesk, scorer: Scorer) -> None:
        held = asyncio.create_task(ask(desk, "r", "hold"))
        await until(lambda: scorer.at_work == 1)
        assert (await ask(desk, "r"))["kind"] == "malformed"
        scorer.release.set()
        assert "scores" in await held
        assert "scores" in await ask(desk, "r")

    with open_desk() as (desk, scorer):
        asyncio.run(go(desk, scorer))


def test_every_kind_of_message_wants_the_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("geheim-ß")
    (tmp_path / "token").chmod(0o600)

    async def go(desk: RewardDesk) -> None:
        for fields in ({"kind": "identity"}, {"kind": "metrics"}, {"kind": "cancel"}, {"kind": "?"}):
            for token in ("", "geheim", None, 7, ["geheim-ß"], "\ud800"):
                data = json.dumps({"schema": 3, "token": token, **fields}).encode()
                assert (await send(desk, data))["kind"] == "token"
        assert "metrics" in await send(desk, schema.encode_request("metrics", "geheim-ß"))

    with open_desk(token_file=str(tmp_path / "token")) as (desk, _):
        asyncio.run(go(desk))
        assert desk.authorised("geheim-ß") and not desk.authorised("geheim")


def test_without_the_token_nothing_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)

    def answered(token: str) -> tuple[dict[str, Any], float]:
        """The refusal of many small objects, and the memory that it took, in MiB."""
        data = schema.encode_request("score", token, [], request_id="r", deadline_s=1.0) + b"{}\n" * 2_000_000
        with open_desk(token_file=str(tmp_path / "token")) as (desk, _):
            tracemalloc.start()
            try:
                return asyncio.run(send(desk, data)), tracemalloc.get_traced_memory()[1] / 2**20
            finally:
                tracemalloc.stop()

    refusal, memory = answered("wrong")
    assert refusal["kind"] == "token" and memory < 0.5
    # Nor with it, beyond the limits.
    refusal, memory = answered("secret")
    assert refusal["kind"] == "limit" and "2000000 texts" in refusal["message"] and memory < 0.5


def test_a_language_that_is_not_served_is_refused_by_name() -> None:
    request = ScoreRequest("a", "text", "reference", "de", "ko")
    data = schema.encode_score_request("", "r", 5.0, [schema.encode_text(request)])
    with open_desk() as (desk, scorer):
        refusal = asyncio.run(send(desk, data))
        assert (
            refusal["kind"] == "language" and "texts[0].language='ko' is not served; accepted: de" in refusal["message"]
        )
        assert not scorer.seen


def test_a_scorer_that_cannot_score_is_said_to_be_ill() -> None:
    with open_desk(max_text_chars=77) as (desk, scorer):
        for ill in (False, True):
            scorer.ill = ill
            reply = asyncio.run(send(desk, schema.encode_request("identity", "")))
            assert reply["healthy"] is not ill and desk.accepting is not ill
            assert reply["identity"]["max_text_chars"] == 77


def test_the_end_lets_nobody_in_and_nobody_wait() -> None:
    async def go(desk: RewardDesk, scorer: Scorer) -> None:
        held = asyncio.create_task(ask(desk, "r", "hold"))
        await until(lambda: scorer.at_work == 1)
        await asyncio.to_thread(desk.close, 0.05)
        assert (await held)["kind"] == "cancelled"
        refusal = await ask(desk, "late")
        assert refusal["kind"] == "busy" and "ending" in refusal["message"]

    with open_desk() as (desk, scorer):
        asyncio.run(go(desk, scorer))


def test_metrics() -> None:
    async def go(desk: RewardDesk) -> dict[str, float]:
        await ask(desk, "a", "mask")
        await ask(desk, "b")
        await ask(desk, "c", "crash")
        await send(desk, b"nonsense")
        return (await send(desk, schema.encode_request("metrics", "")))["metrics"]

    with open_desk() as (desk, _):
        found = asyncio.run(go(desk))
        text = desk.metrics.text().decode()
    expected = {
        'lrpo_reward_requests_total{kind="score",outcome="ok"}': 2,
        'lrpo_reward_requests_total{kind="score",outcome="internal"}': 1,
        'lrpo_reward_requests_total{kind="unread",outcome="malformed"}': 1,
        "lrpo_reward_texts_total": 2,
        "lrpo_reward_missing_total": 1,
        "lrpo_reward_request_seconds_count": 3,
        "lrpo_reward_wait_seconds_count": 3,
        'lrpo_reward_abstained_total{label="de"}': 3,
        'lrpo_reward_batch_fill{label=""}': 0.75,
        'lrpo_reward_cache_hit_rate{label="reference"}': 0.75,
    }
    assert {name: found[name] for name in expected} == expected
    for name, value in expected.items():
        assert f"{name} {float(value)}" in text
    assert 'lrpo_reward_request_seconds_bucket{le="0.05"}' in text
