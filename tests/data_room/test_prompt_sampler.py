"""Every question once an epoch, none twice a step, and a resumed run that goes on as if never stopped."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.data.sampler import PromptSampler, SamplerStateError
from nemo_lrpo.types import Prompt


def questions(count: int) -> list[Prompt]:
    return [Prompt(f"q{i}", f"Frage {i}?", "Antwort.", "de", "de", ("General Knowledge",)) for i in range(count)]


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.question_id for prompt in prompts]


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    count = draw(st.integers(1, 40))
    return count, draw(st.integers(1, count))


@given(size=sizes(), steps=st.integers(1, 30), seed=st.integers(0, 9), shuffle=st.booleans())
def test_epochs_are_complete_and_steps_without_repetition(
    size: tuple[int, int], steps: int, seed: int, shuffle: bool
) -> None:
    count, per_step = size
    sampler = PromptSampler(questions(count), per_step, seed, shuffle)
    asked: Counter[str] = Counter()
    for step in range(1, steps + 1):
        drawn = ids(sampler.next())
        assert len(drawn) == len(set(drawn)) == per_step
        asked.update(drawn)
        assert sampler.epoch == step * per_step // count
        assert sampler.state_dict()["consumed"] == step * per_step
        # No question may be ahead of another by more than the pass that has begun.
        passes = [asked[f"q{i}"] for i in range(count)]
        assert min(passes) >= sampler.epoch and max(passes) <= sampler.epoch + 1


@given(size=sizes(), before=st.integers(0, 20), after=st.integers(1, 20), shuffle=st.booleans())
def test_resume_equals_continuing(size: tuple[int, int], before: int, after: int, shuffle: bool) -> None:
    count, per_step = size
    original = PromptSampler(questions(count), per_step, 3, shuffle)
    for _ in range(before):
        original.next()
    resumed = PromptSampler(questions(count), per_step, 3, shuffle)
    resumed.load_state_dict(json.loads(json.dumps(original.state_dict())))
    for _ in range(after):
        assert resumed.next() == original.next()
        assert resumed.state_dict() == original.state_dict()


@given(size=sizes(), other=st.integers(1, 40), before=st.integers(0, 12))
def test_resume_with_another_step_size_keeps_epochs_complete(size: tuple[int, int], other: int, before: int) -> None:
    count, per_step = size
    other = min(other, count)
    first = PromptSampler(questions(count), per_step, 3)
    asked: Counter[str] = Counter()
    for _ in range(before):
        asked.update(ids(first.next()))
    second = PromptSampler(questions(count), other, 3)
    second.load_state_dict(first.state_dict())
    for _ in range(count):
        drawn = ids(second.next())
        assert len(set(drawn)) == other
        asked.update(drawn)
        passes = [asked[f"q{i}"] for i in range(count)]
        assert min(passes) >= second.epoch and max(passes) <= second.epoch + 1


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def epoch_orders(seed: int, prompts: list[Prompt]) -> list[list[str]]:
        sampler = PromptSampler(prompts, 20, seed)
        return [ids(sampler.next()) for _ in range(3)]

    orders = epoch_orders(1, questions(20))
    assert orders == epoch_orders(1, questions(20)) == epoch_orders(1, questions(20)[::-1])
    assert orders[0] != orders[1] != orders[2] and orders != epoch_orders(2, questions(20))
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_without_shuffling_the_tail_is_filled_from_the_start() -> None:
    sampler = PromptSampler(questions(5), 3, 0, shuffle=False)
    assert [ids(sampler.next()) for _ in range(5)] == [
        ["q0", "q1", "q2"],
        ["q3", "q4", "q0"],
        ["q1", "q2", "q3"],
        ["q4", "q0", "q1"],
        ["q2", "q3", "q4"],
    ]


def test_a_question_already_in_the_step_waits_for_the_next_one() -> None:
    """Seven questions, five a step: the second step holds two of epoch 0 and must pass over them in epoch 1."""
    prompts = questions(7)
    seed = next(s for s in range(100) if _passed_over(prompts, s))
    sampler = PromptSampler(prompts, 5, seed)
    sampler.next()
    second = ids(sampler.next())
    waiting = sampler.state_dict()["passed_over"]
    assert waiting and set(waiting) <= set(second[:2])
    assert ids(sampler.next())[: len(waiting)] == waiting


def _passed_over(prompts: list[Prompt], seed: int) -> list[str]:
    sampler = PromptSampler(prompts, 5, seed)
    sampler.next()
    sampler.next()
    return sampler.state_dict()["passed_over"]


@pytest.mark.parametrize(
    ("prompts", "seed", "shuffle", "part"),
    [
        (questions(9), 3, True, "questions=8 was saved, this run has 9"),
        ([dataclasses.replace(questions(8)[0], question="Andere Frage?"), *questions(8)[1:]], 3, True, "fingerprint"),
        (questions(8), 4, True, "seed=3 was saved, this run has 4"),
        (questions(8), 3, False, "shuffle=True"),
    ],
)
def test_another_data_set_is_refused(prompts: list[Prompt], seed: int, shuffle: bool, part: str) -> None:
    saved = PromptSampler(questions(8), 3, 3).state_dict()
    with pytest.raises(SamplerStateError, match=part):
        PromptSampler(prompts, 3, seed, shuffle).load_state_dict(saved)


@pytest.mark.parametrize(
    "damage",
    [
        {"position": 9},
        {"position": 5},
        {"epoch": -1},
        {"consumed": 7},
        {"epoch": "0"},
        {"passed_over": None},
        {"passed_over": [["q1"]]},
        {"passed_over": ["q1", "q1"], "position": 8},
        {"passed_over": ["stranger"], "position": 7},
        {"version": 0},
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: dict[str, Any]) -> None:
    sampler = PromptSampler(questions(8), 3, 3)
    sampler.next()
    sampler.next()
    before = sampler.state_dict()
    with pytest.raises(SamplerStateError, match="data position"):
        sampler.load_state_dict({**before, **damage})
    assert sampler.state_dict() == before
    for part in before:
        with pytest.raises(SamplerStateError, match=part):
            sampler.load_state_dict({name: value for name, value in before.items() if name != part})


@pytest.mark.parametrize("per_step", [0, 9])
def test_a_step_larger_than_the_data_set(per_step: int) -> None:
    with pytest.raises(ConfigError, match=rf"prompts_per_step={per_step} with 8 questions"):
        PromptSampler(questions(8), per_step, 0)


def test_repeated_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="1 question ids occur more than once"):
        PromptSampler([*questions(3), questions(1)[0]], 2, 0)
