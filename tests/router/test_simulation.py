"""The simulator: its worlds and figures, and which policy wins in a small version with fixed seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from nemo_lrpo.types import ORIGIN_DRAWN
from tools import router_sim
from tools.router_worlds.run import POLICIES, Outcome, Questions, play
from tools.router_worlds.worlds import LANGUAGES, WORLDS, shortened

SEEDS = (2001, 2002)


def small(name: str, steps: int = 80, questions: int = 128) -> dict[str, float]:
    """Mean share per policy over SEEDS in a shortened world."""
    world = shortened(WORLDS[name], steps, questions)
    return {
        policy: fmean(play(world, policy, seed).share for seed in SEEDS)
        for policy in ("uniform", "published", "ucb", "thompson-still", "default")
    }


@pytest.mark.parametrize(("name", "least"), [("regional", 0.8), ("hard and easy", 0.7), ("change", 0.68)])
def test_the_default_wins_and_the_published_policy_comes_last(name: str, least: float) -> None:
    share = small(name)
    assert share["default"] > max(share["ucb"], share["thompson-still"]) > share["published"] + 0.2
    assert share["published"] > share["uniform"] and abs(share["uniform"]) < 0.02
    assert share["default"] > least


def test_features_find_what_names_and_words_betray_where_a_table_cannot() -> None:
    world = shortened(WORLDS["subjects"], 40, 128)
    share = {policy: play(world, policy, 2001).share for policy in ("thompson", "features")}
    assert share["features"] > share["thompson"] + 0.15


def test_runs_repeat_and_every_policy_meets_the_same_questions() -> None:
    world = shortened(WORLDS["skewed"], 6, 16)
    first, again = (play(world, "default", 3) for _ in range(2))
    assert (first.share, first.languages) == (again.share, again.languages)
    a, b = Questions(world, 3), Questions(world, 3)
    assert [a.draw(step)[0] for step in range(3)] == [b.draw(step)[0] for step in range(3)]
    assert play(world, "default", 4).share != first.share


def test_the_floor_keeps_two_languages_in_every_group() -> None:
    world = shortened(WORLDS["regional"], 30, 32)
    assert play(world, "default", 1).languages > 2.0
    assert POLICIES["default-no-floor"] == [*POLICIES["default"], "router.diversity.min_languages=1"]


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_is_made_of_probabilities_and_draws_contexts_that_it_has(name: str) -> None:
    world = shortened(WORLDS[name], 10, 40)
    truth = world.truth(np.random.default_rng(0), 10)
    prompts, row, column = Questions(world, 0).draw(0)
    values = truth(0)[row, column]
    assert values.shape == (world.size.questions, len(LANGUAGES)) and values.min() >= 0.02 and values.max() <= 0.98
    assert len({prompt.question_id for prompt in prompts}) == world.size.questions
    assert (values.max(axis=1) > values.mean(axis=1) + 0.01).all()
    changed = not np.array_equal(truth(0), truth(9))
    assert changed == (name in ("change", "sparse change", "drift"))


def test_zipf_makes_the_first_contexts_common() -> None:
    for name in ("skewed", "cells"):
        questions = Questions(WORLDS[name], 0)
        counts = np.bincount(np.concatenate([questions.draw(step)[2] for step in range(10)]), minlength=24)
        if name == "skewed":
            assert counts[0] > 5 * counts[9] > 0
        else:
            assert counts.max() < 2 * counts.min()


def test_the_interval_is_students() -> None:
    low, high = router_sim.interval([1.0, 2.0, 3.0, 4.0])
    # 3.182 standard errors on either side, for 3 degrees of freedom.
    assert (high - low) / 2 == pytest.approx(3.182 * math.sqrt(5 / 3) / 2, rel=0.02)
    assert (low + high) / 2 == 2.5
    rows = [router_sim.summary(WORLDS["cells"], "ucb", [Outcome(x, 2.0, 1.0) for x in (0.5, 0.7)])]
    assert rows[0]["share"] == pytest.approx(0.6) and rows[0]["seeds"] == 2


def test_the_tool_prints_objects_and_draws_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "sim.png"
    arguments = ["--quick", "--seeds", "2", "--worlds", "sparse cells", "--policies", "uniform,ucb", "--jobs", "1"]
    router_sim.main([*arguments, "--json", "--plot", str(figure)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["world"], row["policy"]) for row in rows} == {("sparse cells", "uniform"), ("sparse cells", "ucb")}
    assert all(row["low"] <= row["share"] <= row["high"] and row["questions"] == 25 for row in rows)
    assert figure.read_bytes().startswith(b"\x89PNG")
    text = router_sim.table(rows)
    assert "sparse cells" in text and "ucb" in text and "±" in text
    with pytest.raises(SystemExit, match=r"'best' is not known; accepted: .*default"):
        router_sim.main(["--policies", "best"])


def test_runs_that_are_kept_are_not_played_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that a stop cut off is played again; other sizes and settings are other runs."""
    kept, world = tmp_path / "runs.jsonl", shortened(WORLDS["sparse cells"], 4, 8)
    outcome = Outcome(0.625, 3.0, 0.5)
    for seed in range(2):
        router_sim.Results(kept).add(world, "uniform", seed, outcome)
    with kept.open("a") as file:
        file.write('{"world": "sparse')
    results = router_sim.Results(kept)
    assert kept.read_text().count("\n") == 2 == len(kept.read_text().splitlines())
    assert [results.get(world, "uniform", seed) for seed in range(3)] == [outcome, outcome, None]
    assert results.get(WORLDS["sparse cells"], "uniform", 0) is None and results.get(world, "ucb", 0) is None
    (row,) = router_sim.simulate([(world, "uniform")], range(2), 1, results, progress=False)
    assert (row["share"], row["seeds"]) == (0.625, 2)
    kept.write_text("{}\n")
    with pytest.raises(SystemExit, match=r"runs\.jsonl:1: no run of this tool"):
        router_sim.main(["--results", str(kept)])


def test_only_drawn_slots_count() -> None:
    """Uniform routing closes nothing, though its reserved slots are all in the question's language."""
    share = [play(shortened(WORLDS["regional"], 20, 64), "uniform", seed).share for seed in range(4)]
    assert abs(fmean(share)) < 0.03 and ORIGIN_DRAWN == "drawn"
