"""The reward server: two PyTriton models, `score` and `identity`, around a scorer that is handed in.

One gRPC port is all that is opened; Triton's HTTP and metrics ports stay closed, so that servers on one machine cannot
collide. Models are fixed at the start: nobody can load, replace or unload one from outside.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig, TritonLifecyclePolicy
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from nemo_lrpo.config.reward import RewardServerConfig, read_token
from nemo_lrpo.serving import schema
from nemo_lrpo.serving.endpoint import Endpoint
from nemo_lrpo.serving.errors import RewardServerFailed, WireError
from nemo_lrpo.types import Score, ScoreRequest

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Triton itself is up within seconds; models are loaded before."""


class Scorer(Protocol):
    """What the server serves."""

    def score(self, requests: list[ScoreRequest]) -> list[Score]:
        """Scores in the order of the requests."""

    def identity(self) -> dict[str, object]:
        """What the scores depend on (encoder, calibration, languages), as JSON values."""


class RewardServer:
    """Serves `scorer` from `start` to `stop`; also a context manager. Runs in the process that makes it."""

    def __init__(self, config: RewardServerConfig, scorer: Scorer) -> None:
        """Opens nothing yet. `config` has passed its check. Raises ConfigError for a token file that cannot be read."""
        self._config = config
        self._scorer = scorer
        self._token = (read_token("token_file", config.token_file) or "").encode()
        self._triton: Triton | None = None
        self._workspace: Path | None = None
        self._reaper: subprocess.Popen[bytes] | None = None

    def start(self) -> Endpoint:
        """Start Triton and wait until both models answer. Raises RewardServerFailed, naming the log, if they do not.

        The endpoint file is written last: what it names is ready.
        """
        config = self._config
        provide_libpython()
        port = config.port or free_port(config.host)
        # Short: the names of Unix sockets in it are limited to 107 bytes.
        self._workspace = Path(tempfile.mkdtemp(prefix="lrpo-reward-"))
        self._log_file().parent.mkdir(parents=True, exist_ok=True)
        self._triton = _FixedModelsTriton(
            config=TritonConfig(
                allow_http=False,
                allow_metrics=False,
                grpc_address=config.host,
                grpc_port=port,
                exit_timeout_secs=config.exit_timeout_s,
                log_file=self._log_file(),
            ),
            workspace=self._workspace / "triton",
            triton_lifecycle_policy=TritonLifecyclePolicy(launch_triton_on_startup=True, local_model_store=True),
        )
        for name, answer in ((schema.SCORE_MODEL, self._score), (schema.IDENTITY_MODEL, self._identity)):
            self._triton.bind(
                model_name=name,
                infer_func=_infer_function(self._guarded(answer)),
                inputs=[Tensor(name=schema.REQUEST_TENSOR, dtype=np.uint8, shape=(-1,))],
                outputs=[Tensor(name=schema.REPLY_TENSOR, dtype=np.uint8, shape=(-1,))],
                config=ModelConfig(batching=False),
            )
        try:
            self._triton.run()
        except Exception as error:
            said = self._log_tail()
            self.stop()
            raise RewardServerFailed(f"Triton did not start on {config.host}:{port} ({error}).{said}") from error
        self._reaper = _start_reaper(self._triton.processes(), self._workspace)
        token_file = None if config.token_file is None else str(Path(config.token_file).resolve())
        everywhere = config.host in ("0.0.0.0", "::")
        host = config.advertise_host or (socket.gethostname() if everywhere else config.host)
        endpoint = Endpoint(host, port, os.getpid(), token_file)
        if config.endpoint_file:
            endpoint.write(Path(config.endpoint_file))
        return endpoint

    def wait(self, stop: threading.Event) -> None:
        """Serve until `stop` is set. Raises RewardServerFailed if Triton dies before."""
        while not stop.wait(timeout=0.5):
            if self._triton is None or not self._triton.is_alive():
                raise RewardServerFailed(f"Triton ended unexpectedly.{self._log_tail()}")

    def stop(self) -> None:
        """Take back the endpoint file, end Triton and remove its workspace. Safe to call twice."""
        if self._config.endpoint_file:
            path = Path(self._config.endpoint_file)
            try:
                # Another server may have been started with the same file since.
                if Endpoint.read(path).pid == os.getpid():
                    path.unlink()
            except (OSError, ValueError):
                pass
        if self._triton is not None:
            with warnings.catch_warnings():
                # PyTriton asks over gRPC whether Triton is still alive, and warns that this has no timeout.
                warnings.simplefilter("ignore")
                self._triton.stop()
            self._triton = None
        if self._reaper is not None:
            self._reaper.kill()
            self._reaper.communicate()
            self._reaper = None
        if self._workspace is not None:
            shutil.rmtree(self._workspace, ignore_errors=True)
            self._workspace = None

    def __enter__(self) -> RewardServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _log_file(self) -> Path:
        assert self._workspace is not None
        return Path(self._config.triton_log) if self._config.triton_log else self._workspace / "triton.log"

    def _log_tail(self) -> str:
        try:
            lines = self._log_file().read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(["", "The end of Triton's log:", *lines[-20:]])

    def _score(self, message: dict[str, Any]) -> bytes:
        config = self._config
        requests = schema.requests_of(message, config.max_texts_per_request, config.max_text_chars)
        started = time.monotonic()
        scores = self._scorer.score(requests)
        log.debug("scored %d answers in %.3f s", len(requests), time.monotonic() - started)
        return schema.encode_scores(scores)

    def _identity(self, message: dict[str, Any]) -> bytes:
        limits = {"max_texts_per_request": self._config.max_texts_per_request}
        return schema.encode_identity({**self._scorer.identity(), **limits})

    def _guarded(self, answer: Callable[[dict[str, Any]], bytes]) -> Callable[[bytes], bytes]:
        """`answer` behind the checks of size, version and token, in this order; every failure becomes a refusal."""

        def guarded(data: bytes) -> bytes:
            try:
                if len(data) > self._config.max_request_bytes:
                    limit = f"max_request_bytes={self._config.max_request_bytes}"
                    raise WireError(schema.ERROR_LIMIT, f"the request has {len(data)} bytes; {limit}")
                message = schema.decode_message(data)
                if self._token and not hmac.compare_digest(str(message.get("token")).encode(), self._token):
                    raise WireError(schema.ERROR_TOKEN, "the token is missing or wrong")
                return answer(message)
            except WireError as error:
                log.warning("refused a request: %s", error)
                return schema.encode_error(error.kind, str(error))
            except Exception as error:
                log.exception("a request failed")
                return schema.encode_error(schema.ERROR_INTERNAL, f"{type(error).__name__}: {error}")

        return guarded


def free_port(host: str) -> int:
    """A TCP port that is free on `host` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def provide_libpython() -> None:
    """Let Triton's worker find the libpython of this interpreter, where that is not the system's.

    The worker is a process of its own that inherits this environment; this process is not affected.
    """
    directory = sysconfig.get_config_var("LIBDIR")
    library = sysconfig.get_config_var("INSTSONAME")
    paths = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    if directory and library and (Path(directory) / library).is_file() and directory not in paths:
        os.environ["LD_LIBRARY_PATH"] = ":".join([*paths, directory])


def _start_reaper(processes: list[int], workspace: Path) -> subprocess.Popen[bytes]:
    """A process that, should this one be killed, kills Triton's at once and removes the workspace.

    Left to themselves, Triton's workers keep the connections open for half a minute after the scorer has died, and
    clients wait for nothing. The pipe closes with this process, however it ends.
    """
    script = 'read -r _; workspace=$1; shift; kill -9 "$@" 2>/dev/null; sleep 1; rm -rf -- "$workspace"'
    command = ["/bin/sh", "-c", script, "lrpo-reward-reaper", str(workspace), *map(str, processes)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _infer_function(answer: Callable[[bytes], bytes]) -> Callable[..., list[dict[str, NDArray[np.uint8]]]]:
    def infer(requests: list[Any]) -> list[dict[str, NDArray[np.uint8]]]:
        replies = [answer(request.data[schema.REQUEST_TENSOR].tobytes()) for request in requests]
        return [{schema.REPLY_TENSOR: np.frombuffer(reply, dtype=np.uint8)} for reply in replies]

    return infer


class _FixedModelsTriton(Triton):
    """Triton that takes its models from the local store at the start, and none later.

    PyTriton manages models over the same port as clients do. With the models in the store before the start it has
    nothing to manage; only its waiting would read the (closed) log settings, and is replaced by health checks.
    """

    def _prepare_triton_config(self, workspace: Any) -> None:
        super()._prepare_triton_config(workspace)
        self._triton_server_config["model_control_mode"] = "none"
        self._triton_server_config["load_model"] = None
        # Clients need inference, health and metadata. The rest is closed by a value that is thrown away.
        closed = "model-config,model-repository,shared-memory,statistics,trace,logging"
        self._triton_server_config["grpc_restricted_protocol"] = f"{closed}:closed={secrets.token_hex(16)}"

    def processes(self) -> list[int]:
        """Ids of the running tritonserver and its workers."""
        server = psutil.Process(self._triton_server._tritonserver_running_cmd.pid)
        return [server.pid, *(child.pid for child in server.children(recursive=True))]

    def _wait_for_server(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        address = self._url.split("://", 1)[-1]
        with InferenceServerClient(address, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
            while self._is_alive_impl():
                try:
                    if client.is_server_ready(client_timeout=1.0):
                        return
                except InferenceServerException:
                    pass
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not ready after {START_TIMEOUT_S:.0f} s")
                time.sleep(0.05)
        raise RuntimeError("the process ended")

    def _wait_for_models(self) -> None:
        """The server is ready only when its models are."""
