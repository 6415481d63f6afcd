"""An HTTP port for those that watch a server: /healthz, /readyz and Prometheus' /metrics."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

_READ_TIMEOUT_S = 5.0
_MAX_CONNECTIONS = 16
"""At once; further ones are closed."""


class HealthServer:
    """Serves from its construction to `close`, on threads of its own."""

    def __init__(
        self,
        address: tuple[str, int],
        authorised: Callable[[str], bool],
        checks: dict[str, Callable[[], bool]],
        metrics: Callable[[], bytes],
    ) -> None:
        """`address`: host and port, 0 for a free one. `authorised` judges the bearer token that a request brings, empty
        without one. `checks`: by path, 200 where it holds, else 503. Raises OSError where the port is taken."""

        class Handler(BaseHTTPRequestHandler):
            timeout = _READ_TIMEOUT_S

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                scheme, _, token = self.headers.get("Authorization", "").partition(" ")
                # http.server reads bytes as Latin-1.
                token = token.strip(" \t").encode("latin-1", "replace").decode("utf-8", "replace")
                if not authorised(token if scheme.lower() == "bearer" else ""):
                    self._reply(401, b"the token is missing or wrong\n", ("WWW-Authenticate", "Bearer"))
                elif path in checks:
                    holds = checks[path]()
                    self._reply(200 if holds else 503, b"ok\n" if holds else b"not now\n")
                elif path == "/metrics":
                    self._reply(200, metrics(), ("Content-Type", "text/plain; version=0.0.4; charset=utf-8"))
                else:
                    self._reply(404, f"there are {', '.join(['/metrics', *checks])}\n".encode())

            do_HEAD = do_GET  # noqa: N815

            def _reply(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
                self.send_response(status)
                for name, value in (*headers, ("Content-Length", str(len(body)))):
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, form: str, *values: object) -> None:
                log.debug(form, *values)

        # Not http.server's own, which looks up the host's name at the start.
        class Server(ThreadingTCPServer):
            address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = _MAX_CONNECTIONS
            places = threading.BoundedSemaphore(_MAX_CONNECTIONS)

            def process_request(self, request: Any, client_address: Any) -> None:
                if self.places.acquire(blocking=False):
                    super().process_request(request, client_address)
                else:
                    self.shutdown_request(request)

            def process_request_thread(self, request: Any, client_address: Any) -> None:
                try:
                    super().process_request_thread(request, client_address)
                finally:
                    self.places.release()

            def handle_error(self, request: Any, client_address: Any) -> None:
                log.debug("a connection of %s broke", client_address, exc_info=True)

        self._server = Server(address, Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="reward-health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
