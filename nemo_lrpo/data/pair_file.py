"""Preference pairs in a file: a line each, as tools/make_pairs.py writes them.

    question_id, question, question_language, language
    chosen, rejected      each sample_id, response, reward (a number or null)
    margin                how far they lie apart
    dominant              null, or language, chosen, rejected and margin of the dominant language's pair

Other fields are passed over. What is bad is refused by file, line and field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.languages import LANGUAGES
from nemo_lrpo.data.pairs import PreferencePair, RatedAnswer
from nemo_lrpo.data.rows import Row, json_lines, kind_of
from nemo_lrpo.seeding import derive_seed


def pair_record(pair: PreferencePair) -> dict[str, Any]:
    """A line of the file."""
    chosen = pair.chosen
    return {
        "question_id": chosen.question_id,
        "question": chosen.question,
        "question_language": chosen.question_language,
        "language": chosen.language,
        **_sides(pair),
        "dominant": pair.dominant and {"language": pair.dominant.chosen.language, **_sides(pair.dominant)},
    }


def read_pairs(path: Path, needs_dominant: bool = False) -> list[PreferencePair]:
    """The pairs of a file, in its order. needs_dominant: every one has a pair of the dominant language.

    Raises DataError at the first bad line; for a pair that occurs twice, a sample id with two responses, and a file
    without pairs.
    """
    seen: dict[str, str] = {}
    answers: dict[str, tuple[RatedAnswer, str]] = {}
    pairs = []
    for where, fields in json_lines(path):
        row = Row(where, fields)
        pair = _pair(row, needs_dominant)
        if pair.pair_id in seen:
            raise DataError(f"{where}: the pair {pair.pair_id} occurred before, in {seen[pair.pair_id]}.")
        seen[pair.pair_id] = where
        for answer in answers_of(pair):
            before, there = answers.setdefault(answer.sample_id, (answer, where))
            if (before.question, before.language, before.response) != (
                answer.question,
                answer.language,
                answer.response,
            ):
                raise DataError(
                    f"{where}: sample_id={answer.sample_id!r} has another question, language or response in {there}."
                )
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{path}: has no pairs; tools/make_pairs.py makes them of a run's rollouts.")
    return pairs


def answers_of(pair: PreferencePair) -> tuple[RatedAnswer, ...]:
    """Chosen, rejected, and those of the dominant language where it has them."""
    own = (pair.chosen, pair.rejected)
    return own if pair.dominant is None else (*own, pair.dominant.chosen, pair.dominant.rejected)


def hold_out(
    pairs: Iterable[PreferencePair], share: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(pairs to train on, pairs held out), each in the given order.

    A question is on one side with all its pairs; on which, is a function of (seed, question id).
    """
    sides: tuple[list[PreferencePair], list[PreferencePair]] = [], []
    for pair in pairs:
        sides[derive_seed("held out", seed, pair.chosen.question_id) < share * 2**64].append(pair)
    return sides


def languages_of(pairs: Sequence[PreferencePair]) -> list[str]:
    """Codes of the languages that the pairs are in, sorted."""
    return sorted({pair.chosen.language for pair in pairs})


def _sides(pair: PreferencePair) -> dict[str, Any]:
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    named = {
        name: {"sample_id": side.sample_id, "response": side.response, "reward": side.reward}
        for name, side in sides.items()
    }
    return {**named, "margin": pair.margin}


def _pair(row: Row, needs_dominant: bool) -> PreferencePair:
    facts = {name: row.required_text(name) for name in ("question_id", "question", "question_language")}
    pair = _two(row, "", facts, _language(row, "language"))
    if row.get("dominant") is None:
        if needs_dominant:
            row.refuse(
                "dominant", "is null; method.loss=reward_gap needs the dominant language's pair (make_pairs --kind mpo)"
            )
        return pair
    dominant = _two(row, "dominant.", facts, _language(row, "dominant.language"))
    return PreferencePair(pair.chosen, pair.rejected, pair.margin, dominant)


def _two(row: Row, prefix: str, facts: dict[str, str], language: str) -> PreferencePair:
    chosen, rejected = (_answer(row, f"{prefix}{side}", facts, language) for side in ("chosen", "rejected"))
    if chosen.sample_id == rejected.sample_id or chosen.response == rejected.response:
        row.refuse(f"{prefix}rejected", "is the chosen answer; a pair has two")
    margin = row.required(f"{prefix}margin")
    return PreferencePair(chosen, rejected, _number(row, f"{prefix}margin", margin))


def _answer(row: Row, side: str, facts: dict[str, str], language: str) -> RatedAnswer:
    response, reward = row.required(f"{side}.response"), row.get(f"{side}.reward")
    if not isinstance(response, str):
        row.refuse(f"{side}.response", f"is {kind_of(response)}; accepted: text")
    if response.strip():
        row.text(f"{side}.response", response)
    return RatedAnswer(
        sample_id=row.required_text(f"{side}.sample_id"),
        **facts,
        language=language,
        response=response,
        reward=None if reward is None else _number(row, f"{side}.reward", reward),
        ended=True,
    )


def _language(row: Row, field: str) -> str:
    language = row.required_text(field)
    if language not in LANGUAGES:
        row.refuse(field, f"is {language!r}; accepted: an ISO 639-1 code such as {', '.join(list(LANGUAGES)[:3])}")
    return language


def _number(row: Row, field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        row.refuse(field, f"is {kind_of(value)}; accepted: a number")
    if not math.isfinite(value):
        row.refuse(field, f"is {value}; accepted: a finite number")
    return float(value)
