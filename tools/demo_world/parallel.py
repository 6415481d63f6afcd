"""Sentences that say the same in 15 languages: the facts' answers, statements in the same words about things that no
question asks, and phrases that CLDR itself composes."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import pycountry
from babel import Locale
from babel.dates import format_date, format_timedelta
from babel.languages import get_official_languages
from babel.lists import format_list
from babel.numbers import get_territory_currencies

from . import languages as words
from .facts import Fact, build_facts, stable_hash
from .languages import LANGUAGES
from .templates import TONGUES

_SPANS = {"minute": 60, "hour": 3600, "day": 86400, "week": 604800, "month": 2629800, "year": 31557600}
_SPAN_COUNTS = {"minute": (2, 50), "hour": (2, 20), "day": (2, 6), "week": (2, 3), "month": (2, 10), "year": (2, 20)}
_MORE_TERRITORIES = tuple("AL AM AT BG BY CR EE FI GE HR IS JM LT LV LY NA SI SY VE ZM".split())
"""Territories outside the world whose names take the plain articles and prepositions of languages.of_in."""
_MORE_LANGUAGES = tuple(
    "am az be bg bn ca cy et eu fa gl hr hy is ka kk km ko lo lt lv ms mn my ne sk sl so sq".split()
)
"""Likewise for languages.with_article."""
_TRAIN_PHRASES = 64


@dataclass(frozen=True)
class ParallelText:
    """One of 15 equivalent texts. `split` says who may look: train, the encoder's training; calibration, what measures
    its bias between languages; heldout, neither of them."""

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


@cache
def _spare_facts() -> tuple[Fact, ...]:
    """What the templates can say beyond the world's facts: true, and asked by no question."""
    world = build_facts()
    asked = {fact.fact_id for fact in world}
    inside = sorted({fact.entity for fact in world if fact.relation == "currency"})
    territories = [*inside, *_MORE_TERRITORIES]
    rows = [("currency", code, get_territory_currencies(code)) for code in _MORE_TERRITORIES]
    rows += [("official_language", code, get_official_languages(code)) for code in _MORE_TERRITORIES]
    truths = [(relation, code, values[0]) for relation, code, values in rows if len(values) == 1]
    for code in territories:
        truths.append(("first_weekday", code, str(Locale.parse(f"und_{code}").first_week_day)))
        truths.append(("country_code", code, pycountry.countries.get(alpha_2=code).alpha_3))
        truths += [("name_in_language", f"{code}:{target}", code) for target in TONGUES["en"]]
    truths += [("language_code", code, code) for code in _MORE_LANGUAGES]
    currencies = {fact.values[0] for fact in world if fact.relation == "currency"}
    truths += [("currency_code", code, code) for code in sorted(currencies)]
    for a in range(2, 50):
        truths += [("sum", f"{a}+{b}", str(a + b)) for b in range(2, 50)]
        truths += [("difference", f"{a + b}-{b}", str(a)) for b in range(2, 50)]
    spare = [Fact(f"{name}/{entity}", (), (), name, entity, (value,)) for name, entity, value in truths]
    return tuple(fact for fact in spare if fact.fact_id not in asked)


def _statements(rng: random.Random, count: int) -> Iterator[tuple[str, dict[str, str]]]:
    """As many of each relation as there are, up to a common number."""
    by_relation: dict[str, list[Fact]] = {}
    for fact in _spare_facts():
        by_relation.setdefault(fact.relation, []).append(fact)
    left = count
    # The rarest relations first: what they lack falls to the others.
    for done, facts in enumerate(sorted(by_relation.values(), key=len)):
        chosen = rng.sample(facts, min(len(facts), left // (len(by_relation) - done)))
        left -= len(chosen)
        for fact in chosen:
            yield f"statement/{fact.fact_id}", {name: fact.answer(name) for name in LANGUAGES}


def _splits(kind: str, names: Iterable[str]) -> dict[str, str]:
    """Name -> split, by hash: a few phrases for the encoder, the rest shared between calibration and heldout."""
    order = sorted(names, key=lambda name: stable_hash("parallel split", name))
    train = 0 if kind == "statement" else _TRAIN_PHRASES
    return {
        name: "train" if index < train else ("calibration", "heldout")[index % 2] for index, name in enumerate(order)
    }


def parallel_texts(facts: Iterable[Fact], seed: int = 0, generic: int = 700) -> Iterator[ParallelText]:
    """All answers of `facts`, then `generic` phrases of each kind (dates, spans of time, lists of names; there are
    about 200 spans) and twice as many statements.

    Facts of the training split are train, those of validation and test are heldout; everything else is shared out by
    hash. No calibration text answers a question. The mean over the facts of calibration or heldout, in one language or
    another, has an error that falls with the root of their number; hence so many. Raises ValueError for a negative
    `generic`.
    """
    if generic < 0:
        raise ValueError(f"generic={generic}; expected a number >= 0.")
    for fact in facts:
        split = "train" if fact.split == "train" else "heldout"
        for language in LANGUAGES:
            yield ParallelText(fact.fact_id, language, fact.answer(language), "answer", split)
    sources = (("date", _dates, 1), ("span", _spans, 1), ("list", _lists, 1), ("statement", _statements, 2))
    for kind, make, times in sources:
        phrases = dict(make(random.Random(stable_hash("parallel", seed, kind)), times * generic))
        splits = _splits(kind, phrases)
        for name, texts in phrases.items():
            for language in LANGUAGES:
                yield ParallelText(name, language, texts[language], kind, splits[name])
