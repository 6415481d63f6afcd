"""The training run's side of the reward server: submit answers, go on working, join the scores by sample id."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import numpy as np
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from nemo_lrpo.config.reward import RewardClientConfig, parse_endpoint, read_token
from nemo_lrpo.serving import schema
from nemo_lrpo.serving.endpoint import Endpoint
from nemo_lrpo.serving.errors import (
    RewardDeadlineExceeded,
    RewardError,
    RewardRequestRefused,
    RewardServerFailed,
    RewardServerMismatch,
    RewardServerUnavailable,
    WireError,
)
from nemo_lrpo.types import Score, ScoreRequest

log = logging.getLogger(__name__)

_CHANNEL = [
    # A cluster's web proxy has no business between a run and its reward server.
    ("grpc.enable_http_proxy", 0),
    # The pauses between retries are ours; the channel's own would grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
_LIVENESS_TIMEOUT_S = 5.0
"""A server that takes connections says within this time that it is alive, however busy its scorer is."""
_REMINDER_S = 15.0


class RewardFuture:
    """The scores of one submission, under way."""

    def __init__(self, where: Callable[[], str], deadline: float, deadline_s: float) -> None:
        self._where = where
        self._deadline = deadline
        self._deadline_s = deadline_s
        self._parts: list[tuple[list[str], Future[schema.ScoreReply]]] = []

    def result(self) -> dict[str, Score]:
        """Scores by sample id. Ids without a usable record (none, several, not finite) are absent, and are logged.

        Raises RewardServerUnavailable where no server answered for `connect_timeout_s`, RewardDeadlineExceeded at
        `deadline_s` after `submit`, RewardRequestRefused, RewardServerMismatch or RewardServerFailed.
        """
        scores: dict[str, Score] = {}
        unknown = duplicated = invalid = 0
        try:
            for _, part in self._parts:
                reply = part.result(timeout=max(0.0, self._deadline - time.monotonic()))
                scores.update(reply.scores)
                unknown += reply.unknown
                duplicated += reply.duplicated
                invalid += reply.invalid
        except FutureTimeoutError:
            raise RewardDeadlineExceeded(_too_slow(self._where(), self._deadline_s)) from None
        finally:
            # After an error nobody waits for the rest.
            for _, part in self._parts:
                part.cancel()
        asked = sum(len(ids) for ids, _ in self._parts)
        if len(scores) < asked or unknown:
            log.warning(
                "%d of %d rewards are missing (records dropped: %d with an unknown id, %d ids given twice, %d invalid)",
                asked - len(scores), asked, unknown, duplicated, invalid,
            )  # fmt: skip
        return scores


class RewardClient:
    """Sends answers to the reward server that `config` names. Connects at the first call; safe to use from threads."""

    def __init__(self, config: RewardClientConfig) -> None:
        self._config = config
        self._pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="reward")
        self._lock = threading.Lock()
        self._endpoint: Endpoint | None = None
        self._connection: InferenceServerClient | None = None
        self._reminded = -math.inf

    def submit(self, requests: Sequence[ScoreRequest]) -> RewardFuture:
        """Start scoring and return at once; what goes wrong is raised by `result`. The deadline starts now.

        Raises ValueError, naming it, for a sample id given twice.
        """
        seen: set[str] = set()
        for request in requests:
            if request.sample_id in seen:
                raise ValueError(f"sample id {request.sample_id!r} is submitted twice; rewards are joined by it.")
            seen.add(request.sample_id)
        deadline = time.monotonic() + self._config.deadline_s
        pending = RewardFuture(self._where, deadline, self._config.deadline_s)
        size = self._config.max_texts_per_request
        for start in range(0, len(requests), size):
            chunk = list(requests[start : start + size])
            pending._parts.append(([r.sample_id for r in chunk], self._pool.submit(self._score, chunk, deadline)))
        return pending

    def wait_until_ready(self, timeout_s: float) -> dict[str, object]:
        """The server's identity, as soon as it answers; the endpoint file may be published meanwhile.

        Raises RewardServerUnavailable after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        message = self._call(schema.IDENTITY_MODEL, None, deadline, timeout_s, timeout_s)
        identity = message.get("identity")
        if not isinstance(identity, dict):
            raise RewardServerMismatch(f"{self._where()} does not say what it is; is it a reward server?")
        return identity

    def check_server(self, languages: Sequence[str]) -> None:
        """Wait for the server at most `startup_timeout_s`, then refuse one that cannot serve this run.

        Raises RewardServerUnavailable, or RewardServerMismatch for another schema version, missing `languages`
        (ISO 639-1), another encoder than `config.encoder` or a smaller request limit than the run needs.
        """
        identity = self.wait_until_ready(self._config.startup_timeout_s)
        served = identity.get("languages")
        missing = sorted(set(languages) - set(served if isinstance(served, list) else []))
        if missing:
            raise RewardServerMismatch(
                f"{self._where()} does not score {', '.join(missing)}, which data.languages asks for; it scores "
                f"{served}. Start it with languages=[...] that cover the run's."
            )
        if self._config.encoder is not None and identity.get("encoder") != self._config.encoder:
            raise RewardServerMismatch(
                f"{self._where()} scores with encoder {identity.get('encoder')}, not reward.encoder="
                f"{self._config.encoder}; point the run at the right server."
            )
        limit = identity.get("max_texts_per_request")
        if isinstance(limit, int) and limit < self._config.max_texts_per_request:
            raise RewardServerMismatch(
                f"reward.max_texts_per_request={self._config.max_texts_per_request} exceeds the server's {limit}; "
                "lower it, or raise max_texts_per_request of nemo_lrpo.serve_rewards."
            )

    def close(self) -> None:
        """Give up what is under way and disconnect."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _score(self, chunk: list[ScoreRequest], deadline: float) -> schema.ScoreReply:
        config = self._config
        message = self._call(schema.SCORE_MODEL, chunk, deadline, config.connect_timeout_s, config.deadline_s)
        try:
            return schema.scores_of(message, [request.sample_id for request in chunk])
        except WireError as error:
            raise RewardServerFailed(f"{self._where()} sent an unreadable reply: {error}.") from error

    def _call(
        self, model: str, requests: list[ScoreRequest] | None, deadline: float, connect_s: float, deadline_s: float
    ) -> dict[str, Any]:
        """One request and its reply. Only a lost connection is tried again: scoring twice does no harm."""
        lost_since: list[float] = []

        def give_up(state: RetryCallState) -> bool:
            now = time.monotonic()
            lost_since.append(now)
            return now + state.upcoming_sleep >= min(deadline, lost_since[0] + connect_s)

        def remind(state: RetryCallState) -> None:
            now = time.monotonic()
            if now - self._reminded > _REMINDER_S:
                self._reminded = now
                log.warning("waiting for the reward server: %s", state.outcome and state.outcome.exception())

        retrying = Retrying(
            retry=retry_if_exception_type(_ConnectionLost),
            wait=wait_random_exponential(multiplier=0.1, max=2.0),
            stop=give_up,
            before_sleep=remind,
            reraise=True,
        )
        try:
            return retrying(self._call_once, model, requests, deadline, deadline_s)
        except _ConnectionLost as error:
            tried = time.monotonic() - lost_since[0]
            raise RewardServerUnavailable(
                f"no reward server at {self._where()}, tried again for {tried:.1f} s: {error}. Start one with "
                "python -m nemo_lrpo.serve_rewards, or look at its log."
            ) from error

    def _call_once(
        self, model: str, requests: list[ScoreRequest] | None, deadline: float, deadline_s: float
    ) -> dict[str, Any]:
        connection, endpoint = self._connect(deadline)
        token = read_token("reward.token_file", self._config.token_file or endpoint.token_file) or ""
        data = np.frombuffer(schema.encode_request(token, requests), dtype=np.uint8)
        tensor = InferInput(schema.REQUEST_TENSOR, list(data.shape), "UINT8")
        tensor.set_data_from_numpy(data)
        try:
            # gRPC wants a positive timeout.
            reply = connection.infer(model, [tensor], client_timeout=max(1e-3, deadline - time.monotonic()))
        except InferenceServerException as error:
            if error.status() == "StatusCode.DEADLINE_EXCEEDED":
                raise RewardDeadlineExceeded(_too_slow(self._where(), deadline_s)) from error
            self._forget(connection)
            # NOT_FOUND: the process that scores has died, and Triton is about to follow.
            if error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.NOT_FOUND"):
                raise _ConnectionLost(error.message()) from error
            raise RewardServerFailed(f"{self._where()} failed: {error}; see its log.") from error
        return self._checked(reply.as_numpy(schema.REPLY_TENSOR).tobytes())

    def _checked(self, data: bytes) -> dict[str, Any]:
        """The reply as a message; a refusal becomes the error that it stands for."""
        try:
            message = schema.decode_message(data)
        except WireError as error:
            kind = RewardServerMismatch if error.kind == schema.ERROR_SCHEMA else RewardServerFailed
            raise kind(f"{self._where()} sent {error}.") from error
        refusal = message.get("error")
        if refusal is None:
            return message
        kind, text = refusal["kind"], refusal["message"]
        if kind == schema.ERROR_SCHEMA:
            raise RewardServerMismatch(f"{self._where()} refused: {text}. Run both with the same nemo_lrpo.")
        if kind == schema.ERROR_TOKEN:
            raise RewardRequestRefused(
                f"{self._where()} refused: {text}. Set reward.token_file, or LRPO_REWARD_TOKEN, to the server's token."
            )
        if kind == schema.ERROR_INTERNAL:
            raise RewardServerFailed(f"{self._where()} failed while scoring: {text}; see its log.")
        raise RewardRequestRefused(f"{self._where()} refused: {text}.")

    def _connect(self, deadline: float) -> tuple[InferenceServerClient, Endpoint]:
        """The open connection, or a new one to where the endpoint file points now. Raises _ConnectionLost."""
        with self._lock:
            if self._connection is not None and self._endpoint is not None:
                return self._connection, self._endpoint
            self._endpoint = endpoint = self._locate()
            connection = InferenceServerClient(endpoint.address, channel_args=_CHANNEL)
            timeout = max(1e-3, min(_LIVENESS_TIMEOUT_S, deadline - time.monotonic()))
            try:
                if not connection.is_server_ready(client_timeout=timeout):
                    raise _ConnectionLost("it is not ready yet")
            except InferenceServerException as error:
                connection.close()
                raise _ConnectionLost(error.message()) from error
            self._connection = connection
            return connection, endpoint

    def _forget(self, connection: InferenceServerClient) -> None:
        """Connect anew at the next call. Other threads may still be using the connection: it closes with its last."""
        with self._lock:
            if connection is self._connection:
                self._connection = None

    def _locate(self) -> Endpoint:
        if self._config.endpoint is not None:
            return Endpoint(*parse_endpoint("reward.endpoint", self._config.endpoint))
        try:
            return Endpoint.read(Path(str(self._config.endpoint_file)))
        except FileNotFoundError:
            raise _ConnectionLost("the endpoint file does not exist (yet)") from None
        except (OSError, ValueError) as error:
            raise RewardServerMismatch(f"reward.endpoint_file={self._config.endpoint_file!r}: {error}.") from error

    def _where(self) -> str:
        key = "endpoint" if self._config.endpoint is not None else "endpoint_file"
        source = f"reward.{key}={getattr(self._config, key)}"
        return source if self._endpoint is None else f"{self._endpoint.address} ({source})"


class _ConnectionLost(RewardError):
    """No connection, or it broke: worth another try."""


def _too_slow(where: str, deadline_s: float) -> str:
    return (
        f"the reward server at {where} did not finish within reward.deadline_s={deadline_s:g} s; raise it, give the "
        "server more compute, or send less at once."
    )
