"""An OpenAI-compatible endpoint on loopback, whose replies a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatEndpoint(ThreadingHTTPServer):
    """`answer` gets what the user says first; its text is the reply, a number the status of a reply without one."""

    def __init__(self, answer: Callable[[str], str | int]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.prompts: list[str] = []
        """Of all requests, in the order of their arrival."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatEndpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = next(one["content"] for one in body["messages"] if one["role"] == "user")
        self.server.prompts.append(prompt)
        reply = self.server.answer(prompt)
        text = isinstance(reply, str)
        data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode() if text else b""
        self.send_response(200 if text else reply)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve_chat(answer: Callable[[str], str | int]) -> Iterator[ChatEndpoint]:
    """An endpoint that listens inside."""
    with ChatEndpoint(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
