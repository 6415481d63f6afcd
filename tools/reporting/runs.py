"""What a run directory holds, read for a report: it may be of a run that goes on, has just begun or broke off."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from tools.saved_router import LOG, Record, SavedRouterError, Source, read_config, read_state

ROLLOUTS = "rollouts.jsonl"
LAST_SAMPLES = 2
"""Rollouts of each language that are kept as text, besides the first."""


class ReportError(ValueError):
    """An input is missing or is not what the tool that writes it would have written."""


@dataclass(frozen=True)
class Run:
    """A run. train, validation, evaluation: records of metrics.jsonl by step. samples: by language, the first and the
    last rollouts that were written as text. notes: what is missing or was left out, in sentences."""

    name: str
    path: Path
    train: list[Record]
    validation: list[Record]
    samples: dict[str, list[Record]]
    source: Source
    notes: list[str] = field(default_factory=list)
    evaluation: list[Record] = field(default_factory=list)

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages that its log names, sorted."""
        prefixes = ("count/", "router/probability/", "pairs/")
        keys = {key for record in (*self.train, *self.validation) for key in record if key.startswith(prefixes)}
        return tuple(sorted({key.rpartition("/")[2] for key in keys}))

    def series(self, key: str, validation: bool = False) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and values [N] of one metric over the records; NaN where a record has no finite value."""
        return series_of(self.validation if validation else self.train, key)

    def settings(self) -> dict[str, Any]:
        """Its configuration, flat; empty where it left none."""
        return {} if self.source.config is None else dict(_flat(OmegaConf.to_container(self.source.config[1])))


def series_of(records: Sequence[Record], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values [N] of one metric over the records; NaN where a record has no finite value."""
    return np.array([r["step"] for r in records], float), np.array([_number(r.get(key)) for r in records], float)


def read_run(path: Path, name: str) -> Run:
    """Raises ReportError where `path` is no run directory or a file of it is damaged in the middle."""
    if not path.is_dir():
        raise ReportError(f"{path}: no such directory; expected the run_dir of a training.")
    notes: list[str] = []
    if not any((path / one).exists() for one in (LOG, ROLLOUTS, "config.yaml", "checkpoints", "model.nemo")):
        raise ReportError(f"{path}: no run directory; it has neither {LOG} nor config.yaml nor checkpoints/.")
    records = _metrics(path / LOG, notes)
    samples = _samples(path / ROLLOUTS, notes)
    source = _source(path, records["train"], notes)
    return Run(name, path, records["train"], records["validation"], samples, source, notes, records["evaluation"])


def read_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, Record]]:
    """Line numbers and objects of a file of JSON objects, one a line. A last line that is not whole yet is noted.
    Raises ReportError naming the file and the line."""
    try:
        # Not splitlines: a text may hold other characters that end lines.
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    notes.append(f"The last line of {path.name} is not whole; it was left out.")
                    return
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ReportError(f"{path}:{number}: not JSON ({error}).") from error
                if not isinstance(record, dict):
                    raise ReportError(f"{path}:{number}: a JSON object was expected, found {type(record).__name__}.")
                yield number, record
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror}).") from error


def _metrics(path: Path, notes: list[str]) -> dict[str, list[Record]]:
    kinds: dict[str, list[Record]] = {"train": [], "validation": [], "evaluation": []}
    if not path.exists():
        notes.append(f"It has no {path.name}: no step has ended yet.")
        return kinds
    for number, record in read_lines(path, notes):
        if not math.isfinite(_number(record.get("step"))):
            raise ReportError(f"{path}:{number}: has no 'step'; expected lines as nemo_lrpo.train writes them.")
        if record.get("kind") in kinds:
            kinds[record["kind"]].append(record)
    train = kinds["train"]
    if not train:
        notes.append("No training step was logged: it has just begun or broke off in its first step.")
    # Training over pairs or traces has a loss and no rewards.
    for key in ("loss",) if any("loss" in record for record in train) else ("reward", "policy/loss"):
        lost = [f"{r['step']:g}" for r in train if not math.isfinite(_number(r.get(key)))]
        if lost:
            which = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
            notes.append(f"{key} is missing or not finite in {len(lost)} of {len(train)} steps ({which}).")
    return kinds


def _samples(path: Path, notes: list[str]) -> dict[str, list[Record]]:
    """By language; of a long file only what is shown is kept."""
    if not path.exists():
        notes.append(f"It has no {path.name}: no rollouts to show.")
        return {}
    first: dict[str, Record] = {}
    last: dict[str, deque[Record]] = {}
    for number, record in read_lines(path, notes):
        if not isinstance(record.get("language"), str) or not isinstance(record.get("response"), str):
            raise ReportError(f"{path}:{number}: has no 'language' or no 'response'; it is no rollout.")
        if first.setdefault(record["language"], record) is not record:
            last.setdefault(record["language"], deque(maxlen=LAST_SAMPLES)).append(record)
    if not first:
        notes.append(f"{path.name} is empty: no rollouts to show.")
    return {language: [first[language], *last.get(language, ())] for language in sorted(first)}


def _source(path: Path, train: list[Record], notes: list[str]) -> Source:
    config, state = None, None
    try:
        config = read_config(path)
        if config is None:
            notes.append("It has no config.yaml: its settings are not known.")
        state = read_state(path)
        if state is None:
            notes.append("It has no complete checkpoint and no model.nemo: no heat maps of the router.")
    except SavedRouterError as error:
        notes.append(f"What its router learned cannot be shown: {error}")
    return Source(path, state, train, config)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Last parts of the paths, as many as tell them apart; at least two where the last says only `run`."""
    resolved = [path.resolve() for path in paths]
    for count in range(1, max((len(path.parts) for path in resolved), default=1) + 1):
        names = ["/".join(path.parts[-count:]) for path in resolved]
        if len(set(names)) == len(set(resolved)) and "run" not in names:
            break
    return names


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, (dict, DictConfig)) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
