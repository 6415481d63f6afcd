"""The world of spelled arithmetic: true, told apart by language, and without leaks between its splits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.config.scoring import LanguageIdConfig, VerifierConfig
from nemo_lrpo.data.reader import read_prompts
from nemo_lrpo.explang.format import parse
from nemo_lrpo.rewards.language import LanguageIdentifier
from nemo_lrpo.rewards.numeric import NumericVerifier
from nemo_lrpo.types import ScoreRequest
from tools.build_arithmetic import main
from tools.demo_arithmetic import (
    ASKED,
    CARRIES,
    LANGUAGES,
    SEEN,
    SPLITS,
    UNSEEN,
    Problem,
    answer,
    base_rows,
    problems,
    question,
    teacher_replies,
    thinking,
)

MARKS = MarksConfig()


@pytest.fixture(scope="module")
def world() -> tuple[Problem, ...]:
    return problems()


def values(problem: Problem) -> tuple[int, ...]:
    return tuple(step.value for step in problem.steps)


def test_values_are_those_of_the_expression(world: tuple[Problem, ...]) -> None:
    assert all(eval(problem.problem_id) == problem.value for problem in world)
    assert all(0 <= value <= 12 for problem in world for value in values(problem))


def test_no_problem_is_in_two_splits_and_no_result_is_worth_guessing(world: tuple[Problem, ...]) -> None:
    assert Counter(problem.split for problem in world) == SPLITS
    assert len({problem.problem_id for problem in world}) == len(world)
    assert max(Counter(problem.value for problem in world).values()) <= len(world) / 10
    assert problems(1) != world and problems() == world


def test_sentences() -> None:
    problem = next(one for one in problems() if len({step.sign for step in one.steps}) == 2)
    small = Problem(8, ((1, 4), (-1, 5)), "train")
    assert problem.steps[1].left == problem.steps[0].value
    assert question(small, "en") == "What is eight plus four minus five?"
    assert question(small, "ja") == "八足す四引く五はいくつですか。"
    assert thinking(small.steps, values(small), "de") == (
        "Acht plus vier ist gleich zwölf. Zwölf minus fünf ist gleich sieben."
    )


def test_thinking_is_in_the_language_that_it_is_in(world: tuple[Problem, ...]) -> None:
    """By the identifier that rewards go by; else the cold start would reject what is right."""
    identifier = LanguageIdentifier(LanguageIdConfig(), LANGUAGES)
    for language in LANGUAGES:
        texts = [thinking(one.steps, values(one), language) for one in world if one.split == "validation"]
        found = Counter(one.language for one in identifier.identify(texts))
        assert found[language] >= 0.98 * len(texts), (language, found)


def test_answers_are_verified_by_their_number() -> None:
    verifier = NumericVerifier(VerifierConfig(kind="numeric"), "verifiers.math")
    for language in LANGUAGES:
        for value in (0, 7, 11, 12):
            requests = [ScoreRequest("1/q/0", answer(value, language), str(n), language, language) for n in (7, value)]
            verdicts = verifier.verify(requests, [language] * 2)
            assert [one.value for one in verdicts] == [float(value == 7), 1.0]


def test_the_base_model_is_one_out_where_it_cannot_carry(world: tuple[Problem, ...]) -> None:
    train = [problem for problem in world if problem.split == "train"]
    by_question = {question(problem, language): problem for problem in train for language in ASKED}
    right: Counter[tuple[bool, bool]] = Counter()
    named = 0
    for text, asked, spoken, said in base_rows(train, MARKS, seed=0, epoch=0, slips=0.0):
        if said.startswith(MARKS.language_open):
            assert said == f"<lang_select>{spoken}</lang_select>"
            named += 1
            continue
        problem = by_question[text]
        assert asked in ASKED
        knows = spoken in CARRIES or not any(step.crosses_ten for step in problem.steps)
        right[knows, said.endswith(answer(problem.value, spoken))] += 1
    assert right[True, True] > 100 and right[True, False] == 0
    # Two errors may make up for each other.
    assert right[False, False] > 100 and right[False, True] < 0.4 * right[False, False]
    assert 0.1 < named / (2 * len(train)) < 0.2


def test_the_teacher_errs_in_every_way(world: tuple[Problem, ...]) -> None:
    rows = list(teacher_replies(world[:20], MARKS, 0))
    thought_in = Counter(row["language"] for row in rows)
    assert thought_in["en"] == 20 * len(ASKED) and set(SEEN) | set(UNSEEN) == set(LANGUAGES)
    assert set(thought_in) == set(SEEN) and sum(thought_in.values()) < 3 * thought_in["en"]
    parsed = [parse(row["reply"], MARKS, SEEN) for row in rows]
    broken = sum(one.defect is not None for one in parsed)
    assert 0.02 < broken / len(rows) < 0.09
    assert all(one.language == row["language"] for one, row in zip(parsed, rows))


def test_files_are_read_as_questions_and_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        assert main(["--out", str(tmp_path / name), "--taught", "3", "--steps", "0"]) == 0
    for name in (*(f"{split}.parquet" for split in SPLITS), "replies.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    prompts = {split: read_prompts(tmp_path / "a" / f"{split}.parquet", ASKED) for split in SPLITS}
    assert {split: len(rows) for split, rows in prompts.items()} == {s: n * len(ASKED) for s, n in SPLITS.items()}
    asked = {split: {prompt.question for prompt in rows} for split, rows in prompts.items()}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]
    taught = {json.loads(line)["question_id"] for line in (tmp_path / "a/replies.jsonl").open(encoding="utf-8")}
    assert taught <= {prompt.question_id for prompt in prompts["train"]} and len(taught) == 3 * len(ASKED)
    easy = {problem.problem_id for problem in problems() if not any(step.crosses_ten for step in problem.steps)}
    assert {question_id.rpartition("/")[0] for question_id in taught} <= easy
