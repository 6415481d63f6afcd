"""tools/reproduce_explang.py: what is compared, what a run brought, which runs are gone on with, what is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_lrpo.config.loader import compose, load_train_config
from tools.miniature.processes import ProcessFailed
from tools.miniature.text import marks
from tools.miniature.thinking import (
    CHOOSES,
    ENGLISH,
    PROPOSED,
    Runs,
    Thinking,
    figures_of,
    read_run,
    table,
    thinking_arms,
)
from tools.reproduce_explang import BLOCK, COLD_START, Bench, check_same, reproduce, write_all

ARMS = thinking_arms(8)


def left_behind(directory: Path, accuracy: float, languages: Sequence[float | None]) -> tuple[Path, Path]:
    """An evaluation and a run_dir as the entry points leave them; exploration is the first half of the steps."""
    run_dir = directory / "train"
    run_dir.mkdir(parents=True)
    own = {
        "accuracy": accuracy,
        "accuracy_strict": accuracy - 0.1,
        "compliance/seen": 0.9,
        "tokens": 30.0,
        "count": 40.0,
        "count/ja": 30.0,
        "count/en": 10.0,
        "count/seen": 40.0,
    }
    measured = {"sums/count": 40.0, **{f"sums/explang/{name}": value for name, value in own.items()}}
    (directory / "answers.json").write_text(json.dumps({"metrics": measured}))
    steps = []
    for number, effective in enumerate(languages):
        step = {"kind": "train", "step": number + 1, "count": 256.0, "explang/accuracy": 0.1 * number}
        step |= {"explang/compliance/seen": 0.5, "explang/exploration": float(number < len(languages) / 2)}
        steps.append(step if effective is None else step | {"explang/languages_effective": effective})
    lines = [*steps, {"kind": "validation", "step": 1}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory / "answers.json", run_dir


def run_of(arm: str, seed: int, accuracy: float) -> Thinking:
    return Thinking(
        arm=arm,
        seed=seed,
        steps=2,
        rollouts=512,
        questions=40,
        accuracy=accuracy,
        accuracy_strict=accuracy,
        compliance=1.0,
        tokens=30.0,
        chosen={"ja": 1.0},
        trained_accuracy=[0.1, 0.2],
        trained_compliance=[0.5, 0.5],
        languages=None if arm == ENGLISH else [8.0, 2.0],
        exploring=1,
        processor_seconds=9.0,
    )


def test_the_arms_differ_in_who_chooses_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    paths = [
        f"{name}={tmp_path / 'file'}"
        for name in ("data.train", "reward.endpoint_file", "pretrained_checkpoint.restore_from_path")
    ]
    found = {
        name: load_train_config(compose("demo_explang", [*arm.settings, "data.validation=null", *paths]))
        for name, arm in ARMS.items()
    }
    assert {name: config.mode.forced_rollouts for name, config in found.items()} == {
        ENGLISH: 8,
        CHOOSES: 0,
        PROPOSED: 4,
    }
    assert found[ENGLISH].router.mix == {"en": 1} and ARMS[ENGLISH].think_in == "en"
    assert all(found[name].router.reserved_slots == 0 for name in (ENGLISH, PROPOSED))
    rest = [(config.loop, config.algorithm, config.rollout, config.data) for config in found.values()]
    assert all(one == rest[0] for one in rest) and rest[0][0].rollouts_per_prompt == 8


def test_a_run_is_read_from_what_it_left(tmp_path: Path) -> None:
    evaluation, run_dir = left_behind(tmp_path, 0.8, [8.0, 10.0, 3.0, 1.0])
    found = read_run(ARMS[CHOOSES], 2, evaluation, "sums", run_dir, 7.0)
    assert (found.steps, found.rollouts, found.questions, found.exploring) == (4, 1024, 40, 2)
    assert found.chosen == {"en": 0.25, "ja": 0.75} and found.accuracy_strict == pytest.approx(0.7)
    figures = figures_of(found)
    assert (figures["languages_first"], figures["languages_explored"]) == (8.0, 10.0)
    assert figures["languages_last"] == pytest.approx(5.5)  # of the last five steps, here all
    assert figures["sampled_compliance"] == 0.5
    evaluation, run_dir = left_behind(tmp_path / "forced", 0.8, [None, None])
    assert read_run(ARMS[ENGLISH], 2, evaluation, "sums", run_dir, 7.0).languages is None
    assert read_run(COLD_START, 1, evaluation, "sums", None, 0.0).steps == 0
    # No tag of a seen language, in some step or in the end.
    some = dataclasses.replace(found, compliance=None, trained_compliance=[0.2, None, None, None])
    assert "compliance" not in figures_of(some) and figures_of(some)["sampled_compliance"] == 0.2


def test_runs_are_kept_as_they_come_and_a_cut_line_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Runs(path).add(run_of(CHOOSES, 1, 0.9))
    with path.open("a") as file:
        file.write('{"arm": "expl')
    runs = Runs(path)
    runs.add(run_of(ENGLISH, 1, 0.5))
    assert [run.accuracy for run in Runs(path).of(CHOOSES)] == [0.9] and Runs(path).get(ENGLISH, 1) is not None
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:1: no run of tools/reproduce_explang\.py"):
        Runs(path)


def test_only_what_is_missing_is_run_and_a_failure_stops_nothing_else(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "results.jsonl")
    runs.add(run_of(ENGLISH, 1, 0.5))
    started: list[str] = []

    def start(module: str, settings: Sequence[str], log: Path) -> float:
        started.append(f"{module.rpartition('.')[2]} {log.parent.name}")
        if module == "nemo_lrpo.train" and log.parent.name == "explang_2":
            raise ProcessFailed("broken")
        if module == "nemo_lrpo.evaluate":
            left_behind(log.parent, 0.8, [8.0, 2.0])
        return 5.0

    start.stop = lambda: None  # type: ignore[attr-defined]
    servers = SimpleNamespace(endpoint=lambda overrides: tmp_path / "endpoint.json")
    bench = Bench(tmp_path / "model.nemo", (), tmp_path, servers, start)  # type: ignore[arg-type]
    failures = reproduce(bench, runs, [ARMS[ENGLISH], ARMS[CHOOSES]], [1, 2], 1)
    assert failures == ["explang, seed 2: broken"]
    assert "train english_1" not in started and "evaluate explang_1" in started and "train english_2" in started
    assert (
        runs.get(CHOOSES, 2) is None and runs.get(CHOOSES, 1) is not None and runs.get(COLD_START.name, 1) is not None
    )


def test_the_table_pairs_by_seed_and_a_file_without_a_block_is_refused(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "results.jsonl")
    for seed, (english, chooses) in enumerate([(0.5, 0.8), (0.6, 1.0)], start=1):
        runs.add(run_of(ENGLISH, seed, english))
        runs.add(run_of(CHOOSES, seed, chooses))
    arms = list(ARMS.values())
    row = table(runs, arms[:2], COLD_START.name).splitlines()[-1]
    # Differences 0.3 and 0.4: their mean +- 12.706 * 0.0707 / sqrt(2).
    assert "0.900 ±1.271 (+0.350 ±0.635)" in row
    readme = tmp_path / "README.md"
    opening, closing = marks(BLOCK)
    readme.write_text("\n".join(["above", opening, "old", closing, "below", ""]))
    (tmp_path / "tools/miniature").mkdir(parents=True)
    text = write_all(runs, arms, tmp_path, readme)
    written = readme.read_text()
    assert "old" not in written and text in written and written.startswith("above\n") and written.endswith("\nbelow\n")
    assert "ExpLang thinks in: ja 1.00." in text
    assert (tmp_path / "tools/miniature/thinking.svg").read_bytes() == (tmp_path / "thinking.svg").read_bytes()
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="no block"):
        write_all(runs, arms, tmp_path, readme)


def test_another_model_or_other_settings_are_refused_once_a_run_is_kept(tmp_path: Path) -> None:
    model, path = tmp_path / "model.nemo", tmp_path / "settings.json"
    model.write_text("one")
    runs = Runs(tmp_path / "results.jsonl")
    check_same(path, runs, model, ["trainer.lrpo.max_steps=2"])
    check_same(path, runs, model, [])
    runs.add(run_of(CHOOSES, 1, 0.9))
    check_same(path, runs, model, [])
    with pytest.raises(ValueError, match="another settings; give another --out"):
        check_same(path, runs, model, ["trainer.lrpo.max_steps=3"])
    model.write_text("two")
    with pytest.raises(ValueError, match="another model; give another --out"):
        check_same(path, runs, model, [])
