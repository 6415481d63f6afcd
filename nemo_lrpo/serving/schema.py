"""The wire schema, version 3. Requests are lines of UTF-8 JSON, each ended by a newline: a head, and one line for each
of its items. Replies are one JSON object. Scores are joined by sample id.

    score     {"schema": 3, "token": "...", "kind": "score", "request_id": "5f0c...", "deadline_s": 599.2, "items": 2}
              {"sample_id": "12/q7/1", "response": "...", "reference": "...", "reference_language": "de",
               "language": "ja", "question": "..."}                                        (one line for each text)
      reply   {"schema": 3, "request_id": "5f0c...", "scores": [{"sample_id": "12/q7/1", "digest": "9a1b...",
               "reward": 0.93, "quality": 0.93, "gate": 1.0, "language": "ja", "confidence": 0.99,
               "parts": {"similarity": 0.93}, "measures": {"similarity": 0.91}, "flags": []}, ...]}
    identity  {"schema": 3, "token": "...", "kind": "identity", "items": 0}
      reply   {"schema": 3, "identity": {"languages": ["ar", ...], "max_text_chars": 65536, ...}, "healthy": true}
    metrics   {"schema": 3, "token": "...", "kind": "metrics", "items": 0}
      reply   {"schema": 3, "metrics": {"lrpo_reward_texts_total": 4096.0, ...}}
    cancel    {"schema": 3, "token": "...", "kind": "cancel", "items": 1}
              "5f0c..."                                                                    (one line for each request)
      reply   {"schema": 3, "cancelled": 1}
    refusal   {"schema": 3, "error": {"kind": "busy", "message": "...", "retry_after_s": 0.4}}

Version and token stand in the head, which is short: nothing else of a request is decoded for those without the token,
and no more at once than a line for those with it. `deadline_s` is what is left of the client's deadline when it sends.
The digest is that of the texts that were scored, so that a reply with mixed-up rows is seen. The scores of a reply may
come in any order and be incomplete. `healthy` is false where scoring would fail. Any change of meaning raises
SCHEMA_VERSION; the two sides refuse each other when their versions differ. Imports neither torch, NumPy nor PyTriton.
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

SCHEMA_VERSION = 3

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
ERROR_LANGUAGE = "language"
"""An answer in a language that is not served."""
ERROR_MALFORMED = "malformed"
ERROR_INTERNAL = "internal"
ERROR_BUSY = "busy"
"""Too much is waiting; `retry_after_s` says when to come back."""
ERROR_EXPIRED = "expired"
ERROR_CANCELLED = "cancelled"

MAX_HEAD_BYTES = 16384
_MAX_IDS = 4096
"""Requests that one message cancels."""
_MAX_ID_CHARS = 128
_MAX_BYTES_PER_CHAR = 12
"""In JSON: two escaped surrogates, of six characters each."""
_REQUEST_FIELDS = tuple(field.name for field in dataclasses.fields(ScoreRequest))
_SCORE_FIELDS = frozenset(field.name for field in dataclasses.fields(Score))
_UNIT_FIELDS = ("reward", "quality", "gate")


@dataclasses.dataclass(frozen=True)
class Request:
    """A request of which the head is decoded: its version is that of this side. `items` begin at `start` in `data`."""

    head: Mapping[str, Any]
    data: bytes
    start: int

    @property
    def token(self) -> str:
        """Empty where there is none."""
        token = self.head.get("token")
        return token if isinstance(token, str) else ""


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
    fields = _json([getattr(request, name) for name in _REQUEST_FIELDS])
    return hashlib.blake2b(fields, digest_size=8).hexdigest()


def encode_score_request(token: str, request_id: str, deadline_s: float, texts: Sequence[bytes]) -> bytes:
    """A score request; `texts` are the lines of encode_text."""
    return encode_request(KIND_SCORE, token, texts, request_id=request_id, deadline_s=deadline_s)


def encode_text(request: ScoreRequest) -> bytes:
    """One answer as a line of a score request."""
    return _json({name: getattr(request, name) for name in _REQUEST_FIELDS})


def encode_cancel(token: str, request_ids: Sequence[str]) -> list[bytes]:
    """Cancel requests, as many as it takes."""
    lines = [_json(request_id) for request_id in request_ids]
    return [encode_request(KIND_CANCEL, token, lines[at : at + _MAX_IDS]) for at in range(0, len(lines), _MAX_IDS)]


def encode_request(kind: str, token: str, items: Sequence[bytes] = (), **fields: Any) -> bytes:
    """A request of one of KINDS; `fields` are those of the kind, with values that survive JSON."""
    head = {"schema": SCHEMA_VERSION, "token": token, "kind": kind, **fields, "items": len(items)}
    return b"\n".join([_json(head), *items, b""])


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
    """Any reply, the version added."""
    return _json({"schema": SCHEMA_VERSION, **message})


def decode_message(data: bytes) -> dict[str, Any]:
    """Any reply, or the head of a request, as a dict, its version checked. Raises WireError."""
    message = _read(data, "not a JSON message")
    if not isinstance(message, dict):
        raise WireError(ERROR_MALFORMED, f"the message is a {type(message).__name__}, not an object")
    version = message.get("schema")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise WireError(ERROR_SCHEMA, f"schema version {version!r:.40}; this side speaks {SCHEMA_VERSION}")
    return message


def open_request(data: bytes) -> Request:
    """Decode the head, and no more. Raises WireError."""
    end = data.find(b"\n", 0, MAX_HEAD_BYTES)
    if end < 0 and len(data) >= MAX_HEAD_BYTES:
        raise WireError(ERROR_MALFORMED, f"not a JSON message with a head of at most {MAX_HEAD_BYTES} bytes")
    head = decode_message(data if end < 0 else data[:end])
    return Request(head, data, len(data) if end < 0 else end + 1)


def kind_of(request: Request) -> str:
    """Which of KINDS a request is. Raises WireError."""
    kind = request.head.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise WireError(ERROR_MALFORMED, f"kind {kind!r:.40} is not known; accepted: {', '.join(KINDS)}")
    return kind


def score_job_of(request: Request, max_texts: int, max_chars: int) -> ScoreJob:
    """A score request, decoded and checked. Raises WireError, naming the record, beyond a limit too."""
    request_id = request.head.get("request_id")
    if not _is_id(request_id):
        raise WireError(ERROR_MALFORMED, f"request_id must be a string of 1 to {_MAX_ID_CHARS} characters")
    deadline_s = request.head.get("deadline_s")
    if not _is_number(deadline_s):
        raise WireError(ERROR_MALFORMED, "deadline_s must be a finite number of seconds")
    requests: dict[str, ScoreRequest] = {}
    max_bytes = len(_REQUEST_FIELDS) * (_MAX_BYTES_PER_CHAR * max_chars + 64)
    for index, line in enumerate(_items_of(request, max_texts, "texts", "max_texts_per_request")):
        if len(line) > max_bytes:
            raise WireError(ERROR_LIMIT, f"texts[{index}] has {len(line)} bytes; {max_bytes} allowed")
        found = _text_of(_read(line, f"texts[{index}] is not JSON"), index, max_chars)
        if found.sample_id in requests:
            raise WireError(ERROR_MALFORMED, f"texts[{index}].sample_id is that of an earlier record")
        requests[found.sample_id] = found
    return ScoreJob(str(request_id), float(deadline_s or 0.0), list(requests.values()))


def cancelled_ids_of(request: Request) -> list[str]:
    """The request ids in a cancel request. Raises WireError."""
    lines = _items_of(request, _MAX_IDS, "requests to cancel", "the limit")
    ids = [_read(line, "not JSON") if len(line) < MAX_HEAD_BYTES else None for line in lines]
    if not all(_is_id(each) for each in ids):
        raise WireError(ERROR_MALFORMED, f"ids of requests must be strings of 1 to {_MAX_ID_CHARS} characters")
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


def _items_of(request: Request, limit: int, what: str, limit_name: str) -> list[bytes]:
    """The lines after the head. Counted before they are cut: each costs more than its bytes."""
    count = request.data.count(b"\n", request.start)
    if count > limit:
        raise WireError(ERROR_LIMIT, f"{count} {what} in one request; {limit_name}={limit}")
    lines = request.data[request.start :].split(b"\n")
    if lines.pop() or request.head.get("items") != count:
        raise WireError(ERROR_MALFORMED, f"not a JSON message of {request.head.get('items')!r:.40} {what}; cut off?")
    return lines


def _text_of(record: object, index: int, max_chars: int) -> ScoreRequest:
    if not isinstance(record, dict) or set(record) != set(_REQUEST_FIELDS):
        raise WireError(ERROR_MALFORMED, f"texts[{index}] must have exactly the fields {', '.join(_REQUEST_FIELDS)}")
    for name, value in record.items():
        if not isinstance(value, str):
            raise WireError(ERROR_MALFORMED, f"texts[{index}].{name} is not a string")
        if len(value) > max_chars:
            raise WireError(ERROR_LIMIT, f"texts[{index}].{name} has {len(value)} characters; {max_chars} allowed")
    if not is_unicode(record["sample_id"]):
        raise WireError(ERROR_MALFORMED, f"texts[{index}].sample_id={record['sample_id']!a:.80} has a lone surrogate")
    # Escapes may bring what has no UTF-8 form, which tokenizers refuse.
    return ScoreRequest(
        **{name: value if is_unicode(value) else _bytes(value).decode() for name, value in record.items()}
    )


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


def is_unicode(text: str) -> bool:
    """Whether `text` has a UTF-8 form; one with a lone surrogate, which a broken decoder may leave, has none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _bytes(text: str) -> bytes:
    """UTF-8; a lone surrogate becomes a question mark."""
    return text.encode("utf-8", errors="replace")


def _json(value: object) -> bytes:
    """One line."""
    return _bytes(json.dumps(value, ensure_ascii=False))


def _read(data: bytes, otherwise: str) -> Any:
    try:
        # Decoded here: json would guess UTF-16 and UTF-32 too.
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError(ERROR_MALFORMED, f"{otherwise} ({error})") from None


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
