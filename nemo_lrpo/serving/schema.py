"""The wire schema, version 2: UTF-8 JSON objects, one per message, joined by sample id.

    score     {"schema": 2, "kind": "score", "token": "...", "request_id": "5f0c...", "deadline_s": 599.2,
               "texts": [{"sample_id": "12/q7/1", "response": "...", "reference": "...", "reference_language": "de",
               "language": "ja", "question": "..."}, ...]}
      reply   {"schema": 2, "request_id": "5f0c...", "scores": [{"sample_id": "12/q7/1", "digest": "9a1b...",
               "reward": 0.93, "quality": 0.93, "gate": 1.0, "language": "ja", "confidence": 0.99,
               "parts": {"similarity": 0.93}, "measures": {"similarity": 0.91}, "flags": []}, ...]}
    identity  {"schema": 2, "kind": "identity", "token": "..."}
      reply   {"schema": 2, "identity": {"languages": ["ar", ...], ...}}
    metrics   {"schema": 2, "kind": "metrics", "token": "..."}
      reply   {"schema": 2, "metrics": {"lrpo_reward_texts_total": 4096.0, ...}}
    cancel    {"schema": 2, "kind": "cancel", "token": "...", "request_ids": ["5f0c...", ...]}
      reply   {"schema": 2, "cancelled": 1}
    refusal   {"schema": 2, "error": {"kind": "busy", "message": "...", "retry_after_s": 0.4}}

`deadline_s` is what is left of the client's deadline when it sends. The digest is that of the texts that were scored,
so that a reply with mixed-up rows is seen. The scores of a reply may come in any order and be incomplete. Any change
of meaning raises SCHEMA_VERSION; the two sides refuse each other when their versions differ. Imports neither torch nor
NumPy nor PyTriton.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_lrpo.serving.errors import WireError
from nemo_lrpo.types import Score, ScoreRequest

SCHEMA_VERSION = 2

MODEL = "reward"
"""Name of the one Triton model."""
REQUEST_TENSOR = "request"
REPLY_TENSOR = "reply"
"""uint8 [bytes], one message each."""

KIND_SCORE = "score"
KIND_IDENTITY = "identity"
KIND_METRICS = "metrics"
KIND_CANCEL = "cancel"
KINDS = (KIND_SCORE, KIND_IDENTITY, KIND_METRICS, KIND_CANCEL)

ERROR_SCHEMA = "schema"
ERROR_TOKEN = "token"
ERROR_LIMIT = "limit"
ERROR_MALFORMED = "malformed"
ERROR_INTERNAL = "internal"
ERROR_BUSY = "busy"
"""Too much is waiting; `retry_after_s` says when to come back."""
ERROR_EXPIRED = "expired"
ERROR_CANCELLED = "cancelled"

_MAX_ID_CHARS = 128
_REQUEST_FIELDS = tuple(field.name for field in dataclasses.fields(ScoreRequest))
_SCORE_FIELDS = frozenset(field.name for field in dataclasses.fields(Score))
_UNIT_FIELDS = ("reward", "quality", "gate")


@dataclasses.dataclass(frozen=True)
class ScoreJob:
    """A decoded score request. deadline_s: seconds left when it was sent, > 0 unless it was sent too late."""

    request_id: str
    deadline_s: float
    requests: list[ScoreRequest]


@dataclasses.dataclass
class ScoreReply:
    """The usable scores of a reply by sample id, and how many records were dropped and why."""

    scores: dict[str, Score]
    unknown: int = 0
    """Records whose id was not asked for."""
    duplicated: int = 0
    """Ids that came more than once: none of their records counts."""
    invalid: int = 0
    """Records with a missing field, a wrong type, a number that is not finite or out of range."""
    mixed_up: int = 0
    """Records of other texts than those that were sent under their id, or in the reply to another request."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What a server says instead of an answer. kind: one of ERROR_*; retry_after_s: seconds, with ERROR_BUSY."""

    kind: str
    message: str
    retry_after_s: float = 0.0


def digest(request: ScoreRequest) -> str:
    """16 hexadecimal digits that stand for all fields of the request, as both sides of the wire see them."""
    fields = json.dumps([getattr(request, name) for name in _REQUEST_FIELDS], ensure_ascii=False)
    return hashlib.blake2b(fields.encode("utf-8", errors="replace"), digest_size=8).hexdigest()


def encode_score_request(token: str, request_id: str, deadline_s: float, requests: Sequence[ScoreRequest]) -> bytes:
    """A score request."""
    texts = [{name: getattr(request, name) for name in _REQUEST_FIELDS} for request in requests]
    return encode_request(KIND_SCORE, token, request_id=request_id, deadline_s=deadline_s, texts=texts)


def encode_request(kind: str, token: str, **fields: Any) -> bytes:
    """A request of one of KINDS; `fields` are those of the kind, with values that survive JSON."""
    return encode_message({"kind": kind, "token": token, **fields})


def encode_scores(job: ScoreJob, scores: Sequence[Score]) -> bytes:
    """The reply to `job`, whose requests `scores` answer one by one, in order."""
    records = [{**dataclasses.asdict(score), "digest": digest(request)} for request, score in zip(job.requests, scores)]
    return encode_message({"request_id": job.request_id, "scores": records})


def encode_refusal(kind: str, message: str, retry_after_s: float | None = None) -> bytes:
    """A refusal; `kind` is one of ERROR_*."""
    error: dict[str, Any] = {"kind": kind, "message": message}
    if retry_after_s is not None:
        error["retry_after_s"] = retry_after_s
    return encode_message({"error": error})


def encode_message(message: Mapping[str, Any]) -> bytes:
    """Any message, the version added."""
    # A lone surrogate, which a broken decoder may leave in a response, has no UTF-8 form; it becomes a question mark.
    text = json.dumps({"schema": SCHEMA_VERSION, **message}, ensure_ascii=False)
    return text.encode("utf-8", errors="replace")


def decode_message(data: bytes) -> dict[str, Any]:
    """Any message as a dict, its version checked. Raises WireError."""
    try:
        # Decoded here: json would guess UTF-16 and UTF-32 too.
        message = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError(ERROR_MALFORMED, f"not a JSON message ({error})") from None
    if not isinstance(message, dict):
        raise WireError(ERROR_MALFORMED, f"the message is a {type(message).__name__}, not an object")
    version = message.get("schema")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise WireError(ERROR_SCHEMA, f"schema version {version!r:.40}; this side speaks {SCHEMA_VERSION}")
    return message


def kind_of(message: Mapping[str, Any]) -> str:
    """Which of KINDS a decoded request is. Raises WireError."""
    kind = message.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise WireError(ERROR_MALFORMED, f"kind {kind!r:.40} is not known; accepted: {', '.join(KINDS)}")
    return kind


def score_job_of(message: Mapping[str, Any], max_texts: int, max_chars: int) -> ScoreJob:
    """A decoded score request, checked. Raises WireError, naming the record, beyond a limit too."""
    request_id = message.get("request_id")
    if not _is_id(request_id):
        raise WireError(ERROR_MALFORMED, f"request_id must be a string of 1 to {_MAX_ID_CHARS} characters")
    deadline_s = message.get("deadline_s")
    if not _is_number(deadline_s):
        raise WireError(ERROR_MALFORMED, "deadline_s must be a finite number of seconds")
    return ScoreJob(str(request_id), float(deadline_s or 0.0), _requests_of(message, max_texts, max_chars))


def cancelled_ids_of(message: Mapping[str, Any]) -> list[str]:
    """The request ids in a decoded cancel request. Raises WireError."""
    ids = message.get("request_ids")
    if not isinstance(ids, list) or not all(_is_id(each) for each in ids):
        raise WireError(ERROR_MALFORMED, f"request_ids must be a list of strings of 1 to {_MAX_ID_CHARS} characters")
    return ids


def refusal_of(message: Mapping[str, Any]) -> Refusal | None:
    """The refusal in a decoded reply; None where it is an answer. Raises WireError for one that says nothing."""
    error = message.get("error")
    if error is None:
        return None
    kind, text = (error.get("kind"), error.get("message")) if isinstance(error, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(text, str):
        raise WireError(ERROR_MALFORMED, "error must have kind and message")
    wait = error.get("retry_after_s")
    return Refusal(kind, text, max(0.0, float(wait)) if _is_number(wait) else 0.0)


def metrics_of(message: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a decoded metrics reply. Raises WireError."""
    metrics = message.get("metrics")
    if not isinstance(metrics, dict) or not all(_is_number(value) for value in metrics.values()):
        raise WireError(ERROR_MALFORMED, "metrics must be numbers by name")
    return {name: float(value) for name, value in metrics.items()}


def scores_of(message: Mapping[str, Any], request_id: str, requests: Sequence[ScoreRequest]) -> ScoreReply:
    """The scores in a decoded reply that can be joined to `requests`, sent as `request_id`; the others are counted.

    Raises WireError if the reply holds no list of scores at all.
    """
    records = message.get("scores")
    if not isinstance(records, list):
        raise WireError(ERROR_MALFORMED, "scores must be a list")
    if message.get("request_id") != request_id:
        return ScoreReply({}, mixed_up=len(records))
    reply = ScoreReply({})
    asked = {request.sample_id: request for request in requests}
    by_id: dict[str, list[Any]] = {}
    for record in records:
        sample_id = record.get("sample_id") if isinstance(record, dict) else None
        if not isinstance(sample_id, str):
            reply.invalid += 1
        elif sample_id not in asked:
            reply.unknown += 1
        else:
            by_id.setdefault(sample_id, []).append(record)
    for sample_id, found in by_id.items():
        score = _score_of(found[0])
        if len(found) > 1:
            reply.duplicated += 1
        elif score is None:
            reply.invalid += 1
        elif found[0]["digest"] != digest(asked[sample_id]):
            reply.mixed_up += 1
        else:
            reply.scores[sample_id] = score
    return reply


def _requests_of(message: Mapping[str, Any], max_texts: int, max_chars: int) -> list[ScoreRequest]:
    texts = message.get("texts")
    if not isinstance(texts, list):
        raise WireError(ERROR_MALFORMED, "texts must be a list")
    if len(texts) > max_texts:
        raise WireError(ERROR_LIMIT, f"{len(texts)} texts in one request; max_texts_per_request={max_texts}")
    requests: dict[str, ScoreRequest] = {}
    for index, record in enumerate(texts):
        if not isinstance(record, dict) or set(record) != set(_REQUEST_FIELDS):
            raise WireError(
                ERROR_MALFORMED, f"texts[{index}] must have exactly the fields {', '.join(_REQUEST_FIELDS)}"
            )
        for name, value in record.items():
            if not isinstance(value, str):
                raise WireError(ERROR_MALFORMED, f"texts[{index}].{name} is not a string")
            if len(value) > max_chars:
                raise WireError(ERROR_LIMIT, f"texts[{index}].{name} has {len(value)} characters; {max_chars} allowed")
        if record["sample_id"] in requests:
            raise WireError(ERROR_MALFORMED, f"texts[{index}].sample_id is that of an earlier record")
        requests[record["sample_id"]] = ScoreRequest(**record)
    return list(requests.values())


def _score_of(record: Mapping[str, Any]) -> Score | None:
    """The record as a score, None where it is none."""
    if set(record) != _SCORE_FIELDS | {"digest"}:
        return None
    units = {name: record[name] for name in _UNIT_FIELDS}
    if not all(value is None or (_is_number(value) and 0.0 <= value <= 1.0) for value in units.values()):
        return None
    language, confidence, flags = record["language"], record["confidence"], record["flags"]
    if not (language is None or isinstance(language, str)) or not _is_number(confidence):
        return None
    if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
        return None
    for name in ("parts", "measures"):
        if not isinstance(record[name], dict) or not all(_is_number(value) for value in record[name].values()):
            return None
    return Score(
        sample_id=record["sample_id"],
        language=language,
        confidence=float(confidence),
        parts={name: float(value) for name, value in record["parts"].items()},
        measures={name: float(value) for name, value in record["measures"].items()},
        flags=tuple(flags),
        **{name: None if value is None else float(value) for name, value in units.items()},
    )


def _is_id(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_ID_CHARS


def _is_number(value: object) -> bool:
    """Finite, and within what a double holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
