"""Runs that are done, kept in a file of JSON lines: the same command goes on after a stop, and more add to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar


class ResultsError(ValueError):
    """A file cannot be gone on with, or not be written to; the message names file, line and remedy."""


class Run(Protocol):
    """A dataclass of JSON values."""

    __dataclass_fields__: Any

    @property
    def arm(self) -> str: ...

    @property
    def seed(self) -> int: ...


R = TypeVar("R", bound=Run)


class KeptRuns(Generic[R]):
    """By arm and seed, each added to the file as soon as it is done."""

    def __init__(self, path: Path, understand: Callable[[Mapping[str, Any]], R], tool: str) -> None:
        """understand: a line's object as a run; KeyError, TypeError or ValueError for what is none. tool: whose runs
        they are. A last line that a stop cut off is taken out. Raises ResultsError, naming the line, for one that is
        no run."""
        self.path = path
        self._found: dict[tuple[str, int], R] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, cut = text.rpartition("\n")
        if cut:
            path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        for number, line in enumerate(whole.split("\n") if whole else [], start=1):
            try:
                run = understand(json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise ResultsError(f"{path}:{number}: no run of {tool} ({error!r}).") from error
            self._found[run.arm, run.seed] = run

    def __len__(self) -> int:
        return len(self._found)

    def get(self, arm: str, seed: int) -> R | None:
        return self._found.get((arm, seed))

    def of(self, arm: str) -> list[R]:
        """By seed."""
        return [self._found[key] for key in sorted(self._found) if key[0] == arm]

    def add(self, run: R) -> None:
        """Keep a run."""
        self._found[run.arm, run.seed] = run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")
