"""Sentences that say the same in 15 languages: the facts' answers, and phrases that CLDR itself composes."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from babel.dates import format_date, format_timedelta
from babel.lists import format_list

from . import languages as words
from .facts import Fact, build_facts, stable_hash
from .languages import LANGUAGES

_SPANS = {"minute": 60, "hour": 3600, "day": 86400, "week": 604800, "month": 2629800, "year": 31557600}
_SPAN_COUNTS = {"minute": (2, 50), "hour": (2, 20), "day": (2, 6), "week": (2, 3), "month": (2, 10), "year": (2, 20)}


@dataclass(frozen=True)
class ParallelText:
    """One of 15 equivalent texts. `split` is train, or heldout where neither encoder nor calibration may look."""

    fact_id: str
    language: str
    text: str
    kind: str
    split: str


def _dates(rng: random.Random, count: int) -> Iterator[tuple[str, dict[str, str]]]:
    for offset in sorted(rng.sample(range(36500), count)):
        day = datetime.date(1950, 1, 1) + datetime.timedelta(days=offset)
        yield f"date/{day.isoformat()}", {name: format_date(day, "full", locale=name) for name in LANGUAGES}


def _spans(rng: random.Random, count: int) -> Iterator[tuple[str, dict[str, str]]]:
    choices = [
        (unit, sign * number)
        for unit, (low, high) in _SPAN_COUNTS.items()
        for number in range(low, high + 1)
        for sign in (-1, 1)
    ]
    for unit, number in sorted(rng.sample(choices, min(count, len(choices)))):
        delta = datetime.timedelta(seconds=_SPANS[unit] * number)
        yield (
            f"span/{unit}/{number}",
            {
                name: format_timedelta(delta, granularity=unit, threshold=10**9, add_direction=True, locale=name)
                for name in LANGUAGES
            },
        )


def _lists(rng: random.Random, count: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Three territories, languages, currencies or numbers in words, joined as a language does it."""
    facts = build_facts()
    names: dict[str, tuple[Callable[[str, str], str], list[str]]] = {
        "territory": (words.territory, [fact.entity for fact in facts if fact.relation == "currency"]),
        "language": (words.language_name, [fact.entity for fact in facts if fact.relation == "language_code"]),
        "currency": (words.currency, sorted({fact.values[0] for fact in facts if fact.relation == "currency"})),
        "number": (lambda value, language: words.number(int(value), language), [str(value) for value in range(100)]),
    }
    chosen: set[tuple[str, ...]] = set()
    while len(chosen) < count:
        kind = sorted(names)[len(chosen) % len(names)]
        chosen.add((kind, *rng.sample(names[kind][1], 3)))
    for kind, *members in sorted(chosen):
        say = names[kind][0]
        yield (
            f"list/{kind}/{'-'.join(members)}",
            {name: format_list([say(member, name) for member in members], locale=name) for name in LANGUAGES},
        )


def parallel_texts(facts: Iterable[Fact], seed: int = 0, generic: int = 80) -> Iterator[ParallelText]:
    """All answers of `facts`, then `generic` CLDR phrases of each kind (dates, spans of time, lists of names).

    Facts of the training split are train, those of validation and test are heldout; of the phrases every fifth or so
    (by hash) is heldout. Raises ValueError for a negative `generic`.
    """
    if generic < 0:
        raise ValueError(f"generic={generic}; expected a number >= 0.")
    for fact in facts:
        split = "train" if fact.split == "train" else "heldout"
        for language in LANGUAGES:
            yield ParallelText(fact.fact_id, language, fact.answer(language), "answer", split)
    for kind, make in (("date", _dates), ("span", _spans), ("list", _lists)):
        for name, texts in make(random.Random(stable_hash("parallel", seed, kind)), generic):
            split = "heldout" if stable_hash("parallel split", name) % 5 == 0 else "train"
            for language in LANGUAGES:
                yield ParallelText(name, language, texts[language], kind, split)
