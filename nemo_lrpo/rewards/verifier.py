"""What a verifier is: one judgement of how good an answer is, whatever the language gate says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from nemo_lrpo.types import ScoreRequest

ShouldStop = Callable[[], bool]
"""Asked between pieces of work; True: nobody waits for the result, raise ScoringAbandoned."""

FLAG_UNREADABLE_REFERENCE = "unreadable_reference"
"""The reference is nothing that the verifier could compare with; there is no value."""


def never() -> bool:
    """A ShouldStop for work that is always wanted."""
    return False


@dataclass(frozen=True)
class Verdict:
    """`value` in [0, 1]; None where there is none to be had (a judge that does not answer, an embedding that is not
    finite): such a sample has no reward, which is not a reward of zero. measures and flags: see Score."""

    value: float | None
    measures: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


class Verifier(Protocol):
    """One part of r_qual. A new kind of verifier is one more such class and its name in rewards/build.py. May be called
    by several threads at once."""

    def verify(
        self, requests: Sequence[ScoreRequest], languages: Sequence[str], should_stop: ShouldStop = never
    ) -> list[Verdict]:
        """One verdict per request, in order; `languages` are those that the responses are written in (where that
        cannot be said, the requested ones). Responses are not empty. Raises ScoringAbandoned once `should_stop`."""

    def identity(self) -> dict[str, object]:
        """What a value depends on, JSON-able."""

    def counts(self) -> dict[str, float]:
        """Totals since construction, by `name` or `name/label`."""

    def close(self) -> None:
        """Give back threads and connections."""


@runtime_checkable
class Supervised(Protocol):
    """A verifier with a part that may die or hang."""

    def healthy(self) -> bool:
        """Whether it could verify now."""
