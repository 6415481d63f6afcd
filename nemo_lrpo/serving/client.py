"""The training run's side of the reward servers: submit answers, go on working, join the scores by sample id.

Behind one client stand one or several replicas. A submission is cut into requests; each goes to the replica with the
fewest tokens on their way to it. A replica that cannot be reached, or answers and does not score, is left out, its
requests go to the others at once, and it is taken back when it answers again as the same server. A request that has
waited for half of its time goes to a second replica as well, and the first answer counts. Answers that a reply lacks,
or got wrong, are asked for once more. What is longer than the servers take is not sent.
"""

from __future__ import annotations

import atexit
import logging
import math
import queue
import random
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from types import TracebackType

import grpc

from nemo_lrpo.config.reward import RewardClientConfig
from nemo_lrpo.serving import schema
from nemo_lrpo.serving.errors import (
    MISTAKES,
    RewardCancelled,
    RewardDeadlineExceeded,
    RewardError,
    RewardServerMismatch,
    RewardServerUnavailable,
    WireError,
)
from nemo_lrpo.serving.pool import DaemonPool
from nemo_lrpo.serving.replica import REMINDER_S, Busy, Connection, ConnectionLost, Replica, ScoringFailed
from nemo_lrpo.types import FLAG_TOO_LONG, Score, ScoreRequest

log = logging.getLogger(__name__)

_GOODBYE_S = 1.0
"""For telling servers that nobody waits any more."""
_MAX_LOSSES = 5
"""Connections that one request may lose: it may be the request that ends them."""
_MAX_STRIKES = 3
"""Requests in a row that a replica may fail to score before others are preferred for a while."""
_HEDGE_SHARE = 0.5
"""Of its time a request waits for one replica; then another is asked as well."""
_MIN_HEDGE_S = 0.05
_GRACE_S = 0.25
"""gRPC ends a call at its deadline; beyond this time it is not waited for."""
_DROPPED = {
    "unknown": "with an unknown id",
    "duplicated": "ids given twice",
    "invalid": "invalid",
    "mixed_up": "of other texts",
}
_COUNTERS = (
    *("retries", "busy", "replica_failures", "scoring_failures", "hedged", "asked_again", "missing", "too_long"),
    *("cancelled", *_DROPPED),
)


_OPEN: weakref.WeakSet[RewardClient] = weakref.WeakSet()
"""Clients that nobody has closed."""


@atexit.register
def _close_all() -> None:
    """Before the process ends, so that servers do not score for it any more."""
    for client in list(_OPEN):
        client.close()


class _TooLarge(Exception):
    """The request has more bytes than the server takes."""


@dataclass(eq=False)
class _Attempt:
    """A request on its way to one replica. `abandon` may come from another thread, before its call has begun too."""

    replica: Replica
    connection: Connection
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.monotonic)
    call: grpc.Call | None = None
    abandoned: bool = False

    def start(self, call: grpc.Call) -> None:
        self.call = call
        if self.abandoned:
            call.cancel()

    def abandon(self) -> None:
        self.abandoned = True
        if self.call is not None:
            self.call.cancel()


@dataclass(eq=False)
class _Chunk:
    """The samples of one request. reply: completed at `deadline` (time.monotonic's) at the latest, or cancelled.
    attempts: under way."""

    requests: list[ScoreRequest]
    submitted: float
    deadline: float
    reply: Future[schema.ScoreReply] = field(default_factory=Future)
    started: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)
    attempts: list[_Attempt] = field(default_factory=list)


class _Ask:
    """One request until it is answered, to one replica after another or to two at once. texts: its lines. failed:
    replicas that could not score it. hedge_at: when another replica is asked as well."""

    def __init__(self, chunk: _Chunk, requests: Sequence[ScoreRequest], deadline: float) -> None:
        self.chunk = chunk
        self.requests = requests
        self.deadline = deadline
        self.texts = [schema.encode_text(request) for request in requests]
        self.tokens = sum(map(estimated_tokens, requests))
        self.outcomes: queue.SimpleQueue[tuple[_Attempt, schema.ScoreReply | Exception]] = queue.SimpleQueue()
        self.failed: list[Replica] = []
        self.losses = 0
        self.hedge_at = math.inf

    def hedge_later(self) -> None:
        now = time.monotonic()
        self.hedge_at = now + max(_MIN_HEDGE_S, _HEDGE_SHARE * (self.deadline - now))


class RewardFuture:
    """The scores of one submission, under way."""

    def __init__(self, client: RewardClient, deadline: float) -> None:
        self._client = client
        self._deadline = deadline
        self._chunks: list[_Chunk] = []

    def result(self) -> dict[str, Score]:
        """Scores by sample id. Absent, counted and logged are ids without a usable record (none, several, not finite)
        and those of a request that failed or was not answered in time. An answer that is longer than the servers take
        has a score without reward, with FLAG_TOO_LONG.

        Raises what no server and no second try mends (RewardRequestRefused, RewardServerMismatch, ConfigError) and
        RewardCancelled. Only where no scores came at all it raises why: RewardServerUnavailable where no server
        answered for `connect_timeout_s`, RewardDeadlineExceeded at `deadline_s` after `submit`, or RewardServerFailed.
        The servers are told that nobody waits for the rest.
        """
        scores: dict[str, Score] = {}
        dropped = dict.fromkeys(_DROPPED, 0)
        errors: list[RewardError] = []
        replies = [chunk.reply for chunk in self._chunks]
        try:
            for done in as_completed(replies, timeout=max(0.0, self._deadline + _GRACE_S - time.monotonic())):
                try:
                    reply = done.result()
                except (*MISTAKES, RewardCancelled):
                    raise
                except RewardError as error:
                    errors.append(error)
                else:
                    scores.update(reply.scores)
                    for name in dropped:
                        dropped[name] += getattr(reply, name)
        except FutureTimeoutError:
            errors.append(self._client.too_slow())
        finally:
            self.cancel()
        asked = sum(len(chunk.requests) for chunk in self._chunks)
        if errors and not scores:
            raise errors[0]
        missing = asked - len(scores)
        if missing or any(dropped.values()):
            reasons = ", ".join(f"{dropped[name]} {words}" for name, words in _DROPPED.items())
            # What was dropped and came right when asked for again is no trouble.
            level = logging.WARNING if missing else logging.INFO
            log.log(level, "%d of %d rewards are missing (records dropped: %s)", missing, asked, reasons)
        for text in {str(error) for error in errors}:
            log.warning("some rewards are missing: %s", text)
        return scores

    def cancel(self) -> None:
        """Nobody waits any more: `result` raises RewardCancelled unless all scores are there, and the servers are told.
        Never blocks."""
        self._client._cancel(self._chunks)


class RewardClient:
    """Sends answers to the reward servers that `config` names. Connects at the first call; safe to use from threads.
    A context manager: closes at the end of the block, at the latest when the interpreter ends."""

    def __init__(self, config: RewardClientConfig) -> None:
        """`config` has passed its check."""
        sources = config.sources()
        self._config = config
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._replicas = [
            Replica(source, config.token_file, self._changed, self._accept, self._closed) for source in sources
        ]
        self._identity: Mapping[str, object] | None = None
        self._identified = ""
        self._alone_since: float | None = None
        self._under_way: set[_Chunk] = set()
        self._outstanding = 0
        self._totals: Counter[str] = Counter()
        self._reminded = -math.inf
        self._jitter = random.Random()
        places = config.concurrency * len(sources)
        self._askers = DaemonPool(places, "reward")
        # Two attempts at a request, and as many that are ending.
        self._callers = DaemonPool(4 * places, "reward-call")
        self._goodbyes = DaemonPool(min(4, len(sources)), "reward-goodbye")
        for pool in (self._askers, self._callers, self._goodbyes):
            weakref.finalize(self, pool.close).atexit = False
        _OPEN.add(self)

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, requests: Sequence[ScoreRequest]) -> RewardFuture:
        """Start scoring; what goes wrong is raised by `result`. The deadline starts now.

        Returns at once while fewer than `max_outstanding_texts` samples are on their way; else as soon as the servers
        have caught up, at the latest at the deadline. Where it is called between batches of a generation, the
        generation waits with it. Raises ValueError, naming it, for a sample id given twice, or with a lone surrogate,
        which has no form on the wire.
        """
        seen: set[str] = set()
        for request in requests:
            if not schema.is_unicode(request.sample_id):
                raise ValueError(f"sample id {request.sample_id!a} has a lone surrogate; give its question another id.")
            if request.sample_id in seen:
                raise ValueError(f"sample id {request.sample_id!r} is submitted twice; rewards are joined by it.")
            seen.add(request.sample_id)
        submitted = time.monotonic()
        deadline = submitted + self._config.deadline_s
        pending = RewardFuture(self, deadline)
        size = self._config.max_texts_per_request
        for start in range(0, len(requests), size):
            chunk = _Chunk(list(requests[start : start + size]), submitted, deadline)
            pending._chunks.append(chunk)
            self._start(chunk)
        return pending

    def wait_until_ready(self, timeout_s: float) -> dict[str, object]:
        """What the servers are, as soon as one answers; endpoint files may be published meanwhile.

        Raises RewardServerUnavailable after `timeout_s`, RewardServerMismatch or RewardRequestRefused where all that
        answer refuse, or are refused.
        """
        started = time.monotonic()
        with self._changed:
            while not any(replica.connection for replica in self._replicas):
                self._wait_for_a_replica(started, started + timeout_s, timeout_s)
            assert self._identity is not None
            return dict(self._identity)

    def check_server(self, languages: Sequence[str]) -> None:
        """Wait for a server at most `startup_timeout_s`, then refuse servers that cannot serve this run. Replicas that
        cannot be reached yet are left out, with a warning.

        Raises RewardServerUnavailable, RewardRequestRefused, or RewardServerMismatch for another schema version,
        missing `languages` (ISO 639-1), another encoder than `config.encoder`, a smaller request limit than the run
        needs, or replicas that would not give the same rewards.
        """
        identity = self.wait_until_ready(self._config.startup_timeout_s)
        with self._changed:
            self._changed.wait_for(lambda: all(r.probed for r in self._replicas), self._config.startup_timeout_s)
            for replica in self._replicas:
                if replica.refusal is not None:
                    raise _again(replica.refusal)
                if replica.connection is None:
                    log.warning("beginning without the reward server %s: %s", replica.where, replica.trouble)
        served = identity.get("languages")
        missing = sorted(set(languages) - set(served if isinstance(served, list) else []))
        if missing:
            raise RewardServerMismatch(
                f"{self._identified} does not score {', '.join(missing)}, which data.languages asks for; it scores "
                f"{served}. Start it with languages=[...] that cover the run's."
            )

    def server_metrics(self, timeout_s: float = 5.0) -> dict[str, dict[str, float]]:
        """The metrics of each replica in use, by host and port with its key; those that do not answer are absent."""
        with self._changed:
            connections = {r.where: r.connection for r in self._replicas if r.connection is not None}
        metrics = {}
        for where, connection in connections.items():
            try:
                message = connection.call(schema.encode_request(schema.KIND_METRICS, connection.token), timeout_s)
                metrics[where] = schema.metrics_of(message)
            except (RewardError, WireError) as error:
                log.warning("no metrics of %s: %s", where, error)
        return metrics

    def counters(self) -> dict[str, float]:
        """Totals since construction: retries (requests sent again after a lost connection), busy (sent again after a
        full server), replica_failures (replicas left out), scoring_failures (requests that a server could not score),
        hedged (requests sent to a second replica while the first was silent), asked_again and missing (samples without
        a usable score, at first and in the end), too_long (samples that were not sent; also too_long/LANGUAGE),
        cancelled (requests), and records dropped: unknown, duplicated, invalid, mixed_up. And, as they are now:
        replicas_live, outstanding_texts."""
        with self._changed:
            live = sum(replica.connection is not None for replica in self._replicas)
            totals = {**dict.fromkeys(_COUNTERS, 0), **self._totals}
            now = {"replicas_live": live, "outstanding_texts": self._outstanding}
            return {name: float(value) for name, value in (*totals.items(), *now.items())}

    def close(self) -> None:
        """Give up what is under way, tell the servers (for a second at most) and disconnect. May be repeated."""
        with self._changed:
            self._closed.set()
            chunks = list(self._under_way)
            self._changed.notify_all()
        wait(self._cancel(chunks), timeout=_GOODBYE_S)
        _OPEN.discard(self)
        for pool in (self._askers, self._callers, self._goodbyes):
            pool.close()
        with self._changed:
            for replica in self._replicas:
                replica.connection = None

    def too_slow(self) -> RewardDeadlineExceeded:
        """The error of a submission whose time is up."""
        where = " and ".join(replica.where for replica in self._replicas)
        return RewardDeadlineExceeded(
            f"the reward server at {where} did not finish within reward.deadline_s={self._config.deadline_s:g} s; "
            "raise it, give the server more compute, or send less at once."
        )

    # -- one request ---------------------------------------------------------------------------------------------

    def _start(self, chunk: _Chunk) -> None:
        """Hand `chunk` to the pool once there is room for its samples; an error becomes that of its reply."""
        size = len(chunk.requests)
        with self._changed:
            room = self._changed.wait_for(
                lambda: self._closed.is_set() or self._outstanding + size <= self._config.max_outstanding_texts,
                timeout=max(0.0, chunk.deadline - time.monotonic()),
            )
            if self._closed.is_set() or not room:
                late = RewardCancelled("the reward client is closed.") if room else self.too_slow()
                chunk.reply.set_exception(late)
                return
            self._outstanding += size
            self._under_way.add(chunk)
        chunk.reply.add_done_callback(lambda _: self._finished(chunk))
        try:
            self._askers.submit(lambda: self._run(chunk))
        except RuntimeError:
            self._cancel([chunk])

    def _finished(self, chunk: _Chunk) -> None:
        with self._changed:
            self._under_way.discard(chunk)
            self._outstanding -= len(chunk.requests)
            self._changed.notify_all()

    def _run(self, chunk: _Chunk) -> None:
        with self._changed:
            if chunk.cancelled.is_set():
                return
            chunk.started = True
        try:
            chunk.reply.set_result(self._score(chunk))
        except BaseException as error:
            if not chunk.cancelled.is_set():
                self._count(missing=len(chunk.requests))
            chunk.reply.set_exception(error)

    def _score(self, chunk: _Chunk) -> schema.ScoreReply:
        """What the servers say of `chunk`, and scores without reward for what is longer than they take."""
        fitting = self._fitting(chunk)
        reply, replica = self._ask_in_parts(chunk, fitting, chunk.deadline, None)
        missing = [request for request in fitting if request.sample_id not in reply.scores]
        if missing:
            self._count(asked_again=len(missing))
            # With time to spare, so that those that are there are not lost to the deadline.
            deadline = chunk.deadline - 0.1 * (chunk.deadline - time.monotonic())
            try:
                second, _ = self._ask_in_parts(chunk, missing, deadline, replica)
            except (*MISTAKES, RewardCancelled):
                raise
            except RewardError as error:
                log.warning("%d missing rewards could not be asked for again: %s", len(missing), error)
            else:
                _add(reply, second)
        self._count(missing=len(fitting) - len(reply.scores), **{name: getattr(reply, name) for name in _DROPPED})
        kept = {request.sample_id for request in fitting}
        for request in chunk.requests:
            if request.sample_id not in kept:
                reply.scores[request.sample_id] = _too_long(request)
        return reply

    def _fitting(self, chunk: _Chunk) -> list[ScoreRequest]:
        """Those of `chunk` that the servers take; the others are counted. The replicas agree about the length."""
        _, connection = self._pick(chunk, chunk.deadline, 0)
        limit = connection.limits.get("max_text_chars", math.inf)
        fitting = [request for request in chunk.requests if max(_lengths(request).values()) <= limit]
        kept = {id(request) for request in fitting}
        self._leave_out([r for r in chunk.requests if id(r) not in kept], f"max_text_chars={limit}")
        return fitting

    def _leave_out(self, requests: Sequence[ScoreRequest], limit: str) -> None:
        if not requests:
            return
        by_language = Counter(request.language for request in requests)
        self._count(too_long=len(requests), **{f"too_long/{name}": n for name, n in by_language.items()})
        longest = max(_lengths(requests[0]).items(), key=lambda item: item[1])
        log.warning(
            "%d samples are longer than the reward server takes (%s) and get no reward (%s); the first: %r, its %s has "
            "%d characters",
            *(len(requests), limit, ", ".join(f"{name}: {n}" for name, n in sorted(by_language.items()))),
            *(requests[0].sample_id, *longest),
        )

    def _ask_in_parts(
        self, chunk: _Chunk, requests: list[ScoreRequest], deadline: float, avoid: Replica | None
    ) -> tuple[schema.ScoreReply, Replica | None]:
        """As `_ask`, in two halves where the request has more bytes than a server takes."""
        if not requests:
            return schema.ScoreReply({}), avoid
        try:
            return self._ask(chunk, requests, deadline, avoid)
        except _TooLarge as error:
            if len(requests) == 1:
                self._leave_out(requests, str(error))
                return schema.ScoreReply({requests[0].sample_id: _too_long(requests[0])}), avoid
        half = len(requests) // 2
        reply, replica = self._ask_in_parts(chunk, requests[:half], deadline, avoid)
        _add(reply, self._ask_in_parts(chunk, requests[half:], deadline, avoid)[0])
        return reply, replica

    def _ask(
        self, chunk: _Chunk, requests: list[ScoreRequest], deadline: float, avoid: Replica | None
    ) -> tuple[schema.ScoreReply, Replica]:
        """Scores of `requests`, and who gave them; another replica than `avoid` where there is one.

        Sent again where the connection was lost or the server was full, and once to another replica where one failed,
        or says nothing for half of the time: scoring twice does no harm.
        """
        ask = _Ask(chunk, requests, deadline)
        try:
            while True:
                if not chunk.attempts:
                    self._send(ask, self._pick(chunk, deadline, ask.tokens, avoid, ask.failed))
                attempt, outcome = self._outcome(ask)
                if isinstance(outcome, schema.ScoreReply):
                    self._scored(attempt, chunk.attempts)
                    return outcome, attempt.replica
                self._give_up_or_go_on(ask, attempt, outcome)
        finally:
            self._tell(chunk.attempts)
            chunk.attempts.clear()

    def _send(self, ask: _Ask, chosen: tuple[Replica, Connection]) -> None:
        """Ask `chosen`, which has been charged with the tokens, on another thread. Raises _TooLarge."""
        attempt = _Attempt(*chosen)
        limit = attempt.connection.limits.get("max_request_bytes", math.inf)
        if sum(len(text) + 1 for text in ask.texts) + schema.MAX_HEAD_BYTES > limit:
            self._discharge(attempt.replica, ask.tokens)
            raise _TooLarge(f"max_request_bytes={limit}")
        # Either the cancellation sees it, or it is seen here.
        ask.chunk.attempts.append(attempt)
        if ask.chunk.cancelled.is_set():
            attempt.abandon()
        ask.hedge_later()
        try:
            self._callers.submit(lambda: self._call(ask, attempt))
        except RuntimeError:
            self._discharge(attempt.replica, ask.tokens)
            raise RewardCancelled("the reward client is closed.") from None

    def _call(self, ask: _Ask, attempt: _Attempt) -> None:
        """On a thread of its own: one call, and what comes of it."""
        outcome: schema.ScoreReply | Exception
        try:
            left = ask.deadline - time.monotonic()
            data = schema.encode_score_request(attempt.connection.token, attempt.request_id, left, ask.texts)
            message = attempt.connection.call(data, left, attempt.start)
            outcome = schema.scores_of(message, attempt.request_id, ask.requests)
        except WireError as error:
            outcome = ScoringFailed(f"{attempt.replica.where} sent an unreadable reply: {error}.")
        except Exception as error:
            # Without the frames, which would hold the texts.
            outcome = error.with_traceback(None)
        self._discharge(attempt.replica, ask.tokens)
        ask.outcomes.put((attempt, outcome))

    def _outcome(self, ask: _Ask) -> tuple[_Attempt, schema.ScoreReply | Exception]:
        """Of the first attempt that ends; asks another replica when those that were asked say nothing for too long."""
        attempts = ask.chunk.attempts
        while True:
            try:
                ends = min(ask.hedge_at, ask.deadline + _GRACE_S)
                attempt, outcome = ask.outcomes.get(timeout=max(0.0, ends - time.monotonic()))
            except queue.Empty:
                if ask.hedge_at > ask.deadline:
                    raise self.too_slow() from None
                other = None
                if len(attempts) == 1:
                    other = self._another(ask.tokens, [attempts[0].replica, *ask.failed])
                if other is None:
                    ask.hedge_later()
                else:
                    self._count(hedged=1)
                    self._send(ask, other)
                continue
            attempts.remove(attempt)
            if ask.chunk.cancelled.is_set():
                raise RewardCancelled("the submission was cancelled.")
            return attempt, outcome

    def _give_up_or_go_on(self, ask: _Ask, attempt: _Attempt, error: Exception) -> None:
        """After an attempt that failed: raises where nobody else is under way and no other try would help."""
        replica = attempt.replica
        ask.hedge_later()
        if isinstance(error, ConnectionLost):
            ask.losses += 1
            with self._changed:
                self._totals["replica_failures"] += replica.lost(attempt.connection, error)
            if ask.losses == _MAX_LOSSES:
                raise RewardServerUnavailable(
                    f"{ask.losses} connections were lost with the same request, the last to {replica.where}: {error}."
                ) from error
            self._count(retries=1)
        elif isinstance(error, Busy):
            self._wait_for_room(replica, error)
        elif isinstance(error, ScoringFailed):
            ask.failed.append(replica)
            self._strike(attempt)
            if not ask.chunk.attempts and (len(ask.failed) > 1 or not self._live(ask.failed)):
                raise error
        elif isinstance(error, RewardDeadlineExceeded):
            raise self.too_slow() from None
        else:
            raise error

    def _pick(
        self,
        chunk: _Chunk,
        deadline: float,
        tokens: int,
        avoid: Replica | None = None,
        failed: Sequence[Replica] = (),
    ) -> tuple[Replica, Connection]:
        """The replica with the fewest tokens on their way, now with `tokens` more; waits for one that is none of
        `failed` while there is another, and rather not `avoid`."""
        with self._changed:
            while True:
                if chunk.cancelled.is_set() or self._closed.is_set():
                    raise RewardCancelled("the submission was cancelled.")
                now = time.monotonic()
                if now >= deadline:
                    raise self.too_slow()
                live = self._live(failed) or self._live()
                best = self._charge(tokens, live, now, avoid)
                if best is not None:
                    return best
                if live:
                    self._alone_since = None
                    self._changed.wait(min(deadline, *(r.not_before for r in live)) - now)
                else:
                    if self._alone_since is None:
                        self._alone_since = now
                    since = max(self._alone_since, chunk.submitted)
                    connect_s = self._config.connect_timeout_s
                    self._wait_for_a_replica(since, min(deadline, since + connect_s), connect_s)

    def _another(self, tokens: int, besides: Sequence[Replica]) -> tuple[Replica, Connection] | None:
        """As `_pick`, without waiting: None where there is none now."""
        with self._changed:
            return self._charge(tokens, self._live(besides), time.monotonic())

    def _charge(
        self, tokens: int, live: Sequence[Replica], now: float, avoid: Replica | None = None
    ) -> tuple[Replica, Connection] | None:
        """The best of `live` that may be asked now, with `tokens` more on their way; `changed` is held."""
        ready = [replica for replica in live if replica.not_before <= now]
        best = min(ready, key=lambda replica: (replica is avoid, replica.outstanding), default=None)
        if best is None or best.connection is None:
            return None
        self._alone_since = None
        best.outstanding += tokens
        return best, best.connection

    def _discharge(self, replica: Replica, tokens: int) -> None:
        with self._changed:
            replica.outstanding -= tokens
            self._changed.notify_all()

    def _live(self, besides: Sequence[Replica] = ()) -> list[Replica]:
        """Replicas in use, in their order."""
        return [replica for replica in self._replicas if replica.connection is not None and replica not in besides]

    def _scored(self, attempt: _Attempt, silent: Sequence[_Attempt]) -> None:
        """A replica has answered; those that were asked before and have not are left out for a while."""
        with self._changed:
            attempt.replica.scored()
            for other in silent:
                if other.began < attempt.began:
                    waited = time.monotonic() - other.began
                    reason = f"it said nothing for {waited:.1f} s; another replica answered"
                    self._totals["replica_failures"] += other.replica.rest(other.connection, reason)

    def _strike(self, attempt: _Attempt) -> None:
        """A replica could not score; one that never can is left out for a while, unless it is the only one."""
        replica = attempt.replica
        with self._changed:
            self._totals["scoring_failures"] += 1
            replica.strikes += 1
            if replica.strikes >= _MAX_STRIKES and self._live([replica]):
                reason = f"it failed to score {replica.strikes} requests in a row; see its log"
                self._totals["replica_failures"] += replica.rest(attempt.connection, reason)

    def _wait_for_room(self, replica: Replica, busy: Busy) -> None:
        with self._changed:
            now = time.monotonic()
            replica.not_before = now + busy.retry_after_s * self._jitter.uniform(1.0, 1.5)
            self._totals["busy"] += 1
            if now - self._reminded > REMINDER_S:
                self._reminded = now
                log.warning("waiting: %s", busy)

    def _wait_for_a_replica(self, since: float, until: float, timeout_s: float) -> None:
        """Wait for a change, while no replica is in use; `changed` is held.

        Raises what they refuse where all refuse, RewardServerUnavailable after `until`.
        """
        for replica in self._replicas:
            replica.needed()
            replica.probe()
        refusals = [replica.refusal for replica in self._replicas if replica.refusal is not None]
        if len(refusals) == len(self._replicas):
            raise _again(refusals[0])
        now = time.monotonic()
        if now >= until:
            reasons = "; ".join(f"{replica.where}: {replica.trouble}" for replica in self._replicas)
            raise RewardServerUnavailable(
                f"no reward server at {reasons}, tried again for {now - since:.1f} of {timeout_s:g} s. Start one with "
                "python -m nemo_lrpo.serve_rewards, or look at its log."
            )
        self._changed.wait(until - now)

    def _accept(self, replica: Replica, identity: Mapping[str, object]) -> None:
        """Raises RewardServerMismatch unless the server with this identity may score for this run."""
        config = self._config
        if config.encoder is not None and identity.get("encoder") != config.encoder:
            raise RewardServerMismatch(
                f"{replica.where} scores with encoder {identity.get('encoder')}, not reward.encoder={config.encoder}; "
                "point the run at the right server."
            )
        limit = identity.get("max_texts_per_request")
        if isinstance(limit, int) and limit < config.max_texts_per_request:
            raise RewardServerMismatch(
                f"{replica.where}: reward.max_texts_per_request={config.max_texts_per_request} exceeds the server's "
                f"{limit}; lower it, or raise max_texts_per_request of nemo_lrpo.serve_rewards."
            )
        with self._changed:
            if self._identity is None:
                self._identity, self._identified = identity, replica.where
                return
            differences = list(_differences(self._identity, identity))
        if differences:
            raise RewardServerMismatch(
                f"{replica.where} would not give the rewards of {self._identified}, which this run began with: "
                f"{'; '.join(differences)}. Start both with the same configuration."
            )

    def _cancel(self, chunks: Iterable[_Chunk]) -> list[Future[None]]:
        """Cancel what is under way of `chunks`, and tell the servers, without waiting for it."""
        attempts: list[_Attempt] = []
        waiting: list[_Chunk] = []
        with self._changed:
            for chunk in chunks:
                if chunk.reply.done() or chunk.cancelled.is_set():
                    continue
                chunk.cancelled.set()
                self._totals["cancelled"] += 1
                attempts += chunk.attempts
                if not chunk.started:
                    waiting.append(chunk)
            self._changed.notify_all()
        for chunk in waiting:
            chunk.reply.set_exception(RewardCancelled("the submission was cancelled, or its client closed."))
        return self._tell(attempts)

    def _tell(self, attempts: Iterable[_Attempt]) -> list[Future[None]]:
        """Abandon `attempts`, and tell the servers: Triton passes the end of a call on to nobody."""
        by_connection: dict[Connection, list[str]] = {}
        for attempt in attempts:
            attempt.abandon()
            by_connection.setdefault(attempt.connection, []).append(attempt.request_id)
        told = []
        for connection, request_ids in by_connection.items():
            done: Future[None] = Future()
            try:
                self._goodbyes.submit(lambda c=connection, ids=request_ids, d=done: d.set_result(_say_goodbye(c, ids)))
            except RuntimeError:
                break
            told.append(done)
        return told

    def _count(self, **by: int) -> None:
        with self._changed:
            for name, number in by.items():
                self._totals[name] += number


def estimated_tokens(request: ScoreRequest) -> int:
    """Of response and reference, from their UTF-8 length: about four bytes each, in Latin script as in others, and a
    few for the record."""
    return (
        8 + (len(request.response.encode("utf-8", "replace")) + len(request.reference.encode("utf-8", "replace"))) // 4
    )


def _add(reply: schema.ScoreReply, other: schema.ScoreReply) -> None:
    reply.scores.update(other.scores)
    for name in _DROPPED:
        setattr(reply, name, getattr(reply, name) + getattr(other, name))


def _lengths(request: ScoreRequest) -> dict[str, int]:
    """Characters by field."""
    return {name: len(value) for name, value in vars(request).items()}


def _too_long(request: ScoreRequest) -> Score:
    return Score(request.sample_id, None, None, None, None, 0.0, flags=(FLAG_TOO_LONG,))


def _again(error: Exception) -> Exception:
    """A new one: the same error raised in several threads would gather all their tracebacks."""
    return type(error)(str(error))


def _differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> Iterable[str]:
    """What two identities differ in, but for what does not move rewards."""
    for name in sorted({*ours, *theirs} - {"versions", "max_texts_per_request", "max_request_bytes"}):
        mine, other = ours.get(name), theirs.get(name)
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from (f"{name}.{difference}" for difference in _differences(mine, other))
        elif mine != other:
            yield f"{name} is {other!r}, not {mine!r}"


def _say_goodbye(connection: Connection, request_ids: list[str]) -> None:
    try:
        for data in schema.encode_cancel(connection.token, request_ids):
            connection.call(data, _GOODBYE_S)
    except (RewardError, WireError) as error:
        log.debug("a server could not be told of %d cancelled requests: %s", len(request_ids), error)
