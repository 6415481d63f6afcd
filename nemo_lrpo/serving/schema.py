"""The wire schema, version 1: UTF-8 JSON objects, one per message, joined by sample id.

    score request   {"schema": 1, "token": "...", "texts": [{"sample_id": "12/q7/1", "response": "...",
                     "reference": "...", "reference_language": "de", "language": "ja"}, ...]}
    score reply     {"schema": 1, "scores": [{"sample_id": "12/q7/1", "similarity": 0.91, ..., "reward": 0.93}, ...]}
    identity request {"schema": 1, "token": "..."}
    identity reply  {"schema": 1, "identity": {"languages": ["ar", ...], ...}}
    refusal         {"schema": 1, "error": {"kind": "token", "message": "..."}}

The texts of a reply may come in any order and be incomplete. Any change of meaning raises SCHEMA_VERSION; the two sides
refuse each other when their versions differ. Imports neither torch nor NumPy nor PyTriton.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nemo_lrpo.serving.errors import WireError
from nemo_lrpo.types import Score, ScoreRequest

SCHEMA_VERSION = 1

SCORE_MODEL = "score"
IDENTITY_MODEL = "identity"
"""Names of the two Triton models."""
REQUEST_TENSOR = "request"
REPLY_TENSOR = "reply"
"""uint8 [bytes], one message each."""

ERROR_SCHEMA = "schema"
ERROR_TOKEN = "token"
ERROR_LIMIT = "limit"
ERROR_MALFORMED = "malformed"
ERROR_INTERNAL = "internal"

_REQUEST_FIELDS = tuple(field.name for field in dataclasses.fields(ScoreRequest))
_NUMBER_FIELDS = ("similarity", "calibrated", "quality", "confidence", "gate", "reward")


@dataclasses.dataclass
class ScoreReply:
    """The usable scores of a reply by sample id, and how many records were dropped and why."""

    scores: dict[str, Score]
    unknown: int = 0
    """Records whose id was not asked for."""
    duplicated: int = 0
    """Ids that came more than once: none of their records counts."""
    invalid: int = 0
    """Records with a missing field, a wrong type or a number that is not finite."""


def encode_request(token: str, requests: Sequence[ScoreRequest] | None = None) -> bytes:
    """A score request, or, without `requests`, an identity request."""
    message: dict[str, Any] = {"token": token}
    if requests is not None:
        message["texts"] = [{name: getattr(request, name) for name in _REQUEST_FIELDS} for request in requests]
    return _encode(message)


def encode_scores(scores: Sequence[Score]) -> bytes:
    """A score reply."""
    return _encode({"scores": [dataclasses.asdict(score) for score in scores]})


def encode_identity(identity: Mapping[str, object]) -> bytes:
    """An identity reply; the values must survive JSON."""
    return _encode({"identity": dict(identity)})


def encode_error(kind: str, message: str) -> bytes:
    """A refusal; `kind` is one of ERROR_*."""
    return _encode({"error": {"kind": kind, "message": message}})


def decode_message(data: bytes) -> dict[str, Any]:
    """Any message as a dict, its version checked. Raises WireError."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(ERROR_MALFORMED, f"not a JSON message ({error})") from None
    if not isinstance(message, dict):
        raise WireError(ERROR_MALFORMED, f"the message is a {type(message).__name__}, not an object")
    if message.get("schema") != SCHEMA_VERSION:
        raise WireError(ERROR_SCHEMA, f"schema version {message.get('schema')!r}; this side speaks {SCHEMA_VERSION}")
    return message


def requests_of(message: Mapping[str, Any], max_texts: int, max_chars: int) -> list[ScoreRequest]:
    """The answers to score in a decoded score request. Raises WireError, naming the record, beyond a limit too."""
    texts = message.get("texts")
    if not isinstance(texts, list):
        raise WireError(ERROR_MALFORMED, "texts must be a list")
    if len(texts) > max_texts:
        raise WireError(ERROR_LIMIT, f"{len(texts)} texts in one request; max_texts_per_request={max_texts}")
    requests: list[ScoreRequest] = []
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
        requests.append(ScoreRequest(**record))
    return requests


def scores_of(message: Mapping[str, Any], asked: Collection[str]) -> ScoreReply:
    """The scores in a decoded score reply that can be joined to the ids `asked` for; the others are counted.

    Raises WireError if the reply holds no list of scores at all.
    """
    records = message.get("scores")
    if not isinstance(records, list):
        raise WireError(ERROR_MALFORMED, "scores must be a list")
    reply = ScoreReply(scores={})
    accepted = set(asked)
    by_id: dict[str, list[Any]] = {}
    for record in records:
        sample_id = record.get("sample_id") if isinstance(record, dict) else None
        if not isinstance(sample_id, str):
            reply.invalid += 1
        elif sample_id not in accepted:
            reply.unknown += 1
        else:
            by_id.setdefault(sample_id, []).append(record)
    for sample_id, found in by_id.items():
        if len(found) > 1:
            reply.duplicated += 1
        elif _is_score(found[0]):
            numbers = {name: float(found[0][name]) for name in _NUMBER_FIELDS}
            reply.scores[sample_id] = Score(sample_id=sample_id, language=found[0]["language"], **numbers)
        else:
            reply.invalid += 1
    return reply


def _is_score(record: Mapping[str, Any]) -> bool:
    if "language" not in record or not (record["language"] is None or isinstance(record["language"], str)):
        return False
    values = [record.get(name) for name in _NUMBER_FIELDS]
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _encode(message: Mapping[str, Any]) -> bytes:
    # A lone surrogate, which a broken decoder may leave in a response, has no UTF-8 form; it becomes a question mark.
    text = json.dumps({"schema": SCHEMA_VERSION, **message}, ensure_ascii=False)
    return text.encode("utf-8", errors="replace")
