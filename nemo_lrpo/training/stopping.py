"""When a run stops before its last step, and when starting it again has become pointless.

A launcher stops a job by a signal, or at a time limit that is known in advance. Either way there is a moment by which
everything must be saved. `Stop` decides from measured times whether another step fits before it, and whether the step
under way still does; it knows nothing of ranks, and whoever asks it makes all ranks agree.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.training import StopConfig
from nemo_lrpo.types import AgreedError

EXIT_REQUEUE = 75
"""The run stopped early with everything saved; the same command goes on from there. EX_TEMPFAIL of sysexits.h."""
EXIT_NO_PROGRESS = 79
"""`trainer.lrpo.stop.no_progress_limit` starts came no further: another one would not either."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask for a stop; Ctrl-C ends the process as ever."""
TIME_LIMIT = 1000
"""Reason of a stop that no signal asked for; larger than every signal's number."""
JOB_START, JOB_END = "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"

_RECENT = 8
"""Times kept of each kind: the longest of them is expected."""


class StoppedInSetUp(BaseException):
    """A signal came before the first step; nothing has been done that would have to be saved. Like KeyboardInterrupt it
    is not for the libraries in between to handle."""


class NoProgress(AgreedError):
    """Start after start, the work has come no further."""


class Stop:
    """Whether this rank has to stop. All moments and durations in seconds.

    deadline: by `clock` (monotonic), when the job is ended from outside; None: never. grace: from a signal to the end
    that the launcher then makes. margin: factor on measured times. Times that were not measured yet: a save is taken to
    last `grace`; a step is given the benefit of the doubt before a deadline, and none after a signal.
    """

    def __init__(
        self, *, deadline: float | None, grace: float, margin: float, clock: Callable[[], float] = time.monotonic
    ):
        self._deadline = math.inf if deadline is None else deadline
        self._grace = grace
        self._margin = margin
        self._clock = clock
        self._recent: dict[str, deque[float]] = {}
        self._signalled: tuple[int, float] | None = None
        self._under_way: tuple[str, float] | None = None
        self._setting_up = False

    # -- what happens --------------------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        """Note a signal. Only the first one counts: its grace period is running. Raises StoppedInSetUp, see there."""
        if self._signalled is None:
            self._signalled = number, self._clock()
        if self._setting_up:
            raise StoppedInSetUp(signal.Signals(number).name)

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """Inside, a signal raises StoppedInSetUp: there is nothing to finish, and loading a model takes minutes."""
        if self._signalled is not None:
            raise StoppedInSetUp(signal.Signals(self._signalled[0]).name)
        self._setting_up = True
        try:
            yield
        except BaseException as error:
            # torch's reader of checkpoints, for one, makes an error of its own of whatever interrupts it.
            if self._signalled is not None:
                raise StoppedInSetUp(signal.Signals(self._signalled[0]).name) from error
            raise
        finally:
            self._setting_up = False

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Measure a "step", a "validation" or a "save"; what fails is not counted."""
        start = self._clock()
        self._under_way = kind, start
        try:
            yield
            self.took(kind, self._clock() - start)
        finally:
            self._under_way = None

    def took(self, kind: str, seconds: float) -> None:
        """Add a measured time; also one that an earlier start left."""
        self._recent.setdefault(kind, deque(maxlen=_RECENT)).append(seconds)

    # -- what follows --------------------------------------------------------------------------------------------

    def reason(self, kind: str) -> int:
        """Why nothing of this kind should begin: the signal's number, TIME_LIMIT if it and a save would not end before
        the deadline, else 0."""
        if self._signalled is not None:
            return self._signalled[0]
        needed = self._margin * (self._longest(kind, 0.0) + self._save_time())
        return TIME_LIMIT if self._clock() + needed > self._deadline else 0

    def must_abandon(self) -> bool:
        """Whether what is under way has to be given up, because it and a save would not end in time."""
        end, unknown = self._deadline, 0.0
        if self._signalled is not None:
            end, unknown = min(end, self._signalled[1] + self._grace), math.inf
        if end == math.inf:
            return False
        rest = 0.0
        if self._under_way is not None:
            kind, start = self._under_way
            rest = max(self._longest(kind, unknown) - (self._clock() - start), 0.0)
        return self._clock() + self._margin * (rest + self._save_time()) > end

    def _save_time(self) -> float:
        return self._longest("save", self._grace)

    def _longest(self, kind: str, unknown: float) -> float:
        return max(self._recent.get(kind, ()), default=unknown)

    @contextmanager
    def cancelling(self, cancel: Callable[[], None], every: float = 0.2) -> Iterator[None]:
        """Inside, call `cancel` (from another thread) as soon as what is under way has to be given up: for waits that
        do not ask."""
        left = threading.Event()

        def watch() -> None:
            while not left.wait(every):
                if self.must_abandon():
                    cancel()
                    return

        watcher = threading.Thread(target=watch, name="stop", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            left.set()
            watcher.join()


def stop_of_this_job(rules: StopConfig) -> Stop:
    """A Stop by the configuration and by what Slurm says of the job; the process's own start counts where it is mute.

    Raises ConfigError for values of Slurm's that make no sense.
    """
    end = job_deadline(rules.seconds, os.environ, psutil.Process().create_time())
    deadline = None if end is None else time.monotonic() + end - time.time()
    return Stop(deadline=deadline, grace=rules.grace_seconds, margin=rules.margin)


def describe(reason: int) -> str:
    """A reason in words."""
    return "the job's time limit" if reason == TIME_LIMIT else signal.Signals(reason).name


def catch_signals(stop: Stop) -> None:
    """From here on SIGTERM and SIGUSR1 are noted in `stop` instead of ending the process."""
    process = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        # A checkpoint is written by forks of this process, and launchers signal whole process groups: those finish.
        if os.getpid() == process:
            stop.signal(number)

    for number in SIGNALS:
        signal.signal(number, note)


def job_deadline(time_limit: float | None, environment: Mapping[str, str], started: float) -> float | None:
    """When the job ends, in seconds since the epoch; None: not known.

    time_limit: seconds from the job's start, which is Slurm's where it says so, else `started`. Slurm's own end counts
    too; the earlier one holds. Raises ConfigError for a value of Slurm's that is no number.
    """
    ends = [_moment(environment, JOB_END)]
    if time_limit is not None:
        job_start = _moment(environment, JOB_START)
        ends.append((started if job_start is None else job_start) + time_limit)
    return min((end for end in ends if end is not None), default=None)


def _moment(environment: Mapping[str, str], name: str) -> float | None:
    text = environment.get(name, "")
    try:
        return float(text) if text else None
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} in the environment is no time; unset it, or give epoch seconds.") from error


def is_main_process(environment: Mapping[str, str]) -> bool:
    """Whether this is the first of the job's processes, as torchrun or srun has numbered them; for use before there is
    a process group to ask."""
    return int(environment.get("RANK") or environment.get("SLURM_PROCID") or 0) == 0


class Starts:
    """How often in a row a run was started from the same step; the main rank keeps it in `<run_dir>/starts.json`.

    Other work counts its own progress in place of steps.
    """

    def __init__(
        self, run_dir: Path, limit: int, *, file: str = "starts.json", lacking: str = "completed the step after step {}"
    ):
        """limit: starts that may complete no step; 0: any number. lacking: what a start in vain has not done, with {}
        for the progress so far."""
        self._file = run_dir / file
        self._limit = limit
        self._lacking = lacking
        self._main = False
        self.step = -1
        self.count = 0
        """This start included; on the main rank after `begin`, on the others as soon as it was told to them."""

    def begin(self, step: int, main: bool) -> None:
        """This start goes on after `step`. Called before what may kill it: loading the model."""
        self.step, self._main = step, main
        if main:
            before = self._read()
            self.count = before["starts"] + 1 if before["step"] == step else 1
            self._write("running")

    def refuse_if_too_many(self) -> None:
        """Raise NoProgress if the limit was reached before this start, whose predecessors were killed."""
        if self._limit and self.count > self._limit:
            self.clear()
            raise NoProgress(self._message(self.count - 1))

    def requeue(self, step: int) -> None:
        """This start ends, saved at `step`, to be followed by another. Raises NoProgress if that is pointless."""
        if self._limit and step == self.step and self.count >= self._limit:
            self.clear()
            raise NoProgress(self._message(self.count))
        self._write("requeue")

    def clear(self) -> None:
        """Count anew: the run is done, or ends with an error that says what to do."""
        if self._main:
            self._file.unlink(missing_ok=True)

    def _message(self, count: int) -> str:
        return (
            f"{count} starts in a row have not {self._lacking.format(self.step)}. With set-up and save it may "
            "not fit into the job's time, or the run was killed each time, for want of memory for example. Nothing is "
            "lost: mend that and start again (trainer.lrpo.stop.no_progress_limit counts anew)."
        )

    def _read(self) -> dict[str, int]:
        try:
            record = json.loads(self._file.read_text(encoding="utf-8"))
            return {name: int(record[name]) for name in ("step", "starts")}
        except (OSError, ValueError, KeyError, TypeError):
            return {"step": -1, "starts": 0}

    def _write(self, outcome: str) -> None:
        if self._main:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_name(self._file.name + ".partial")
            partial.write_text(json.dumps({"step": self.step, "starts": self.count, "outcome": outcome}) + "\n")
            partial.replace(self._file)


def counted(starts: Starts, work: Callable[[], int | None]) -> int:
    """The exit code of a start, which is `work`: 0, or EXIT_REQUEUE where the same command is to go on.

    work: begins `starts`; how far it has come where it stops early, None at its end. Raises NoProgress where one more
    start would be pointless, and what `work` raises.
    """
    try:
        stopped_at = work()
    except StoppedInSetUp as signalled:
        print(f"{signalled} before the first step of this start; nothing is lost.", flush=True)
        stopped_at = starts.step
    except BaseException:
        starts.clear()
        raise
    if stopped_at is None:
        starts.clear()
        return 0
    starts.requeue(stopped_at)
    return EXIT_REQUEUE
