"""What a step looked like, per language: metrics, text samples and timings, as JSON lines and for the logger."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lrpo.explang.flags import is_own
from nemo_lrpo.training.scoring import has_reward, is_missing
from nemo_lrpo.types import (
    FLAG_ABSTAINED,
    FLAG_CHUNKED,
    FLAG_EMPTY,
    FLAG_TRUNCATED,
    FLAG_UNKNOWN_PAIR,
    Rollouts,
    RoutedPrompt,
    Score,
)

_FLAGS = (FLAG_ABSTAINED, FLAG_EMPTY, FLAG_TRUNCATED, FLAG_CHUNKED, FLAG_UNKNOWN_PAIR)
"""Logged at every step, whether they occur or not."""


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


@dataclass(frozen=True)
class Measured:
    """What is measured of one answer: its requested language, its tokens (None where nothing was generated), whether it
    ended by itself and held valid tokens only, its score, and how often its batch was generated again."""

    language: str
    length: int | None
    ended: bool
    valid: bool
    score: Score | None
    retried: int | None = None


def rollout_metrics(plan: Sequence[RoutedPrompt], rollouts: Rollouts, scores: Mapping[str, Score]) -> dict[str, float]:
    """What the rollouts of a step were like, see `answer_metrics`."""
    columns = (rollouts.lengths - rollouts.prompt_lengths, rollouts.ended, rollouts.valid)
    retried = [None] * len(plan) if rollouts.retried is None else rollouts.retried.tolist()
    return answer_metrics(
        [
            Measured(routed.language, length, ended, valid, scores.get(routed.sample_id), again)
            for routed, length, ended, valid, again in zip(
                plan, *(column.tolist() for column in columns), retried, strict=True
            )
        ]
    )


def answer_metrics(answers: Sequence[Measured]) -> dict[str, float]:
    """What answers were like, in all (`reward`) and by requested language (`reward/de`).

    Means over all answers: `length` (response tokens), `ended`, `invalid`, `retried` (how often its batch was generated
    again). Means over those that have one: `reward`, `quality`, `gate`, each verifier's value `part_<name>`, each
    measure by its name. Means over all with a score: `confidence` and the share with each flag (`abstained`,
    `truncated`, `unknown_pair`, ...; but what mode explang read in a response, see its own metrics). Numbers of
    answers: `count`, `scored` (with a reward), `masked` (without one by intent), `missing`.
    """
    totals: dict[str, float] = defaultdict(float)
    sums: dict[str, float] = defaultdict(float)
    numbers: dict[str, int] = defaultdict(int)
    flags = {flag for answer in answers if answer.score for flag in answer.score.flags if not is_own(flag)} | set(
        _FLAGS
    )
    for answer in answers:
        score = answer.score
        values: dict[str, float | None] = {
            "length": answer.length,
            "ended": answer.ended,
            "invalid": not answer.valid,
            "retried": answer.retried,
        }
        if score is not None:
            values |= {"reward": score.reward, "quality": score.quality, "gate": score.gate}
            values |= {"confidence": score.confidence, **score.measures}
            values |= {f"part_{name}": value for name, value in score.parts.items()}
            values |= {flag: float(flag in score.flags) for flag in flags}
        for suffix in ("", f"/{answer.language}"):
            totals[f"count{suffix}"] += 1
            totals[f"scored{suffix}"] += has_reward(score)
            totals[f"missing{suffix}"] += is_missing(score)
            totals[f"masked{suffix}"] += score is not None and score.masked
            for name, value in values.items():
                if value is not None:
                    sums[name + suffix] += value
                    numbers[name + suffix] += 1
    return dict(sorted({**totals, **{key: total / numbers[key] for key, total in sums.items()}}.items()))


def sample_record(
    routed: RoutedPrompt,
    text: str,
    ended: bool,
    score: Score | None,
    advantage: float | None,
    tokens: int | None = None,
) -> dict[str, Any]:
    """One rollout as a readable JSON object. tokens: of the response, its end token included. `thinking`, the language
    that a response was made to think in, is there where one was."""
    prompt = routed.prompt
    thinking = {} if routed.thinking is None else {"thinking": routed.thinking}
    return {
        "sample_id": routed.sample_id,
        "question": prompt.question,
        "question_language": prompt.language,
        "topics": list(prompt.topics),
        "regions": list(prompt.regions),
        "language": routed.language,
        "origin": routed.origin,
        "probability": routed.probability,
        **thinking,
        "response": text,
        "tokens": tokens,
        "reference": prompt.reference,
        "ended": ended,
        "advantage": advantage,
        "score": None if score is None else dataclasses.asdict(score),
    }


class JsonLines:
    """A file of JSON objects, one a line, flushed at every line; a run that stops keeps what it wrote.

    A resumed run cuts off what it is about to write again: lines of steps after `resume_step`, at that step those of
    the kinds `redo`, and what is no whole record. Without `resume_step` the file starts empty.
    """

    def __init__(self, path: Path, resume_step: int | None = None, redo: Collection[str] = ()):
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            partial = path.with_name(path.name + ".partial")
            # As bytes: only \n ends a line here, and a line may end in the middle of a character.
            with path.open("rb") as lines, partial.open("wb") as kept:
                kept.writelines(line for line in lines if _belongs(line, resume_step, redo))
            partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """To the disk, so that a checkpoint that follows never knows more than the file."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _belongs(line: bytes, resume_step: int, redo: Collection[str]) -> bool:
    """Whether a line is a whole record of what was done up to `resume_step`."""
    if not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
        step = record["step"]
        return step < resume_step or (step == resume_step and record.get("kind") not in redo)
    except (ValueError, KeyError, TypeError):
        return False
