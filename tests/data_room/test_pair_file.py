"""Files of preference pairs: what was written is read, what is bad is named, questions are held out whole."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.pair_file import answers_of, hold_out, languages_of, pair_record, read_pairs
from nemo_lrpo.data.pairs import PreferencePair, RatedAnswer


def answer(question: str, language: str, slot: int, response: str | None = None) -> RatedAnswer:
    name, text = f"3/{question}/{slot}", f"{language} {slot} of {question}\u2028" if response is None else response
    return RatedAnswer(name, question, f"Was ist {question}?", "de", language, text, slot / 8, True)


def pair(question: str, language: str, slot: int, dominant: bool = False) -> PreferencePair:
    own = PreferencePair(answer(question, language, slot + 1), answer(question, language, slot), 0.125)
    if not dominant:
        return own
    english = PreferencePair(answer(question, "en", 7), answer(question, "en", 6, ""), 0.25)
    return PreferencePair(own.chosen, own.rejected, own.margin, english)


PAIRS = [pair("q1", "de", 0, dominant=True), pair("q1", "ja", 2, dominant=True), pair("q2", "de", 0)]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [pair_record(one) for one in PAIRS])
    assert read_pairs(path) == PAIRS and languages_of(PAIRS) == ["de", "ja"]
    assert [answer.sample_id for answer in answers_of(PAIRS[1])] == ["3/q1/3", "3/q1/2", "3/q1/7", "3/q1/6"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("question", None, ["question is missing"]),
        ("language", "Klingon", ["language is 'Klingon'", "de"]),
        ("dominant.language", "xx", ["dominant.language is 'xx'"]),
        ("chosen.response", None, ["chosen.response is missing"]),
        ("rejected.response", 3, ["rejected.response is a whole number", "text"]),
        ("rejected.response", "de 1 of q1\u2028", ["rejected is the chosen answer"]),
        ("rejected.sample_id", "3/q1/1", ["rejected is the chosen answer"]),
        ("chosen.reward", True, ["chosen.reward is true or false"]),
        ("margin", "wide", ["margin is text"]),
        ("margin", math.nan, ["margin is nan", "finite"]),
        ("dominant", None, ["dominant is null", "--kind mpo"]),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, field: str, value: object, words: list[str]) -> None:
    records = [pair_record(PAIRS[1]), copy.deepcopy(pair_record(PAIRS[0]))]
    *parents, last = field.split(".")
    node = records[1]
    for name in parents:
        node = node[name]
    node[last] = value
    path = write(tmp_path / "pairs.jsonl", records)
    with pytest.raises(DataError) as refused:
        read_pairs(path, needs_dominant=True)
    for word in [f"{path}, line 2: ", *words]:
        assert word in str(refused.value)


def test_pairs_and_sample_ids_are_there_once(tmp_path: Path) -> None:
    first, other = pair_record(PAIRS[2]), pair_record(PAIRS[2])
    with pytest.raises(DataError, match=r"line 2: the pair 3/q2/1 > 3/q2/0 occurred before, in .*line 1"):
        read_pairs(write(tmp_path / "twice.jsonl", [first, other]))
    other["chosen"] = {**other["chosen"], "sample_id": "3/q2/5"}
    other["rejected"] = {**other["rejected"], "response": "another"}
    with pytest.raises(DataError, match=r"line 2: sample_id='3/q2/0' has another question, language or response"):
        read_pairs(write(tmp_path / "two_texts.jsonl", [first, other]))
    with pytest.raises(DataError, match="has no pairs"):
        read_pairs(write(tmp_path / "none.jsonl", []))


@settings(max_examples=20)
@given(share=st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.95]), seed=st.integers(0, 2**31))
def test_a_question_is_held_out_with_all_its_pairs(share: float, seed: int) -> None:
    pairs = [pair(f"q{number}", language, 0) for number in range(200) for language in ("de", "ja")]
    train, held = hold_out(pairs, share, seed)
    assert sorted([*train, *held], key=pairs.index) == pairs
    assert not {one.chosen.question_id for one in train} & {one.chosen.question_id for one in held}
    # Five standard deviations of 200 draws.
    assert abs(len(held) / 400 - share) <= 5 * math.sqrt(share * (1 - share) / 200)
    assert hold_out(reversed(pairs), share, seed)[1] == held[::-1]
