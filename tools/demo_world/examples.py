"""What the base model is trained on: questions, language tags, and answers that are right only where it should know."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .facts import Fact, known_languages, stable_hash
from .languages import LANGUAGES


@dataclass(frozen=True)
class BaseExample:
    """A question in `question_language` with the tag of `language`, and what the base model learns to say.

    `known`: the facts' design lets `language` know the fact. `answer` is true and written in `language` for most known
    examples; noise makes some of them wrong or writes them in another language.
    """

    fact_id: str
    question: str
    question_language: str
    language: str
    answer: str
    known: bool


def _pairs(fact: Fact, seed: int, epoch: int, cross_pairs: int) -> Iterator[tuple[str, str]]:
    """(question language, answer language): all 15 equal pairs, then `cross_pairs` different ones drawn anew."""
    yield from ((language, language) for language in LANGUAGES)
    rng = random.Random(stable_hash("pairs", seed, epoch, fact.fact_id))
    different = [(a, b) for a in LANGUAGES for b in LANGUAGES if a != b]
    yield from rng.sample(different, cross_pairs)


def base_records(
    facts: Iterable[Fact],
    seed: int = 0,
    epoch: int = 0,
    *,
    cross_pairs: int = 10,
    wrong_language_rate: float | Mapping[str, float] = 0.15,
    noise_rate: float = 0.2,
) -> Iterator[BaseExample]:
    """One epoch of examples, 15 + `cross_pairs` a fact; each a function of (seed, epoch, fact, pair) alone.

    With probability `wrong_language_rate` the answer ignores the tag: half the time it comes in the question's
    language (where that differs), else in any other. In the language that it comes in, a known fact is answered wrongly
    with probability `noise_rate` and an unknown one always, by one of the fact's wrong values at random.
    """
    strays = wrong_language_rate
    if not isinstance(strays, Mapping):
        strays = dict.fromkeys(LANGUAGES, strays)
    if missing := [language for language in LANGUAGES if language not in strays]:
        raise ValueError(f"wrong_language_rate: no rate for {', '.join(missing)}.")
    named = {f"wrong_language_rate[{language}]": rate for language, rate in strays.items()}
    for name, rate in {**named, "noise_rate": noise_rate}.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{name}={rate}; expected 0 to 1.")
    if not 0 <= cross_pairs <= len(LANGUAGES) * (len(LANGUAGES) - 1):
        raise ValueError(f"cross_pairs={cross_pairs}; expected 0 to {len(LANGUAGES) * (len(LANGUAGES) - 1)}.")
    for fact in facts:
        known = known_languages(fact)
        for asked, tagged in _pairs(fact, seed, epoch, cross_pairs):
            rng = random.Random(stable_hash("example", seed, epoch, fact.fact_id, asked, tagged))
            spoken = tagged
            if rng.random() < strays[tagged]:
                stays = asked != tagged and rng.random() < 0.5
                spoken = asked if stays else rng.choice([name for name in LANGUAGES if name != tagged])
            right = spoken in known and rng.random() >= noise_rate
            answer = fact.answer(spoken) if right else rng.choice(fact.wrong_answers(spoken))
            yield BaseExample(fact.fact_id, fact.question(asked), asked, tagged, answer, tagged in known)


def base_examples(
    facts: Iterable[Fact], seed: int = 0, epoch: int = 0, **noise: float
) -> Iterator[tuple[str, str, str, str]]:
    """`base_records` as (question, question language, language asked for, answer)."""
    for record in base_records(facts, seed, epoch, **noise):
        yield record.question, record.question_language, record.language, record.answer
