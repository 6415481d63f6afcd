"""What a step looked like, per language: metrics, text samples and timings, as JSON lines and for the logger."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_lrpo.types import Rollouts, RoutedPrompt, Score

_SCORE_FIELDS = ("reward", "quality", "similarity", "calibrated", "gate", "confidence")


class Timer:
    """Seconds by part of a step; `with timer("generate"): ...` adds up."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last `take`, keys `time/<part>`."""
        taken = {f"time/{part}": seconds for part, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


def rollout_metrics(plan: Sequence[RoutedPrompt], rollouts: Rollouts, scores: Mapping[str, Score]) -> dict[str, float]:
    """Means over a step's rollouts, in all (`reward`) and by requested language (`reward/de`).

    Score parts average over the rollouts that have a score; `ended`, `invalid`, `length` (response tokens) over all.
    `count`, `scored` and `missing` are numbers of rollouts.
    """
    sums: dict[str, float] = defaultdict(float)
    lengths = (rollouts.lengths - rollouts.prompt_lengths).tolist()
    for routed, length, ended, valid in zip(
        plan, lengths, rollouts.ended.tolist(), rollouts.valid.tolist(), strict=True
    ):
        score = scores.get(routed.sample_id)
        for suffix in ("", f"/{routed.language}"):
            sums[f"count{suffix}"] += 1
            sums[f"length{suffix}"] += length
            sums[f"ended{suffix}"] += ended
            sums[f"invalid{suffix}"] += not valid
            sums[f"missing{suffix}"] += score is None
            sums[f"scored{suffix}"] += score is not None
            if score is not None:
                sums[f"abstained{suffix}"] += score.language is None
                for name in _SCORE_FIELDS:
                    sums[f"{name}{suffix}"] += getattr(score, name)
    metrics = {}
    for key, total in sums.items():
        name, _, language = key.partition("/")
        suffix = f"/{language}" if language else ""
        if name in ("count", "scored", "missing"):
            metrics[key] = total
        elif name in (*_SCORE_FIELDS, "abstained"):
            metrics[key] = total / sums[f"scored{suffix}"]
        else:
            metrics[key] = total / sums[f"count{suffix}"]
    return dict(sorted(metrics.items()))


def sample_record(
    routed: RoutedPrompt, text: str, ended: bool, score: Score | None, advantage: float | None
) -> dict[str, Any]:
    """One rollout as a readable JSON object."""
    prompt = routed.prompt
    return {
        "sample_id": routed.sample_id,
        "question": prompt.question,
        "question_language": prompt.language,
        "topics": list(prompt.topics),
        "regions": list(prompt.regions),
        "language": routed.language,
        "origin": routed.origin,
        "probability": routed.probability,
        "response": text,
        "reference": prompt.reference,
        "ended": ended,
        "advantage": advantage,
        "score": None if score is None else {name: getattr(score, name) for name in (*_SCORE_FIELDS, "language")},
    }


class JsonLines:
    """A file of JSON objects, one a line, flushed at every line; a run that stops keeps what it wrote.

    `drop_after` removes lines of steps that a resumed run is about to repeat.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= resume_step]
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """Step of a record; a line cut off by a crash belongs to no step and goes."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
