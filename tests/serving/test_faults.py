"""Ten thousand submissions to replicas that stall, die, come back and lie: nothing wrong is joined, nothing is late,
nothing leaks."""

from __future__ import annotations

import gc
import logging
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving.hash_server import hashed_reward

from nemo_lrpo.config.reward import RewardClientConfig
from nemo_lrpo.serving.client import RewardClient
from nemo_lrpo.serving.errors import RewardDeadlineExceeded
from nemo_lrpo.types import ScoreRequest

SUBMISSIONS = 10_000
WARM_UP = 2_000
THREADS = 16
HASTY = 2
"""Of the threads: theirs is a client with a short deadline."""
DEADLINE_S, HASTY_DEADLINE_S, SLACK_S = 30.0, 0.5, 1.0
WORDS = ("Yen", "Währung", "円", "Ⴀ", "عملة", "\u202e", "\0", "😀", "\ud800", "")


class Load:
    """Submissions from several threads, and what became of them."""

    def __init__(self, patient: RewardClient, hasty: RewardClient) -> None:
        self._clients = [hasty] * HASTY + [patient] * (THREADS - HASTY)
        self._lock = threading.Lock()
        self._next = 0
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[Any] = []
        self.latest = 0.0

    def run(self, until: int) -> None:
        """Until `until` submissions have been made in all."""
        threads = [threading.Thread(target=self._work, args=(client, until)) for client in self._clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, client: RewardClient, until: int) -> None:
        deadline_s = client._config.deadline_s
        while True:
            with self._lock:
                number = self._next
                if number >= until:
                    return
                self._next += 1
            requests = submission(number)
            started = time.monotonic()
            try:
                scores = client.submit(requests).result()
                outcome = "complete" if len(scores) == len(requests) else "short"
            except RewardDeadlineExceeded:
                scores, outcome = {}, "late"
            except Exception as error:
                scores, outcome = {}, f"{type(error).__name__}: {error}"
            over = time.monotonic() - started - deadline_s
            truth = {request.sample_id: hashed_reward(request) for request in requests}
            wrong = {key: score for key, score in scores.items() if score.reward != truth.get(key)}
            with self._lock:
                self.outcomes[f"{outcome} {'hasty' if deadline_s < 1 else 'patient'}"] += 1
                self.latest = max(self.latest, over)
                self.wrong.extend(wrong.items())


def submission(number: int) -> list[ScoreRequest]:
    draw = random.Random(number)
    requests = []
    for slot in range(draw.randrange(7)):
        text = " ".join(draw.choices(WORDS, k=draw.randrange(40)))
        requests.append(ScoreRequest(f"{number}/q/{slot}", text, f"reference {number % 50}", "de", "ja", "?"))
    return requests


@contextmanager
def trouble(steps: Callable[[threading.Event], Iterator[float]]) -> Iterator[None]:
    """Run `steps`, which yield pauses in seconds, on a thread until the end of the block."""
    stop = threading.Event()

    def run() -> None:
        for pause in steps(stop):
            if stop.wait(pause):
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def resources(process: psutil.Process) -> dict[str, float]:
    """Of a process and those that it started: memory in MiB, threads, open files."""
    family = [process, *process.children(recursive=True)]
    return {
        "memory": sum(each.memory_info().rss for each in family) / 2**20,
        "threads": sum(each.num_threads() for each in family),
        "files": sum(each.num_fds() for each in family),
    }


def own_resources() -> dict[str, float]:
    gc.collect()
    own = psutil.Process()
    return {"memory": own.memory_info().rss / 2**20, "threads": own.num_threads(), "files": own.num_fds()}


@pytest.mark.slow
def test_ten_thousand_requests_under_faults(
    serve_hashes: Callable[..., AbstractContextManager[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # pytest keeps every line of the log.
    caplog.set_level(logging.ERROR)
    with ExitStack() as stack:
        slow = stack.enter_context(serve_hashes(tmp_path / "slow"))
        liar = stack.enter_context(serve_hashes(tmp_path / "liar", "lies=0.3"))
        first = stack.enter_context(serve_hashes(tmp_path / "killed"))
        files = [str(server.wait().endpoint_file) for server in (slow, liar, first)]
        kills = 0

        def stall(stop: threading.Event) -> Iterator[float]:
            draw = random.Random(1)
            while True:
                slow.process.send_signal(signal.SIGSTOP)
                yield draw.uniform(0.1, 1.2)
                slow.process.send_signal(signal.SIGCONT)
                yield draw.uniform(0.5, 2.0)

        def kill(stop: threading.Event) -> Iterator[float]:
            nonlocal kills
            yield 0.5
            first.process.kill()
            while True:
                kills += 1
                yield 0.5
                with serve_hashes(tmp_path / "killed") as again:
                    again.wait()
                    yield 2.0
                    again.process.kill()

        options = {"endpoint_file": files, "max_texts_per_request": 4, "concurrency": 6, "max_outstanding_texts": 64}
        patient = RewardClient(RewardClientConfig(deadline_s=DEADLINE_S, **options))
        hasty = RewardClient(RewardClientConfig(deadline_s=HASTY_DEADLINE_S, **options))
        load = Load(patient, hasty)
        survivors = [psutil.Process(server.process.pid) for server in (slow, liar)]
        try:
            for client in (patient, hasty):
                client.check_server(["de"])
            with trouble(stall), trouble(kill):
                load.run(WARM_UP)
                slow.process.send_signal(signal.SIGCONT)
                before = [own_resources(), *map(resources, survivors)]
                started = time.monotonic()
                load.run(SUBMISSIONS)
                took = time.monotonic() - started
            slow.process.send_signal(signal.SIGCONT)
            after = [own_resources(), *map(resources, survivors)]
            counters = patient.counters()
        finally:
            patient.close()
            hasty.close()
        print(f"\n{(SUBMISSIONS - WARM_UP) / took:.0f} submissions/s, {kills} kills, latest {load.latest:+.2f} s")
        print(dict(load.outcomes), counters, before, after, sep="\n")
    assert not load.wrong
    # With time enough, what one replica loses, drops or spoils comes from another.
    assert set(load.outcomes) <= {"complete patient", "complete hasty", "short hasty", "late hasty"}, load.outcomes
    assert load.outcomes.total() == SUBMISSIONS and load.outcomes["complete patient"] > SUBMISSIONS / 2
    assert load.latest < SLACK_S
    assert kills >= 3 and counters["replica_failures"] >= 3 and counters["retries"] > 0
    for lie in ("unknown", "duplicated", "invalid", "mixed_up", "asked_again"):
        assert counters[lie] > 0, lie
    for was, now in zip(before, after):
        assert now["memory"] < 1.05 * was["memory"], (before, after)
        assert now["threads"] <= was["threads"] + 4, (before, after)
        assert now["files"] <= was["files"] + 8, (before, after)
