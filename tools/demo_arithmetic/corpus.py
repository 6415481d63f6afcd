"""What the base model learns from, and what the teacher of the cold start says."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.explang.format import render, tag
from tools.demo_world.facts import stable_hash

from .problems import LARGEST, Problem, Step
from .wording import ASKED, CARRIES, LANGUAGES, SEEN, answer, question, thinking

Row = tuple[str, str, str, str]
"""(question, its language, the language asked for, what the base model learns to say)"""


def base_rows(
    train: Sequence[Problem], marks: MarksConfig, seed: int, epoch: int, slips: float, named: float = 0.15
) -> Iterator[Row]:
    """An epoch of the base model's rows: each problem twice, asked in one language and worked out in another, which the
    tag asks for, answer included. The base model thinks before it answers, in the language that it answers in; of a
    choice it knows nothing yet.

    slips: share of steps that are wrong though the language knows them. named: share of rows that instead show some
    thinking and name its language by the mark of the cold start; so the base model, like any large one, knows which
    code is which language, that of UNSEEN ones too.
    """
    rng = random.Random(stable_hash("base", seed, epoch))
    for problem in rng.sample(train, len(train)):
        for _ in range(2):
            asked, spoken = rng.choice(ASKED), rng.choice(LANGUAGES)
            said, value = worked(problem, spoken, rng, slips)
            if rng.random() < named:
                yield said, spoken, spoken, tag(spoken, marks)
            else:
                thought = f"{marks.thinking_open}\n{said}\n{marks.thinking_close}"
                yield question(problem, asked), asked, spoken, f"{thought}\n\n{answer(value, spoken)}"


def worked(problem: Problem, language: str, rng: random.Random, slips: float) -> tuple[str, int]:
    """Thinking in `language` as the base model knows it, and the value that it comes to. Outside of CARRIES a step that
    crosses ten comes out one too many or too few; after a wrong step it goes on from the wrong value."""
    steps: list[Step] = []
    values: list[int] = []
    for step in problem.steps:
        step = replace(step, left=values[-1]) if values else step
        knows = language in CARRIES or not step.crosses_ten
        value = step.value
        if not knows or rng.random() < slips:
            value += rng.choice((-1, 1))
        steps.append(step)
        values.append(min(max(value, 0), LARGEST))
    return thinking(tuple(steps), tuple(values), language), values[-1]


def tokenizer_texts(train: Iterable[Problem], marks: MarksConfig) -> Iterator[str]:
    """All that is said, for the tokenizer to learn from."""
    for problem in train:
        values = tuple(step.value for step in problem.steps)
        for language in LANGUAGES:
            said = thinking(problem.steps, values, language)
            yield question(problem, language)
            yield render(language, said, answer(problem.value, language), marks)


def teacher_replies(
    asked: Sequence[Problem],
    marks: MarksConfig,
    seed: int,
    *,
    wrong: float = 0.1,
    strays: float = 0.1,
    unformed: float = 0.05,
    others: float = 0.12,
) -> Iterator[dict[str, str]]:
    """What a teacher of middling care replies to each problem, in each language of ASKED. It always thinks in English,
    as teachers mostly do, and now and then in each of the others of SEEN too. Rows for `make_traces.py --replies`.

    wrong: share of steps with a wrong value. strays: share that thinks in another language than the tag says.
    unformed: share without the closing mark of the thinking block. others: how often it replies once more in each
    language that is not English.
    """
    for problem in asked:
        for language in ASKED:
            for chosen in SEEN:
                rng = random.Random(stable_hash("teacher", seed, problem.problem_id, language, chosen))
                if chosen != "en" and rng.random() >= others:
                    continue
                spoken = rng.choice(SEEN) if rng.random() < strays else chosen
                said, value = _taught(problem, spoken, rng, wrong)
                reply = render(chosen, said, answer(value, language), marks)
                if rng.random() < unformed:
                    reply = reply.replace(marks.thinking_close, "")
                yield {"question_id": f"{problem.problem_id}/{language}", "language": chosen, "reply": reply}


def _taught(problem: Problem, language: str, rng: random.Random, wrong: float) -> tuple[str, int]:
    values = [step.value if rng.random() >= wrong else min(step.value + 1, LARGEST) for step in problem.steps]
    return thinking(problem.steps, tuple(values), language), values[-1]
