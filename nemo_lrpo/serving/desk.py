"""Between the wire and the scorer: who is let in, who waits, who is scored, and who is told to come back.

Every request is at the desk as soon as it has arrived, so that deadlines, cancellations and the length of the queue are
known of all of them. `concurrency` threads score; at most `max_pending` requests wait for one.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemo_lrpo.config.reward import RewardServerConfig, read_token
from nemo_lrpo.serving import schema
from nemo_lrpo.serving.errors import WireError
from nemo_lrpo.serving.metrics import ServerMetrics
from nemo_lrpo.types import Score, ScoreRequest, ScoringAbandoned

log = logging.getLogger(__name__)

_READERS = 2
_MAX_UNREAD = 256
"""Messages that have arrived and are not decoded yet; more are refused undecoded."""
_MAX_UNREAD_SIZE = 8
"""All of them together, in requests of max_request_bytes."""
_RETRY_AFTER_S = (0.05, 10.0)


class Scorer(Protocol):
    """What is served; shared by the desk's threads."""

    def score(self, requests: list[ScoreRequest], should_stop: Callable[[], bool]) -> list[Score]:
        """One score per request, in order. Raises ScoringAbandoned once `should_stop` says so."""

    def identity(self) -> dict[str, object]:
        """What the scores depend on (encoder, calibration, languages), as JSON values."""

    def healthy(self) -> bool:
        """Whether it could score now."""

    def counts(self) -> Mapping[str, float]:
        """Totals by `name` or `name/label`."""


@dataclass
class _Ticket:
    """A score request at the desk. Times are time.monotonic's."""

    job: schema.ScoreJob
    arrived: float
    deadline: float
    cancelled: threading.Event = field(default_factory=threading.Event)
    future: Future[bytes] | None = None
    started: bool = False

    def should_stop(self) -> bool:
        return self.cancelled.is_set() or time.monotonic() >= self.deadline

    def refusal(self) -> WireError:
        if self.cancelled.is_set():
            return WireError(schema.ERROR_CANCELLED, "the request was cancelled")
        return WireError(schema.ERROR_EXPIRED, f"not scored within deadline_s={self.job.deadline_s:.3g}")


class RewardDesk:
    """Answers messages, from any number of event loops, until `close`."""

    def __init__(self, config: RewardServerConfig, scorer: Scorer) -> None:
        """`config` has passed its check. Raises ConfigError for a token file that cannot be read."""
        self.metrics = ServerMetrics(scorer.counts)
        self._config = config
        self._scorer = scorer
        languages = scorer.identity().get("languages")
        self._languages = frozenset(languages) if isinstance(languages, list) else None
        self._token = (read_token("token_file", config.token_file) or "").encode()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reward-read")
        self._workers = ThreadPoolExecutor(config.concurrency, thread_name_prefix="reward-score")
        self._lock = threading.Lock()
        self._tickets: dict[str, _Ticket] = {}
        self._unread: list[int] = []
        self._pace_s = 0.0
        self._closed = False
        self.metrics.waiting.set_function(lambda: self._count(started=False))
        self.metrics.in_progress.set_function(lambda: self._count(started=True))

    async def answer(self, data: bytes) -> bytes:
        """The reply to one message. Every failure becomes a refusal, of this message alone."""
        arrived = time.monotonic()
        kind = "unread"
        try:
            kind, content = await self._read(data)
            if kind == schema.KIND_SCORE:
                reply = await self._score(content, arrived)
            else:
                reply = await asyncio.get_running_loop().run_in_executor(self._readers, self._attend, kind, content)
            outcome = "ok"
        except WireError as error:
            log.log(logging.INFO if error.kind in _ORDINARY else logging.WARNING, "refused a request: %s", error)
            outcome, reply = error.kind, schema.encode_refusal(error.kind, str(error), error.retry_after_s)
        except Exception as error:
            log.exception("a request failed")
            outcome = schema.ERROR_INTERNAL
            reply = schema.encode_refusal(outcome, f"{type(error).__name__}: {error}")
        self.metrics.requests.labels(kind, outcome).inc()
        if kind == schema.KIND_SCORE:
            self.metrics.latency.observe(time.monotonic() - arrived)
        return reply

    def authorised(self, token: str) -> bool:
        """Whether `token` is the server's, compared in constant time; any will do where it has none."""
        return not self._token or hmac.compare_digest(token.encode("utf-8", errors="replace"), self._token)

    @property
    def accepting(self) -> bool:
        """Whether a score request would be let in now, and scored."""
        full = len(self._tickets) >= self._config.concurrency + self._config.max_pending
        return not self._closed and not full and self._scorer.healthy()

    def close(self, grace_s: float = 0.0) -> None:
        """Let nobody in any more; after `grace_s` seconds, cancel what is left. May be repeated."""
        with self._lock:
            self._closed = True
        ends = time.monotonic() + grace_s
        while self._tickets and time.monotonic() < ends:
            time.sleep(0.02)
        with self._lock:
            for ticket in self._tickets.values():
                _cancel(ticket)
        self._readers.shutdown(wait=False)
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def _read(self, data: bytes) -> tuple[str, Any]:
        """Kind and content, behind the checks of size, version and token, in this order. Raises WireError."""
        config = self._config
        if len(data) > config.max_request_bytes:
            limit = f"max_request_bytes={config.max_request_bytes}"
            raise WireError(schema.ERROR_LIMIT, f"the request has {len(data)} bytes; {limit}")
        request = schema.open_request(data)
        if not self.authorised(request.token):
            raise WireError(schema.ERROR_TOKEN, "the token is missing or wrong")
        with self._lock:
            unread, size = len(self._unread), sum(self._unread)
            full = unread >= _MAX_UNREAD or size + len(data) > _MAX_UNREAD_SIZE * config.max_request_bytes
            if self._closed or full:
                raise self._busy("the server is ending" if self._closed else f"{unread} messages are unread")
            self._unread.append(len(data))
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, self._decode, request)
        finally:
            with self._lock:
                self._unread.remove(len(data))

    def _decode(self, request: schema.Request) -> tuple[str, Any]:
        """On a reader. Raises WireError."""
        config = self._config
        kind = schema.kind_of(request)
        if kind == schema.KIND_SCORE:
            job = schema.score_job_of(request, config.max_texts_per_request, config.max_text_chars)
            self._check_languages(job)
            return kind, job
        return kind, schema.cancelled_ids_of(request) if kind == schema.KIND_CANCEL else None

    def _check_languages(self, job: schema.ScoreJob) -> None:
        for index, request in enumerate(job.requests):
            if self._languages is not None and request.language not in self._languages:
                raise WireError(
                    schema.ERROR_LANGUAGE,
                    f"texts[{index}].language={request.language!r:.40} is not served; accepted: "
                    f"{', '.join(sorted(self._languages))}",
                )

    def _attend(self, kind: str, content: Any) -> bytes:
        """What needs no scoring."""
        if kind == schema.KIND_CANCEL:
            return schema.encode_message({"cancelled": self._cancel(content)})
        if kind == schema.KIND_METRICS:
            return schema.encode_message({"metrics": self.metrics.flat()})
        limits = {name: getattr(self._config, name) for name in _LIMITS}
        identity = {**self._scorer.identity(), **limits}
        return schema.encode_message({"identity": identity, "healthy": self._scorer.healthy()})

    def _cancel(self, request_ids: list[str]) -> int:
        with self._lock:
            found = [ticket for request_id in request_ids if (ticket := self._tickets.get(request_id))]
            for ticket in found:
                _cancel(ticket)
        return len(found)

    async def _score(self, job: schema.ScoreJob, arrived: float) -> bytes:
        ticket = _Ticket(job, arrived, arrived + job.deadline_s)
        future = self._admit(ticket)
        try:
            # At the deadline a waiting request leaves the queue; one that is being scored stops after its batch.
            left = max(0.0, ticket.deadline - time.monotonic())
            return await asyncio.wait_for(asyncio.wrap_future(future), left)
        except asyncio.TimeoutError:
            if not ticket.should_stop():
                # The scorer's own.
                raise
            raise ticket.refusal() from None
        except asyncio.CancelledError:
            if not ticket.cancelled.is_set():
                raise
            raise ticket.refusal() from None
        finally:
            with self._lock:
                del self._tickets[job.request_id]
            if future.cancelled():
                # The pool forgets a cancelled future only when it comes to it; its texts go now.
                job.requests.clear()

    def _admit(self, ticket: _Ticket) -> Future[bytes]:
        """Put `ticket` in the queue. Raises WireError where it is full."""
        request_id = ticket.job.request_id
        if ticket.should_stop():
            raise ticket.refusal()
        with self._lock:
            if self._closed:
                raise self._busy("the server is ending")
            # Not by who has started: a worker that is free may not have taken its ticket yet.
            waiting = len(self._tickets) - self._config.concurrency
            if waiting >= self._config.max_pending:
                raise self._busy(f"{waiting} requests wait; max_pending={self._config.max_pending}", waiting)
            if request_id in self._tickets:
                raise WireError(schema.ERROR_MALFORMED, f"request_id {request_id!r} is that of a request in progress")
            self._tickets[request_id] = ticket
            ticket.future = future = self._workers.submit(self._work, ticket)
        return future

    def _work(self, ticket: _Ticket) -> bytes:
        """On a worker: score one request. Raises WireError where nobody waits for it."""
        started = time.monotonic()
        self.metrics.waited.observe(started - ticket.arrived)
        with self._lock:
            ticket.started = True
        if ticket.should_stop():
            raise ticket.refusal()
        requests = ticket.job.requests
        try:
            scores = self._scorer.score(requests, ticket.should_stop)
        except ScoringAbandoned:
            if not ticket.should_stop():
                raise RuntimeError("the scorer was closed") from None
            raise ticket.refusal() from None
        if [score.sample_id for score in scores] != [request.sample_id for request in requests]:
            raise RuntimeError(f"the scorer gave {len(scores)} scores, not one for each of {len(requests)} answers")
        self.metrics.texts.inc(len(scores))
        self.metrics.missing.inc(sum(score.reward is None for score in scores))
        with self._lock:
            self._pace_s += 0.2 * (time.monotonic() - started - self._pace_s)
        return schema.encode_scores(ticket.job, scores)

    def _busy(self, message: str, waiting: int = 0) -> WireError:
        """With the time that half of the queue takes at the present pace, within limits."""
        low, high = _RETRY_AFTER_S
        after = self._pace_s * (waiting + 1) / (2 * self._config.concurrency)
        return WireError(schema.ERROR_BUSY, message, min(high, max(low, after)))

    def _count(self, started: bool) -> int:
        with self._lock:
            return sum(ticket.started is started for ticket in self._tickets.values())


_LIMITS = ("max_texts_per_request", "max_text_chars", "max_request_bytes")
_ORDINARY = (schema.ERROR_BUSY, schema.ERROR_EXPIRED, schema.ERROR_CANCELLED)
"""Refusals that are no sign of a mistake."""


def _cancel(ticket: _Ticket) -> None:
    ticket.cancelled.set()
    if ticket.future is not None:
        ticket.future.cancel()
