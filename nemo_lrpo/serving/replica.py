"""One reward server as a client sees it: the connection, what it refuses, and how it is found again."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from tenacity import RetryError, Retrying, retry_if_result, stop_when_event_set, wait_random_exponential
from tenacity.nap import sleep_using_event
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.reward import parse_endpoint, read_token
from nemo_lrpo.serving import schema
from nemo_lrpo.serving.endpoint import Endpoint
from nemo_lrpo.serving.errors import (
    RewardDeadlineExceeded,
    RewardError,
    RewardRequestRefused,
    RewardServerFailed,
    RewardServerMismatch,
    WireError,
)

log = logging.getLogger(__name__)

_CHANNEL = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A cluster's web proxy has no business between a run and its reward server.
    ("grpc.enable_http_proxy", 0),
    # A new channel is a new connection, with no memory of how the last one failed.
    ("grpc.use_local_subchannel_pool", 1),
    # A machine that is gone without a word: noticed within half a minute rather than at the deadline.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]
_PROBE_TIMEOUT_S = 10.0
"""A server says within this time what it is, however busy its scorer is."""
_NO_ROOM_S = 0.5
_REST_S = (5.0, 60.0)
"""A replica that answers and does not score rests at first, and at most."""
_ASK_WHAT_IT_IS_S = 2.0
REMINDER_S = 15.0
"""The same trouble is logged again after this time."""


class ConnectionLost(RewardError):
    """No connection, or it broke: the request may be sent again."""


class Busy(RewardError):
    """The server lets nobody in for `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ScoringFailed(RewardServerFailed):
    """The server is there and could not score this request, or its answer cannot be read."""


class Connection:
    """An open channel to a server. Closes when nobody refers to it any more: other threads may still be using it.

    limits: what the server says that it takes at most, by name; empty before it was asked.
    """

    def __init__(self, endpoint: Endpoint, token: str, where: str) -> None:
        self.token = token
        self.limits: Mapping[str, int] = {}
        self._where = where
        self._channel = grpc.insecure_channel(endpoint.address, options=_CHANNEL)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def call(
        self, data: bytes, timeout_s: float, on_start: Callable[[grpc.Call], None] | None = None
    ) -> dict[str, Any]:
        """The answer to one message. `on_start` gets the call, which other threads may cancel.

        Raises ConnectionLost (also where the server dropped the request), Busy, RewardDeadlineExceeded, ScoringFailed,
        or the error that the server's refusal stands for.
        """
        request = service_pb2.ModelInferRequest(model_name=schema.MODEL)
        request.inputs.add(name=schema.REQUEST_TENSOR, datatype="UINT8", shape=[len(data)])
        request.raw_input_contents.append(data)
        # A stream of one: Triton's decoupled models have no other call.
        call = self._stub.ModelStreamInfer(iter((request,)), timeout=max(1e-3, timeout_s))
        if on_start is not None:
            on_start(call)
        replies: list[service_pb2.ModelStreamInferResponse] = []
        try:
            # To the end of the stream, which ends the call.
            replies.extend(call)
        except grpc.RpcError as error:
            if not replies:
                raise self._failure(error) from error
        if not replies:
            raise ConnectionLost("the server ended the call without a reply")
        if replies[0].error_message:
            # The server itself answers all that goes wrong: this is Triton, which has no room for the request in
            # /dev/shm beside others', or whose other half has died or is ending.
            said = f"{self._where}: Triton says: {replies[0].error_message.splitlines()[-1]}"
            if "unknown model" in said and "is not found" in said:
                raise self._foreign(said)
            raise Busy(said, _NO_ROOM_S) if "shared memory" in said else ConnectionLost(said)
        outputs = replies[0].infer_response.raw_output_contents
        if not outputs:
            raise self._foreign(f"{self._where} gave an answer without an output")
        return self._answer(outputs[0])

    def _foreign(self, said: str) -> RewardServerMismatch:
        """The error of a Triton that is no reward server, with what it is as far as it says so."""
        found = ""
        try:
            server = self._stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=_ASK_WHAT_IT_IS_S)
            found = f"; it is {server.name} {server.version}"
            index = self._stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=_ASK_WHAT_IT_IS_S)
            found += f" with the models {', '.join(model.name for model in index.models) or '(none)'}"
        except grpc.RpcError as error:
            log.debug("%s does not say what it is: %s", self._where, error)
        return RewardServerMismatch(f"{said}{found}. Point the run at a server of nemo_lrpo.serve_rewards.")

    def _failure(self, error: grpc.RpcError) -> RewardError:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return RewardDeadlineExceeded(f"{self._where} did not answer in time")
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return self._foreign(f"{self._where} does not know the call ({error.details()})")
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ScoringFailed(f"{self._where} failed: {error.details()}; see its log.")
        return ConnectionLost(str(error.details() or error.code()))

    def _answer(self, data: bytes) -> dict[str, Any]:
        try:
            message = schema.decode_message(data)
            refusal = schema.refusal_of(message)
        except WireError as error:
            kind = RewardServerMismatch if error.kind == schema.ERROR_SCHEMA else ScoringFailed
            raise kind(f"{self._where} sent {error}.") from error
        if refusal is None:
            return message
        said = f"{self._where} refused: {refusal.message}."
        if refusal.kind == schema.ERROR_BUSY:
            raise Busy(said, refusal.retry_after_s)
        if refusal.kind == schema.ERROR_EXPIRED:
            raise RewardDeadlineExceeded(said)
        if refusal.kind == schema.ERROR_CANCELLED:
            # Not by this side, or nobody would read it: the server is ending.
            raise ConnectionLost(said)
        if refusal.kind == schema.ERROR_LANGUAGE:
            raise RewardServerMismatch(f"{said} Start it with languages=[...] that cover the run's.")
        if refusal.kind == schema.ERROR_SCHEMA:
            raise RewardServerMismatch(f"{said} Run both with the same nemo_lrpo.")
        if refusal.kind == schema.ERROR_TOKEN:
            raise RewardRequestRefused(f"{said} Set reward.token_file, or LRPO_REWARD_TOKEN, to the server's token.")
        if refusal.kind == schema.ERROR_INTERNAL:
            raise ScoringFailed(f"{self._where} failed while scoring: {refusal.message}; see its log.")
        raise RewardRequestRefused(said)


class Replica:
    """One of the servers behind a client. Its state is guarded by `changed`, which tells of every change.

    connection: None unless it is in use. refusal: why it is there and not used. trouble: why it cannot be reached.
    probed: whether it has been tried at all. outstanding: estimated tokens on their way to it. not_before: when it may
    be asked again after it was busy, by time.monotonic. strikes: how often in a row it failed to score.
    """

    def __init__(
        self,
        source: tuple[str, str],
        token_file: str | None,
        changed: threading.Condition,
        accept: Callable[[Replica, Mapping[str, object]], None],
        closed: threading.Event,
    ) -> None:
        """`source`: configuration key and value that say where it is. `accept` raises RewardServerMismatch for the
        identity of a server that is not to be used."""
        self.connection: Connection | None = None
        self.refusal: RewardError | ConfigError | None = None
        self.trouble = "it has not been tried"
        self.probed = False
        self.outstanding = 0
        self.not_before = -math.inf
        self.strikes = 0
        self._rests = 0
        self._rested = -math.inf
        self._key, self._value = source
        self._token_file = token_file
        self._changed = changed
        self._accept = accept
        self._closed = closed
        self._address = ""
        self._prober: threading.Thread | None = None
        self._reminded = -math.inf

    @property
    def where(self) -> str:
        """Host and port as far as they are known, with the configuration key that led there."""
        source = f"{self._key}={self._value}"
        return f"{self._address} ({source})" if self._address else source

    def probe(self) -> None:
        """Look for the server until it is in use, on a thread of its own; `changed` is held. Does nothing where that
        is under way or done."""
        if self._prober is None and self.connection is None and not self._closed.is_set():
            self._prober = threading.Thread(target=self._look_for_it, name="reward-probe", daemon=True)
            self._prober.start()

    def lost(self, connection: Connection, error: ConnectionLost) -> bool:
        """Leave the replica out until it answers again; `changed` is held. False where that is so already."""
        return self._leave_out(connection, str(error))

    def rest(self, connection: Connection, reason: str) -> bool:
        """Leave out a replica that answers and does not score: for some seconds, each time for longer, and until it
        says that it can; `changed` is held. False where it is left out already."""
        if connection is self.connection:
            first, most = _REST_S
            self._rested = time.monotonic() + min(most, first * 2 ** min(self._rests, 8))
            self._rests += 1
        return self._leave_out(connection, reason)

    def needed(self) -> None:
        """End the rest: there is no other replica; `changed` is held."""
        self._rested = -math.inf

    def scored(self) -> None:
        """It has done its work; `changed` is held."""
        self.strikes = self._rests = 0

    def _leave_out(self, connection: Connection, reason: str) -> bool:
        if connection is not self.connection:
            return False
        self.connection = None
        self.trouble = reason
        log.warning("leaving out the reward server %s: %s", self.where, reason)
        self.probe()
        self._changed.notify_all()
        return True

    def _look_for_it(self) -> None:
        retrying = Retrying(
            retry=retry_if_result(lambda found: not found),
            wait=wait_random_exponential(multiplier=0.1, max=2.0),
            sleep=sleep_using_event(self._closed),
            stop=stop_when_event_set(self._closed),
        )
        try:
            retrying(self._try_it)
        except RetryError:
            log.debug("stopped looking for %s", self.where)

    def _try_it(self) -> bool:
        if time.monotonic() < self._rested:
            return False
        connection, refusal, trouble = None, None, ""
        try:
            connection, identity = self._connect()
            self._accept(self, identity)
        except (ConnectionLost, RewardDeadlineExceeded, Busy) as error:
            connection, trouble = None, str(error)
        except (RewardError, ConfigError) as error:
            connection, refusal, trouble = None, error, str(error)
        except Exception as error:
            log.exception("looking for %s failed", self.where)
            connection, trouble = None, f"{type(error).__name__}: {error}"
        with self._changed:
            again = trouble == self.trouble and time.monotonic() - self._reminded < REMINDER_S
            self.probed, self.connection, self.refusal, self.trouble = True, connection, refusal, trouble
            self.not_before = -math.inf
            self.strikes = 0
            if connection is not None:
                self._prober = None
            self._changed.notify_all()
        if trouble and not again:
            self._reminded = time.monotonic()
            log.warning("%s the reward server %s: %s", "not using" if refusal else "waiting for", self.where, trouble)
        return connection is not None

    def _connect(self) -> tuple[Connection, Mapping[str, object]]:
        endpoint = self._locate()
        self._address = endpoint.address
        token = read_token("reward.token_file", self._token_file or endpoint.token_file) or ""
        connection = Connection(endpoint, token, self.where)
        message = connection.call(schema.encode_request(schema.KIND_IDENTITY, token), _PROBE_TIMEOUT_S)
        identity = message.get("identity")
        if not isinstance(identity, dict):
            raise RewardServerMismatch(f"{self.where} does not say what it is; is it a reward server?")
        if message.get("healthy") is False:
            raise ConnectionLost("it answers, but its scorer is not at work; see its log")
        names = ("max_text_chars", "max_request_bytes")
        connection.limits = {name: limit for name in names if isinstance(limit := identity.get(name), int)}
        return connection, identity

    def _locate(self) -> Endpoint:
        if ".endpoint_file" not in self._key:
            return Endpoint(*parse_endpoint(self._key, self._value))
        try:
            return Endpoint.read(Path(self._value))
        except FileNotFoundError:
            raise ConnectionLost("the endpoint file does not exist (yet)") from None
        except (OSError, ValueError) as error:
            raise RewardServerMismatch(f"{self._key}={self._value!r}: {error}.") from error
