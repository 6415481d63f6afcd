"""The HTTP port for health and metrics, with checks that the test decides."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from nemo_lrpo.serving import health
from nemo_lrpo.serving.health import HealthServer

TOKEN = "geheim-ß-à"


@pytest.fixture
def server() -> Iterator[HealthServer]:
    checks = {"/healthz": lambda: True, "/readyz": lambda: False}
    server = HealthServer(("127.0.0.1", 0), lambda token: token == TOKEN, checks, lambda: b"metrics\n")
    yield server
    server.close()


def ask(server: HealthServer, path: str, method: str = "GET", token: str = TOKEN) -> httpx.Response:
    headers = {"Authorization": b"Bearer " + token.encode()} if token else {}
    return httpx.request(method, f"http://127.0.0.1:{server.port}{path}", headers=headers, trust_env=False)


def test_a_token_of_any_characters(server: HealthServer) -> None:
    assert ask(server, "/healthz").text == "ok\n"
    for token in ("", "geheim", "geheim-ß-a", TOKEN + "\x80"):
        assert ask(server, "/healthz", token=token).status_code == 401


def test_what_is_asked_may_have_a_query(server: HealthServer) -> None:
    assert ask(server, "/healthz?probe=1").status_code == 200
    assert ask(server, "/readyz?probe=1").status_code == 503
    assert ask(server, "/metrics?name=x").text == "metrics\n"
    assert ask(server, "/health").status_code == 404


def test_head_is_answered_without_a_body(server: HealthServer) -> None:
    for path, status in (("/healthz", 200), ("/readyz", 503), ("/metrics", 200), ("/", 404)):
        whole, head = ask(server, path), ask(server, path, "HEAD")
        assert head.status_code == whole.status_code == status and head.text == ""
        assert head.headers["Content-Length"] == str(len(whole.content))


def test_connections_beyond_the_limit_are_closed(server: HealthServer) -> None:
    def threads() -> int:
        return sum("process_request_thread" in thread.name for thread in threading.enumerate())

    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(health._MAX_CONNECTIONS + 5)]
    try:
        for late in silent[health._MAX_CONNECTIONS :]:
            late.settimeout(5.0)
            assert late.recv(1) == b"", "closed"
        assert threads() == health._MAX_CONNECTIONS
    finally:
        for each in silent:
            each.close()
    # Their places are free again.
    while threads():
        pass
    assert ask(server, "/healthz").status_code == 200
