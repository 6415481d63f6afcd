"""A run in mode=explang on a real model, against a reward server that reads a response's tag and makes up the rest."""

from __future__ import annotations

import json
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluations import Evaluations
from serving.conftest import run_server
from training_runs import LANGUAGES, Runs, metrics, records, settings_for, state, weights
from warm_start import Starter

pytestmark = pytest.mark.slow

HASH_SERVER = str(Path(__file__).parents[1] / "serving" / "hash_server.py")
FORCED, K, QUESTIONS = 2, 6, 4


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("tagged")
    with run_server(directory, [HASH_SERVER, "tagged=1"]) as server:
        yield server.endpoint_file


@pytest.fixture(scope="module")
def runs(starter: Starter, tiny_nemo: Path, data: Path, endpoint: Path) -> Runs:
    settings = {
        **settings_for(tiny_nemo, data, endpoint),
        "mode": "explang",
        "mode.forced_rollouts": FORCED,
        "mode.exploration_share": 0.5,
        "mode.seen": "[de,en]",
        "router.reserved_slots": 0,
        "trainer.lrpo.rollouts_per_prompt": K,
        "trainer.lrpo.prompts_per_step": QUESTIONS,
        "trainer.lrpo.log_samples": K * QUESTIONS,
        "trainer.lrpo.save_interval": 1,
        "trainer.lrpo.keep_checkpoints": 0,
        "algorithm.kl_coefficient": 0.01,
        "data.validation": data,
        "trainer.lrpo.val_check_interval": 4,
    }
    return Runs(starter, settings)


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps: two of exploration, two of exploitation."""
    run_dir = tmp_path_factory.mktemp("explang")
    runs(run_dir, [0])
    return run_dir


def rollouts_by_step(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in records(run_dir, "rollouts.jsonl"):
        found[record["step"]].append(record)
    return found


def chosen(record: dict[str, Any]) -> str | None:
    names = [flag.removeprefix("selected:") for flag in record["score"]["flags"] if flag.startswith("selected:")]
    return names[0] if names else None


def expected_rewards(group: list[dict[str, Any]], exploring: bool) -> list[float]:
    """By the formula, from what the server has said."""
    free = [record for record in group if "thinking" not in record]
    counts = Counter(chosen(record) for record in free if chosen(record))
    solved = {chosen(record) for record in group if record["score"]["quality"] == 1.0} - {None}

    def own(record: dict[str, Any]) -> float:
        language = chosen(record)
        if language is None:
            return 0.0
        return 0.2 * min(counts.values()) / counts[language] if exploring else 0.5 * (language in solved)

    mean = statistics.fmean(own(record) for record in free)
    return [
        0.2 * (chosen(record) is not None)
        + 0.2 * record["score"]["gate"]
        + record["score"]["quality"]
        + (mean if "thinking" in record else own(record))
        for record in group
    ]


def test_rewards_and_advantages_are_those_of_the_formula(whole: Path) -> None:
    by_step = rollouts_by_step(whole)
    assert sorted(by_step) == [1, 2, 3, 4]
    for step, rows in by_step.items():
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in rows:
            groups[record["sample_id"].rpartition("/")[0]].append(record)
        assert [len(group) for group in groups.values()] == [K] * QUESTIONS
        for group in groups.values():
            rewards = expected_rewards(group, exploring=step <= 2)
            assert [record["score"]["reward"] for record in group] == pytest.approx(rewards)
            used = [i for i, record in enumerate(group) if record["ended"]]
            if len(used) > 1:
                values = [rewards[i] for i in used]
                spread = statistics.stdev(values) + 1e-6
                expected = [(value - statistics.fmean(values)) / spread for value in values]
                found = [group[i]["advantage"] for i in used]
                assert found == pytest.approx(expected, abs=1e-3), "forced and chosen share the group's mean"


def test_the_router_proposes_and_learns_and_the_answer_is_the_users(whole: Path) -> None:
    for rows in rollouts_by_step(whole).values():
        slots = [int(record["sample_id"].rpartition("/")[2]) for record in rows]
        for record, slot in zip(rows, slots, strict=True):
            assert record["language"] == record["question_language"]
            assert ("thinking" in record) == (slot < FORCED)
            if "thinking" in record:
                # The server has seen the tag that was prefilled; the policy has not written it.
                assert record["score"]["flags"] == [f"selected:{record['thinking']}"]
                assert "<lang_select>" not in record["response"]
        log = {record["sample_id"]: record["thinking"] for record in rows if "thinking" in record}
        assert len(log) == FORCED * QUESTIONS and set(log.values()) <= set(LANGUAGES)
    train = [record for record in metrics(whole) if record["kind"] == "train"]
    for record in train:
        slots = sum(record[f"router/slots/{origin}"] for origin in ("drawn", "reserved", "fixed"))
        assert slots == FORCED * QUESTIONS and record["explang/forced"] == pytest.approx(FORCED / K)
    assert train[-1]["router/updates"] == 2 and train[-1]["router/probability/de"] != pytest.approx(1 / 3, abs=1e-6)


def test_divergence_and_weights_follow_the_stage(whole: Path) -> None:
    train = [record for record in metrics(whole) if record["kind"] == "train"]
    assert [record["explang/exploration"] for record in train] == [1.0, 1.0, 0.0, 0.0]
    assert [record["policy/kl"] > 0 for record in train] == [False, False, True, True]
    for record in train:
        stage = "exploration" if record["step"] <= 2 else "exploitation"
        shares = {key.split("/")[1]: key for key in record if key.startswith("explang/selected_")}
        assert set(shares) == {f"selected_{stage}"}
        total = sum(record.get(f"explang/selected_{stage}/{name}", 0.0) for name in (*LANGUAGES, "none"))
        assert total == pytest.approx(1.0)
        assert 0 <= record["explang/accuracy_strict"] <= record["explang/accuracy"] <= record["explang/pass_at_k"] <= 1
        assert record["explang/count/unseen"] == record.get("explang/count/ja", 0.0)
        assert record["explang/count/forced"] == FORCED * QUESTIONS
    assert state(whole)["step"] == 4
    (validation,) = [record for record in metrics(whole) if record["kind"] == "validation"]
    assert validation["explang/count"] == 12 and validation["explang/forced"] == 0.0


def test_a_run_goes_on_across_the_stages_as_if_it_had_not_stopped(runs: Runs, whole: Path, tmp_path: Path) -> None:
    """From the checkpoint after its first step: one step more of exploration, then exploitation."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for path in sorted((run_dir / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(path)
    assert "Continuing after step 1" in runs(run_dir, [0])
    assert metrics(run_dir) == metrics(whole) and state(run_dir) == state(whole)
    assert weights(run_dir) == weights(whole)
    assert records(run_dir, "rollouts.jsonl") == records(whole, "rollouts.jsonl")
    saved = json.loads((run_dir / "checkpoints" / "step_00000004" / "state.json").read_text(encoding="utf-8"))
    assert saved["mode"] == {"name": "explang", "exploration_steps": 2}


def test_an_evaluation_forces_a_language(
    starter: Starter, tiny_nemo: Path, data: Path, endpoint: Path, tmp_path: Path
) -> None:
    own = settings_for(tiny_nemo, data, endpoint)
    fixtures = Path(__file__).parents[1] / "tasks" / "fixtures"
    names = ("data.languages", "rollout.micro_batch_size", "rollout.max_new_tokens", "reward.endpoint_file")
    evaluate = Evaluations(
        starter,
        {
            **{name: own[name] for name in names},
            "pretrained_checkpoint.restore_from_path": tiny_nemo,
            "evaluation.data": data,
            "mode": "explang",
            "+evaluation.tasks.math": f"{{kind: mgsm, path: {fixtures / 'mgsm'}}}",
            "prompt.max_tokens": 240,
        },
    )
    tree, text = evaluate(tmp_path / "ja.json", evaluation__think_in="ja", evaluation__samples=2)
    lines = (tmp_path / "ja.jsonl").read_text(encoding="utf-8").splitlines()
    found = {(one["task"], one["sample_id"]): one for one in map(json.loads, lines)}
    assert len(found) == len(lines) == 2 * 12 + 2 * 4
    answers = {sample_id: one for (task, sample_id), one in found.items() if task == "test"}
    measured = tree["metrics"]
    assert measured["explang/forced"] == 1.0 and measured["explang/count/ja"] == 24
    assert {(one["thinking"], *one["score"]["flags"]) for one in answers.values()} == {("ja", "selected:ja")}
    assert measured["explang/accuracy"] == pytest.approx(
        statistics.fmean(one["score"]["quality"] for one in answers.values())
    )
    # Two answers, drawn apart, to each question; together they are its group.
    pairs = [(answers[f"{name[:-2]}/0"], answers[f"{name[:-2]}/1"]) for name in answers if name.endswith("/0")]
    assert len(pairs) == 12 and any(one["response"] != other["response"] for one, other in pairs)
    solved = [max(one["score"]["quality"], other["score"]["quality"]) == 1.0 for one, other in pairs]
    assert measured["explang/pass_at_k"] == pytest.approx(statistics.fmean(solved))
    assert measured["math/count"] == 8 and {"math/pass_at_k/1", "math/pass_at_k/2/sw"} <= set(measured)
    assert "math: 8 answers" in text and "pass@2" in text
