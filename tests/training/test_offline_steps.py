"""Training over pairs on a policy small enough to differentiate by hand: a table of next-token logits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from nemo_lrpo.algorithms.loss import aggregation_weights, grpo_loss
from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.pairs import MethodConfig
from nemo_lrpo.config.schema import OfflineConfig
from nemo_lrpo.config.training import PairLoopConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.pair_answers import AnswerRenderer, AnswerTokens
from nemo_lrpo.data.pairs import PreferencePair, RatedAnswer
from nemo_lrpo.data.sampler import PairSampler
from nemo_lrpo.training.checkpoint import CheckpointError, open_store
from nemo_lrpo.training.offline import PairTrainer
from nemo_lrpo.training.scoring import NonFiniteStep
from nemo_lrpo.training.stopping import TIME_LIMIT, Stop
from nemo_lrpo.types import NonFiniteError, RoutedPrompt, TaggedPrompt, TrainingBatch

VOCABULARY, END, LEARNING_RATE = 40, 0, 0.5
DPO = MethodConfig("dpo", beta=0.5, label_smoothing=0.05)
MPO = MethodConfig("mpo", loss="reward_gap", beta=1.5, retention=0.7)


def answer(question: int, language: str, slot: int) -> RatedAnswer:
    """Of 1 to 4 tokens, which depend on all three."""
    text = f"{language}{question}{slot}" * 2
    return RatedAnswer(f"0/q{question}/{slot}", f"q{question}", f"?{question}", "de", language, text, 0.5, True)


def make_pairs(questions: int = 4) -> list[PreferencePair]:
    """German and Japanese pairs of each question, with the same English one."""
    pairs = []
    for question in range(questions):
        english = PreferencePair(answer(question, "en", 6), answer(question, "en", 7), 0.5)
        for slot, language in ((0, "de"), (2, "ja")):
            chosen, rejected = answer(question, language, slot), answer(question, language, slot + 1)
            pairs.append(PreferencePair(chosen, rejected, 0.5, english))
    return pairs


def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(1 + (7 * byte + index) % (VOCABULARY - 1) for index, byte in enumerate(text.encode()))


class Renderer:
    """Bytes are tokens; an answer has as many as its question's number says."""

    end_token = END

    def render(self, answers: Sequence[RatedAnswer]) -> list[AnswerTokens]:
        kept = [1 + int(one.question_id[1:]) % 4 for one in answers]
        return [
            AnswerTokens(one.sample_id, tokens_of(one.question), (*tokens_of(one.response)[-count:], END))
            for one, count in zip(answers, kept, strict=True)
        ]


class TableActor:
    """softmax(table[token]) is the distribution of the next one; the update is plain gradient descent."""

    rank, is_main = 0, True

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
        self.initial = self.table.detach().clone()
        self.passes = 0
        self.initial_rows = 0

    def token_logprobs(self, table: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = table[batch.tokens[:, :-1]].log_softmax(dim=-1)
        position = torch.arange(1, batch.tokens.size(1))
        mask = (position >= batch.prompt_lengths.unsqueeze(1)) & (position < batch.lengths.unsqueeze(1))
        return logprobs.gather(-1, batch.tokens[:, 1:].unsqueeze(-1)).squeeze(-1), mask

    def continuation_logprobs(
        self, tokens: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor, initial: bool = False
    ) -> torch.Tensor:
        self.passes += 1
        self.initial_rows += len(tokens) if initial else 0
        batch = TrainingBatch(tokens, prompt_lengths, lengths, torch.zeros(0), torch.zeros(0))
        logprobs, mask = self.token_logprobs(self.initial if initial else self.table.detach(), batch)
        return logprobs.masked_fill(~mask, 0.0).sum(dim=1)

    def update(self, batch: TrainingBatch) -> dict[str, float]:
        logprobs, mask = self.token_logprobs(self.table, batch)
        weights = aggregation_weights(mask, "sequence_mean", mask.sum(), mask.any(dim=1).sum()).double()
        loss, _ = grpo_loss(logprobs, logprobs.detach(), None, batch.advantages.double(), mask, weights)
        if not loss.isfinite():
            raise NonFiniteError(loss.item(), float("nan"), 0)
        (gradient,) = torch.autograd.grad(loss, self.table)
        with torch.no_grad():
            self.table -= LEARNING_RATE * gradient
        return {"loss": loss.item(), "grad_norm": float(gradient.norm()), "lr": LEARNING_RATE}

    def save_shards(self, directory: Path) -> None:
        np.save(directory / "table.npy", self.table.detach().numpy())

    def load(self, directory: Path) -> None:
        with torch.no_grad():
            self.table.copy_(torch.from_numpy(np.load(directory / "table.npy")))

    def agree(self, error: BaseException | None) -> None:
        if error:
            raise error

    def max_over_ranks(self, value: int) -> int:
        return value

    def reseed(self, seed: int) -> None:
        pass

    def decode(self, rollouts: Any, rows: Any) -> list[str]:
        raise AssertionError("a run over pairs writes no rollouts")


class NoTime(Stop):
    """There is no time left for the `calls`-th step or batch of validation, and for none after it."""

    def __init__(self, calls: int):
        super().__init__(deadline=None, grace=30.0, margin=1.5)
        self.left = calls

    def must_abandon(self) -> bool:
        self.left -= 1
        return self.left < 0

    def reason(self, kind: str) -> int:
        return TIME_LIMIT if self.left < 0 else 0


def start(
    run_dir: Path,
    method: MethodConfig = DPO,
    validation: Sequence[PreferencePair] = (),
    pairs: Sequence[PreferencePair] | None = None,
    stop: Stop | None = None,
    seed: int = 5,
    **loop: Any,
) -> tuple[PairTrainer, TableActor]:
    settings = {"pairs_per_step": 3, "max_steps": 8, "val_check_interval": 3, "save_interval": 2, **loop}
    config = OfflineConfig(run_dir=str(run_dir), seed=seed, method=method, loop=PairLoopConfig(**settings))
    pairs, actor = make_pairs() if pairs is None else pairs, TableActor()
    trainer = PairTrainer(
        config,
        actor=actor,
        sampler=PairSampler(pairs, config.loop.pairs_per_step, seed),
        renderer=Renderer(),
        train=pairs,
        validation=validation,
        log=lambda metrics, step: None,
        total_steps=config.loop.max_steps,
        layout={"tensor": 1},
        stop=stop or Stop(deadline=None, grace=30.0, margin=1.5),
    )
    checkpoint = open_store(config.run_dir, config.loop).latest()
    if checkpoint is not None:
        actor.load(checkpoint.shards)
        trainer.load_state_dict(checkpoint)
    return trainer, actor


def lines(run_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in one.items() if not name.startswith("time/")} for one in records]


def by_hand(actor: TableActor, method: MethodConfig, pairs: Sequence[PreferencePair]) -> torch.Tensor:
    """The loss of `pairs`, with gradient, from the published equations."""
    losses = []

    def logprob(table: torch.Tensor, one: RatedAnswer) -> torch.Tensor:
        (row,) = Renderer().render([one])
        text = [*row.prompt, *row.answer]
        steps = [table[a].log_softmax(dim=-1)[b] for a, b in pairwise(text)][len(row.prompt) - 1 :]
        return torch.stack(steps).mean() if method.loss == "reward_gap" else torch.stack(steps).sum()

    for pair in pairs:
        change = [logprob(actor.table, one) - logprob(actor.initial, one) for one in (pair.chosen, pair.rejected)]
        if method.loss == "dpo":
            h, wrong = method.beta * (change[0] - change[1]), method.label_smoothing
            losses.append(-(1 - wrong) * logsigmoid(h) - wrong * logsigmoid(-h))
            continue
        english = [pair.dominant.chosen, pair.dominant.rejected]
        target = logprob(actor.initial, english[0]) - logprob(actor.initial, english[1])
        gap = logprob(actor.table, pair.chosen) - logprob(actor.table, pair.rejected)
        moved = [logprob(actor.table, one) - logprob(actor.initial, one) for one in english]
        losses.append((method.beta * gap - target) ** 2 + 0.5 * method.retention * (moved[0] ** 2 + moved[1] ** 2))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("method", [DPO, MPO], ids=lambda method: method.name)
def test_every_step_is_one_of_gradient_descent_on_the_published_loss(method: MethodConfig, tmp_path: Path) -> None:
    trainer, actor = start(tmp_path, method)
    for _ in range(4):
        pairs = PairSampler.next(_copy(trainer._sampler))
        loss = by_hand(actor, method, pairs)
        expected = actor.table.detach() - LEARNING_RATE * torch.autograd.grad(loss, actor.table)[0]
        metrics = trainer.step().metrics
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(actor.table.detach(), expected, rtol=1e-6, atol=1e-7)


def _copy(sampler: PairSampler) -> PairSampler:
    """One that goes on from the same place."""
    other = PairSampler(list(sampler._items.values()), 3, 5)
    other.load_state_dict(sampler.state_dict())
    return other


@pytest.mark.parametrize("method", [DPO, MPO], ids=lambda method: method.name)
def test_loss_falls_and_what_is_preferred_becomes_likelier(method: MethodConfig, tmp_path: Path) -> None:
    """On pairs that are trained on and, the table being shared, on those that are not."""
    pairs = make_pairs(6)
    trainer, actor = start(
        tmp_path, method, pairs=pairs[:8], validation=pairs[8:], pairs_per_step=8, max_steps=30, val_at_start=True
    )
    assert trainer.fit() == 0 and trainer.finished
    train = [one for one in lines(tmp_path) if one["kind"] == "train"]
    losses = [one["loss"] for one in train]
    assert all(later < earlier for earlier, later in pairwise(losses)) and losses[-1] < 0.5 * losses[0]
    validation = [one for one in lines(tmp_path) if one["kind"] == "validation"]
    assert [one["step"] for one in validation] == [*range(0, 31, 3)]
    assert validation[-1]["pairs"] == 4 and validation[-1]["pairs/ja"] == 2 and train[0]["pairs"] == 8
    if method is MPO:
        # Near the target, and the dominant language, which shares the table, is held where it was.
        assert losses[-1] < 0.1 * losses[0] and train[0]["retention"] == 0.0 < train[-1]["retention"] < 0.02
        return
    assert losses[0] == pytest.approx(np.log(2)) and train[0]["accuracy"] == 0.0 and train[-1]["accuracy"] == 1.0
    assert train[-1]["chosen_change"] > 0.0 > train[-1]["rejected_change"]
    assert train[-1]["accuracy/de"] == train[-1]["accuracy/ja"] == 1.0
    both = [0.5 * (train[-1]["loss/de"] + train[-1]["loss/ja"]), train[-1]["loss"]]
    assert both[0] == pytest.approx(both[1])
    # Every answer was put to the initial policy once: 8 pairs to train on, 4 held out.
    assert actor.initial_rows == 2 * 12


@pytest.mark.parametrize("method", [DPO, MPO], ids=lambda method: method.name)
def test_a_run_with_stops_is_the_run_without(method: MethodConfig, tmp_path: Path) -> None:
    """Stopped after two steps, in a validation, and in a step that was given up; bit by bit."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    pairs = {"pairs": make_pairs(), "validation": make_pairs(7)[-4:]}
    expected, reached = start(whole, method, **pairs)
    assert expected.fit() == 0 and expected.state_dict()["validated_step"] == 8
    trainer, _ = start(stopped, method, **pairs, stop_after_steps=2)
    assert trainer.fit() == 0 and not trainer.finished and trainer.steps_done == 2
    trainer, _ = start(stopped, method, **pairs, stop=NoTime(2))
    assert trainer.fit() == TIME_LIMIT and trainer.steps_done == 3
    trainer, _ = start(stopped, method, **pairs, stop=NoTime(4))
    assert trainer.fit() == TIME_LIMIT and trainer.steps_done == 5
    trainer, actor = start(stopped, method, **pairs)
    assert trainer.fit() == 0 and trainer.finished
    # Whatever the run needs to know of the initial policy, it knew by then.
    assert actor.initial_rows == 0
    assert torch.equal(actor.table, reached.table) and lines(stopped) == lines(whole)
    ends = [json.dumps(one.state_dict(), default=np.ndarray.tolist, sort_keys=True) for one in (trainer, expected)]
    assert ends[0] == ends[1]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    trainer, _ = start(tmp_path, stop_after_steps=2)
    trainer.fit()
    with pytest.raises(CheckpointError, match=r"8 then, 6 now.*validation_share"):
        start(tmp_path, pairs=make_pairs(3))
    with pytest.raises(CheckpointError, match=r"saved with method\.loss=dpo, this run has reward_gap"):
        start(tmp_path, MPO)
    with pytest.raises(CheckpointError, match="fingerprint|seed=5"):
        start(tmp_path, seed=6)


def test_a_loss_that_is_not_finite_stops_the_run_as_before_the_step(tmp_path: Path) -> None:
    trainer, actor = start(tmp_path, max_steps=4)
    trainer.step()
    before = actor.table.detach().clone()
    broken = actor.continuation_logprobs
    actor.continuation_logprobs = lambda *columns, **named: broken(*columns, **named) * float("nan")
    with pytest.raises(NonFiniteStep, match=r"after step 1.*on_non_finite=skip"):
        trainer.fit()
    assert trainer.steps_done == 1 and torch.equal(actor.table, before)
    assert json.loads((tmp_path / "checkpoints" / "step_00000001" / "state.json").read_text())["step"] == 1


# --- what is put to the policy -----------------------------------------------------------------------------------


class Prompts:
    """Of PromptRenderer: words are tokens; `fitting` keeps questions of at most three."""

    def render_all(self, plan: Sequence[RoutedPrompt]) -> list[TaggedPrompt]:
        return [TaggedPrompt(one, tokens_of(one.prompt.question)) for one in plan]

    def tokens_of(self, text: str) -> tuple[int, ...]:
        return tokens_of(text)

    def fitting(self, prompts: Sequence[Any], languages: Sequence[str]) -> list[Any]:
        assert all(prompt.fixed_language for prompt in prompts) and not languages
        return [prompt for prompt in prompts if len(prompt.question) <= 3]


@dataclasses.dataclass
class Length:
    over_long: str


def test_answers_end_with_the_end_token_and_long_ones_are_refused_or_left_out() -> None:
    pairs = make_pairs()
    long = dataclasses.replace(pairs[1].rejected, response="x" * 20)
    pairs[1] = dataclasses.replace(pairs[1], rejected=long)
    pairs[6:] = [
        dataclasses.replace(one, chosen=dataclasses.replace(one.chosen, question="four words")) for one in pairs[6:]
    ]
    renderer = AnswerRenderer(Prompts(), Length("drop"), END, 9)
    assert renderer.render([long])[0] == AnswerTokens(long.sample_id, tokens_of("?0"), (*tokens_of("x" * 20), END))
    assert renderer.fitting(pairs) == [pairs[0], *pairs[2:6]] and renderer.dropped == 3
    with pytest.raises(DataError, match=r"1 of \d+ answers are longer than data\.max_answer_tokens=9.*'0/q0/3' \(21"):
        AnswerRenderer(Prompts(), Length("reject"), END, 9).fitting(pairs)
    with pytest.raises(DataError, match="leaves no pair"):
        AnswerRenderer(Prompts(), Length("drop"), END, 2).fitting(pairs)
    assert AnswerRenderer(Prompts(), Length("reject"), END, 9).fitting([]) == []


def test_the_order_of_pairs_is_a_function_of_seed_and_epoch() -> None:
    pairs = make_pairs(5)

    def order(seed: int, steps: int = 4) -> list[str]:
        sampler = PairSampler(pairs, 5, seed)
        return [one.pair_id for _ in range(steps) for one in sampler.next()]

    assert order(1) == order(1) != order(2)
    first, second = order(1)[:10], order(1)[10:]
    assert sorted(first) == sorted(second) == sorted(one.pair_id for one in pairs) and first != second
    assert PairSampler(pairs, 5, 1, shuffle=False).next() == pairs[:5]
    with pytest.raises(ConfigError, match=r"trainer\.lrpo\.pairs_per_step=11 with 10 pairs"):
        PairSampler(pairs, 11, 1)
