"""tools/bench.py step: medians by part, and what LRPO adds to the step, of hand-made records."""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tools.benches import step


def record(number: int, seconds: dict[str, float]) -> dict[str, Any]:
    """As a training logs it."""
    times = {f"time/{name}": value for name, value in seconds.items()}
    return {"kind": "train", "step": number, "count": 64.0, "length": 20.0, **times}


def test_parts_are_medians_and_a_part_that_a_step_lacks_took_no_time() -> None:
    found = step.parts([record(1, {"step": 4.0, "route": 0.2}), record(2, {"step": 6.0}), record(3, {"step": 5.0})])
    assert found == {"route": 0.0, "step": 5.0}


def test_what_is_added_is_a_share_of_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = {
        "default": {"step": 10.0, "route": 0.3, "observe": 0.1, "score_wait": 0.05},
        step.GRPO: {"step": 8.0, "route": 0.1, "observe": 0.0, "score_wait": 0.0},
    }

    @contextmanager
    def no_server(*_: Path) -> Any:
        yield

    def train(router: str, steps: int, endpoint: Path, directory: Path) -> list[dict[str, Any]]:
        directory.mkdir(parents=True)
        (directory / "rollouts.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 2}\n')
        return [record(number, seconds[router]) for number in range(2, steps + 1)]

    judged: list[dict[str, Any]] = []
    monkeypatch.setattr(step, "NEEDED", ())
    monkeypatch.setattr(step, "reward_server", no_server)
    monkeypatch.setattr(step, "train", train)
    monkeypatch.setattr(
        step, "scoring_seconds", lambda rollouts: judged.extend(rollouts) or {"gating": 0.06, "calibration": 0.04}
    )
    (row,) = step.run(argparse.Namespace(router="default", steps=3, rounds=2))
    # Routing takes 0.4 s of LRPO's step, 0.1 s of GRPO's.
    assert row["added"] == pytest.approx({"routing": 0.03, "gating": 0.006, "calibration": 0.004})
    assert row["added_share"] == pytest.approx(0.04)
    assert (row["ratio"], row["routing_share"], row["wait_share"]) == pytest.approx((1.25, 0.04, 0.005))
    assert (row["steps"], row["rollouts"]) == (4, 64) and [one["step"] for one in judged] == [2, 2]
    assert any("4.00% in all. Waiting for rewards: 0.50%" in line for line in step.table(row))
