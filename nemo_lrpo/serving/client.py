"""The training run's side of the reward servers: submit answers, go on working, join the scores by sample id.

Behind one client stand one or several replicas. A submission is cut into requests; each goes to the replica with the
fewest tokens on their way to it. A replica that cannot be reached is left out, its requests go to the others at once,
and it is taken back when it answers again as the same server. Answers that a reply lacks, or got wrong, are asked for
once more.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

import grpc

from nemo_lrpo.config.reward import RewardClientConfig
from nemo_lrpo.serving import schema
from nemo_lrpo.serving.errors import (
    RewardCancelled,
    RewardDeadlineExceeded,
    RewardError,
    RewardServerFailed,
    RewardServerMismatch,
    RewardServerUnavailable,
    WireError,
)
from nemo_lrpo.serving.replica import REMINDER_S, Busy, Connection, ConnectionLost, Replica
from nemo_lrpo.types import Score, ScoreRequest

log = logging.getLogger(__name__)

_GOODBYE_S = 1.0
"""For telling servers that nobody waits any more."""
_MAX_LOSSES = 5
"""Connections that one request may lose: it may be the request that ends them."""
_DROPPED = {
    "unknown": "with an unknown id",
    "duplicated": "ids given twice",
    "invalid": "invalid",
    "mixed_up": "of other texts",
}
_COUNTERS = ("retries", "busy", "replica_failures", "asked_again", "missing", "cancelled", *_DROPPED)


@dataclass
class _Chunk:
    """The samples of one request. reply: completed at `deadline` (time.monotonic's) at the latest, or cancelled."""

    requests: list[ScoreRequest]
    deadline: float
    reply: Future[schema.ScoreReply] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)
    attempt: tuple[Connection, str, grpc.Call] | None = None
    """Under way: the connection, the id of the request, and the call."""


class RewardFuture:
    """The scores of one submission, under way."""

    def __init__(self, client: RewardClient, deadline: float) -> None:
        self._client = client
        self._deadline = deadline
        self._chunks: list[_Chunk] = []

    def result(self) -> dict[str, Score]:
        """Scores by sample id. Ids without a usable record (none, several, not finite) are absent, and are logged.

        Raises RewardServerUnavailable where no server answered for `connect_timeout_s`, RewardDeadlineExceeded at
        `deadline_s` after `submit`, RewardCancelled, RewardRequestRefused, RewardServerMismatch or RewardServerFailed.
        The servers are told that nobody waits for the rest.
        """
        scores: dict[str, Score] = {}
        dropped = dict.fromkeys(_DROPPED, 0)
        try:
            for chunk in self._chunks:
                reply = chunk.reply.result(timeout=max(0.0, self._deadline - time.monotonic()))
                scores.update(reply.scores)
                for name in dropped:
                    dropped[name] += getattr(reply, name)
        except BaseException as error:
            self.cancel()
            if isinstance(error, CancelledError):
                raise RewardCancelled("the submission was cancelled, or its client closed.") from None
            if isinstance(error, FutureTimeoutError):
                raise self._client.too_slow() from None
            raise
        missing = sum(len(chunk.requests) for chunk in self._chunks) - len(scores)
        if missing or any(dropped.values()):
            reasons = ", ".join(f"{dropped[name]} {words}" for name, words in _DROPPED.items())
            # What was dropped and came right when asked for again is no trouble.
            level = logging.WARNING if missing else logging.INFO
            log.log(
                level, "%d of %d rewards are missing (records dropped: %s)", missing, missing + len(scores), reasons
            )
        return scores

    def cancel(self) -> None:
        """Nobody waits any more: `result` raises RewardCancelled unless all scores are there, and the servers are told.
        Never blocks."""
        self._client._cancel(self._chunks)


class RewardClient:
    """Sends answers to the reward servers that `config` names. Connects at the first call; safe to use from threads."""

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
        self._under_way: dict[int, _Chunk] = {}
        self._outstanding = 0
        self._totals = dict.fromkeys(_COUNTERS, 0)
        self._reminded = -math.inf
        self._jitter = random.Random()
        self._pool = ThreadPoolExecutor(config.concurrency * len(sources), thread_name_prefix="reward")
        self._goodbyes = ThreadPoolExecutor(min(4, len(sources)), thread_name_prefix="reward-goodbye")

    def submit(self, requests: Sequence[ScoreRequest]) -> RewardFuture:
        """Start scoring; what goes wrong is raised by `result`. The deadline starts now.

        Returns at once while fewer than `max_outstanding_texts` samples are on their way; else as soon as the servers
        have caught up, at the latest at the deadline. Where it is called between batches of a generation, the
        generation waits with it. Raises ValueError, naming it, for a sample id given twice.
        """
        seen: set[str] = set()
        for request in requests:
            if request.sample_id in seen:
                raise ValueError(f"sample id {request.sample_id!r} is submitted twice; rewards are joined by it.")
            seen.add(request.sample_id)
        deadline = time.monotonic() + self._config.deadline_s
        pending = RewardFuture(self, deadline)
        size = self._config.max_texts_per_request
        for start in range(0, len(requests), size):
            chunk = _Chunk(list(requests[start : start + size]), deadline)
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
        full server), replica_failures, asked_again and missing (samples without a usable score, at first and in the
        end), cancelled (requests), and records dropped: unknown, duplicated, invalid, mixed_up. And, as they are now:
        replicas_live, outstanding_texts."""
        with self._changed:
            live = sum(replica.connection is not None for replica in self._replicas)
            now = {"replicas_live": live, "outstanding_texts": self._outstanding}
            return {name: float(value) for name, value in (*self._totals.items(), *now.items())}

    def close(self) -> None:
        """Give up what is under way, tell the servers (for a second at most) and disconnect."""
        with self._changed:
            self._closed.set()
            chunks = list(self._under_way.values())
            self._changed.notify_all()
        told = self._cancel(chunks)
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait(told, timeout=_GOODBYE_S)
        self._goodbyes.shutdown(wait=False, cancel_futures=True)
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
            self._under_way[id(chunk)] = chunk
        chunk.reply.add_done_callback(lambda _: self._finished(chunk))
        try:
            self._pool.submit(self._run, chunk)
        except RuntimeError:
            chunk.reply.cancel()

    def _finished(self, chunk: _Chunk) -> None:
        with self._changed:
            self._under_way.pop(id(chunk), None)
            self._outstanding -= len(chunk.requests)
            self._changed.notify_all()

    def _run(self, chunk: _Chunk) -> None:
        if not chunk.reply.set_running_or_notify_cancel():
            return
        try:
            chunk.reply.set_result(self._score(chunk))
        except BaseException as error:
            chunk.reply.set_exception(error)

    def _score(self, chunk: _Chunk) -> schema.ScoreReply:
        reply, replica = self._ask(chunk, chunk.requests, chunk.deadline, None)
        missing = [request for request in chunk.requests if request.sample_id not in reply.scores]
        if missing:
            self._count(asked_again=len(missing))
            # With time to spare, so that those that are there are not lost to the deadline.
            deadline = chunk.deadline - 0.1 * (chunk.deadline - time.monotonic())
            try:
                second, _ = self._ask(chunk, missing, deadline, replica)
            except RewardCancelled:
                raise
            except RewardError as error:
                log.warning("%d missing rewards could not be asked for again: %s", len(missing), error)
            else:
                reply.scores.update(second.scores)
                for name in _DROPPED:
                    setattr(reply, name, getattr(reply, name) + getattr(second, name))
        self._count(missing=len(chunk.requests) - len(reply.scores), **{n: getattr(reply, n) for n in _DROPPED})
        return reply

    def _ask(
        self, chunk: _Chunk, requests: list[ScoreRequest], deadline: float, avoid: Replica | None
    ) -> tuple[schema.ScoreReply, Replica]:
        """Scores of `requests`, and who gave them; another replica than `avoid` where there is one. Sent again only
        where the connection was lost or the server was full: scoring twice does no harm."""
        tokens = sum(map(estimated_tokens, requests))
        waiting_since = time.monotonic()
        losses = 0
        while True:
            replica, connection = self._pick(chunk, deadline, waiting_since, tokens, avoid)
            request_id = uuid.uuid4().hex
            try:
                left = deadline - time.monotonic()
                data = schema.encode_score_request(connection.token, request_id, left, requests)

                def started(call: grpc.Call, connection: Connection = connection, request_id: str = request_id) -> None:
                    chunk.attempt = (connection, request_id, call)
                    if chunk.cancelled.is_set():
                        call.cancel()

                message = connection.call(data, left, started)
                return schema.scores_of(message, request_id, requests), replica
            except ConnectionLost as error:
                if chunk.cancelled.is_set():
                    raise RewardCancelled("the submission was cancelled.") from None
                losses += 1
                if losses == 1:
                    waiting_since = time.monotonic()
                with self._changed:
                    self._totals["replica_failures"] += replica.lost(connection, error)
                if losses == _MAX_LOSSES:
                    raise RewardServerUnavailable(
                        f"{losses} connections were lost with the same request, the last to {replica.where}: {error}."
                    ) from error
                self._count(retries=1)
            except Busy as busy:
                with self._changed:
                    now = time.monotonic()
                    replica.not_before = now + busy.retry_after_s * self._jitter.uniform(1.0, 1.5)
                    self._totals["busy"] += 1
                    if now - self._reminded > REMINDER_S:
                        self._reminded = now
                        log.warning("waiting: %s", busy)
            except RewardDeadlineExceeded:
                raise self.too_slow() from None
            except WireError as error:
                raise RewardServerFailed(f"{replica.where} sent an unreadable reply: {error}.") from error
            finally:
                chunk.attempt = None
                with self._changed:
                    replica.outstanding -= tokens
                    self._changed.notify_all()

    def _pick(
        self, chunk: _Chunk, deadline: float, waiting_since: float, tokens: int, avoid: Replica | None
    ) -> tuple[Replica, Connection]:
        """The replica with the fewest tokens on their way, now with `tokens` more; waits for one."""
        with self._changed:
            while True:
                if chunk.cancelled.is_set() or self._closed.is_set():
                    raise RewardCancelled("the submission was cancelled.")
                now = time.monotonic()
                if now >= deadline:
                    raise self.too_slow()
                live = [replica for replica in self._replicas if replica.connection is not None]
                ready = [replica for replica in live if replica.not_before <= now]
                best = min(ready, key=lambda r: (r is avoid, r.outstanding), default=None)
                if best is not None and best.connection is not None:
                    best.outstanding += tokens
                    return best, best.connection
                if live:
                    self._changed.wait(min(deadline, *(r.not_before for r in live)) - now)
                else:
                    connect_s = self._config.connect_timeout_s
                    self._wait_for_a_replica(waiting_since, min(deadline, waiting_since + connect_s), connect_s)

    def _wait_for_a_replica(self, since: float, until: float, timeout_s: float) -> None:
        """Wait for a change, while no replica is in use; `changed` is held.

        Raises what they refuse where all refuse, RewardServerUnavailable after `until`.
        """
        for replica in self._replicas:
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
        told: dict[Connection, list[str]] = {}
        for chunk in chunks:
            if chunk.reply.done():
                continue
            chunk.cancelled.set()
            self._count(cancelled=1)
            attempt = chunk.attempt
            if not chunk.reply.cancel() and attempt is not None:
                connection, request_id, call = attempt
                told.setdefault(connection, []).append(request_id)
                call.cancel()
        with self._changed:
            self._changed.notify_all()
        try:
            return [self._goodbyes.submit(_say_goodbye, connection, ids) for connection, ids in told.items()]
        except RuntimeError:
            return []

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


def _again(error: Exception) -> Exception:
    """A new one: the same error raised in several threads would gather all their tracebacks."""
    return type(error)(str(error))


def _differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> Iterable[str]:
    """What two identities differ in, but for what does not move rewards."""
    for name in sorted({*ours, *theirs} - {"versions", "max_texts_per_request"}):
        mine, other = ours.get(name), theirs.get(name)
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from (f"{name}.{difference}" for difference in _differences(mine, other))
        elif mine != other:
            yield f"{name} is {other!r}, not {mine!r}"


def _say_goodbye(connection: Connection, request_ids: list[str]) -> None:
    data = schema.encode_request(schema.KIND_CANCEL, connection.token, request_ids=request_ids)
    try:
        connection.call(data, _GOODBYE_S)
    except RewardError as error:
        log.debug("a server could not be told of %d cancelled requests: %s", len(request_ids), error)
