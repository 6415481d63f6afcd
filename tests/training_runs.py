"""Small training runs: twelve questions, their settings, and starts of them from a warm process."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from warm_start import Start, Starter

LANGUAGES = ("de", "en", "ja")
QUESTIONS = {
    "de": ("Wie heißt die Währung von {}?", "Die Währung von {} heißt {}."),
    "en": ("What is the currency of {}?", "The currency of {} is the {}."),
    "ja": ("{}の通貨は何ですか。", "{}の通貨は{}です。"),
}
CURRENCIES = (("Japan", "Yen"), ("Kenya", "Shilling"), ("Peru", "Sol"), ("Israel", "Shekel"))


def write_questions(path: Path) -> Path:
    """Twelve questions in three languages, one of them with its language fixed."""
    rows = []
    for language, (question, answer) in QUESTIONS.items():
        for index, (country, currency) in enumerate(CURRENCIES):
            text = question.format(country)
            rows.append(
                {
                    "prompt": [{"role": "user", "content": text}],
                    "question": text,
                    "answer": answer.format(country, currency),
                    "reward_model": {"ground_truth": answer.format(country, currency), "style": "model"},
                    "ability": "Translation" if index == 3 else "Regional Knowledge",
                    "extra_info": {
                        "id": f"{country}-{language}",
                        "language": language,
                        "region": ["Asia", "Africa", "America", "Asia"][index],
                    },
                }
            )
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def settings_for(nemo: Path, data: Path, endpoint_file: Path) -> dict[str, object]:
    """A run of four steps; rollouts end at any letter, since random text hardly ends by itself."""
    return {
        "pretrained_checkpoint.restore_from_path": nemo,
        "data.train": data,
        "data.validation": "null",
        "data.languages": f"[{','.join(LANGUAGES)}]",
        "reward.endpoint_file": endpoint_file,
        "router.update_every": 2,
        "router.reserved_slots": 1,
        "rollout.micro_batch_size": 8,
        "rollout.max_new_tokens": 8,
        "trainer.lrpo.prompts_per_step": 4,
        "trainer.lrpo.rollouts_per_prompt": 4,
        "trainer.lrpo.max_steps": 4,
        "trainer.lrpo.max_epochs": 2,
        "trainer.lrpo.save_interval": 2,
        "trainer.lrpo.val_check_interval": 0,
        "trainer.lrpo.log_samples": 16,
        "rollout.end_strings": f"[{','.join(string.ascii_lowercase)}]",
        "model.micro_batch_size": 4,
        "model.optim.lr": 1e-3,
        "model.optim.sched": "{name: CosineAnnealing, warmup_steps: 1, constant_steps: 0, min_lr: 1e-5}",
    }


class Runs:
    """Starts of a training run from a warm process, with rewards that are hashes."""

    def __init__(self, starter: Starter, settings: dict[str, object]):
        self._starter = starter
        self._settings = settings

    def start(
        self,
        run_dir: Path,
        *,
        ranks: int = 1,
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        **changes: object,
    ) -> Start:
        """Returns at once. Keys of `changes` have `__` for dots; `before` runs in every rank's process first."""
        run_dir.mkdir(parents=True, exist_ok=True)
        settings = {**self._settings, "run_dir": run_dir, "trainer.devices": ranks}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        log = run_dir / f"start_{len(list(run_dir.glob('start_*.log')))}.log"
        log.touch()
        arguments = ["--config-name", "demo", *(f"{key}={value}" for key, value in settings.items())]
        return self._starter(arguments, log, ranks=ranks, environment=environment, before=before)

    def __call__(self, run_dir: Path, expect: list[int], **arguments: Any) -> str:
        """Start and wait; what was printed. Fails unless the ranks exit with `expect`."""
        started = self.start(run_dir, ranks=len(expect), **arguments)
        codes = started.wait()
        assert codes == expect, f"exit {codes}, expected {expect}\n{started.text}"
        return started.text
