"""What a run leaves for its reader: metrics.jsonl, rollouts.jsonl, the loggers and a progress bar, by the main rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_lrpo.router import LanguagePlan
from nemo_lrpo.training.metrics import JsonLines, sample_record
from nemo_lrpo.training.protocols import Logger
from nemo_lrpo.types import Rollouts, Score

VALIDATION = "validation"
EVALUATION = "evaluation"
SHOWN = {"reward": ".3f", "gate": ".2f"}
"""Beside the bar: metrics and their formats."""


Decode = Callable[[Rollouts, Sequence[int]], list[str]]
"""Gives the responses of some rows as text."""


@dataclass
class StepRecord:
    """What a step leaves for the logs."""

    metrics: dict[str, float]

    def samples(self, count: int, decode: Decode) -> Iterator[dict[str, Any]]:
        """At most `count` readable objects of what the step was made of; none here."""
        yield from ()


@dataclass
class RolloutRecord(StepRecord):
    """Of a step that made rollouts; arrays are in plan order."""

    plan: LanguagePlan
    rollouts: Rollouts
    scores: dict[str, Score]
    advantages: list[float]

    def samples(self, count: int, decode: Decode) -> Iterator[dict[str, Any]]:
        count = min(count, len(self.plan))
        # Spread over the step, so that several questions and slots are seen.
        rows = sorted({index * len(self.plan) // count for index in range(count)}) if count else []
        for row, text in zip(rows, decode(self.rollouts, rows), strict=True):
            routed = self.plan[row]
            score, ended = self.scores.get(routed.sample_id), bool(self.rollouts.ended[row])
            tokens = int(self.rollouts.lengths[row] - self.rollouts.prompt_lengths[row])
            yield sample_record(routed, text, ended, score, self.advantages[row], tokens)


class RunLog:
    """The files of one start of a run. They hold every step once, whatever was written after `resume_step` before."""

    def __init__(
        self,
        run_dir: Path | None,
        *,
        total_steps: int,
        resume_step: int | None,
        repeats: Collection[str],
        logger: Logger,
        samples: int | None,
        shown: Mapping[str, str] = SHOWN,
    ):
        """run_dir: None on the ranks that write nothing. repeats: of VALIDATION and EVALUATION, with which of
        `resume_step` the resumed run begins. samples: rollouts of a step that are written as text; None: the run has
        none. shown: metrics beside the bar, with their formats."""
        self._logger = logger
        self._samples = samples
        self._shown = shown
        self._metrics = self._rollouts = None
        if run_dir is not None:
            self._metrics = JsonLines(run_dir / "metrics.jsonl", resume_step, redo=repeats)
            if samples is not None:
                self._rollouts = JsonLines(run_dir / "rollouts.jsonl", resume_step)
        self._bar = tqdm(
            total=total_steps, initial=resume_step or 0, desc="train", unit="step", disable=run_dir is None
        )

    def step(self, step: int, record: StepRecord, decode: Decode) -> None:
        """Write a step that is done."""
        self._write("train", step, record.metrics)
        if self._rollouts is not None and self._samples is not None:
            for sample in record.samples(self._samples, decode):
                self._rollouts.write({"step": step, **sample})
        shown = {name: format(record.metrics.get(name, math.nan), form) for name, form in self._shown.items()}
        self._bar.set_postfix(**shown, seconds=f"{record.metrics['time/step']:.1f}")
        self._bar.update()

    def between(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write the VALIDATION or EVALUATION after `step`."""
        self._write(kind, step, metrics)

    def sync(self) -> None:
        """To the disk."""
        for file in self._files():
            file.sync()

    def close(self) -> None:
        self._bar.close()
        for file in self._files():
            file.close()

    def _files(self) -> list[JsonLines]:
        return [file for file in (self._metrics, self._rollouts) if file is not None]

    def _write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write({"kind": kind, "step": step, **metrics})
            self._logger({f"{kind}/{name}": value for name, value in metrics.items()}, step)
