"""What a step that failed leaves behind, and reading it again: enough to repeat the step without its reward servers.

`run_dir/failed/step_00000007/` is of the step that began after 7 others, in the state of `checkpoints/step_00000007`::

    reason.json           error, traceback, layout, versions, time; reason.rank1.json where rank 1 failed by itself
    config.json           the run's configuration
    questions.jsonl       the questions, as they were read
    plan.jsonl            a line per rollout: language, seed of its tokens, score
    tensors.safetensors   prompt_ids, prompt_sizes; and as far as the step came: tokens, prompt_lengths, lengths, ended,
                          valid, logprobs (where generation says them), advantages, use, divergence

All ranks of a step hold the same of these but for the reason, so that any of them may write them. A file appears whole
or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nemo_lrpo.training.protocols import Actor
from nemo_lrpo.training.scoring import StepRefused
from nemo_lrpo.types import (
    AgreedError,
    NonFiniteError,
    Prompt,
    RankFailure,
    Rollouts,
    RoutedPrompt,
    Score,
    StepAbandoned,
    TaggedPrompt,
    TrainingBatch,
)

FORMAT_VERSION = 1
PACKAGES = ("torch", "nemo_toolkit", "megatron-core", "nemo-aligner", "transformers", "numpy")
_ROLLOUTS = ("tokens", "prompt_lengths", "lengths", "ended", "valid")


class FailedStepError(ValueError):
    """A directory that is not what a failed step leaves; the message names the file and what is wrong with it."""


@dataclass
class StepParts:
    """A step as far as it came, rows in plan order. step: number of steps before it. expected: tokens of each answer,
    which its place in a batch, and so its last bits, came from."""

    step: int
    plan: Sequence[RoutedPrompt] = ()
    prompts: Sequence[TaggedPrompt] = ()
    seeds: Sequence[int] = ()
    expected: Sequence[float] = ()
    rollouts: Rollouts | None = None
    scores: Mapping[str, Score] = dataclasses.field(default_factory=dict)
    batch: TrainingBatch | None = None


@dataclass(frozen=True)
class FailedStep:
    """A dump, read. reasons: by file name; config: the tree of nemo_lrpo.config.loader.train_config_tree."""

    directory: Path
    reasons: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    parts: StepParts

    @property
    def reason(self) -> Mapping[str, Any]:
        """That of rank 0, or of the only rank that could give one."""
        return next(iter(self.reasons.values()))


class FailedSteps:
    """Leaves the steps of a run that fail under `directory`; the same object on every rank."""

    def __init__(self, directory: Path, actor: Actor, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """facts: further entries of each reason, JSON-able."""
        self._directory = directory
        self._actor = actor
        self._config = config
        self._facts = facts

    @contextmanager
    def left_behind(self, step: int, unless: Callable[[], bool] = lambda: False) -> Iterator[StepParts]:
        """Fill in the parts of the step as they come; an exception leaves them behind and goes on, saying where. One
        that is given up because the run is to stop is not left, nor one that fails while `unless`."""
        parts = StepParts(step)
        try:
            yield parts
        except StepAbandoned:
            # Given up, not failed: it is redone.
            raise
        except Exception as error:
            if unless():
                raise
            where = self.dump(parts, error)
            if isinstance(error, StepRefused):
                raise type(error)(f"{error} {where}") from error
            print(where, file=sys.stderr, flush=True)
            raise

    def dump(self, parts: StepParts, error: Exception) -> str:
        """Leave `parts` behind, on rank 0 and on a rank that has failed by itself; a sentence that says where."""
        path = self._directory / f"step_{parts.step:08d}"
        if self._actor.is_main or concerns_this_rank(error):
            try:
                dump_step(path, parts, error, rank=self._actor.rank, config=self._config, **self._facts)
            except Exception as trouble:
                # Whatever it is, it must not take the place of the error that it is about.
                return f"The step could not be left in {path} ({type(trouble).__name__}: {trouble})."
        return f"The step is left in {path} for tools/replay.py."


def concerns_this_rank(error: BaseException) -> bool:
    """Whether the cause of `error` lies in this rank, and not in all of them or in another."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RankFailure):
            return cause.__cause__ is not None
        cause = cause.__cause__
    return not isinstance(error, AgreedError)


def dump_step(
    directory: Path, parts: StepParts, error: BaseException, *, rank: int, config: Mapping[str, Any], **facts: Any
) -> None:
    """Write `parts` and why the step failed. facts: further entries of the reason, JSON-able.

    Raises OSError where it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plan = [_plan_row(parts, row) for row in range(len(parts.plan))]
    questions = {routed.prompt.question_id: dataclasses.asdict(routed.prompt) for routed in parts.plan}
    tensors = _tensors(parts)
    write = _Writer(directory, rank)
    write.text("config.json", json.dumps(config, ensure_ascii=False, indent=1, default=str))
    write.text("questions.jsonl", _lines(questions.values()))
    write.text("plan.jsonl", _lines(plan))
    write.tensors("tensors.safetensors", tensors)
    # The last one: a directory without it is of a dump that did not come to its end.
    reason = {"version": FORMAT_VERSION, "step": parts.step, "rank": rank, **_why(error), **facts}
    name = "reason.json" if rank == 0 else f"reason.rank{rank}.json"
    write.text(name, json.dumps(reason, ensure_ascii=False, indent=1, default=str))


def load_failed_step(directory: Path) -> FailedStep:
    """Read what `dump_step` wrote. Raises FailedStepError."""
    names = sorted(directory.glob("reason*.json"))
    if not names:
        raise FailedStepError(f"{directory}: no reason.json; give a directory run_dir/failed/step_XXXXXXXX.")
    reasons = {path.name: _json(path) for path in names}
    reason = next(iter(reasons.values()))
    if reason.get("version") != FORMAT_VERSION:
        raise FailedStepError(
            f"{names[0]}: format version {reason.get('version')!r}; this release reads {FORMAT_VERSION}."
        )
    try:
        prompts = {row["question_id"]: _prompt(row) for row in _json_lines(directory / "questions.jsonl")}
        rows = _json_lines(directory / "plan.jsonl")
        tensors = load_file(directory / "tensors.safetensors")
        parts = _parts(int(reason["step"]), rows, prompts, tensors)
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise FailedStepError(
            f"{directory}: not a complete dump of a step ({type(error).__name__}: {error})."
        ) from error
    return FailedStep(directory, reasons, _json(directory / "config.json"), parts)


def versions() -> dict[str, str]:
    """Of Python and of the packages that a step's numbers depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _why(error: BaseException) -> dict[str, Any]:
    """Error and traceback; loss and gradient that are not finite as text, since JSON has no word for them."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, NonFiniteError):
        cause = cause.__cause__
    numbers = {} if cause is None else {"loss": str(cause.loss), "grad_norm": str(cause.grad_norm)}
    updates = {} if cause is None else {"updates_done": cause.updates_done}
    return {
        "error": type(error).__name__,
        "message": str(error),
        **numbers,
        **updates,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _plan_row(parts: StepParts, row: int) -> dict[str, Any]:
    routed = parts.plan[row]
    score = parts.scores.get(routed.sample_id)
    return {
        "sample_id": routed.sample_id,
        "question_id": routed.prompt.question_id,
        "slot": routed.slot,
        "language": routed.language,
        "origin": routed.origin,
        "probability": routed.probability,
        "thinking": routed.thinking,
        "seed": parts.seeds[row] if row < len(parts.seeds) else None,
        "expected": parts.expected[row] if row < len(parts.expected) else None,
        "score": None if score is None else dataclasses.asdict(score),
    }


def _tensors(parts: StepParts) -> dict[str, torch.Tensor]:
    """Prompts padded with 0, and what there is of rollouts and batch."""
    sizes = torch.tensor([len(prompt.token_ids) for prompt in parts.prompts], dtype=torch.int64)
    ids = torch.zeros(len(sizes), int(sizes.max()) if len(sizes) else 0, dtype=torch.int64)
    for row, prompt in enumerate(parts.prompts):
        ids[row, : len(prompt.token_ids)] = torch.tensor(prompt.token_ids)
    tensors = {"prompt_ids": ids, "prompt_sizes": sizes}
    if parts.rollouts is not None:
        tensors |= {name: getattr(parts.rollouts, name) for name in _ROLLOUTS}
        if parts.rollouts.logprobs is not None:
            tensors["logprobs"] = parts.rollouts.logprobs
    if parts.batch is not None:
        tensors |= {"advantages": parts.batch.advantages, "use": parts.batch.use}
        tensors["divergence"] = torch.tensor(parts.batch.divergence)
    # Clones: safetensors refuses tensors that share their memory.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _parts(
    step: int, rows: Sequence[Mapping[str, Any]], prompts: Mapping[str, Prompt], tensors: Mapping[str, torch.Tensor]
) -> StepParts:
    plan = [
        RoutedPrompt(
            prompts[r["question_id"]],
            step,
            r["slot"],
            r["language"],
            r["origin"],
            r["probability"],
            r.get("thinking"),
        )
        for r in rows
    ]
    ids = [row[:size].tolist() for row, size in zip(tensors["prompt_ids"], tensors["prompt_sizes"].tolist())]
    rollouts = batch = None
    if "tokens" in tensors:
        rollouts = Rollouts(
            tuple(r["sample_id"] for r in rows),
            *(tensors[name] for name in _ROLLOUTS),
            texts=(),
            logprobs=tensors.get("logprobs"),
        )
    if "use" in tensors and rollouts is not None:
        batch = TrainingBatch(
            rollouts.tokens,
            rollouts.prompt_lengths,
            rollouts.lengths,
            tensors["advantages"],
            tensors["use"],
            rollouts.logprobs,
            tuple(r["language"] for r in rows),
            bool(tensors.get("divergence", True)),
        )
    scores = {r["sample_id"]: Score(**{**r["score"], "flags": tuple(r["score"]["flags"])}) for r in rows if r["score"]}
    return StepParts(
        step=step,
        plan=plan,
        prompts=[TaggedPrompt(routed, tuple(row)) for routed, row in zip(plan, ids)],
        seeds=[r["seed"] for r in rows if r["seed"] is not None],
        expected=[r["expected"] for r in rows if r.get("expected") is not None],
        rollouts=rollouts,
        scores=scores,
        batch=batch,
    )


def _prompt(fields: Mapping[str, Any]) -> Prompt:
    return Prompt(**{**fields, "topics": tuple(fields["topics"]), "regions": tuple(fields["regions"])})


class _Writer:
    """Writes files of a directory under another name first, one that no other rank uses."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory = directory
        self._suffix = f".rank{rank}.partial"

    def text(self, name: str, text: str) -> None:
        partial = self._directory / (name + self._suffix)
        partial.write_text(text, encoding="utf-8", errors="surrogatepass")
        os.replace(partial, self._directory / name)

    def tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        partial = self._directory / (name + self._suffix)
        save_file(tensors, partial)
        os.replace(partial, self._directory / name)


def _lines(records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    except (OSError, ValueError) as error:
        raise FailedStepError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(value, dict):
        raise FailedStepError(f"{path}: is no JSON object.")
    return value


def _json_lines(path: Path) -> list[dict[str, Any]]:
    # Not splitlines: texts may hold separators of lines that JSON leaves as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8", errors="surrogatepass").split("\n") if line]
