"""Threads of the client: none of them keeps the process from ending."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)


class DaemonPool:
    """Up to `size` threads, started when there is work for them. concurrent.futures' would be joined when the
    interpreter ends: a run that failed would hang as long as a request may take."""

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._changed = threading.Condition()
        self._tasks: deque[Callable[[], object]] = deque()
        self._threads = 0
        self._idle = 0
        self._closed = False

    def submit(self, task: Callable[[], object]) -> None:
        """Have `task` done; what it raises is logged. Raises RuntimeError once the pool is closed."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._tasks.append(task)
            if len(self._tasks) > self._idle and self._threads < self._size:
                self._threads += 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            self._changed.notify()

    def close(self) -> None:
        """Drop what nobody has begun with; the threads end when they are through. Does not wait; may be repeated."""
        with self._changed:
            self._closed = True
            self._tasks.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._tasks or self._closed)
                self._idle -= 1
                if self._closed:
                    return
                task = self._tasks.popleft()
            try:
                task()
            except Exception:
                log.exception("%s failed", self._name)
            # What it holds is not kept until the next one comes.
            del task
