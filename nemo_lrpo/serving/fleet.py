"""The replicas behind one client: which of them are in use, and who is asked next."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from nemo_lrpo.config.reward import RewardClientConfig
from nemo_lrpo.serving.errors import (
    RewardCancelled,
    RewardDeadlineExceeded,
    RewardServerMismatch,
    RewardServerUnavailable,
)
from nemo_lrpo.serving.replica import REMINDER_S, Busy, Connection, ConnectionLost, Replica

log = logging.getLogger(__name__)

_MAX_STRIKES = 3
"""Requests in a row that a replica may fail to score before others are preferred for a while."""


@dataclass(eq=False)
class Attempt:
    """A request on its way to one replica. `abandon` may come from another thread, before its call has begun too."""

    replica: Replica
    connection: Connection
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.monotonic)
    call: grpc.Call | None = None
    abandoned: bool = False

    def start(self, call: grpc.Call) -> None:
        """The call has begun."""
        self.call = call
        if self.abandoned:
            call.cancel()

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self.abandoned = True
        if self.call is not None:
            self.call.cancel()


class Fleet:
    """`changed` guards its state and that of its replicas, and tells of every change. identity: of the server that the
    run began with, None before. totals: what is counted, by name."""

    def __init__(self, config: RewardClientConfig, closed: threading.Event) -> None:
        """`config` has passed its check. Once `closed` is set, no replica is looked for."""
        self.changed = threading.Condition()
        self.identity: Mapping[str, object] | None = None
        self.identified = ""
        self.totals: Counter[str] = Counter()
        self.replicas = [
            Replica(source, config.token_file, self.changed, self.accept, closed) for source in config.sources()
        ]
        self._config = config
        self._alone_since: float | None = None
        self._reminded = -math.inf
        self._jitter = random.Random()

    def pick(
        self,
        cancelled: Callable[[], bool],
        submitted: float,
        deadline: float,
        tokens: int,
        avoid: Replica | None = None,
        failed: Sequence[Replica] = (),
    ) -> tuple[Replica, Connection]:
        """The replica with the fewest tokens on their way, now with `tokens` more; waits for one that is none of
        `failed` while there is another, and rather not `avoid`. Times are time.monotonic's.

        Raises RewardCancelled, RewardDeadlineExceeded, what all replicas refuse, or RewardServerUnavailable where there
        was none for `connect_timeout_s`.
        """
        with self.changed:
            while True:
                if cancelled():
                    raise RewardCancelled("the submission was cancelled.")
                now = time.monotonic()
                if now >= deadline:
                    raise self.too_slow()
                live = self.live(failed) or self.live()
                best = self._charge(tokens, live, now, avoid)
                if best is not None:
                    return best
                if live:
                    self._alone_since = None
                    self.changed.wait(min(deadline, *(r.not_before for r in live)) - now)
                else:
                    if self._alone_since is None:
                        self._alone_since = now
                    since = max(self._alone_since, submitted)
                    connect_s = self._config.connect_timeout_s
                    self.wait_for_one(since, min(deadline, since + connect_s), connect_s)

    def another(self, tokens: int, besides: Sequence[Replica]) -> tuple[Replica, Connection] | None:
        """As `_pick`, without waiting: None where there is none now."""
        with self.changed:
            return self._charge(tokens, self.live(besides), time.monotonic())

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

    def discharge(self, replica: Replica, tokens: int) -> None:
        """An attempt at so many tokens has ended."""
        with self.changed:
            replica.outstanding -= tokens
            self.changed.notify_all()

    def live(self, besides: Sequence[Replica] = ()) -> list[Replica]:
        """Replicas in use, in their order, without `besides`."""
        return [replica for replica in self.replicas if replica.connection is not None and replica not in besides]

    def lost(self, attempt: Attempt, error: ConnectionLost) -> None:
        """The connection of an attempt has broken."""
        with self.changed:
            self.totals["replica_failures"] += attempt.replica.lost(attempt.connection, error)

    def scored(self, attempt: Attempt, silent: Sequence[Attempt]) -> None:
        """A replica has answered; those that were asked before and have not are left out for a while."""
        with self.changed:
            attempt.replica.scored()
            for other in silent:
                if other.began < attempt.began:
                    waited = time.monotonic() - other.began
                    reason = f"it said nothing for {waited:.1f} s; another replica answered"
                    self.totals["replica_failures"] += other.replica.rest(other.connection, reason)

    def strike(self, attempt: Attempt) -> None:
        """A replica could not score; one that never can is left out for a while, unless it is the only one."""
        replica = attempt.replica
        with self.changed:
            self.totals["scoring_failures"] += 1
            replica.strikes += 1
            if replica.strikes >= _MAX_STRIKES and self.live([replica]):
                reason = f"it failed to score {replica.strikes} requests in a row; see its log"
                self.totals["replica_failures"] += replica.rest(attempt.connection, reason)

    def wait_for_room(self, replica: Replica, busy: Busy) -> None:
        """A replica is full."""
        with self.changed:
            now = time.monotonic()
            replica.not_before = now + busy.retry_after_s * self._jitter.uniform(1.0, 1.5)
            self.totals["busy"] += 1
            if now - self._reminded > REMINDER_S:
                self._reminded = now
                log.warning("waiting: %s", busy)

    def wait_for_one(self, since: float, until: float, timeout_s: float) -> None:
        """Wait for a change, while no replica is in use; `changed` is held.

        Raises what they refuse where all refuse, RewardServerUnavailable after `until`.
        """
        for replica in self.replicas:
            replica.needed()
            replica.probe()
        refusals = [replica.refusal for replica in self.replicas if replica.refusal is not None]
        if len(refusals) == len(self.replicas):
            raise again(refusals[0])
        now = time.monotonic()
        if now >= until:
            reasons = "; ".join(f"{replica.where}: {replica.trouble}" for replica in self.replicas)
            raise RewardServerUnavailable(
                f"no reward server at {reasons}, tried again for {now - since:.1f} of {timeout_s:g} s. Start one with "
                "python -m nemo_lrpo.serve_rewards, or look at its log."
            )
        self.changed.wait(until - now)

    def accept(self, replica: Replica, identity: Mapping[str, object]) -> None:
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
        with self.changed:
            if self.identity is None:
                self.identity, self.identified = identity, replica.where
                return
            differences = list(_differences(self.identity, identity))
        if differences:
            raise RewardServerMismatch(
                f"{replica.where} would not give the rewards of {self.identified}, which this run began with: "
                f"{'; '.join(differences)}. Start both with the same configuration."
            )

    def too_slow(self) -> RewardDeadlineExceeded:
        """The error of a submission whose time is up."""
        where = " and ".join(replica.where for replica in self.replicas)
        return RewardDeadlineExceeded(
            f"the reward server at {where} did not finish within reward.deadline_s={self._config.deadline_s:g} s; "
            "raise it, give the server more compute, or send less at once."
        )


def again(error: Exception) -> Exception:
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
