"""Advantages against values computed by hand, and the identities that define each scaling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemo_lrpo.algorithms.advantages import SCALINGS, group_advantages
from nemo_lrpo.types import Prompt, RoutedPrompt


def advantages(rewards, groups, valid=None, scaling="std", eps=1e-6, dtype=torch.float64):
    rewards = torch.tensor(rewards, dtype=dtype)
    valid = torch.ones(len(rewards), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return group_advantages(rewards, torch.tensor(groups), valid, scaling, eps)


batches = st.lists(
    st.tuples(st.floats(-1, 1, width=32), st.integers(0, 3), st.booleans()), min_size=1, max_size=24
).map(lambda rows: [list(column) for column in zip(*rows)])


def test_two_groups_by_hand() -> None:
    result, groups = advantages([0.0, 1.0, 0.5, 0.2, 0.2, 0.8], [7, 7, 7, 3, 3, 3], eps=0.1)
    first, second = 0.5, math.sqrt(0.12)
    expected = [-0.5 / (first + 0.1), 0.5 / (first + 0.1), 0.0]
    expected += [-0.2 / (second + 0.1), -0.2 / (second + 0.1), 0.4 / (second + 0.1)]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))
    assert groups.index.tolist() == [3, 7] and groups.count.tolist() == [3, 3]
    assert groups.mean.tolist() == pytest.approx([0.4, 0.5]) and groups.std.tolist() == pytest.approx([second, first])
    assert not groups.zero_variance.any() and not groups.undersized.any()


def test_three_languages_of_one_question_make_one_group() -> None:
    """Groups come from the question and step; the language, and with it the prompt's text, plays no part."""
    questions = [Prompt(f"q{i}", "?", "!", "de", "en", ("Chat",)) for i in range(2)]
    routed = [
        RoutedPrompt(question, 4, slot, language, "drawn", 0.3)
        for question in questions
        for slot, language in enumerate(("de", "ja", "en"))
    ]
    number = {name: i for i, name in enumerate(dict.fromkeys(r.group_id for r in routed))}
    result, groups = advantages([0.0, 0.5, 1.0, 0.3, 0.3, 0.9], [number[r.group_id] for r in routed], scaling="mean")
    assert groups.count.tolist() == [3, 3]
    assert result.tolist() == pytest.approx([-0.5, 0.0, 0.5, -0.2, -0.2, 0.4])


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("value", [0.1, 0.7, 1e-3, 0.9123456])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_variance_is_exactly_zero(scaling: str, value: float, dtype: torch.dtype) -> None:
    """Seven equal rewards: their mean rounds, and dividing that by eps must not become an advantage."""
    result, groups = advantages([value] * 7 + [0.0, 1.0], [0] * 7 + [1] * 2, scaling=scaling, eps=1e-12, dtype=dtype)
    assert result[:7].tolist() == [0.0] * 7 and (result[7:] != 0).all()
    assert groups.zero_variance.tolist() == [True, False] and groups.std[0] == 0.0


@pytest.mark.parametrize("scaling", SCALINGS)
def test_small_and_empty_groups_are_zero(scaling: str) -> None:
    rewards, valid = [0.9, 0.1, 0.4, 0.6, math.nan], [True, True, False, False, False]
    result, groups = advantages(rewards, [0, 1, 1, 2, 2], valid, scaling)
    assert result.tolist() == [0.0] * 5
    assert groups.undersized.tolist() == [True] * 3 and groups.count.tolist() == [1, 1, 0]
    assert groups.mean.tolist() == [0.9, 0.1, 0.0] and groups.std.tolist() == [0.0] * 3
    assert not groups.zero_variance.any()


@given(batch=batches, scaling=st.sampled_from(SCALINGS), junk=st.sampled_from([math.nan, math.inf, 1e30]))
@settings(max_examples=60, deadline=None)
def test_invalid_rows_have_no_influence(batch, scaling, junk) -> None:
    rewards, groups, valid = batch
    full, _ = advantages([r if v else junk for r, v in zip(rewards, valid)], groups, valid, scaling)
    assert all(a == 0.0 for a, v in zip(full.tolist(), valid) if not v)
    kept = [i for i, v in enumerate(valid) if v]
    if kept:
        alone, _ = advantages([rewards[i] for i in kept], [groups[i] for i in kept], None, scaling)
        torch.testing.assert_close(full[kept], alone, rtol=1e-9, atol=1e-12)


@given(batch=batches, scaling=st.sampled_from(SCALINGS), data=st.data())
@settings(max_examples=60, deadline=None)
def test_permutation_and_relabelling_change_nothing(batch, scaling, data) -> None:
    rewards, groups, valid = batch
    order = data.draw(st.permutations(range(len(rewards))))
    straight, _ = advantages(rewards, groups, valid, scaling, eps=1e-3)
    permuted, _ = advantages(
        [rewards[i] for i in order], [5 - 9 * groups[i] for i in order], [valid[i] for i in order], scaling, eps=1e-3
    )
    torch.testing.assert_close(permuted, straight[order], rtol=1e-9, atol=1e-12)


@given(batch=batches)
@example(batch=[[0.0, 0.0, 0.0, 1.0], [0] * 4, [True] * 4])
@settings(max_examples=60, deadline=None)
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(batch) -> None:
    rewards, groups, valid = batch
    result, _ = advantages(rewards, groups, valid, "leave_one_out")
    for i, value in enumerate(result.tolist()):
        others = [r for j, r in enumerate(rewards) if j != i and groups[j] == groups[i] and valid[j]]
        expected = rewards[i] - sum(others) / len(others) if valid[i] and others else 0.0
        assert value == pytest.approx(expected, abs=1e-12)


def test_std_is_invariant_to_scale_and_shift_but_mean_is_not() -> None:
    rewards = [0.1, 0.5, 0.9, 0.3]
    moved = [3.0 * r + 2.0 for r in rewards]
    for scaling, same in (("std", True), ("mean", False)):
        one, other = (advantages(r, [0] * 4, scaling=scaling, eps=1e-12)[0] for r in (rewards, moved))
        assert torch.allclose(one, other, atol=1e-9) is same


def test_dtype_of_the_rewards_is_kept() -> None:
    result, groups = advantages([0.0, 1.0], [0, 0], dtype=torch.float32)
    assert result.dtype == torch.float32 and groups.mean.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0, math.nan], [0, 0]), r"rows \[1\] are not finite"),
        (([0.0, 1.0], [0, 0], None, "sd"), r"scaling='sd'.*accepted: std, mean, leave_one_out"),
        (([0.0, 1.0], [0]), r"one shape"),
    ],
)
def test_refusals(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        advantages(*arguments)
