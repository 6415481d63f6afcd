"""Asking a model behind an OpenAI-compatible endpoint, many times at once, and keeping what it said."""

from __future__ import annotations

import concurrent.futures
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import tenacity

from nemo_lrpo.config.checks import ConfigError

_WINDOW = 8
"""Questions under way for each connection: enough that none waits."""

Q = TypeVar("Q")
A = TypeVar("A")


class NoReply(Exception):
    """The endpoint has not replied, try after try."""


@dataclass(frozen=True)
class Reply:
    """What a model says. ended: by itself, not by a limit on its length."""

    text: str
    ended: bool = True


class ChatEndpoint:
    """One model of an endpoint. May be shared by threads.

    `option` begins the names of the command line's options, --label for --label-url: messages name them.
    """

    def __init__(
        self, url: str, model: str, option: str, *, key_env: str | None, concurrency: int, timeout_s: float
    ) -> None:
        """Raises ConfigError where `key_env` names no environment variable that is set."""
        key = os.environ.get(key_env, "") if key_env else ""
        if key_env and not key:
            raise ConfigError(f"{option}-key-env {key_env}: that environment variable is not set.")
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._model = model
        self._option = option
        self._timeout_s = timeout_s
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=concurrency),
            trust_env=False,
        )

    def reply(self, system: str, user: str, **settings: object) -> Reply:
        """What the model says; connection errors, HTTP 408, 429 and 5xx are tried again for `timeout_s`.

        settings: of the request, such as max_tokens; without temperature it is 0. Raises NoReply, and ConfigError where
        the endpoint refuses all requests (HTTP 401, 403, 404).
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(httpx.TransportError),
            wait=tenacity.wait_random_exponential(multiplier=0.25, max=8.0),
            stop=tenacity.stop_after_delay(self._timeout_s),
            reraise=True,
        )
        try:
            return retrying(self._post, system, user, settings)
        except httpx.TransportError as error:
            raise NoReply(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._client.close()

    def _post(self, system: str, user: str, settings: dict[str, object]) -> Reply:
        payload: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "temperature": 0.0,
            **settings,
        }
        response = self._client.post(self._url, json=payload)
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise httpx.TransportError(f"HTTP {response.status_code}")
        if response.status_code in (401, 403, 404):
            raise ConfigError(
                f"{self._url} refused model {self._model!r} with HTTP {response.status_code}; see {self._option}-url, "
                f"{self._option}-model and {self._option}-key-env."
            )
        try:
            choice = response.json()["choices"][0]
            content, ended = choice["message"]["content"], choice.get("finish_reason") != "length"
        except (ValueError, LookupError, TypeError, AttributeError):
            return Reply(f"HTTP {response.status_code}")
        return Reply(content if isinstance(content, str) else "", ended)


def as_answered(questions: Iterable[Q], ask: Callable[[Q], A], concurrency: int) -> Iterator[tuple[Q, A]]:
    """Each question with its answer, as the answers come; `ask` runs in `concurrency` threads. Its error ends it."""
    pool = concurrent.futures.ThreadPoolExecutor(concurrency, thread_name_prefix="ask")
    left = iter(questions)
    waiting: dict[concurrent.futures.Future[A], Q] = {}
    try:
        while True:
            for question in left:
                waiting[pool.submit(ask, question)] = question
                if len(waiting) >= _WINDOW * concurrency:
                    break
            if not waiting:
                return
            done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def kept_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file to which lines are added; none where it is not there. A line that was cut off by a
    kill is passed over, and ended, so that the next one begins anew."""
    if not path.exists():
        return []
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    found = []
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
