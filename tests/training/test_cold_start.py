"""Supervised training on traces, started as users do: what it learns, resumes, exports, and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import records
from warm_start import Starter

from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.explang.format import render

pytestmark = pytest.mark.slow

MARKS = MarksConfig()
START = Callable[..., str]


def write_traces(path: Path) -> Path:
    """Six short traces of different lengths."""
    parts = (
        ("de", "Eins und eins ist zwei.", "2"),
        ("en", "Two and one is three.", "The answer is 3."),
        ("ja", "三と一は四。", "4"),
        ("en", "It is five, since two and three are five.", "5"),
        ("de", "Zwei und vier ist sechs.", "The answer is 6."),
        ("ja", "四と三は七。", "7"),
    )
    lines = []
    for number, (language, thinking, answer) in enumerate(parts):
        row = {
            "question_id": f"q{number}",
            "question": f"How much is it, {number}?",
            "question_language": "en",
            "language": language,
            "response": render(language, thinking, answer, MARKS),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def start(starter: Starter, tiny_nemo: Path, tmp_path_factory: pytest.TempPathFactory) -> START:
    """Starts nemo_lrpo.train_sft and waits; what it printed. Three passes of three steps."""
    traces = write_traces(tmp_path_factory.mktemp("traces") / "traces.jsonl")
    settings: dict[str, object] = {
        "pretrained_checkpoint.restore_from_path": tiny_nemo,
        "data.train": traces,
        "data.validation": traces,
        "trainer.sft.traces_per_step": 2,
        "trainer.sft.max_epochs": 3,
        "model.micro_batch_size": 1,
        "model.optim.lr": 1e-2,
    }

    def run(run_dir: Path, ranks: int = 1, expect: int = 0, **changes: object) -> str:
        run_dir.mkdir(parents=True, exist_ok=True)
        log = run_dir / f"start_{len(list(run_dir.glob('start_*.log')))}.log"
        log.touch()
        own = settings | {"run_dir": run_dir, "trainer.devices": ranks}
        own |= {key.replace("__", "."): value for key, value in changes.items()}
        arguments = ["--config-name", "demo_sft", *(f"{key}={value}" for key, value in own.items())]
        started = starter(arguments, log, ranks=ranks, entry="nemo_lrpo.train_sft")
        assert started.wait() == [expect] * ranks, started.text
        return started.text

    return run


@pytest.fixture(scope="module")
def taught(start: START, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps with adapters in two starts, the second from the middle of a pass."""
    run_dir = tmp_path_factory.mktemp("taught")
    start(run_dir, trainer__sft__max_steps=4, trainer__sft__export_nemo="false")
    text = start(run_dir, trainer__sft__val_check_interval=9)
    assert "continuing after step 4" in text
    return run_dir


def losses(run_dir: Path) -> list[float]:
    steps = [record for record in records(run_dir, "metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    return [record["loss"] for record in steps]


def held_out(run_dir: Path) -> float:
    """The loss on the held-out traces, which was measured once."""
    (record,) = [record for record in records(run_dir, "metrics.jsonl") if record["kind"] == "validation"]
    return record["loss"]


def test_the_loss_falls_and_is_measured_on_held_out_traces(taught: Path) -> None:
    found = losses(taught)
    assert len(found) == 9 and sum(found[6:]) < 0.8 * sum(found[:3])
    assert held_out(taught) < found[0]


def test_two_ranks_without_a_stop_learn_the_same(taught: Path, start: START, tmp_path: Path) -> None:
    """Neither data-parallel ranks nor the resume leave a trace but rounding: the order of the traces is the same."""
    start(tmp_path, ranks=2, trainer__sft__export_nemo="false")
    assert losses(tmp_path) == pytest.approx(losses(taught), rel=1e-4)


def test_the_export_is_the_model_with_its_adapters(taught: Path, start: START, tmp_path: Path) -> None:
    """All its weights trained, but with a rate of nothing, it is what the run has ended with."""
    model = {"pretrained_checkpoint__restore_from_path": taught / "model.nemo", "model__peft__peft_scheme": "none"}
    still = {"trainer__sft__max_steps": 1, "trainer__sft__val_check_interval": 1, "model__optim__lr": 0.0}
    start(tmp_path, trainer__sft__export_nemo="false", **model, **still)
    assert held_out(tmp_path) == pytest.approx(held_out(taught), rel=1e-4)


def test_mistakes_end_in_one_readable_line(start: START, tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Any], list[str]]] = [
        ({"data__max_tokens": 40}, ["trace 'q", "data.max_tokens=40", "data.over_long=drop"]),
    ]
    for change, words in changes:
        text = start(tmp_path, expect=1, **change)
        assert all(word in text for word in words) and "Traceback" not in text, text


def test_a_local_model_is_a_teacher(starter: Starter, tiny_nemo: Path, tmp_path: Path) -> None:
    """A random one has nothing to teach, but is asked as a policy is: behind its own choice of language."""
    question = {"question": "What is 1 plus 1?", "answer": "2", "ability": "Reasoning / Logic"}
    rows = [{**question, "extra_info": {"id": f"q{number}", "language": "en"}} for number in range(3)]
    rows.append(
        {**rows[0], "question": "What is 1" + " plus 1" * 90 + "?", "extra_info": {"id": "q3", "language": "en"}}
    )
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = ["--questions", tmp_path / "questions.jsonl", "--nemo", tiny_nemo, "--config", "demo_evaluate"]
    out = tmp_path / "out"
    arguments = [*common, "--thinking", "de,ja", "--ask", "tag", "--balance", "none", "--out", out]
    overrides = ["rollout.max_new_tokens=6", "rollout.micro_batch_size=4", "prompt.over_long=drop"]
    log = tmp_path / "log"
    log.touch()
    started = starter([*map(str, arguments), *overrides], log, entry="tools.make_traces")
    assert started.wait() == [0], started.text
    assert "1 of 4 questions are longer than prompt.max_tokens" in started.text and "'q3'" in started.text
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rejected) == 6 and {row["reason"] for row in rejected} == {"no_thinking"}
    assert all(row["reply"].startswith(f"<lang_select>{row['language']}</lang_select>") for row in rejected)
