"""The wire schema: what is sent arrives, and nothing is joined that does not belong."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_lrpo.serving import schema
from nemo_lrpo.serving.errors import WireError
from nemo_lrpo.types import Score, ScoreRequest

text = st.text(st.characters(exclude_categories=["Cs"]))
unit = st.floats(0.0, 1.0)


def score(sample_id: str, reward: float = 0.5) -> Score:
    return Score(sample_id, 0.9, 0.8, 0.9, "de", 0.99, 1.0, reward)


def records(*scores: Score) -> list[dict]:
    return json.loads(schema.encode_scores(scores))["scores"]


@given(st.lists(st.builds(ScoreRequest, text, text, text, text, text)), text)
def test_requests_and_token_arrive_as_sent(requests: list[ScoreRequest], token: str) -> None:
    message = schema.decode_message(schema.encode_request(token, requests))
    assert message["token"] == token
    assert schema.requests_of(message, max_texts=10_000, max_chars=10_000) == requests


@given(
    st.lists(
        st.builds(Score, text, unit, unit, unit, st.none() | text, unit, unit, unit), unique_by=lambda s: s.sample_id
    ),
    st.randoms(use_true_random=False),
)
def test_scores_join_by_id_in_any_order(scores: list[Score], random) -> None:
    shuffled = random.sample(scores, len(scores))
    message = schema.decode_message(schema.encode_scores(shuffled))
    reply = schema.scores_of(message, [s.sample_id for s in scores])
    assert reply == schema.ScoreReply({s.sample_id: s for s in scores})


def test_unknown_and_duplicated_ids_are_counted_never_joined() -> None:
    sent = records(score("a"), score("stranger"), score("twice", 0.1), score("twice", 0.9), score("b"))
    reply = schema.scores_of({"scores": sent}, ["a", "b", "twice", "lost"])
    assert sorted(reply.scores) == ["a", "b"]
    assert (reply.unknown, reply.duplicated, reply.invalid) == (1, 1, 0)


@pytest.mark.parametrize("field", ["similarity", "calibrated", "quality", "confidence", "gate", "reward"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "0.5", True])
def test_a_score_with_a_bad_number_is_dropped(field: str, value: object) -> None:
    bad, good = records(score("bad"), score("good"))
    bad[field] = value
    # Through JSON, since that is how NaN would come.
    message = json.loads(json.dumps({"scores": [bad, good]}))
    reply = schema.scores_of(message, ["bad", "good"])
    assert sorted(reply.scores) == ["good"]
    assert reply.invalid == 1


@pytest.mark.parametrize("record", [None, 3, [], {}, {"sample_id": 7}, {"sample_id": "a"}])
def test_a_record_that_is_no_score_is_dropped(record: object) -> None:
    assert schema.scores_of({"scores": [record]}, ["a"]) == schema.ScoreReply({}, invalid=1)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", schema.ERROR_MALFORMED),
        (b"\xff\xfe", schema.ERROR_MALFORMED),
        (b"[" * 100_000, schema.ERROR_MALFORMED),
        (b"[]", schema.ERROR_MALFORMED),
        (b"{}", schema.ERROR_SCHEMA),
        (b'{"schema": 2}', schema.ERROR_SCHEMA),
        (b'{"schema": "1"}', schema.ERROR_SCHEMA),
    ],
)
def test_other_bytes_are_refused(data: bytes, kind: str) -> None:
    with pytest.raises(WireError) as refused:
        schema.decode_message(data)
    assert refused.value.kind == kind


def test_limits_and_fields_name_the_record() -> None:
    good = dataclasses.asdict(ScoreRequest("a", "12345", "r", "en", "de"))
    with pytest.raises(WireError, match=r"2 texts.*max_texts_per_request=1"):
        schema.requests_of({"texts": [good, good]}, max_texts=1, max_chars=5)
    with pytest.raises(WireError, match=r"texts\[1\].response has 6 characters; 5 allowed"):
        schema.requests_of({"texts": [good, {**good, "response": "123456"}]}, max_texts=2, max_chars=5)
    with pytest.raises(WireError, match=r"texts\[0\].reference is not a string"):
        schema.requests_of({"texts": [{**good, "reference": None}]}, max_texts=2, max_chars=5)
    with pytest.raises(WireError, match=r"texts\[0\] must have exactly the fields sample_id, .*language"):
        schema.requests_of({"texts": [{**good, "extra": ""}]}, max_texts=2, max_chars=5)


def test_a_lone_surrogate_does_not_stop_the_batch() -> None:
    message = schema.decode_message(schema.encode_request("", [ScoreRequest("a", "x\ud800y", "r", "en", "de")]))
    assert schema.requests_of(message, 1, 10)[0].response == "x?y"


def test_the_schema_is_light() -> None:
    """Also for clients that are no training run."""
    code = (
        "import sys, nemo_lrpo.serving.schema, nemo_lrpo.serving.endpoint, nemo_lrpo.serving.errors;"
        "print(sorted({'torch', 'numpy', 'pytriton', 'tritonclient', 'grpc'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
