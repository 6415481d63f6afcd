"""The reward server: one PyTriton model around a scorer that is handed in.

One gRPC port is all that is opened, and an HTTP port for health and metrics where one is asked for; Triton's own HTTP
and metrics ports stay closed, so that servers on one machine cannot collide. The model is fixed at the start: nobody
can load, replace or unload one from outside.

The model is decoupled: Triton hands every request over as soon as it arrives, and takes the replies in any order. Only
so the desk knows of requests that wait, which a model with one request per instance would leave in Triton's own queue.
Between Triton and this process messages travel as base64 over Unix sockets in a directory that only this user can
enter. PyTriton's other transport, shared memory handed out by a multiprocessing manager, would unpickle.
"""

from __future__ import annotations

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
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig, TritonLifecyclePolicy
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from nemo_lrpo.config.reward import RewardServerConfig
from nemo_lrpo.serving import schema
from nemo_lrpo.serving.desk import RewardDesk, Scorer
from nemo_lrpo.serving.endpoint import Endpoint
from nemo_lrpo.serving.errors import RewardServerFailed
from nemo_lrpo.serving.health import HealthServer

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Triton itself is up within seconds; the scorer's models are loaded before."""
SHARED_MEMORY = Path("/dev/shm")
MIN_PING_INTERVAL_MS = 5000
"""Clients that ask more often whether the connection is alive are turned away."""


class RewardServer:
    """Serves `scorer` from `start` to `stop`; also a context manager. Runs in the process that makes it."""

    def __init__(self, config: RewardServerConfig, scorer: Scorer) -> None:
        """Opens nothing yet. `config` has passed its check. Raises ConfigError for a token file that cannot be read."""
        self._config = config
        self._desk = RewardDesk(config, scorer)
        self._health: HealthServer | None = None
        self._triton: _FixedModelsTriton | None = None
        self._workspace: Path | None = None
        self._reaper: subprocess.Popen[bytes] | None = None

    def start(self) -> Endpoint:
        """Start Triton and wait until it answers. Raises RewardServerFailed, naming the log, if it does not.

        The endpoint file is written last: what it names is ready.
        """
        config = self._config
        ports = self._ports()
        # Short: the names of Unix sockets in it are limited to 107 bytes. Others may not enter it.
        self._workspace = Path(tempfile.mkdtemp(prefix="lrpo-reward-"))
        self._log_file().parent.mkdir(parents=True, exist_ok=True)
        try:
            if config.metrics_port is not None:
                self._health = self._serve_health(config.metrics_port)
            port = self._launch_on_one_of(ports)
        except Exception as error:
            said = self._log_tail()
            self.stop()
            where = f"{config.host}:{ports[0]}" + (f" to {ports[-1]}" if len(ports) > 1 else "")
            raise RewardServerFailed(f"the server did not start on {where} ({error}).{said}") from error
        self._reaper = _start_reaper(self._triton.processes(), self._workspace, self._triton.shared_memory)
        token_file = None if config.token_file is None else str(Path(config.token_file).resolve())
        everywhere = config.host in ("0.0.0.0", "::")
        host = config.advertise_host or (socket.gethostname() if everywhere else config.host)
        metrics_port = None if self._health is None else self._health.port
        endpoint = Endpoint(host, port, os.getpid(), token_file, metrics_port)
        if config.endpoint_file:
            endpoint.write(Path(config.endpoint_file))
        return endpoint

    def wait(self, stop: threading.Event) -> None:
        """Serve until `stop` is set. Raises RewardServerFailed if Triton dies before."""
        while not stop.wait(timeout=0.5):
            if not self._alive():
                raise RewardServerFailed(f"Triton ended unexpectedly.{self._log_tail()}")

    def stop(self) -> None:
        """Take back the endpoint file, let nobody in, give requests in progress `exit_timeout_s`, end Triton and remove
        its workspace. Safe to call twice."""
        if self._config.endpoint_file:
            path = Path(self._config.endpoint_file)
            try:
                # Another server may have been started with the same file since.
                if Endpoint.read(path).pid == os.getpid():
                    path.unlink()
            except (OSError, ValueError):
                pass
        self._desk.close(self._config.exit_timeout_s)
        self._end_triton()
        if self._health is not None:
            self._health.close()
            self._health = None
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

    def _end_triton(self) -> None:
        if self._triton is None:
            return
        with warnings.catch_warnings():
            # PyTriton asks over gRPC whether Triton is still alive, and warns that this has no timeout.
            warnings.simplefilter("ignore")
            self._triton.stop()
        for path in SHARED_MEMORY.glob(f"{self._triton.shared_memory}*"):
            # Where Triton has died before.
            path.unlink(missing_ok=True)
        self._triton = None

    def _ports(self) -> range:
        """The ports to try, in order."""
        config = self._config
        first = config.port or free_port(config.host)
        return range(first, first + (config.port_tries if config.port else 1))

    def _launch_on_one_of(self, ports: range) -> int:
        """Start Triton on the first port that it can have; returns it. Raises what PyTriton raises."""
        host = self._config.host
        for port in ports[:-1]:
            if not is_free(host, port):
                continue
            try:
                self._triton = self._launch(port)
                return port
            except Exception:
                if is_free(host, port):
                    raise
                # Somebody has taken it since it was free.
                self._end_triton()
        self._triton = self._launch(ports[-1])
        return ports[-1]

    def _launch(self, port: int) -> _FixedModelsTriton:
        """Triton, ready. Raises what PyTriton raises."""
        config = self._config
        provide_libpython()
        # Read by this process when the model is bound, and by Triton's.
        os.environ["PYTRITON_NO_TENSORSTORE"] = "1"
        triton = self._triton = _FixedModelsTriton(
            config=TritonConfig(
                allow_http=False,
                allow_metrics=False,
                # Triton puts the port behind it, with a colon.
                grpc_address=f"[{config.host}]" if ":" in config.host else config.host,
                grpc_port=port,
                # Clients ask whether a silent connection is still one; Triton's default takes that for an attack.
                grpc_http2_min_recv_ping_interval_without_data=MIN_PING_INTERVAL_MS,
                exit_timeout_secs=config.exit_timeout_s,
                log_file=self._log_file(),
            ),
            workspace=Path(str(self._workspace)) / "triton",
            triton_lifecycle_policy=TritonLifecyclePolicy(launch_triton_on_startup=True, local_model_store=True),
        )
        triton.bind(
            model_name=schema.MODEL,
            infer_func=_infer_function(self._desk.answer),
            inputs=[Tensor(name=schema.REQUEST_TENSOR, dtype=np.uint8, shape=(-1,))],
            outputs=[Tensor(name=schema.REPLY_TENSOR, dtype=np.uint8, shape=(-1,))],
            config=ModelConfig(batching=False, decoupled=True),
        )
        triton.run()
        for path in SHARED_MEMORY.glob(f"{triton.shared_memory}*"):
            # Triton passes the texts through it, and leaves it readable for every user of the machine.
            path.chmod(0o600)
        return triton

    def _serve_health(self, port: int) -> HealthServer:
        checks = {"/healthz": self._alive, "/readyz": lambda: self._alive() and self._desk.accepting}
        address = (self._config.host, port)
        return HealthServer(address, self._desk.authorised, checks, self._desk.metrics.text)

    def _alive(self) -> bool:
        return self._triton is not None and self._reaper is not None and self._triton.is_alive()


def free_port(host: str) -> int:
    """A TCP port that is free on `host` now."""
    with _socket_for(host) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens on this port of `host` now."""
    with _socket_for(host) as probe:
        # What is left of connections that have ended does not matter to a server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _socket_for(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def provide_libpython() -> None:
    """Let Triton's worker find the libpython of this interpreter, where that is not the system's.

    The worker is a process of its own that inherits this environment; this process is not affected.
    """
    directory = sysconfig.get_config_var("LIBDIR")
    library = sysconfig.get_config_var("INSTSONAME")
    paths = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    if directory and library and (Path(directory) / library).is_file() and directory not in paths:
        os.environ["LD_LIBRARY_PATH"] = ":".join([*paths, directory])


def _start_reaper(processes: list[int], workspace: Path, shared_memory: str) -> subprocess.Popen[bytes]:
    """A process that, should this one be killed, kills Triton's at once and removes what they would leave behind.

    Left to themselves, Triton's workers keep the connections open for half a minute after the scorer has died, and
    clients wait for nothing. The pipe closes with this process, however it ends.
    """
    script = 'read -r _; left=$1; shared=$2; shift 2; kill -9 "$@" 2>/dev/null; sleep 1; rm -rf -- "$left" "$shared"*'
    left = (str(workspace), str(SHARED_MEMORY / shared_memory))
    command = ["/bin/sh", "-c", script, "lrpo-reward-reaper", *left, *map(str, processes)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _infer_function(answer: Callable[[bytes], Awaitable[bytes]]) -> Callable[..., AsyncIterator[Any]]:
    async def infer(requests: list[Any]) -> AsyncIterator[list[dict[str, NDArray[np.uint8]]]]:
        # One at a time, without batching; the loop goes on to the next request while this one waits.
        replies = [await answer(request.data[schema.REQUEST_TENSOR].tobytes()) for request in requests]
        yield [{schema.REPLY_TENSOR: np.frombuffer(reply, dtype=np.uint8)} for reply in replies]

    return infer


class _FixedModelsTriton(Triton):
    """Triton that takes its models from the local store at the start, and none later.

    PyTriton manages models over the same port as clients do. With the models in the store before the start it has
    nothing to manage; only its waiting would read the (closed) log settings, and is replaced by health checks.
    """

    shared_memory = ""
    """How the names of Triton's files in SHARED_MEMORY begin."""

    def _prepare_triton_config(self, workspace: Any) -> None:
        super()._prepare_triton_config(workspace)
        self._triton_server_config["model_control_mode"] = "none"
        self._triton_server_config["load_model"] = None
        # Clients need inference, health and metadata. The rest is closed by a value that is thrown away.
        closed = "model-config,model-repository,shared-memory,statistics,trace,logging"
        self._triton_server_config["grpc_restricted_protocol"] = f"{closed}:closed={secrets.token_hex(16)}"

    def _shm_prefix(self) -> str:
        self.shared_memory = f"lrpo-reward-{secrets.token_hex(8)}"
        return self.shared_memory

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
