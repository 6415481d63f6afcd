"""Training over preference pairs as a user starts it: real model, real checkpoints, one rank and two."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from training_runs import CURRENCIES, QUESTIONS, newest, records, weights
from warm_start import Starter

pytestmark = pytest.mark.slow

SETTINGS = {
    "data.max_answer_tokens": 64,
    "data.validation_share": 0.2,
    "trainer.lrpo.pairs_per_step": 4,
    "trainer.lrpo.max_epochs": 2,
    "trainer.lrpo.val_check_interval": 2,
    "trainer.lrpo.val_at_start": "true",
    "trainer.lrpo.save_interval": 2,
    "model.micro_batch_size": 4,
    "model.optim.lr": 1e-3,
    "method.beta": 0.3,
}


class Offline:
    """Starts of nemo_lrpo.train_offline from a process that has the stack imported."""

    def __init__(self, starter: Starter, settings: dict[str, object]):
        self._starter = starter
        self._settings = settings

    def __call__(self, run_dir: Path, expect: int = 0, ranks: int = 1, **changes: object) -> str:
        """What was printed. Keys of `changes` have `__` for dots."""
        run_dir.mkdir(parents=True, exist_ok=True)
        log = run_dir / "start.log"
        log.write_text("")
        settings = {**self._settings, "run_dir": run_dir, "trainer.devices": ranks}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        arguments = ["--config-name", "demo_offline", *(f"{key}={value}" for key, value in settings.items())]
        started = self._starter(arguments, log, ranks=ranks, entry="nemo_lrpo.train_offline")
        codes = started.wait()
        assert codes == [expect] * ranks, started.text
        return started.text


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs: the right answer, and one of another country."""
    rows = []
    for language, (question, text) in QUESTIONS.items():
        for index, (country, currency) in enumerate(CURRENCIES):
            wrong = CURRENCIES[(index + 1) % len(CURRENCIES)][1]
            sides = {
                side: {"sample_id": f"0/{country}-{language}/{slot}", "response": response, "reward": 1.0 - slot}
                for slot, (side, response) in enumerate(
                    {"chosen": text.format(country, currency), "rejected": text.format(country, wrong)}.items()
                )
            }
            facts = {"question_id": f"{country}-{language}", "question": question.format(country)}
            facts |= {"question_language": language, "language": language}
            rows.append({**facts, **sides, "margin": 1.0, "dominant": None})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def offline(starter: Starter, tiny_nemo: Path, pairs: Path) -> Offline:
    paths = {"pretrained_checkpoint.restore_from_path": tiny_nemo, "data.train": pairs}
    return Offline(starter, {**SETTINGS, **paths})


@pytest.fixture(scope="module")
def whole(offline: Offline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a break."""
    path = tmp_path_factory.mktemp("whole")
    assert "pairs to train on" in offline(path)
    return path


@pytest.fixture(scope="module")
def half(offline: Offline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped after two steps, in the middle of the first epoch."""
    path = tmp_path_factory.mktemp("half")
    offline(path, trainer__lrpo__stop_after_steps=2)
    assert not (path / "model.nemo").exists()
    return path


def metrics(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [one for one in records(run_dir, "metrics.jsonl") if kind in (None, one["kind"])]
    return [{name: value for name, value in one.items() if not name.startswith("time/")} for one in found]


def test_the_loss_falls_and_pairs_are_told_apart(whole: Path) -> None:
    train, validation = metrics(whole, "train"), metrics(whole, "validation")
    held = validation[0]["pairs"]
    assert held > 0 and validation[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert [one["step"] for one in validation] == [0, 2, 4, len(train)][: len(validation)]
    assert train[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and train[0]["accuracy"] == 0.0
    assert train[-1]["loss"] < 0.5 and train[-1]["accuracy"] == 1.0
    assert all(one["policy/grad_norm"] > 0 for one in train)
    named = {name for one in records(whole, "metrics.jsonl") if one["kind"] == "train" for name in one}
    assert {"accuracy/de", "margin/ja", "chosen_change", "epoch", "time/initial", "policy/lr"} <= named
    assert not (whole / "rollouts.jsonl").exists()


def test_the_trained_model_and_its_checkpoint_say_what_they_are(whole: Path) -> None:
    with tarfile.open(whole / "model.nemo") as archive:
        summary = json.loads(archive.extractfile("./lrpo_training.json").read())
    steps = len(metrics(whole, "train"))
    assert summary == {"step": steps, "seed": 1234, "languages": ["de", "en", "ja"], "method": "dpo"}
    saved = json.loads((newest(whole) / "state.json").read_text(encoding="utf-8"))
    assert saved["step"] == steps and saved["method"] == {"name": "dpo", "loss": "dpo"}
    assert not (whole / "starts.json").exists()


def test_a_stopped_run_goes_on_as_if_it_had_not(offline: Offline, half: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(half, tmp_path / "run"))
    assert "Continuing after step 2" in offline(run_dir)
    assert metrics(run_dir) == metrics(whole) and weights(run_dir) == weights(whole)


def test_two_data_parallel_ranks_train_what_one_does(offline: Offline, half: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(half, tmp_path / "run"))
    output = offline(run_dir, ranks=2)
    assert "data 1 -> 2" in output
    for found, expected in zip(metrics(run_dir), metrics(whole), strict=True):
        assert found.pop("kind") == expected.pop("kind")
        assert found == pytest.approx(expected, rel=2e-4, abs=2e-4), expected["step"]


def test_a_bad_row_ends_the_start_with_one_line(offline: Offline, pairs: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = pairs.read_text(encoding="utf-8").splitlines()
    bad.write_text("\n".join([*lines, lines[0].replace('"margin": 1.0', '"margin": "wide"')]) + "\n", encoding="utf-8")
    output = offline(tmp_path / "run", expect=1, data__train=bad)
    assert f"DataError: {bad}, line 13: margin is text; accepted: a number." in output and "Traceback" not in output
