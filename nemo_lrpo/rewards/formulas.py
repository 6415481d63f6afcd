"""Equality of formulas by math-verify, in a process of its own that dies when a comparison takes too long.

math-verify bounds its time by signal.alarm, which no thread but the main one may use, and which does not interrupt a
long computation within C: `9**9**9**9`, or a simplification, would hold a server's thread for ever.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading

EQUAL = "equal"
DIFFERENT = "different"
UNREADABLE = "unreadable"
"""The reference is no formula."""
LIMIT = "limit"
"""The comparison exceeded the processor time that it may take."""
LOST = "lost"
"""The process ended or stood still for another reason, so that nothing is known."""

TIME_LIMIT_S = 2.0
"""Processor time of one comparison, so that a busy machine does not decide; most take some 10 ms."""
_WALL_LIMIT_S = 60.0
_START_LIMIT_S = 120.0
_MEMORY_LIMIT = 1 << 30
_CACHE_SIZE = 4096


class _Lost(Exception):
    """LOST; raised, so that it is not remembered."""


class FormulaComparer:
    """Compares formulas in one child process, which starts with the first comparison and again after one that died.

    May be shared by threads; they take turns. Results are remembered, so that a group of equal answers costs one.
    """

    def __init__(self, time_limit_s: float = TIME_LIMIT_S):
        self._time_limit_s = time_limit_s
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._remembered = functools.lru_cache(_CACHE_SIZE)(self._ask)

    def compare(self, reference: str, answer: str, tolerance: float) -> str:
        """EQUAL, DIFFERENT, UNREADABLE, LIMIT or LOST, of two formulas in LaTeX or plain notation. Their
        numerical values may differ by `tolerance`, relative to the reference's. Raises RuntimeError if the process
        cannot start."""
        try:
            return self._remembered(reference, answer, tolerance)
        except _Lost:
            return LOST

    def _ask(self, reference: str, answer: str, tolerance: float) -> str:
        question = {"reference": reference, "answer": answer, "tolerance": tolerance, "limit_s": self._time_limit_s}
        with self._lock:
            child = self._started()
            assert child.stdin is not None and child.stdout is not None
            try:
                print(json.dumps(question), file=child.stdin, flush=True)
                reply = child.stdout.readline()
            except OSError:
                reply = ""
            if not reply:
                # Its output is closed, so its end is near.
                if self._end(grace_s=1.0) == -signal.SIGPROF:
                    return LIMIT
                raise _Lost
        return json.loads(reply)

    def _started(self) -> subprocess.Popen[str]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._end()
        child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            # The child finds this package where the parent did; Ctrl-C is the parent's, whose end the child notices.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
            start_new_session=True,
        )
        assert child.stdout is not None
        if not child.stdout.readline():
            raise RuntimeError(
                "kind=numeric: the process that compares formulas ended at its start with status "
                f"{child.wait()}; its message is on standard error. Is math-verify installed?"
            )
        self._child = child
        return child

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _end(self, grace_s: float = 0.0) -> int | None:
        """The process's exit status, negative for the signal that ended it; None where there was none."""
        if self._child is None:
            return None
        child, self._child = self._child, None
        try:
            child.wait(grace_s)
        except subprocess.TimeoutExpired:
            child.kill()
        child.communicate()
        return child.returncode


def _serve() -> None:
    """The child: one JSON question per line in, one answer per line out, until the input ends."""
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="ascii")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    # The default action of these signals ends the process, whatever it is doing.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _START_LIMIT_S)
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401

    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, question.pop("limit_s"))
        signal.setitimer(signal.ITIMER_REAL, _WALL_LIMIT_S)
        found = _compare(**question)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(json.dumps(found), file=answers)


def _compare(reference: str, answer: str, tolerance: float) -> str:
    from math_verify import parse, verify

    try:
        # No time limit here: the one of _serve holds.
        expected, given = (parse(f"${text}$", parsing_timeout=None) for text in (reference, answer))
        if not expected or isinstance(expected[0], str):
            return UNREADABLE
        if verify(expected, given, timeout_seconds=None):
            return EQUAL
        if tolerance and given and not isinstance(given[0], str):
            wanted, value = (float(side[0].evalf()) for side in (expected, given))
            return EQUAL if abs(value - wanted) <= tolerance * abs(wanted) else DIFFERENT
    except (Exception, RecursionError):  # Whatever a parser makes of an answer, it is not the reference.
        return DIFFERENT
    return DIFFERENT


if __name__ == "__main__":
    _serve()
