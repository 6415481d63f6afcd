"""The loss and its gradient against closed forms; masks, micro batches and weights."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_lrpo.algorithms.advantages import group_advantages
from nemo_lrpo.algorithms.loss import AGGREGATIONS, KL_ESTIMATORS, LOG_RATIO_LIMIT, aggregation_weights, grpo_loss
from nemo_lrpo.config.algorithm import AlgorithmConfig
from nemo_lrpo.config.checks import ConfigError


def example(rows: int = 6, length: int = 9, seed: int = 0, spread: float = 0.3) -> dict[str, torch.Tensor]:
    """Random float64 log-probs with ratios on both sides of the clip range; row 1 is masked throughout."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -1.0 - normal(rows, length).abs()
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    mask = torch.arange(length) < lengths.unsqueeze(1)
    mask[1] = False
    return {
        "logprobs": (old + spread * normal(rows, length)).requires_grad_(),
        "old_logprobs": old,
        "ref_logprobs": old + spread * normal(rows, length),
        "advantages": normal(rows),
        "mask": mask,
    }


def weights_of(mask: torch.Tensor, aggregation: str = "token_mean") -> torch.Tensor:
    return aggregation_weights(mask, aggregation, mask.sum(), mask.any(dim=1).sum())


def loss_of(batch: dict, aggregation: str = "token_mean", **options):
    return grpo_loss(**batch, weights=weights_of(batch["mask"], aggregation).double(), **options)


def gradient_of(batch: dict, **options) -> torch.Tensor:
    return torch.autograd.grad(loss_of(batch, **options)[0], batch["logprobs"])[0]


# --- closed forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_policy_gradient_closed_form(aggregation: str) -> None:
    """d loss / d logprob = -w rho A where the ratio is not clipped against its advantage, 0 where it is."""
    batch = example()
    rho = (batch["logprobs"].detach() - batch["old_logprobs"]).exp()
    advantage = batch["advantages"].unsqueeze(1)
    stuck = ((rho > 1.28) & (advantage > 0)) | ((rho < 0.8) & (advantage < 0))
    assert 0 < (stuck & batch["mask"]).sum() < batch["mask"].sum()
    weights = torch.where(batch["mask"], 1.0, 0.0).double()
    if aggregation == "token_mean":
        weights = weights / batch["mask"].sum()
    else:
        weights = weights / batch["mask"].sum(dim=1, keepdim=True).clamp(min=1) / 5
    expected = torch.where(stuck, 0.0, -weights * rho * advantage)
    gradient = gradient_of(batch, aggregation=aggregation, clip_high=0.28)
    # The shipped weights are float32.
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)
    assert gradient[stuck].tolist() == [0.0] * int(stuck.sum())


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_clipping_holds_back_only_the_side_that_gains(advantage: float) -> None:
    rho = torch.tensor([[0.5, 0.9, 1.3, 1.5]], dtype=torch.float64)
    batch = {
        "logprobs": rho.log().requires_grad_(),
        "old_logprobs": torch.zeros_like(rho),
        "ref_logprobs": None,
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "mask": torch.ones_like(rho, dtype=torch.bool),
    }
    loss, metrics = loss_of(batch, clip_low=0.2, clip_high=0.4)
    clipped = [0.5, 0.9, 1.3, 1.4] if advantage > 0 else [0.8, 0.9, 1.3, 1.5]
    assert loss.item() == pytest.approx(-advantage * sum(clipped) / 4)
    gradient = gradient_of(batch, clip_low=0.2, clip_high=0.4)[0]
    slopes = [0.5, 0.9, 1.3, 0.0] if advantage > 0 else [0.0, 0.9, 1.3, 1.5]
    assert gradient.tolist() == pytest.approx([-advantage * s / 4 for s in slopes])
    counts = (metrics["clipped_low"].item(), metrics["clipped_high"].item())
    assert counts == ((0.0, 1.0) if advantage > 0 else (1.0, 0.0))


def slopes_of_kl(delta: torch.Tensor) -> dict[str, torch.Tensor]:
    """d kl / d logprob, with d = ref - logprob."""
    return {"k1": torch.ones_like(delta), "k2": -delta, "k3": 1.0 - delta.exp()}


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_value_and_gradient_closed_form(estimator: str) -> None:
    """No advantage: what is left of loss and gradient is the divergence, under the same weights."""
    batch = example()
    batch["advantages"] = torch.zeros(6, dtype=torch.float64)
    delta = batch["ref_logprobs"] - batch["logprobs"].detach()
    value = {"k1": -delta, "k2": delta**2 / 2, "k3": delta.exp() - delta - 1.0}[estimator]
    weights = batch["mask"].double() / batch["mask"].sum()
    loss, metrics = loss_of(batch, kl_coefficient=0.25, kl_estimator=estimator)
    torch.testing.assert_close(loss.detach(), 0.25 * (weights * value).sum(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(metrics["kl"], value[batch["mask"]].sum())
    expected = 0.25 * weights * slopes_of_kl(delta)[estimator]
    gradient = gradient_of(batch, kl_coefficient=0.25, kl_estimator=estimator)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck(estimator: str, aggregation: str) -> None:
    """Finite differences in float64, away from the kinks of the clip."""
    batch = example(rows=4, length=5, seed=3)
    rho = (batch["logprobs"].detach() - batch["old_logprobs"]).exp()
    assert ((rho - 0.8).abs().min() > 1e-4) and ((rho - 1.2).abs().min() > 1e-4)

    def loss(logprobs):
        return loss_of(batch | {"logprobs": logprobs}, aggregation, kl_coefficient=0.1, kl_estimator=estimator)[0]

    assert torch.autograd.gradcheck(loss, (batch["logprobs"],), eps=1e-6, atol=1e-7)


def test_k3_keeps_its_digits_near_zero() -> None:
    """exp(d) - d - 1 in float32 loses everything at d = 1e-4; the true value is d^2 / 2."""
    one = torch.ones(1, 1)
    logprobs, ref = torch.tensor([[-1e-4]]), torch.zeros(1, 1)
    _, metrics = grpo_loss(logprobs, logprobs, ref, one[0], one.bool(), one, kl_coefficient=1.0)
    assert metrics["kl"].item() == pytest.approx(5e-9, rel=1e-3)


def test_on_policy_gradient_is_reinforce() -> None:
    """First update after sampling: ratio 1 everywhere, so the gradient is that of -w A logprob."""
    batch = example(spread=0.0)
    expected = -batch["mask"].double() / batch["mask"].sum() * batch["advantages"].unsqueeze(1)
    torch.testing.assert_close(gradient_of(batch), expected, rtol=1e-6, atol=1e-15)


def test_zero_variance_group_gives_exactly_no_policy_gradient() -> None:
    batch = example()
    rewards, groups = torch.tensor([0.7, 0.7, 0.7, 0.1, 0.7, 0.9]), torch.tensor([0, 0, 0, 1, 0, 1])
    batch["advantages"], _ = group_advantages(rewards, groups, batch["mask"].any(dim=1))
    gradient = gradient_of(batch)
    assert gradient[groups == 0].abs().max().item() == 0.0
    assert gradient[3].abs().max() > 0 and gradient[5].abs().max() > 0


# --- masks and weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_tokens_and_samples_have_no_influence(aggregation: str, junk: float) -> None:
    """Neither numerator nor denominator: dropping the masked row altogether gives the same loss and gradient."""
    options = {"aggregation": aggregation, "kl_coefficient": 0.1}
    clean = example()
    dirty = dict(clean)
    for name in ("logprobs", "old_logprobs", "ref_logprobs"):
        dirty[name] = torch.where(clean["mask"], clean[name].detach(), junk)
    dirty["logprobs"].requires_grad_()
    rows = clean["mask"].any(dim=1)
    dropped = {name: value[rows] for name, value in clean.items()}
    dropped["logprobs"] = dropped["logprobs"].detach().requires_grad_()
    (loss, metrics), (other, other_metrics), (less, less_metrics) = (
        loss_of(batch, **options) for batch in (clean, dirty, dropped)
    )
    assert loss.item() == other.item() and loss.item() == pytest.approx(less.item(), rel=1e-9)
    weights = torch.where(clean["mask"], weights_of(clean["mask"], aggregation), junk).double()
    assert grpo_loss(**clean, weights=weights, kl_coefficient=0.1)[0].item() == loss.item()
    assert {k: v.item() for k, v in metrics.items()} == {k: v.item() for k, v in other_metrics.items()}
    assert metrics["tokens"] == less_metrics["tokens"] and metrics["sequences"] == less_metrics["sequences"] == 5
    gradient, other_gradient = gradient_of(clean, **options), gradient_of(dirty, **options)
    assert torch.equal(gradient, other_gradient) and gradient[~clean["mask"]].abs().max() == 0.0
    torch.testing.assert_close(gradient[rows], gradient_of(dropped, **options))


def test_weights_by_hand_and_their_sum() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    token = aggregation_weights(mask, "token_mean", 6, 2)
    sequence = aggregation_weights(mask, "sequence_mean", torch.tensor(6), torch.tensor(2))
    torch.testing.assert_close(token, mask / 6)
    torch.testing.assert_close(sequence, mask * torch.tensor([[0.25], [0.0], [0.125]]))
    assert token.sum() == pytest.approx(1.0) and sequence.sum() == pytest.approx(1.0)
    assert token.dtype == sequence.dtype == torch.float32


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_to_train_on_is_zero_not_nan(aggregation: str) -> None:
    batch = example()
    batch["mask"] = torch.zeros_like(batch["mask"])
    assert weights_of(batch["mask"], aggregation).abs().sum() == 0.0
    loss, metrics = loss_of(batch, aggregation, kl_coefficient=0.1)
    assert loss.item() == 0.0 and all(value.item() == 0.0 for value in metrics.values())
    assert gradient_of(batch, kl_coefficient=0.1).abs().max() == 0.0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_any_split_into_micro_batches_gives_the_same_sums(aggregation: str, size: int) -> None:
    batch = example(rows=7)
    tokens, sequences = batch["mask"].sum(), batch["mask"].any(dim=1).sum()
    whole, metrics = loss_of(batch, aggregation, kl_coefficient=0.05)
    gradient = gradient_of(batch, aggregation=aggregation, kl_coefficient=0.05)
    total, sums = torch.zeros((), dtype=torch.float64), dict.fromkeys(metrics, 0.0)
    for start in range(0, 7, size):
        part = {name: value[start : start + size] for name, value in batch.items()}
        weights = aggregation_weights(part["mask"], aggregation, tokens, sequences).double()
        loss, part_metrics = grpo_loss(**part, weights=weights, kl_coefficient=0.05)
        total = total + loss
        sums = {name: sums[name] + value.item() for name, value in part_metrics.items()}
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)
    assert sums == pytest.approx({name: value.item() for name, value in metrics.items()}, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, batch["logprobs"])[0], gradient, rtol=1e-12, atol=1e-15)


def test_permuting_samples_permutes_the_gradient() -> None:
    batch = example()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    permuted = {name: value[order] for name, value in batch.items()}
    permuted["logprobs"] = permuted["logprobs"].detach().requires_grad_()
    assert loss_of(permuted)[0].item() == pytest.approx(loss_of(batch)[0].item(), rel=1e-12)
    torch.testing.assert_close(gradient_of(permuted), gradient_of(batch)[order], rtol=1e-12, atol=0.0)


def test_padding_further_changes_nothing() -> None:
    batch = example()
    longer = {n: v if n == "advantages" else torch.nn.functional.pad(v.detach(), (0, 3)) for n, v in batch.items()}
    longer["logprobs"].requires_grad_()
    assert loss_of(longer)[0].item() == pytest.approx(loss_of(batch)[0].item(), rel=1e-12)


# --- edges -------------------------------------------------------------------------------------------------------


def single(logprob: float, old: float, ref: float = 0.0, advantage: float = -1.0):
    values = [torch.tensor([[x]], dtype=torch.float64) for x in (logprob, old, ref)]
    values[0].requires_grad_()
    one = torch.ones(1, 1, dtype=torch.float64)
    loss, metrics = grpo_loss(*values, torch.tensor([advantage]), one.bool(), one, kl_coefficient=0.1)
    return loss, metrics, torch.autograd.grad(loss, values[0])[0].item()


def test_far_off_policy_stays_finite() -> None:
    loss, metrics, gradient = single(logprob=-1.0, old=-500.0, ref=600.0)
    assert math.isfinite(loss.item()) and gradient == 0.0
    assert metrics["ratio"].item() == pytest.approx(math.exp(LOG_RATIO_LIMIT))


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
@pytest.mark.parametrize("where", ["logprob", "old", "ref"])
def test_a_log_prob_that_is_not_finite_is_not_hidden(where: str, bad: float) -> None:
    """The trainer stops on a non-finite loss; the clamp must not make one look sound."""
    loss, _, _ = single(**({"logprob": -1.0, "old": -1.0, "ref": -1.0} | {where: bad}))
    assert not math.isfinite(loss.item())


def test_metrics_are_sums_over_tokens() -> None:
    batch = example()
    _, metrics = loss_of(batch, kl_coefficient=0.1)
    mask, rho = batch["mask"], (batch["logprobs"].detach() - batch["old_logprobs"]).exp()
    assert metrics["tokens"].item() == mask.sum().item()
    assert metrics["ratio"].item() == pytest.approx(rho[mask].sum().item())
    assert metrics["surprisal"].item() == pytest.approx(-batch["logprobs"].detach()[mask].sum().item())
    assert metrics["old_kl"].item() == pytest.approx((1 / rho + rho.log() - 1)[mask].sum().item())
    total = metrics["policy_loss"] + 0.1 * metrics["kl_loss"]
    assert metrics["loss"].item() == pytest.approx(total.item())
    assert not any(value.requires_grad for value in metrics.values())


def test_without_coefficient_no_reference_is_needed_and_one_given_changes_nothing() -> None:
    batch = example()
    bare = batch | {"ref_logprobs": None}
    assert loss_of(bare)[0].item() == loss_of(batch)[0].item()
    assert torch.equal(gradient_of(bare), gradient_of(batch))
    with pytest.raises(ValueError, match="kl_coefficient=0.1 needs ref_logprobs"):
        loss_of(bare, kl_coefficient=0.1)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="kl_estimator='k4'.*accepted: k1, k2, k3"):
        loss_of(example(), kl_estimator="k4")
    with pytest.raises(ValueError, match="aggregation='mean'.*accepted: token_mean, sequence_mean"):
        aggregation_weights(torch.ones(1, 1).bool(), "mean", 1, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("advantage_scaling", "sd"),
        ("advantage_eps", 0.0),
        ("clip_low", 1.5),
        ("clip_high", 0.0),
        ("kl_coefficient", -0.1),
        ("kl_coefficient", math.nan),
        ("kl_estimator", "k4"),
        ("aggregation", "mean"),
        ("num_updates", 0),
    ],
)
def test_configuration_is_refused_by_key(field: str, value: object) -> None:
    AlgorithmConfig().check("algorithm")
    with pytest.raises(ConfigError, match=rf"^algorithm\.{field}="):
        AlgorithmConfig(**{field: value}).check("algorithm")
