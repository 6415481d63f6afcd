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
import os
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, as_completed, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from types import TracebackType

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
from nemo_lrpo.serving.fleet import Attempt, Fleet, again
from nemo_lrpo.serving.pool import DaemonPool
from nemo_lrpo.serving.replica import Busy, Connection, ConnectionLost, Replica, ScoringFailed
from nemo_lrpo.types import FLAG_TOO_LONG, Score, ScoreRequest

log = logging.getLogger(__name__)

_GOODBYE_S = 1.0
"""For telling servers that nobody waits any more."""
_MAX_LOSSES = 5
"""Connections that one request may lose: it may be the request that ends them."""
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
    """Before the process ends, so that servers do not score for it any more. A fork of it has nothing to cancel."""
    for client in list(_OPEN):
        if client._pid == os.getpid():
            client.close()


class _TooLarge(Exception):
    """The request has more bytes than the server takes."""


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
    attempts: list[Attempt] = field(default_factory=list)


class _Ask:
    """One request until it is answered, to one replica after another or to two at once. texts: its lines. failed:
    replicas that could not score it. hedge_at: when another replica is asked as well."""

    def __init__(self, chunk: _Chunk, requests: Sequence[ScoreRequest], deadline: float) -> None:
        self.chunk = chunk
        self.requests = requests
        self.deadline = deadline
        self.texts = [schema.encode_text(request) for request in requests]
        self.tokens = sum(map(estimated_tokens, requests))
        self.outcomes: queue.SimpleQueue[tuple[Attempt, schema.ScoreReply | Exception]] = queue.SimpleQueue()
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
            errors.append(self._client._fleet.too_slow())
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
        self._config = config
        self._pid = os.getpid()
        self._closed = threading.Event()
        self._fleet = Fleet(config, self._closed)
        self._changed = self._fleet.changed
        self._under_way: set[_Chunk] = set()
        self._outstanding = 0
        places = config.concurrency * len(self._fleet.replicas)
        self._askers = DaemonPool(places, "reward")
        # Two attempts at a request, and as many that are ending.
        self._callers = DaemonPool(4 * places, "reward-call")
        self._goodbyes = DaemonPool(min(4, len(self._fleet.replicas)), "reward-goodbye")
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
            while not any(replica.connection for replica in self._fleet.replicas):
                self._fleet.wait_for_one(started, started + timeout_s, timeout_s)
            assert self._fleet.identity is not None
            return dict(self._fleet.identity)

    def identity(self) -> dict[str, object]:
        """What the rewards depend on; see RewardScorer.identity. Waits for a server as check_server does."""
        return self.wait_until_ready(self._config.startup_timeout_s)

    def check_server(self, languages: Sequence[str], thinking: Sequence[str] = ()) -> None:
        """Wait for a server at most `startup_timeout_s`, then refuse servers that cannot serve this run. Replicas that
        cannot be reached yet are left out, with a warning.

        Raises RewardServerUnavailable, RewardRequestRefused, or RewardServerMismatch for another schema version,
        missing `languages` of answers or `thinking` blocks (ISO 639-1), another encoder than `config.encoder`, a
        smaller request limit than the run needs, or replicas that would not give the same rewards.
        """
        identity = self.wait_until_ready(self._config.startup_timeout_s)
        with self._changed:
            self._changed.wait_for(lambda: all(r.probed for r in self._fleet.replicas), self._config.startup_timeout_s)
            for replica in self._fleet.replicas:
                if replica.refusal is not None:
                    raise again(replica.refusal)
                if replica.connection is None:
                    log.warning("beginning without the reward server %s: %s", replica.where, replica.trouble)
        served = identity.get("languages")
        known = set(served if isinstance(served, list) else [])
        if missing := sorted(set(languages) - known):
            raise RewardServerMismatch(
                f"{self._fleet.identified} does not score {', '.join(missing)}, which data.languages or a task asks "
                f"for; it scores {served}. Start it with languages=[...] that cover the run's."
            )
        if missing := sorted(set(thinking) - known):
            raise RewardServerMismatch(
                f"{self._fleet.identified} does not know {', '.join(missing)}, of mode.seen: a response that thinks in "
                f"such a language would get no reward. It knows {served}: start it with languages=[...] that cover "
                "mode.seen, or leave the language out of mode.seen."
            )

    def server_metrics(self, timeout_s: float = 5.0) -> dict[str, dict[str, float]]:
        """The metrics of each replica in use, by host and port with its key; those that do not answer are absent."""
        with self._changed:
            connections = {r.where: r.connection for r in self._fleet.replicas if r.connection is not None}
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
            live = sum(replica.connection is not None for replica in self._fleet.replicas)
            totals = {**dict.fromkeys(_COUNTERS, 0), **self._fleet.totals}
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
            for replica in self._fleet.replicas:
                replica.connection = None

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
                late = RewardCancelled("the reward client is closed.") if room else self._fleet.too_slow()
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

    def _is_cancelled(self, chunk: _Chunk) -> Callable[[], bool]:
        return lambda: chunk.cancelled.is_set() or self._closed.is_set()

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
        _, connection = self._fleet.pick(self._is_cancelled(chunk), chunk.submitted, chunk.deadline, 0)
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
        cancelled = self._is_cancelled(chunk)
        try:
            while True:
                if not chunk.attempts:
                    times = chunk.submitted, deadline
                    self._send(ask, self._fleet.pick(cancelled, *times, ask.tokens, avoid, ask.failed))
                attempt, outcome = self._outcome(ask)
                if isinstance(outcome, schema.ScoreReply):
                    self._fleet.scored(attempt, chunk.attempts)
                    return outcome, attempt.replica
                self._give_up_or_go_on(ask, attempt, outcome)
        finally:
            self._tell(chunk.attempts)
            chunk.attempts.clear()

    def _send(self, ask: _Ask, chosen: tuple[Replica, Connection]) -> None:
        """Ask `chosen`, which has been charged with the tokens, on another thread. Raises _TooLarge."""
        attempt = Attempt(*chosen)
        limit = attempt.connection.limits.get("max_request_bytes", math.inf)
        if sum(len(text) + 1 for text in ask.texts) + schema.MAX_HEAD_BYTES > limit:
            self._fleet.discharge(attempt.replica, ask.tokens)
            raise _TooLarge(f"max_request_bytes={limit}")
        # Either the cancellation sees it, or it is seen here.
        ask.chunk.attempts.append(attempt)
        if ask.chunk.cancelled.is_set():
            attempt.abandon()
        ask.hedge_later()
        try:
            self._callers.submit(lambda: self._call(ask, attempt))
        except RuntimeError:
            self._fleet.discharge(attempt.replica, ask.tokens)
            raise RewardCancelled("the reward client is closed.") from None

    def _call(self, ask: _Ask, attempt: Attempt) -> None:
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
        self._fleet.discharge(attempt.replica, ask.tokens)
        ask.outcomes.put((attempt, outcome))

    def _outcome(self, ask: _Ask) -> tuple[Attempt, schema.ScoreReply | Exception]:
        """Of the first attempt that ends; asks another replica when those that were asked say nothing for too long."""
        attempts = ask.chunk.attempts
        while True:
            try:
                ends = min(ask.hedge_at, ask.deadline + _GRACE_S)
                attempt, outcome = ask.outcomes.get(timeout=max(0.0, ends - time.monotonic()))
            except queue.Empty:
                if ask.hedge_at > ask.deadline:
                    raise self._fleet.too_slow() from None
                other = None
                if len(attempts) == 1:
                    other = self._fleet.another(ask.tokens, [attempts[0].replica, *ask.failed])
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

    def _give_up_or_go_on(self, ask: _Ask, attempt: Attempt, error: Exception) -> None:
        """After an attempt that failed: raises where nobody else is under way and no other try would help."""
        replica = attempt.replica
        ask.hedge_later()
        if isinstance(error, ConnectionLost):
            ask.losses += 1
            self._fleet.lost(attempt, error)
            if ask.losses == _MAX_LOSSES:
                raise RewardServerUnavailable(
                    f"{ask.losses} connections were lost with the same request, the last to {replica.where}: {error}."
                ) from error
            self._count(retries=1)
        elif isinstance(error, Busy):
            self._fleet.wait_for_room(replica, error)
        elif isinstance(error, ScoringFailed):
            ask.failed.append(replica)
            self._fleet.strike(attempt)
            if not ask.chunk.attempts and (len(ask.failed) > 1 or not self._fleet.live(ask.failed)):
                raise error
        elif isinstance(error, RewardDeadlineExceeded):
            raise self._fleet.too_slow() from None
        else:
            raise error

    def _cancel(self, chunks: Iterable[_Chunk]) -> list[Future[None]]:
        """Cancel what is under way of `chunks`, and tell the servers, without waiting for it."""
        attempts: list[Attempt] = []
        waiting: list[_Chunk] = []
        with self._changed:
            for chunk in chunks:
                if chunk.reply.done() or chunk.cancelled.is_set():
                    continue
                chunk.cancelled.set()
                self._fleet.totals["cancelled"] += 1
                attempts += chunk.attempts
                if not chunk.started:
                    waiting.append(chunk)
            self._changed.notify_all()
        for chunk in waiting:
            chunk.reply.set_exception(RewardCancelled("the submission was cancelled, or its client closed."))
        return self._tell(attempts)

    def _tell(self, attempts: Iterable[Attempt]) -> list[Future[None]]:
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
                self._fleet.totals[name] += number


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


def _say_goodbye(connection: Connection, request_ids: list[str]) -> None:
    try:
        for data in schema.encode_cancel(connection.token, request_ids):
            connection.call(data, _GOODBYE_S)
    except (RewardError, WireError) as error:
        log.debug("a server could not be told of %d cancelled requests: %s", len(request_ids), error)
