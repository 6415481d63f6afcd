"""No rank waits for one that is gone.

Ranks that share a model meet in collectives all the time, and the others of the update do. One that raises there leaves
its peers waiting for as long as the collective's own timeout. So it says its error beside the collectives, in a small
store that rank 0 serves; a thread on every rank reads it and ends the process. The same thread ends its own rank where
that has not moved for the configured time, and ends the others with it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from nemo_lrpo.actor.collectives import max_over_ranks
from nemo_lrpo.types import AgreedError

FAULT_EXIT_CODE = 70
"""Of a process that was ended because another rank failed, or because it made no progress (EX_SOFTWARE)."""

_POLL_S = 0.5
_GRACE_S = 3.0
"""Where all ranks raise the same error, each is to end by itself; the thread waits so long for that."""
_SERVE_S = 5.0
"""After a failure rank 0 goes on to serve the news for so long, or until all have heard."""
_EXIT_S = 30.0
"""For what runs at the end of a process: tearing down communication may wait for peers that are gone."""
_STORE_TIMEOUT_S = 10.0
_TOLD_BYTES = 2000
_STANDSTILL = "made no progress"


class Watchdog:
    """Watches this rank and hears of the others, from `with` to its end; all ranks enter it together."""

    def __init__(self, timeout_s: float, consequence: str) -> None:
        """timeout_s: without progress. consequence: sentences for the user, what becomes of the run's state."""
        self._timeout_s = timeout_s
        self._consequence = consequence
        self._activity, self._last = "the start", time.monotonic()
        self._leaving = threading.Event()
        self._store: dist.Store | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, activity: str) -> None:
        """This rank has come so far; `activity` is what it does next, in a few words."""
        self._activity, self._last = activity, time.monotonic()

    def __enter__(self) -> Watchdog:
        if dist.get_world_size() > 1:
            self._store = _open_store()
        self.beat("the first step")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """An error that only this rank has is told to the others; one that another rank's has brought about, as errors
        of collectives are, ends this process as the thread does."""
        self._leaving.set()
        self._thread.join()
        if self._store is None:
            return
        # What is no Exception is how ranks are told to stop, by a launcher that tells all of them.
        if error is None or isinstance(error, AgreedError) or not isinstance(error, Exception):
            self._leave(_EXIT_S if isinstance(error, AgreedError | None) else _SERVE_S)
            return
        news = self._news()
        if news:
            self._end(news)
        end = threading.Timer(_EXIT_S, os._exit, (FAULT_EXIT_CODE,))
        end.daemon = True
        end.start()
        self._publish(f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}")
        self._leave(_SERVE_S)

    def _watch(self) -> None:
        while not self._leaving.wait(_POLL_S):
            news = self._news()
            if news and not self._leaving.wait(_GRACE_S):
                self._end(news)
            still_s = time.monotonic() - self._last
            if not news and still_s > self._timeout_s:
                verdict = (
                    f"rank {dist.get_rank()} {_STANDSTILL} for {still_s:.0f} s in {self._activity} "
                    f"(trainer.lrpo.progress_timeout_s={self._timeout_s:g})"
                )
                self._publish(verdict)
                self._end(verdict)

    def _news(self) -> str | None:
        """What another rank has published, or that rank 0 does not answer any more."""
        if self._store is None:
            return None
        try:
            return self._store.get("failed").decode() if self._store.check(["failed"]) else None
        except RuntimeError as error:
            return f"rank 0 cannot be reached: {str(error).splitlines()[0]}"

    def _publish(self, text: str) -> None:
        if self._store is not None:
            # The first one counts: what follows in other ranks is mostly its consequence.
            try:
                short = text.encode(errors="replace")[:_TOLD_BYTES].decode(errors="ignore")
                self._store.compare_set("failed", "", short)
            except RuntimeError as error:
                print(f"The other ranks could not be told: {error}", file=sys.__stderr__, flush=True)

    def _leave(self, serve_s: float) -> None:
        """Rank 0 serves the store until the others need it no more, at most for `serve_s`."""
        assert self._store is not None
        try:
            left = self._store.add("left", 1)
            ends = time.monotonic() + serve_s
            while dist.get_rank() == 0 and left < dist.get_world_size() and time.monotonic() < ends:
                time.sleep(_POLL_S / 5)
                left = self._store.add("left", 0)
        except RuntimeError:
            return

    def _end(self, verdict: str) -> NoReturn:
        """End this process although its main thread waits in a collective."""
        if _STANDSTILL in verdict:
            # The rank that first says so need not be the one that the others wait for.
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        print(
            f"Rank {dist.get_rank()} stops, in {self._activity}: {verdict}. {self._consequence} "
            f"Exit code {FAULT_EXIT_CODE}.",
            file=sys.__stderr__,
            flush=True,
        )
        if self._store is not None:
            self._leave(_SERVE_S)
        # Without the usual end of a process nobody else would end those that it started.
        for child in multiprocessing.active_children():
            # They have inherited what this process does at SIGTERM.
            child.kill()
        os._exit(FAULT_EXIT_CODE)


def _open_store() -> dist.Store:
    """A store of its own: a thread that reads the process group's would be blocked by the main thread's waiting."""
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=_STORE_TIMEOUT_S)
    served = dist.get_rank() == 0
    own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if served else None
    port = max_over_ranks(0 if own is None else own.port)
    return own or dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
