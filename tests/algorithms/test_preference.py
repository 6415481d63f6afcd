"""Pair losses against closed forms, and what the policy's update makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lrpo.algorithms.loss import aggregation_weights, grpo_loss
from nemo_lrpo.algorithms.preference import (
    PairLoss,
    dpo_loss,
    dpo_slopes,
    pair_weights,
    reward_gap_loss,
    reward_gap_slopes,
    row_advantages,
    sequence_logprobs,
)

SEEDS = st.integers(0, 2**31)
LOSSES = ("dpo", "gap")


def normal(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def columns(seed: int, pairs: int = 5) -> list[torch.Tensor]:
    """Chosen and rejected under the policy, with gradient, then under the initial one."""
    chosen, rejected, ref_chosen, ref_rejected = normal(seed, 4, pairs) - 20.0
    return [chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected]


def all_used(pairs: int = 5) -> torch.Tensor:
    return pair_weights(torch.ones(pairs, dtype=torch.bool), pairs).double()


def loss_of(kind: str, given: list[torch.Tensor], weights: torch.Tensor, beta: float = 0.3) -> PairLoss:
    if kind == "dpo":
        return dpo_loss(*given, weights, beta=beta, label_smoothing=0.1)
    return reward_gap_loss(*given[:3], weights, beta=beta)


# --- values and gradients ----------------------------------------------------------------------------------------


def test_dpo_by_hand() -> None:
    """beta 0.5, h = 0.5 ((-4 + 5) - (-6 + 3)) = 2."""
    values = [torch.tensor([x], dtype=torch.float64, requires_grad=x > -5.0) for x in (-4.0, -6.0, -5.0, -3.0)]
    result = dpo_loss(*values, all_used(1), beta=0.5)
    assert result.loss.item() == pytest.approx(math.log(1.0 + math.exp(-2.0)))
    assert result.metrics["margin"].item() == pytest.approx(2.0)
    slope = torch.autograd.grad(result.loss, values[0])[0].item()
    assert slope == pytest.approx(-0.5 / (1.0 + math.exp(2.0))) and result.slopes.item() == pytest.approx(slope)


def test_reward_gap_by_hand() -> None:
    """beta 1.5, gap -0.5 + 0.9 = 0.4, target 1: (0.6 - 1)^2, slope 2 * 1.5 * (0.6 - 1)."""
    chosen, rejected, target = (torch.tensor([x], dtype=torch.float64) for x in (-0.5, -0.9, 1.0))
    result = reward_gap_loss(chosen, rejected, target, all_used(1), beta=1.5)
    assert result.loss.item() == pytest.approx(0.16) and result.slopes.item() == pytest.approx(-1.2)


@pytest.mark.parametrize("kind", LOSSES)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_slopes_are_the_gradient_and_the_gradient_that_of_finite_differences(kind: str, seed: int) -> None:
    given_columns, weights = columns(seed), all_used()
    result = loss_of(kind, given_columns, weights)
    chosen, rejected = torch.autograd.grad(result.loss, given_columns[:2])
    torch.testing.assert_close(result.slopes, chosen)
    torch.testing.assert_close(-result.slopes, rejected)
    assert not result.slopes.requires_grad

    def scalar(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return loss_of(kind, [chosen, rejected, *given_columns[2:]], weights).loss

    assert torch.autograd.gradcheck(scalar, tuple(given_columns[:2]), eps=1e-6, atol=1e-6)


def test_far_apart_pairs_stay_finite() -> None:
    for gap in (-1e4, 1e4):
        values = [torch.tensor([x], dtype=torch.float32) for x in (gap, 0.0, 0.0, 0.0)]
        result = dpo_loss(*values, torch.ones(1), beta=1.0)
        assert result.loss.item() == pytest.approx(max(-gap, 0.0)) and result.slopes.item() == -float(gap < 0)


# --- laws --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, shift=st.floats(-50, 50))
def test_a_shift_of_both_answers_changes_nothing(seed: int, shift: float) -> None:
    """Of policy and reference by pair: what is common to a question's answers cancels."""
    chosen, rejected, ref_chosen, ref_rejected = columns(seed)
    weights = all_used()
    whole = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, weights).loss.item()
    for moved in (
        (chosen + shift, rejected + shift, ref_chosen, ref_rejected),
        (chosen, rejected, ref_chosen + shift, ref_rejected + shift),
        (chosen + shift, rejected, ref_chosen + shift, ref_rejected),
    ):
        assert dpo_loss(*moved, weights).loss.item() == pytest.approx(whole, abs=1e-10)
    gap = reward_gap_loss(chosen, rejected, ref_chosen, weights).loss.item()
    assert reward_gap_loss(chosen + shift, rejected + shift, ref_chosen, weights).loss.item() == pytest.approx(gap)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, smoothing=st.floats(0.0, 0.49))
def test_swapping_the_answers_mirrors_the_loss(seed: int, smoothing: float) -> None:
    """Both labels together: the loss of a label that is wrong with probability e mixes those of the two labels."""
    chosen, rejected, ref_chosen, ref_rejected = columns(seed)
    weights = all_used()
    right = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, weights)
    wrong = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, weights)
    assert right.metrics["margin"].item() == pytest.approx(-wrong.metrics["margin"].item())
    assert right.metrics["accuracy"] + wrong.metrics["accuracy"] == 5
    mixed = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, weights, label_smoothing=smoothing)
    expected = (1.0 - smoothing) * right.loss + smoothing * wrong.loss
    assert mixed.loss.item() == pytest.approx(expected.item())
    mirrored = reward_gap_loss(rejected, chosen, -ref_chosen, weights)
    straight = reward_gap_loss(chosen, rejected, ref_chosen, weights)
    assert mirrored.loss.item() == pytest.approx(straight.loss.item())


@pytest.mark.parametrize("kind", LOSSES)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 7))
def test_micro_batches_add_up(kind: str, seed: int, size: int) -> None:
    given_columns = columns(seed, 7)
    use = torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool()
    whole = loss_of(kind, given_columns, pair_weights(use, 5).double())
    parts = []
    for start in range(0, 7, size):
        run = slice(start, start + size)
        # Each part knows of the others only how many pairs there are in all.
        parts.append(loss_of(kind, [c[run] for c in given_columns], pair_weights(use[run], 5).double()))
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name].item() for part in parts) == pytest.approx(value.item())
    torch.testing.assert_close(torch.cat([part.slopes for part in parts]), whole.slopes)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -1e30])
def test_a_pair_that_is_not_used_has_no_influence(kind: str, junk: float) -> None:
    clean = columns(3)
    use = torch.tensor([1, 0, 1, 1, 1]).bool()
    weights = pair_weights(use, 4).double()
    dirty = [torch.where(use, column.detach(), junk) for column in clean]
    for column in dirty[:2]:
        column.requires_grad_()
    results = [loss_of(kind, given_columns, weights) for given_columns in (clean, dirty)]
    assert results[0].loss.item() == results[1].loss.item() and results[1].metrics["pairs"].item() == 4
    gradients = [torch.autograd.grad(r.loss, c[0])[0] for r, c in zip(results, (clean, dirty))]
    assert torch.equal(*gradients) and gradients[1][1].item() == 0.0
    assert torch.equal(results[0].slopes, results[1].slopes)
    visible = loss_of(kind, dirty, all_used())
    assert not math.isfinite(visible.loss.item()) or junk == -1e30


def test_no_pairs_at_all_are_zero_not_nan() -> None:
    for kind in LOSSES:
        result = loss_of(kind, columns(1), pair_weights(torch.zeros(5, dtype=torch.bool), 0).double())
        assert not any(value.item() for value in result.metrics.values()) and result.slopes.abs().sum() == 0.0


def test_log_probs_of_answers_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, 9.0, 9.0], [math.inf, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert sequence_logprobs(logprobs, mask).tolist() == [-3.0, -4.0, 0.0]
    assert sequence_logprobs(logprobs, mask, normalise=True).tolist() == [-1.5, -4.0, 0.0]


# --- the policy's update -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("size", [1, 3, 8])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_the_update_with_row_advantages_has_the_pair_losss_gradient(kind: str, size: int, seed: int) -> None:
    """grpo_loss in micro batches that part the pairs: row 0 is in two pairs, row 6 in none, row 7 trains nothing."""
    lengths = torch.tensor([4, 1, 6, 3, 2, 5, 3, 0])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    tokens = (normal(seed, 8, 6, scale=1.0) - 2.0).requires_grad_()
    chosen_rows, rejected_rows = torch.tensor([0, 0, 4]), torch.tensor([2, 5, 3])
    reference = normal(seed + 1, 2, 3, scale=1.0) - 5.0
    normalised = kind == "gap"

    def loss(values: torch.Tensor) -> PairLoss:
        answers = sequence_logprobs(values, mask, normalised)
        return loss_of(kind, [answers[chosen_rows], answers[rejected_rows], *reference], all_used(3))

    expected = torch.autograd.grad(loss(tokens).loss, tokens)[0]
    slopes = loss(tokens.detach()).slopes
    advantages = row_advantages(slopes, chosen_rows, rejected_rows, lengths, normalised)
    assert advantages[6].item() == 0.0
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, 8, size):
        run = slice(start, start + size)
        weights = aggregation_weights(mask[run], "sequence_mean", mask.sum(), mask.any(dim=1).sum()).double()
        total = (
            total
            + grpo_loss(
                tokens[run], tokens[run].detach(), None, advantages[run], mask[run], weights, kl_coefficient=0.0
            )[0]
        )
    # The shipped weights are float32.
    torch.testing.assert_close(torch.autograd.grad(total, tokens)[0], expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, retention=st.floats(0.0, 3.0))
def test_slopes_by_answer_are_the_gradient_of_the_whole_loss(seed: int, retention: float) -> None:
    """Of both losses, the third of four pairs not in use; retention is half of c w times the squares of what moved."""
    present, initial = normal(seed, 4, 4).requires_grad_(), normal(seed + 1, 4, 4)
    weights = pair_weights(torch.tensor([1, 1, 0, 1]).bool(), 3).double()
    gap = reward_gap_loss(present[:, 0], present[:, 1], initial[:, 2] - initial[:, 3], weights, beta=1.5).loss
    held = 0.5 * retention * (weights * (present - initial)[:, 2:].square().sum(dim=1)).sum()
    found = reward_gap_slopes(present.detach(), initial, weights, beta=1.5, retention=retention)
    torch.testing.assert_close(found.slopes, torch.autograd.grad(gap + held, present)[0])
    assert found.normalised and found.metrics["loss"].item() == pytest.approx((gap + held).item())
    assert found.metrics["retention"].item() == pytest.approx(held.item())
    columns = (present[:, 0], present[:, 1], initial[:, 0], initial[:, 1])
    loss = dpo_loss(*columns, weights, beta=0.3, label_smoothing=0.1)
    found = dpo_slopes(present.detach(), initial, weights, beta=0.3, label_smoothing=0.1)
    torch.testing.assert_close(found.slopes, torch.autograd.grad(loss.loss, present)[0])
    assert not found.normalised and found.metrics["loss"].item() == pytest.approx(loss.loss.item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta=0.0.*> 0"),
        ({"beta": math.nan}, "beta=nan"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5.*< 0.5"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(*columns(0), all_used(), **options)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"retention=-1.0.*>= 0"):
        reward_gap_slopes(normal(0, 4, 4), normal(1, 4, 4), all_used(4), retention=-1.0)
    with pytest.raises(ValueError, match=r"one shape \[P\]; got"):
        reward_gap_loss(*columns(0)[:3], all_used(4))
