"""Small training runs: twelve questions, their settings, starts of them from a warm process, and what they leave."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Mapping
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
    """Starts of a training run from a warm process."""

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
        log = run_dir / f"start_{len(list(run_dir.glob('start_*.log')))}.log"
        log.touch()
        arguments = self.arguments(run_dir, ranks, changes)
        return self._starter(arguments, log, ranks=ranks, environment=environment, before=before)

    def arguments(self, run_dir: Path, ranks: int, changes: Mapping[str, object]) -> list[str]:
        """The command line of `nemo_lrpo.train`."""
        settings = {**self._settings, "run_dir": run_dir, "trainer.devices": ranks}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        return ["--config-name", "demo", *(f"{key}={value}" for key, value in settings.items())]

    def __call__(self, run_dir: Path, expect: list[int], **arguments: Any) -> str:
        """Start and wait; what was printed. Fails unless the ranks exit with `expect`."""
        started = self.start(run_dir, ranks=len(expect), **arguments)
        codes = started.wait()
        assert codes == expect, f"exit {codes}, expected {expect}\n{started.text}"
        return started.text


def records(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_bytes().split(b"\n") if line]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All but what a clock or a connection has said."""
    own = ("time/", "reward_service/")
    return [{k: v for k, v in record.items() if not k.startswith(own)} for record in records(run_dir, "metrics.jsonl")]


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step_*"))


def state(run_dir: Path) -> dict[str, Any]:
    kept = ("step", "validated_step", "updates", "seed", "data", "router", "languages", "layout")
    saved = json.loads((newest(run_dir) / "state.json").read_text(encoding="utf-8"))
    return {name: saved[name] for name in kept}


def weights(run_dir: Path) -> str:
    """Hash of all that the newest checkpoint holds of model, optimizer and schedule."""
    digest = hashlib.sha256()
    for path in sorted((newest(run_dir) / "shards").rglob("*")):
        if path.is_file() and path.suffix == ".distcp":
            digest.update(path.read_bytes())
    return digest.hexdigest()
