"""Tasks that are measured between training steps, and by nemo_lrpo.evaluate of what the training leaves."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stop_points
from chat_endpoint import ChatEndpoint, serve_chat
from evaluations import Evaluations
from launch import ROOT
from training_runs import Runs, records, settings_for
from warm_start import Starter

pytestmark = pytest.mark.slow

FIXTURES = ROOT / "tests" / "tasks" / "fixtures"
GRADES = {"isst": "A", "grüßt": "B"}


def grade(prompt: str) -> str:
    """Right is who answers what is eaten; wrongly worded who answers how to greet."""
    return next(grade for word, grade in GRADES.items() if word in prompt)


@pytest.fixture(scope="module")
def judge() -> Iterator[ChatEndpoint]:
    with serve_chat(grade) as judge:
        yield judge


@pytest.fixture(scope="module")
def settings(judge: ChatEndpoint) -> dict[str, object]:
    """Of the tasks, in training and after it."""
    return {
        "+evaluation.tasks.math": f"{{kind: mgsm, path: {FIXTURES / 'mgsm'}}}",
        "+evaluation.tasks.exam": f"{{kind: include, path: {FIXTURES / 'include'}, method: both}}",
        "+evaluation.tasks.culture": f"{{kind: care, path: {FIXTURES / 'care'}}}",
        "evaluation.judge.url": judge.url,
        "evaluation.judge.model": "judge",
        "evaluation.batch_size": 3,
        "evaluation.temperature": 0.0,
        "prompt.max_tokens": 240,
        "trainer.lrpo.max_steps": 2,
        "evaluation.interval": 2,
    }


@pytest.fixture(scope="module")
def trained(
    starter: Starter,
    tiny_nemo: Path,
    data: Path,
    hash_rewards: tuple[Path, int],
    settings: dict[str, object],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two steps, the tasks measured after the second one."""
    run_dir = tmp_path_factory.mktemp("trained")
    Runs(starter, {**settings_for(tiny_nemo, data, hash_rewards[0]), **settings})(run_dir, [0])
    return run_dir


@pytest.fixture(scope="module")
def evaluate(
    starter: Starter, tiny_nemo: Path, data: Path, hash_rewards: tuple[Path, int], settings: dict[str, object]
) -> Evaluations:
    names = ("data.languages", "rollout.micro_batch_size", "rollout.max_new_tokens", "rollout.end_strings")
    own = settings_for(tiny_nemo, data, hash_rewards[0])
    shared = {name: own[name] for name in (*names, "reward.endpoint_file", "model.micro_batch_size")}
    tasks = {name: value for name, value in settings.items() if not name.startswith(("trainer", "evaluation.interval"))}
    return Evaluations(starter, {**shared, **tasks, "evaluation.data": data})


@pytest.fixture(scope="module")
def of_checkpoint(evaluate: Evaluations, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newest checkpoint of the run, on the .nemo that the run's own configuration names."""
    out = tmp_path_factory.mktemp("evaluated") / "checkpoint.json"
    evaluate(out, evaluation__checkpoint=trained, pretrained_checkpoint__restore_from_path="null")
    return out


def answers(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    lines = out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return {(record["task"], record["sample_id"]): record for record in map(json.loads, lines)}


def test_tasks_are_measured_between_steps(trained: Path) -> None:
    (record,) = [one for one in records(trained, "metrics.jsonl") if one["kind"] == "evaluation"]
    assert record["step"] == 2
    assert record["math/count"] == 4 and record["exam.logprob/count"] == record["exam.generate/count"] == 3
    assert record["culture/accuracy"] == 0.5 and record["culture/grade/CORRECT_BUT_WRONG_LANGUAGE"] == 0.5
    assert {"math/accuracy/de", "math/accuracy/sw", "math/accuracy_seen", "math/accuracy_unseen_low"} <= set(record)
    # German is a language of the training, Macedonian is not.
    assert record["exam.logprob/accuracy_seen"] == record["exam.logprob/accuracy/de"]
    assert record["exam.logprob/accuracy_unseen"] == record["exam.logprob/accuracy/mk"]


def test_a_checkpoint_measures_as_the_run_did_and_as_its_export(
    trained: Path, of_checkpoint: Path, evaluate: Evaluations
) -> None:
    (between,) = [one for one in records(trained, "metrics.jsonl") if one["kind"] == "evaluation"]
    tree = json.loads(of_checkpoint.read_text(encoding="utf-8"))
    for name, value in between.items():
        if "/" in name:
            assert tree["metrics"][name] == pytest.approx(value, rel=1e-5), name
    assert tree["checkpoint"].endswith("step_00000002") and tree["tasks"]["culture"]["grades"] == {
        "CORRECT": 1,
        "CORRECT_BUT_WRONG_LANGUAGE": 1,
    }
    assert tree["tasks"]["test"]["all"]["count"] == tree["metrics"]["count"] == 12
    exam = tree["tasks"]["exam.logprob"]
    assert exam["languages"]["mk"]["seen"] is False and exam["macro"]["count"] == 3
    exported = of_checkpoint.with_name("exported.json")
    evaluate(exported, pretrained_checkpoint__restore_from_path=trained / "model.nemo")
    left, right = answers(of_checkpoint), answers(exported)
    assert left.keys() == right.keys() and len(left) == 12 + 4 + 3 + 3 + 2
    for key, record in left.items():
        assert record["response"] == right[key]["response"]
        if key[0] == "exam.logprob":
            margins = [one["score"]["measures"]["margin"] for one in (record, right[key])]
            assert margins[0] == pytest.approx(margins[1], rel=1e-4)
            assert record["response"] in "ABCD" and record["tokens"] is None


def test_data_parallel_ranks_share_the_questions(
    trained: Path, of_checkpoint: Path, evaluate: Evaluations, tmp_path: Path
) -> None:
    """Three questions over two ranks, of a model on one rank each; one of them is told to stop on the way."""
    out = tmp_path / "two.json"
    model = {"pretrained_checkpoint__restore_from_path": trained / "model.nemo", "evaluation__data": "null"}
    model["trainer__lrpo__stop__grace_seconds"] = 300
    expected = {key: record for key, record in answers(of_checkpoint).items() if key[0] != "test"}
    point = partial(stop_points.in_generation, 2, signal.SIGUSR1, rank=1)
    _, text = evaluate(out, ranks=2, expect=75, before=point, **model)
    kept = answers(out)
    assert {task for task, _ in kept} == {"math", "exam.logprob", "exam.generate"} and not out.exists()
    assert f"Stopped by SIGUSR1: {len(kept)} of {len(expected)} answers are kept" in text
    started = json.loads(out.with_name("two.starts.json").read_text(encoding="utf-8"))
    assert started == {"step": 0, "starts": 1, "outcome": "requeue"}
    evaluate(out, ranks=2, **model)
    assert not out.with_name("two.starts.json").exists()
    found = answers(out)
    assert found.keys() == expected.keys()
    for key, record in found.items():
        assert record["response"] == expected[key]["response"]
    shown = out.with_suffix(".json").read_text(encoding="utf-8")
    metrics = json.loads(of_checkpoint.read_text(encoding="utf-8"))["tasks"]["exam.logprob"]["metrics"]
    assert json.loads(shown)["tasks"]["exam.logprob"]["metrics"]["margin"] == pytest.approx(metrics["margin"], rel=1e-4)


def test_answers_that_are_there_are_not_asked_again(
    trained: Path, of_checkpoint: Path, evaluate: Evaluations, judge: ChatEndpoint, tmp_path: Path
) -> None:
    """As a start leaves them that was killed while it wrote a line."""
    out = tmp_path / "killed.json"
    lines = of_checkpoint.with_suffix(".jsonl").read_bytes().splitlines(keepends=True)
    marked = lines[0].replace(b'"response": "', b'"response": "KEPT ', 1)
    assert marked != lines[0]
    out.with_suffix(".jsonl").write_bytes(b"".join([marked, *lines[1:-1], lines[-1][:40]]))
    out.with_suffix(".settings.json").write_bytes(of_checkpoint.with_suffix(".settings.json").read_bytes())
    run = {"evaluation__checkpoint": trained, "pretrained_checkpoint__restore_from_path": "null"}
    asked = len(judge.prompts)
    # A job that gets no further is not started for ever.
    over = {"SLURM_JOB_END_TIME": "1000000000"}
    limited = {**run, "trainer__lrpo__stop__no_progress_limit": 1, "data__languages": "[de,ja]"}
    _, text = evaluate(out, expect=79, environment=over, **limited)
    assert f"Stopped by the job's time limit: {len(lines) - 1} of {len(lines)} answers are kept" in text
    # Said before anything is answered.
    assert 0 <= text.find("Note: data.languages was ['de', 'en', 'ja'] in the run of this") < text.find("Stopped by")
    assert f"NoProgress: 1 starts in a row have not added to the {len(lines) - 1} answers" in text
    tree, _ = evaluate(out, **run)
    assert tree == json.loads(of_checkpoint.read_text(encoding="utf-8"))
    texts = Counter(record["response"] for record in answers(out).values())
    assert sum(count for text, count in texts.items() if text.startswith("KEPT ")) == 1
    assert len(judge.prompts) == asked + 1, "only the answer of the line that was cut off is judged again"
    # Now all are there.
    _, text = evaluate(out, data__languages="[de,ja]", **run)
    assert len(judge.prompts) == asked + 1 and "answers, mean accuracy" in text
    assert text.count("data.languages was ['de', 'en', 'ja'] in the run of this checkpoint") == 1
    _, text = evaluate(out, expect=1, evaluation__temperature=0.5, **run)
    assert re.search(r"ConfigError: .*killed\.jsonl holds answers that differ in evaluation\.temperature", text)
    assert "evaluation.overwrite=true" in text and "Traceback" not in text


def test_mistakes_end_in_one_readable_line(evaluate: Evaluations, tiny_nemo: Path, tmp_path: Path) -> None:
    model = {"pretrained_checkpoint__restore_from_path": tiny_nemo}
    broken = tmp_path / "mgsm_de.tsv"
    broken.write_text("Wie viele?\tviele\n", encoding="utf-8")
    changes: list[tuple[dict[str, object], list[str]]] = [
        ({**model, "evaluation__checkpoint": tmp_path}, ["evaluation.checkpoint", "run_dir/checkpoints/step_N"]),
        (
            {**model, "+evaluation__tasks__more": f"{{kind: mgsm, path: {broken}}}"},
            ["mgsm_de.tsv, line 1", "answer_number"],
        ),
    ]
    for more, words in changes:
        _, text = evaluate(tmp_path / "out.json", expect=1, **more)
        assert all(word in text for word in words) and "Traceback" not in text, text
