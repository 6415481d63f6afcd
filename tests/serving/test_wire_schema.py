"""The wire schema: what is sent arrives, nothing is joined that does not belong, and no bytes do harm."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_lrpo.serving import schema
from nemo_lrpo.serving.errors import WireError
from nemo_lrpo.types import Score, ScoreRequest

text = st.text(st.characters(exclude_categories=["Cs"]))
any_text = st.text(st.characters())
unit = st.floats(0.0, 1.0)
numbers = st.dictionaries(text, st.floats(allow_nan=False, allow_infinity=False), max_size=3)
requests = st.lists(st.builds(ScoreRequest, *[text] * 6), unique_by=lambda r: r.sample_id, max_size=5)
scored = st.builds(
    Score, text, st.none() | unit, st.none() | unit, st.none() | unit, st.none() | text, unit, numbers, numbers,
    st.lists(text, max_size=3).map(tuple),
)  # fmt: skip
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
)


def read_request(data: bytes) -> object:
    """A request as the server reads it. Raises WireError."""
    request = schema.open_request(data)
    kind = schema.kind_of(request)
    if kind == schema.KIND_CANCEL:
        return schema.cancelled_ids_of(request)
    return schema.score_job_of(request, max_texts=100, max_chars=1000) if kind == schema.KIND_SCORE else kind


def score_request(token: str, request_id: str, deadline_s: float, sent: list[ScoreRequest]) -> bytes:
    return schema.encode_score_request(token, request_id, deadline_s, [schema.encode_text(each) for each in sent])


def read_job(data: bytes, max_texts: int = 10_000, max_chars: int = 10_000) -> schema.ScoreJob:
    return schema.score_job_of(schema.open_request(data), max_texts, max_chars)


def lines(head: dict[str, Any], *items: Any) -> bytes:
    """A request of these parts, whatever they are."""
    return "".join(json.dumps(each) + "\n" for each in ({"schema": 3, "items": len(items), **head}, *items)).encode()


def make_request(sample_id: str) -> ScoreRequest:
    return ScoreRequest(sample_id, f"the answer of {sample_id}", "reference", "en", "de", "question")


def make_score(sample_id: str, reward: float | None = 0.5) -> Score:
    return Score(sample_id, reward, 0.5, 1.0, "de", 0.99, {"similarity": 0.5}, {"similarity": 0.1}, ("truncated",))


def records(*sample_ids: str) -> list[dict[str, Any]]:
    """Records of a right reply to make_request of each id."""
    job = schema.ScoreJob("r", 1.0, [make_request(each) for each in sample_ids])
    return json.loads(schema.encode_scores(job, [make_score(each) for each in sample_ids]))["scores"]


def read(scores: list[Any], *asked: str, request_id: str = "r") -> schema.ScoreReply:
    # Through JSON, since that is how NaN would come.
    message = json.loads(json.dumps({"request_id": request_id, "scores": scores}))
    return schema.scores_of(message, "r", [make_request(each) for each in asked])


@given(text, st.text(min_size=1, max_size=100), st.floats(0, 1e6), requests)
def test_a_score_request_arrives_as_sent(
    token: str, request_id: str, deadline_s: float, sent: list[ScoreRequest]
) -> None:
    clean = request_id.encode("utf-8", "replace").decode()
    request = schema.open_request(score_request(token, request_id, deadline_s, sent))
    assert request.token == token and schema.kind_of(request) == schema.KIND_SCORE
    job = schema.score_job_of(request, max_texts=10_000, max_chars=10_000)
    assert job == schema.ScoreJob(clean, deadline_s, sent)


@given(st.lists(st.tuples(scored, st.builds(ScoreRequest, *[any_text] * 6)), max_size=5), st.integers())
def test_scores_join_by_id_in_any_order(pairs: list[tuple[Score, ScoreRequest]], seed: int) -> None:
    scores = [dataclasses.replace(score, sample_id=str(place)) for place, (score, _) in enumerate(pairs)]
    asked = [dataclasses.replace(request, sample_id=str(place)) for place, (_, request) in enumerate(pairs)]
    # What the server sees of the request, lone surrogates and all.
    job = read_job(score_request("", "r", 1.0, asked))
    reply = schema.decode_message(schema.encode_scores(job, scores))
    random.Random(seed).shuffle(reply["scores"])
    assert schema.scores_of(reply, "r", asked) == schema.ScoreReply({score.sample_id: score for score in scores})


def test_unknown_and_duplicated_ids_are_counted_never_joined() -> None:
    sent = records("a", "stranger", "twice", "twice", "b")
    sent[3]["reward"] = 0.9
    reply = read(sent, "a", "b", "twice", "lost")
    assert sorted(reply.scores) == ["a", "b"]
    assert (reply.unknown, reply.duplicated, reply.invalid, reply.mixed_up) == (1, 1, 0, 0)


def test_mixed_up_rows_are_counted_never_joined() -> None:
    a, b, c = records("a", "b", "c")
    a["sample_id"], b["sample_id"] = "b", "a"
    reply = read([a, b, c], "a", "b", "c")
    assert sorted(reply.scores) == ["c"] and reply.mixed_up == 2
    assert read([a, b, c], "a", "b", "c", request_id="another") == schema.ScoreReply({}, mixed_up=3)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ScoreRequest)])
def test_the_digest_is_of_every_field(field: str) -> None:
    request = make_request("a")
    other = dataclasses.replace(request, **{field: "b"})
    assert schema.digest(request) != schema.digest(other)
    moved = (
        dataclasses.replace(request, response="xy", reference="z"),
        dataclasses.replace(request, response="x", reference="yz"),
    )
    assert schema.digest(moved[0]) != schema.digest(moved[1])


@pytest.mark.parametrize("field", ["confidence", "gate", "quality", "reward", "parts", "measures"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "0.5", True, 10**400, [0.5]])
def test_a_score_with_a_bad_number_is_dropped(field: str, value: object) -> None:
    bad, good = records("bad", "good")
    bad[field] = {"similarity": value} if field in ("parts", "measures") else value
    reply = read([bad, good], "bad", "good")
    assert sorted(reply.scores) == ["good"]
    assert reply.invalid == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("reward", 1.1), ("reward", -0.1), ("quality", 2), ("gate", -1), ("confidence", None), ("language", 3),
     ("flags", "empty"), ("flags", [1]), ("parts", None), ("digest", 7), ("extra", 1)],
)  # fmt: skip
def test_a_score_out_of_shape_is_dropped(field: str, value: object) -> None:
    (record,) = records("a")
    assert read([record], "a").scores
    record[field] = value
    assert not read([record], "a").scores


def test_a_reward_may_be_null() -> None:
    job = schema.ScoreJob("r", 1.0, [make_request("a")])
    masked = Score("a", None, None, None, None, 0.3, {}, {}, ("abstained",))
    reply = schema.scores_of(schema.decode_message(schema.encode_scores(job, [masked])), "r", job.requests)
    assert reply.scores == {"a": masked}


@pytest.mark.parametrize("record", [None, 3, [], {}, {"sample_id": 7}, {"sample_id": "a"}])
def test_a_record_that_is_no_score_is_dropped(record: object) -> None:
    assert read([record], "a") == schema.ScoreReply({}, invalid=1)


@given(any_json, st.sampled_from(["scores", "request_id", "metrics", "error"]))
def test_no_reply_does_harm(value: Any, field: str) -> None:
    message = {"request_id": "r", "scores": [], field: value}
    asked = [make_request("a")]
    for reader in (lambda: schema.scores_of(message, "r", asked), lambda: schema.metrics_of(message)):
        try:
            reader()
        except WireError:
            pass
    try:
        schema.refusal_of(message)
    except WireError:
        pass
    (record,) = records("a")
    for name in record:
        try:
            found = schema.scores_of({"request_id": "r", "scores": [{**record, name: value}]}, "r", asked).scores
        except WireError:
            continue
        assert all(score.reward is None or 0.0 <= score.reward <= 1.0 for score in found.values())


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", schema.ERROR_MALFORMED),
        (b"\xff\xfe", schema.ERROR_MALFORMED),
        ('{"schema": 3}'.encode("utf-16"), schema.ERROR_MALFORMED),
        (b"[" * 100_000, schema.ERROR_MALFORMED),
        (b"1" * 10_000, schema.ERROR_MALFORMED),
        (b"[]", schema.ERROR_MALFORMED),
        (b"{}", schema.ERROR_SCHEMA),
        (b'{"schema": 2}', schema.ERROR_SCHEMA),
        (b'{"schema": 3.0}', schema.ERROR_SCHEMA),
        (b'{"schema": "2"}', schema.ERROR_SCHEMA),
        (b'{"schema": 3}', schema.ERROR_MALFORMED),
        (b'{"schema": 3, "kind": "scores"}', schema.ERROR_MALFORMED),
    ],
)
def test_other_bytes_are_refused(data: bytes, kind: str) -> None:
    with pytest.raises(WireError) as refused:
        read_request(data)
    assert refused.value.kind == kind


def only_wire_errors(data: bytes) -> None:
    try:
        read_request(data)
    except WireError as error:
        assert len(str(error)) < 1000


@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    only_wire_errors(data)


@given(any_json, st.sampled_from(schema.KINDS), st.lists(any_json, max_size=3))
def test_any_json(value: Any, kind: str, items: list[Any]) -> None:
    only_wire_errors(json.dumps(value).encode())
    fields = {name: value for name in ("request_id", "deadline_s", "items")}
    only_wire_errors(lines({**fields, "kind": kind}, *items))
    only_wire_errors(lines({"kind": kind, "request_id": "r", "deadline_s": 1.0}, *items))


@given(requests.filter(len), any_json, st.data())
def test_requests_with_one_value_replaced(sent: list[ScoreRequest], value: Any, data: st.DataObject) -> None:
    head, *items = map(json.loads, score_request("t", "r", 1.0, sent).splitlines())
    target: Any = data.draw(st.sampled_from([head, items[0]]))
    name = data.draw(st.sampled_from(sorted(target)))
    if data.draw(st.booleans()):
        del target[name]
    else:
        target[name] = value
    only_wire_errors(lines(head, *items))


@given(requests, st.data())
def test_requests_with_bytes_changed(sent: list[ScoreRequest], data: st.DataObject) -> None:
    encoded = bytearray(score_request("t", "r", 1.0, sent))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    only_wire_errors(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]))


def test_a_request_that_is_cut_off_is_refused_wherever() -> None:
    whole = score_request("t", "r", 1.0, [make_request("a"), make_request("b")])
    assert len(read_job(whole).requests) == 2
    for end in range(len(whole)):
        with pytest.raises(WireError):
            read_job(whole[:end])


def test_cancelled_ids_arrive_in_as_many_messages_as_it_takes() -> None:
    sent = [f"request {n}" for n in range(5000)]
    found = [schema.cancelled_ids_of(schema.open_request(data)) for data in schema.encode_cancel("t", sent)]
    assert len(found) == 2 and [each for ids in found for each in ids] == sent
    for bad in (7, None, "", "x" * 129, ["a"]):
        with pytest.raises(WireError, match="ids of requests"):
            read_request(lines({"kind": "cancel"}, "good", bad))


def test_limits_and_fields_name_the_record() -> None:
    good = dataclasses.asdict(ScoreRequest("a", "12345", "r", "en", "de", ""))
    other = {**good, "sample_id": "b"}

    def refused(message: str, *texts: dict[str, Any], max_texts: int = 2, **fields: Any) -> None:
        with pytest.raises(WireError, match=message):
            read_job(lines({"request_id": "r", "deadline_s": 1.0, **fields}, *texts), max_texts, max_chars=5)

    refused(r"2 texts.*max_texts_per_request=1", good, other, max_texts=1)
    refused(r"texts\[1\].response has 6 characters; 5 allowed", good, {**other, "response": "123456"})
    refused(r"texts\[0\].reference is not a string", {**good, "reference": None})
    refused(r"texts\[0\] must have exactly the fields sample_id, .*question", {**good, "extra": ""})
    refused(r"texts\[1\].sample_id is that of an earlier record", good, good)
    refused(r"texts\[0\] has \d+ bytes; \d+ allowed", {**good, "response": "x" * 2000})
    for request_id in ("", "x" * 129, 7, None):
        refused("request_id must be a string", good, request_id=request_id)
    for deadline_s in (math.nan, math.inf, None, "1", True):
        refused("deadline_s must be a finite number", good, deadline_s=deadline_s)


def test_a_lone_surrogate_does_not_stop_the_batch() -> None:
    request = ScoreRequest("a", "x\ud800y", "r", "en", "de")
    job = read_job(score_request("", "r", 1.0, [request]))
    assert job.requests[0].response == "x?y"
    reply = schema.decode_message(schema.encode_scores(job, [make_score("a")]))
    assert "a" in schema.scores_of(reply, "r", [request]).scores
    # Of another client, which escapes it.
    assert read_job(lines({"request_id": "r", "deadline_s": 1.0}, dataclasses.asdict(request))) == job
    with pytest.raises(WireError, match=r"texts\[0\].sample_id='a.ud800' has a lone surrogate"):
        read_job(lines({"request_id": "r", "deadline_s": 1.0}, {**dataclasses.asdict(request), "sample_id": "a\ud800"}))


def test_the_schema_is_light() -> None:
    """Also for clients that are no training run."""
    code = (
        "import sys, nemo_lrpo.serving.schema, nemo_lrpo.serving.endpoint, nemo_lrpo.serving.errors;"
        "print(sorted({'torch', 'numpy', 'pytriton', 'tritonclient', 'grpc'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
