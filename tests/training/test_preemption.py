"""When a run stops: decisions by a clock that the test turns, and what the process makes of signals and time limits."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.loader import to_dataclass
from nemo_lrpo.config.training import StopConfig
from nemo_lrpo.training.layout import layout_news
from nemo_lrpo.training.stopping import (
    TIME_LIMIT,
    NoProgress,
    Starts,
    Stop,
    StoppedInSetUp,
    catch_signals,
    describe,
    is_main_process,
    job_deadline,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_stop(clock: Clock, *, left: float | None = None, grace: float = 30.0, margin: float = 1.0) -> Stop:
    return Stop(deadline=None if left is None else clock.now + left, grace=grace, margin=margin, clock=clock)


def measure(stop: Stop, clock: Clock, kind: str, seconds: float) -> None:
    with stop.timed(kind):
        clock.now += seconds


def test_without_signal_or_deadline_a_run_goes_on() -> None:
    clock = Clock()
    stop = make_stop(clock)
    measure(stop, clock, "step", 1e6)
    assert stop.reason("step") == 0 and not stop.must_abandon()


def test_a_step_is_begun_only_where_it_and_a_save_fit() -> None:
    clock = Clock()
    stop = make_stop(clock, left=100.0, margin=1.5)
    measure(stop, clock, "step", 20.0)
    measure(stop, clock, "save", 10.0)
    assert stop.reason("step") == 0, "70 s are left, 45 s are needed"
    clock.now += 25.1
    assert stop.reason("step") == TIME_LIMIT and describe(TIME_LIMIT) == "the job's time limit"
    assert stop.reason("validation") == 0, "no validation was measured, and 44.9 s are enough for a save"


def test_the_longest_of_the_recent_times_is_expected_and_old_ones_are_forgotten() -> None:
    clock = Clock()
    stop = make_stop(clock, left=200.0)
    stop.took("save", 0.0)
    for seconds in (60.0, 10.0):
        measure(stop, clock, "step", seconds)
    clock.now += 70.0
    assert stop.reason("step") == 0
    clock.now += 0.1
    assert stop.reason("step") == TIME_LIMIT
    for _ in range(8):
        stop.took("step", 10.0)
    assert stop.reason("step") == 0


def test_a_step_that_takes_longer_than_expected_is_given_up_in_time_for_the_save() -> None:
    clock = Clock()
    stop = make_stop(clock, left=100.0)
    stop.took("step", 40.0)
    stop.took("save", 10.0)
    with stop.timed("step"):
        clock.now += 89.9
        assert not stop.must_abandon()
        clock.now += 0.2
        assert stop.must_abandon()


@given(
    step=st.floats(0.1, 1000),
    save=st.floats(0.1, 100),
    left=st.floats(0.1, 5000),
    margin=st.floats(1.0, 3.0),
    share=st.floats(0.0, 1.0),
)
def test_a_step_that_was_begun_and_is_no_longer_than_expected_is_not_given_up(
    step: float, save: float, left: float, margin: float, share: float
) -> None:
    clock = Clock()
    stop = make_stop(clock, left=left, margin=margin)
    stop.took("step", step)
    stop.took("save", save)
    if stop.reason("step"):
        return
    with stop.timed("step"):
        clock.now += 0.999 * share * step
        assert not stop.must_abandon()


def test_after_a_signal_a_step_is_finished_where_it_fits_into_the_grace_period() -> None:
    clock = Clock()
    stop = make_stop(clock, grace=30.0)
    stop.took("step", 20.0)
    stop.took("save", 5.0)
    with stop.timed("step"):
        clock.now += 2.0
        stop.signal(signal.SIGTERM)
        assert not stop.must_abandon(), "18 s and a save of 5 s fit"
        clock.now += 25.1
        assert stop.must_abandon(), "it takes longer than any before, and the save has to fit"
    assert stop.reason("step") == signal.SIGTERM and describe(stop.reason("step")) == "SIGTERM"


@pytest.mark.parametrize(("step", "save"), [(None, 1.0), (1.0, None), (40.0, 1.0)])
def test_after_a_signal_a_step_is_given_up_at_once_where_it_does_not_fit_or_is_not_known(
    step: float | None, save: float | None
) -> None:
    clock = Clock()
    stop = make_stop(clock, grace=30.0, margin=1.5)
    for kind, seconds in (("step", step), ("save", save)):
        if seconds is not None:
            stop.took(kind, seconds)
    with stop.timed("step"):
        assert not stop.must_abandon()
        stop.signal(signal.SIGUSR1)
        assert stop.must_abandon()


def test_the_grace_period_is_that_of_the_first_signal() -> None:
    clock = Clock()
    stop = make_stop(clock, grace=30.0)
    stop.took("save", 10.0)
    stop.signal(signal.SIGUSR1)
    clock.now += 19.0
    assert not stop.must_abandon()
    stop.signal(signal.SIGTERM)
    assert stop.reason("step") == signal.SIGUSR1
    clock.now += 1.1
    assert stop.must_abandon()


def test_what_failed_is_not_measured() -> None:
    clock = Clock()
    stop = make_stop(clock, left=1000.0)
    stop.took("save", 0.0)
    with pytest.raises(OSError), stop.timed("step"):
        clock.now += 500.0
        raise OSError
    assert stop.reason("step") == 0


def test_signals_are_noted_once_caught_and_end_a_set_up() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    stop = make_stop(Clock())
    try:
        catch_signals(stop)
        with pytest.raises(StoppedInSetUp, match="SIGUSR1"), stop.setting_up():
            try:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(1)
            except BaseException as error:
                raise OSError("as a library that loads a checkpoint reports it") from error
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason("step") == signal.SIGUSR1
        with pytest.raises(StoppedInSetUp, match="SIGUSR1"), stop.setting_up():
            raise AssertionError("a signal from before the set-up was forgotten")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_fork_that_writes_a_checkpoint_outlives_a_signal_to_the_process_group() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    stop = make_stop(Clock())
    try:
        catch_signals(stop)
        writer = os.fork()
        if not writer:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7 if stop.reason("step") == 0 else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == 7
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_wait_that_does_not_ask_is_cancelled_when_the_time_is_over() -> None:
    clock, cancelled = Clock(), threading.Event()
    stop = make_stop(clock, left=10.0, grace=0.0)
    with stop.cancelling(cancelled.set, every=0.01):
        assert not cancelled.wait(0.05)
        clock.now += 10.1
        assert cancelled.wait(60.0)
    cancelled.clear()
    with make_stop(clock, grace=0.0).cancelling(cancelled.set, every=0.01):
        assert not cancelled.wait(0.05)


@pytest.mark.parametrize(
    ("limit", "environment", "expected"),
    [
        (None, {}, None),
        (600.0, {}, 1600.0),
        (600.0, {"SLURM_JOB_START_TIME": "900"}, 1500.0),
        (None, {"SLURM_JOB_START_TIME": "900"}, None),
        (None, {"SLURM_JOB_END_TIME": "2000"}, 2000.0),
        (600.0, {"SLURM_JOB_START_TIME": "900", "SLURM_JOB_END_TIME": "1200"}, 1200.0),
        (600.0, {"SLURM_JOB_START_TIME": "", "SLURM_JOB_END_TIME": "9999"}, 1600.0),
    ],
)
def test_the_deadline_counts_from_the_start_of_the_job(
    limit: float | None, environment: dict[str, str], expected: float | None
) -> None:
    assert job_deadline(limit, environment, started=1000.0) == expected


def test_a_time_of_slurms_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME='soon'"):
        job_deadline(None, {"SLURM_JOB_END_TIME": "soon"}, started=0.0)


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:30:00", 1800), ("36:00:01", 129601), ("2-01:00:00", 176400), ("90", 90), (None, None)]
)
def test_time_limits_are_read_as_slurm_writes_them(text: str | None, seconds: float | None) -> None:
    config = StopConfig(time_limit=text)
    config.check("trainer.lrpo.stop")
    assert config.seconds == seconds


def test_a_time_limit_that_yaml_takes_for_a_number_is_that_time() -> None:
    tree = OmegaConf.create("time_limit: 12:00:00")
    assert to_dataclass(StopConfig, tree, "trainer.lrpo.stop").seconds == 12 * 3600


@pytest.mark.parametrize("text", ["1 hour", "00:61:00", "10:00", "", "0", "00:00:00"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.lrpo\.stop\.time_limit=.*HH:MM:SS"):
        StopConfig(time_limit=text).check("trainer.lrpo.stop")


def start(run_dir: Path, step: int, limit: int = 3) -> Starts:
    starts = Starts(run_dir, limit)
    starts.begin(step, main=True)
    starts.refuse_if_too_many()
    return starts


def test_starts_without_a_step_are_counted_and_the_last_one_is_not_to_be_followed(tmp_path: Path) -> None:
    start(tmp_path, 4).requeue(7)
    for _ in range(2):
        start(tmp_path, 7).requeue(7)
    assert json.loads((tmp_path / "starts.json").read_text()) == {"step": 7, "starts": 2, "outcome": "requeue"}
    third = start(tmp_path, 7)
    with pytest.raises(NoProgress, match=r"3 starts in a row .* after step 7"):
        third.requeue(7)
    start(tmp_path, 7).requeue(7)


def test_a_step_that_was_done_makes_a_start_worth_another(tmp_path: Path) -> None:
    for step in range(10):
        start(tmp_path, step, limit=1).requeue(step + 1)


def test_starts_that_were_killed_count_as_well(tmp_path: Path) -> None:
    for _ in range(3):
        start(tmp_path, 0)
    with pytest.raises(NoProgress, match="3 starts in a row"):
        start(tmp_path, 0)
    assert not (tmp_path / "starts.json").exists(), "who starts it again has mended something"
    (tmp_path / "starts.json").write_text('{"step": 0, "sta')
    start(tmp_path, 0)
    for _ in range(10):
        start(tmp_path, 0, limit=0).requeue(0)


@pytest.mark.parametrize(
    ("environment", "main"),
    [
        ({}, True),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"RANK": "3", "SLURM_PROCID": "0"}, False),
        ({"SLURM_PROCID": "2"}, False),
    ],
)
def test_the_main_process_is_known_before_the_ranks_have_met(environment: dict[str, str], main: bool) -> None:
    assert is_main_process(environment) is main


def test_another_rank_decides_alike_and_writes_nothing(tmp_path: Path) -> None:
    other = Starts(tmp_path, 2)
    other.begin(5, main=False)
    other.count = 2
    with pytest.raises(NoProgress):
        other.requeue(5)
    other.requeue(6)
    other.clear()
    assert not list(tmp_path.iterdir())


def test_a_change_of_layout_is_put_into_words() -> None:
    one, two = {"tensor": 1, "pipeline": 1, "data": 2}, {"tensor": 2, "pipeline": 1, "data": 1}
    assert layout_news(one, dict(one)) is None
    news = layout_news(one, two)
    assert news is not None
    assert "tensor 1 -> 2, pipeline 1 -> 1, data 2 -> 1" in news
    for word in ("Reshaped", "optimizer state", "Reseeded: dropout", "(seed, step, rank)", "to rounding"):
        assert word in news
