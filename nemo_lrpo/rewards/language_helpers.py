"""Language identification in several processes. fastText's Python binding holds the interpreter's lock while it reads a
text, so threads of one process would take turns.

A helper is `python -m nemo_lrpo.rewards.language_helpers`. It reads a line of JSON with configuration and languages,
then requests: a line [number, task, characters of each text, bytes of all], and the texts themselves, one after the
other in UTF-8. It answers each by a line [number, [[language, confidence], ...]]. It ends when its input does, so also
when the process that started it is killed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_lrpo.config.scoring import LanguageIdConfig
from nemo_lrpo.rewards.language import Identification, LanguageIdentifier

SMALLEST_SHARE = 16
"""Texts; a batch without so many for each of two processes is identified in this one, about a millisecond of work."""
STALL_LIMIT_S = 20.0
"""A helper that has not answered by then is killed; a batch takes milliseconds."""
_ROOT = Path(__file__).resolve().parents[2]


class HelpedIdentifier(LanguageIdentifier):
    """A LanguageIdentifier that shares its batches with config.threads - 1 helper processes; the results are the same.

    A helper that ends is done without from then on. Of several threads that call at once, one has the helpers. `close`
    it after use."""

    def __init__(self, config: LanguageIdConfig, languages: Sequence[str]):
        super().__init__(config, languages)
        self._helpers = [_Helper(config, languages) for _ in range(config.threads - 1)]
        self._lock = threading.Lock()

    def identify(self, texts: Sequence[str]) -> list[Identification]:
        """As LanguageIdentifier.identify."""
        return self._share("identify", [text[: self._config.max_chars] for text in texts], super().identify)

    def identify_prose(self, texts: Sequence[str]) -> list[Identification]:
        """As LanguageIdentifier.identify_prose."""
        return self._share("identify_prose", texts, super().identify_prose)

    def close(self) -> None:
        """End the helpers; later batches are identified in this process alone."""
        with self._lock:
            while self._helpers:
                self._helpers.pop().close()

    def _share(
        self, task: str, texts: Sequence[str], here: Callable[[Sequence[str]], list[Identification]]
    ) -> list[Identification]:
        if len(texts) < 2 * SMALLEST_SHARE or not self._lock.acquire(blocking=False):
            return here(texts)
        helpers = self._helpers[: len(texts) // SMALLEST_SHARE - 1]
        # A helper that has stopped would block its pipe: killed, it ends, and its share is judged here.
        watch = threading.Timer(STALL_LIMIT_S, lambda: [helper.kill() for helper in helpers])
        watch.start()
        try:
            count = 1 + len(helpers)
            # Every count-th text and not a stretch: neighbours are often of like length.
            shares = [texts[start::count] for start in range(count)]
            for helper, share in zip(helpers, shares[1:]):
                helper.ask(task, share)
            found = [here(shares[0])]
            for helper, share in zip(helpers, shares[1:]):
                answer = helper.answer()
                if answer is None:
                    self._helpers.remove(helper)
                    helper.close()
                found.append(here(share) if answer is None else answer)
            return [found[i % count][i // count] for i in range(len(texts))]
        finally:
            watch.cancel()
            self._lock.release()


class _Helper:
    """One process with a LanguageIdentifier of its own; one request at a time."""

    def __init__(self, config: LanguageIdConfig, languages: Sequence[str]):
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._number = 0
        self._write(_line([dataclasses.asdict(config), list(languages)]))

    def ask(self, task: str, texts: Sequence[str]) -> None:
        self._number += 1
        # Any string is a text, lone surrogates too. All in one piece: JSON would take a tenth of the time.
        payload = "".join(texts).encode("utf-8", "surrogatepass")
        self._write(_line([self._number, task, list(map(len, texts)), len(payload)]) + payload)

    def answer(self) -> list[Identification] | None:
        """To the last request; None where the process has ended."""
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()).endswith(b"\n"):
            number, found = json.loads(line)
            # An earlier one is of a batch that was given up between `ask` and `answer`.
            if number == self._number:
                return [Identification(language, confidence) for language, confidence in found]
        return None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _write(self, message: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` will say so


def _line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def main() -> None:
    """Serve the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to handle
    config, languages = json.loads(sys.stdin.buffer.readline())
    identifier = LanguageIdentifier(LanguageIdConfig(**config), languages)
    tasks = {"identify": identifier.identify, "identify_prose": identifier.identify_prose}
    while line := sys.stdin.buffer.readline():
        number, task, lengths, size = json.loads(line)
        text = sys.stdin.buffer.read(size).decode("utf-8", "surrogatepass")
        ends = list(itertools.accumulate(lengths))
        found = tasks[task]([text[end - length : end] for length, end in zip(lengths, ends, strict=True)])
        sys.stdout.buffer.write(_line([number, [(one.language, one.confidence) for one in found]]))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
