"""The problems: three numbers, two operations, every value from 0 to 12."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tools.demo_world.facts import stable_hash

SPLITS = {"train": 560, "validation": 60, "test": 150}
"""Problems of each split: all that there are."""
LARGEST, LARGEST_RIGHT = 12, 5


@dataclass(frozen=True)
class Step:
    """`left` plus or minus `right`."""

    left: int
    sign: int
    right: int

    @property
    def value(self) -> int:
        return self.left + self.sign * self.right

    @property
    def crosses_ten(self) -> bool:
        """Whether there is something to carry or to borrow."""
        return self.left // 10 != self.value // 10


@dataclass(frozen=True)
class Problem:
    """first sign1 right1 sign2 right2, worked out from left to right."""

    first: int
    operations: tuple[tuple[int, int], ...]
    split: str

    @property
    def problem_id(self) -> str:
        return f"{self.first}" + "".join(f"{'+' if sign > 0 else '-'}{right}" for sign, right in self.operations)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        left, steps = self.first, []
        for sign, right in self.operations:
            steps.append(Step(left, sign, right))
            left = steps[-1].value
        return tuple(steps)

    @property
    def value(self) -> int:
        return self.steps[-1].value


def problems(seed: int = 0) -> tuple[Problem, ...]:
    """All problems, each with the split that the seed has drawn for it."""
    drawn = sorted(_all(), key=lambda one: stable_hash("problem", seed, one.problem_id))
    names = [name for name, count in SPLITS.items() for _ in range(count)]
    return tuple(Problem(one.first, one.operations, name) for one, name in zip(drawn, names, strict=True))


def _all() -> list[Problem]:
    operations = [(sign, right) for sign in (1, -1) for right in range(1, LARGEST_RIGHT + 1)]
    found = []
    for first in range(1, LARGEST + 1):
        for one in operations:
            for two in operations:
                problem = Problem(first, (one, two), "")
                if all(0 <= step.value <= LARGEST for step in problem.steps):
                    found.append(problem)
    return found
