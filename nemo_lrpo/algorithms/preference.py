"""Losses over preference pairs, for off-line baselines: DPO, whose pairs may be MAPO's, and MPO's reward gap.
nemo_lrpo.training.offline trains with them.

A loss here is a function of the log-probs of whole answers, two for a pair. Its weights carry the global number of
pairs, so that scalars of micro batches and ranks are summed, as in nemo_lrpo.algorithms.loss.

How training over pairs attaches to the actor's update, which knows no pairs. By the chain rule a pair loss moves a
token's log-prob by d loss / d (log-prob of its answer), and that is what `grpo_loss` does with an advantage where the
ratio is 1. So for every update:

1. log-probs of all answers under the present policy, without gradient (the actor's `continuation_logprobs`, sums over
   the tokens that train; of the initial policy once for every answer);
2. `dpo_loss` or `reward_gap_loss` over all pairs of the update, which also gives its slopes;
3. the actor's `update` with `row_advantages` of these slopes as `TrainingBatch.advantages`, under
   algorithm.num_updates=1 (no old log-probs: the ratio is 1), aggregation=sequence_mean and kl_coefficient=0.

The gradient is the pair loss's own, not an approximation (tests/actor/test_layouts.py compares them). The answers of a
pair need not lie in one micro batch, nor on one rank, and may be packed; the price is the forward pass of 1. The loss
to report is that of 2: what `grpo_loss` returns then is not it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PairLoss:
    """A loss over P pairs.

    loss: scalar, with gradient where the log-probs have one. slopes: [P], d loss / d (log-prob of the chosen answer),
    no gradient; that of the rejected one is its negative. metrics: detached sums over pairs, to be divided by `pairs`:
    `margin` (what the loss compares: DPO's implicit reward gap, MPO's distance from its target) and `accuracy` (pairs
    whose chosen answer has the higher implicit reward); `loss` is weighted as it is.
    """

    loss: Tensor
    slopes: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class AnswerSlopes:
    """A loss over P pairs of R answers: chosen, rejected and, where R is 4, the dominant language's two.

    slopes: [P, R], d loss / d (log-prob of the answer: its sum over tokens, or its mean where `normalised`), no
    gradient. metrics: as PairLoss has them.
    """

    slopes: Tensor
    normalised: bool
    metrics: dict[str, Tensor]


def sequence_logprobs(logprobs: Tensor, mask: Tensor, normalise: bool = False) -> Tensor:
    """Log-prob of each answer, [B]: sum over its tokens, or, where `normalise`, the mean (SimPO's and MPO's).

    logprobs [B, T], of the tokens. mask: bool [B, T], the answer's own; whatever lies outside, NaN included, has no
    influence. An answer without tokens has 0.
    """
    total = torch.where(mask, logprobs, 0.0).sum(dim=1)
    return total / mask.sum(dim=1).clamp(min=1) if normalise else total


def pair_weights(use: Tensor, global_pairs: Tensor | int) -> Tensor:
    """Weight of every pair in the loss, float32 [P]: 1 / global_pairs, 0 where `use` (bool [P]) is False.

    global_pairs: pairs in use over all micro batches and ranks of the update; 0 of them give weights of 0.
    """
    return use.float() / torch.as_tensor(global_pairs, device=use.device).clamp(min=1)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    weights: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PairLoss:
    """DPO (Rafailov et al., 2023) over P pairs; MAPO (She et al., 2024) is this loss on pairs ranked by alignment.

    chosen, rejected [P]: log-probs of the two answers under the policy; ref_chosen, ref_rejected [P]: under the initial
    one, no gradient. weights [P] from `pair_weights`; a pair of weight 0 is not read.

    With h = beta ((chosen - ref_chosen) - (rejected - ref_rejected)) and e = label_smoothing, the probability that a
    label is wrong (0 to below 0.5), the loss is the sum of w * (-(1 - e) log sigmoid(h) - e log sigmoid(-h)); its slope
    is -w beta (sigmoid(-h) - e). Raises ValueError for a beta or label_smoothing out of range, or shapes that differ.
    """
    _check_beta(beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} is out of range; it must be >= 0 and < 0.5.")
    _check_shapes(chosen, rejected, ref_chosen, ref_rejected, weights)
    used = weights != 0
    # where, not multiplied by 0: a pair that is not used may hold NaN.
    gap = torch.where(used, (chosen - ref_chosen) - (rejected - ref_rejected), 0.0)
    margin = beta * gap
    each = -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    slopes = -beta * weights * (torch.sigmoid(-margin.detach()) - label_smoothing)
    return _collected(each, slopes, weights, used, margin, gap)


def reward_gap_loss(
    chosen: Tensor, rejected: Tensor, target: Tensor, weights: Tensor, *, beta: float = 1.0
) -> PairLoss:
    """MPO's first term (Zhao et al., 2025): the gap in a language is drawn to that in the dominant one.

    chosen, rejected [P]: length-normalised log-probs (`sequence_logprobs` with normalise) of the two answers under the
    policy; their difference is the implicit reward gap. target [P]: the gap of the dominant language's two answers to
    the same question under the initial policy, no gradient. weights [P] as in `dpo_loss`.

    The loss is the sum of w * (beta (chosen - rejected) - target)^2; its slope is
    2 w beta (beta (chosen - rejected) - target). (The released code sets beta = 1.5 for Qwen2.5.) MPO's second term
    holds the dominant language's hidden states where they were, which log-probs do not show; what comes near it here is
    grpo_loss's divergence from the initial policy on the dominant language's answers.
    Raises ValueError for a beta out of range, or shapes that differ.
    """
    _check_beta(beta)
    _check_shapes(chosen, rejected, target, weights)
    used = weights != 0
    gap = torch.where(used, chosen - rejected, 0.0)
    distance = beta * gap - torch.where(used, target, 0.0)
    slopes = 2.0 * beta * weights * distance.detach()
    return _collected(distance**2, slopes, weights, used, distance, gap)


def dpo_slopes(
    present: Tensor, initial: Tensor, weights: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> AnswerSlopes:
    """`dpo_loss` of log-probs [P, R], sums over tokens, under the present and the initial policy; R is 2 or more, of
    which the first two count."""
    columns = (present[:, 0], present[:, 1], initial[:, 0], initial[:, 1])
    loss = dpo_loss(*columns, weights, beta=beta, label_smoothing=label_smoothing)
    slopes = torch.zeros_like(present)
    slopes[:, 0], slopes[:, 1] = loss.slopes, -loss.slopes
    return AnswerSlopes(slopes, False, loss.metrics)


def reward_gap_slopes(
    present: Tensor, initial: Tensor, weights: Tensor, *, beta: float = 1.0, retention: float = 0.0
) -> AnswerSlopes:
    """`reward_gap_loss` of log-probs [P, 4], means over tokens, and with `retention` = c what holds the dominant
    language where it was: c w / 2 ((p_2 - q_2)^2 + (p_3 - q_3)^2) more for every pair, p the present and q the initial
    log-probs of the dominant language's two answers. Its sum is `retention` among the metrics, and part of `loss`.

    (MPO holds hidden states. This is the like of it in log-probs: as there, nothing moves at the initial policy.)
    Raises ValueError for a retention below 0.
    """
    if not retention >= 0.0:
        raise ValueError(f"retention={retention} is out of range; it must be >= 0.")
    loss = reward_gap_loss(present[:, 0], present[:, 1], initial[:, 2] - initial[:, 3], weights, beta=beta)
    moved = torch.where((weights != 0).unsqueeze(1), present[:, 2:] - initial[:, 2:], 0.0)
    slopes = torch.zeros_like(present)
    slopes[:, 0], slopes[:, 1] = loss.slopes, -loss.slopes
    slopes[:, 2:] = retention * weights.unsqueeze(1) * moved
    held = (0.5 * retention * weights * moved.square().sum(dim=1)).sum()
    return AnswerSlopes(slopes, True, {**loss.metrics, "loss": loss.metrics["loss"] + held, "retention": held})


def row_advantages(
    slopes: Tensor, chosen_rows: Tensor, rejected_rows: Tensor, lengths: Tensor, normalised: bool
) -> Tensor:
    """Advantages [N] under which the policy's update has the gradient of a pair loss; see the module's docstring.

    slopes [P]: of a PairLoss over all pairs of the update. chosen_rows, rejected_rows: int64 [P], their answers among
    the N rows of the update; a row may be in several pairs, what they ask for adds up. lengths: int64 [N], tokens of
    each answer that train. normalised: whether the pair loss had means over tokens, not sums.

    `grpo_loss` at ratio 1 under sequence_mean weights moves the log-prob of a token of row i by -A_i / (n_i R), n_i its
    tokens and R the rows with any; hence A_i = -R n_i (sum of its slopes), without n_i for means. In the slopes' dtype.
    """
    slope = torch.zeros(lengths.shape, dtype=slopes.dtype, device=slopes.device)
    slope = slope.index_add(0, chosen_rows, slopes).index_add(0, rejected_rows, -slopes)
    return answer_advantages(slope, lengths, normalised)


def answer_advantages(slopes: Tensor, lengths: Tensor, normalised: bool) -> Tensor:
    """As `row_advantages`, of the slopes [N] of the answers themselves."""
    return -slopes * (lengths > 0).sum() * (1 if normalised else lengths)


def _collected(each: Tensor, slopes: Tensor, weights: Tensor, used: Tensor, margin: Tensor, gap: Tensor) -> PairLoss:
    loss = (weights * each).sum()
    counts = {"margin": margin.sum(), "accuracy": (used & (gap > 0)).sum(), "pairs": used.sum()}
    metrics = {"loss": loss, **counts}
    return PairLoss(loss, slopes, {name: value.detach().to(loss.dtype) for name, value in metrics.items()})


def _check_beta(beta: float) -> None:
    if not beta > 0.0:
        raise ValueError(f"beta={beta} is out of range; it must be > 0.")


def _check_shapes(*columns: Tensor) -> None:
    shapes = [tuple(column.shape) for column in columns]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"log-probs, targets and weights of pairs must have one shape [P]; got {shapes}.")
