"""Scores on their way through a step, and what the logs say of it."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from nemo_lrpo.algorithms.advantages import group_advantages
from nemo_lrpo.data.sampler import PromptSampler
from nemo_lrpo.router import LanguagePlan
from nemo_lrpo.training.checkpoint import Checkpoint, CheckpointError
from nemo_lrpo.training.failed import FailedStepError, FailedSteps, concerns_this_rank, load_failed_step
from nemo_lrpo.training.metrics import JsonLines, rollout_metrics
from nemo_lrpo.training.scoring import (
    GenerationFailed,
    MissingRewards,
    NonFiniteStep,
    RewardsUnavailable,
    ScoreCollector,
)
from nemo_lrpo.training.trainer import check_resumable, cost_column, reward_column
from nemo_lrpo.types import (
    NonFiniteError,
    Prompt,
    RankFailure,
    Rollouts,
    RoutedPrompt,
    Score,
    ScoreRequest,
    TaggedPrompt,
    TrainingBatch,
)

LANGUAGES = ("de", "ja", "en")


def make_plan(questions: int = 3) -> list[RoutedPrompt]:
    plan = []
    for index in range(questions):
        prompt = Prompt(f"q{index}", f"question {index}", f"answer {index}", "de", "de", ("Chat",), ("Europe",))
        plan += [RoutedPrompt(prompt, 7, slot, LANGUAGES[slot], "drawn", 0.3) for slot in range(3)]
    return plan


def observed(plan: Sequence[RoutedPrompt], scores: Mapping[str, Score]) -> set[str]:
    """The samples that the router gets a reward of; the others are NaN."""
    rewards = reward_column(LanguagePlan.of(plan, LANGUAGES), scores)
    assert rewards.dtype == float and len(rewards) == len(plan)
    found = {routed.sample_id: reward for routed, reward in zip(plan, rewards.tolist()) if not math.isnan(reward)}
    assert found == {name: score.reward for name, score in scores.items() if name in found}
    return set(found)


def make_rollouts(plan: Sequence[RoutedPrompt]) -> Rollouts:
    count = len(plan)
    return Rollouts(
        sample_ids=tuple(routed.sample_id for routed in plan),
        tokens=torch.zeros(count, 9, dtype=torch.int64),
        prompt_lengths=torch.full((count,), 4),
        lengths=torch.tensor([5 + index % 4 for index in range(count)]),
        ended=torch.tensor([index % 4 != 3 for index in range(count)]),
        valid=torch.ones(count, dtype=torch.bool),
        texts=tuple(f"text of {routed.sample_id}" for routed in plan),
    )


def make_score(request: ScoreRequest) -> Score:
    reward = int(request.sample_id.split("/")[-1]) / 2
    return Score(
        request.sample_id, reward, reward, 1.0, request.language, 0.9, {"similarity": reward}, {"cosine": reward}
    )


class Pending:
    def __init__(self, scores: dict[str, Score]):
        self._scores = scores

    def result(self) -> dict[str, Score]:
        return self._scores

    def cancel(self) -> None:
        pass


class Service:
    """Answers at once, in an order of its own, and keeps what it was asked."""

    def __init__(self, seed: int = 0, lose: frozenset[str] = frozenset(), mask: frozenset[str] = frozenset()):
        self._random = random.Random(seed)
        self._lose = lose
        self._mask = mask
        self.requests: list[ScoreRequest] = []

    def submit(self, requests: Sequence[ScoreRequest]) -> Pending:
        self.requests += requests
        shuffled = self._random.sample(list(requests), len(requests))
        scores = {r.sample_id: make_score(r) for r in shuffled if r.sample_id not in self._lose}
        for sample_id in self._mask:
            if sample_id in scores:
                masked = {"reward": None, "gate": None, "language": None, "flags": ("abstained",)}
                scores[sample_id] = dataclasses.replace(scores[sample_id], **masked)
        return Pending(scores)

    def counters(self) -> dict[str, float]:
        return {}


class FailingService(Service):
    def submit(self, requests: Sequence[ScoreRequest]) -> Pending:
        raise ConnectionError("no server")


class OneRank:
    rank, is_main = 0, True

    def agree(self, error: BaseException | None) -> None:
        if error:
            raise error

    def generate(self, prompts: object, seeds: object, on_finished: Callable[[Rollouts], None], **_: object):
        on_finished(make_rollouts(make_plan()))
        raise RankFailure("rank 3: MemoryError: too long") from None

    def join_scores(self, sample_ids: Sequence[str], local: Mapping[str, Score]) -> dict[str, Score]:
        return {sample_id: local[sample_id] for sample_id in sample_ids if sample_id in local}


def part(rollouts: Rollouts, rows: slice) -> Rollouts:
    return Rollouts(
        rollouts.sample_ids[rows],
        rollouts.tokens[rows],
        rollouts.prompt_lengths[rows],
        rollouts.lengths[rows],
        rollouts.ended[rows],
        rollouts.valid[rows],
        rollouts.texts[rows],
    )


def collect(service: Service, max_missing_share: float = 0.0) -> dict[str, Score]:
    plan = make_plan()
    rollouts = make_rollouts(plan)
    collector = ScoreCollector(service, plan)
    collector.submit(part(rollouts, slice(4, 9)))
    collector.submit(part(rollouts, slice(0, 4)))
    return collector.join(OneRank(), max_missing_share)


def test_every_request_carries_its_own_reference_and_language() -> None:
    service = Service()
    collect(service)
    for request in service.requests:
        _, question, slot = request.sample_id.split("/")
        assert request.response == f"text of {request.sample_id}"
        assert request.reference == f"answer {question[1:]}"
        assert (request.language, request.reference_language) == (LANGUAGES[int(slot)], "de")


def test_what_was_prefilled_is_judged_with_the_response() -> None:
    service, plan = Service(), make_plan()
    prompts = [TaggedPrompt(routed, (1, 2), "<tag>" if routed.slot == 1 else "") for routed in plan]
    with pytest.raises(GenerationFailed):
        ScoreCollector(service, plan).generate(OneRank(), prompts, [])
    texts = {request.sample_id: request.response for request in service.requests}
    assert texts == {
        routed.sample_id: ("<tag>" if routed.slot == 1 else "") + f"text of {routed.sample_id}" for routed in plan
    }


def test_a_rollout_costs_its_response_tokens_or_its_seconds() -> None:
    rollouts = make_rollouts(make_plan())
    assert cost_column(rollouts, "tokens").tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    with pytest.raises(ValueError, match=r"router\.price\.unit=seconds"):
        cost_column(rollouts, "seconds")
    rollouts.seconds = torch.arange(9).double() / 8
    assert cost_column(rollouts, "seconds").tolist() == [index / 8 for index in range(9)]


def test_permuted_replies_give_identical_advantages() -> None:
    plan = make_plan()
    index = torch.tensor([int(routed.prompt.question_id[1:]) for routed in plan])
    results = []
    for seed in range(5):
        scores = collect(Service(seed))
        rewards = torch.tensor([scores[routed.sample_id].reward for routed in plan])
        results.append(group_advantages(rewards, index, torch.ones(len(plan), dtype=torch.bool))[0])
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].abs().sum() > 0


def test_missing_rewards_are_absent_counted_and_not_zero() -> None:
    lost = frozenset({"7/q1/1", "7/q2/0"})
    scores = collect(Service(lose=lost), max_missing_share=0.3)
    assert set(scores) == {routed.sample_id for routed in make_plan()} - lost
    plan = make_plan()
    metrics = rollout_metrics(plan, make_rollouts(plan), scores)
    assert (metrics["missing"], metrics["missing/ja"], metrics["missing/de"], metrics["missing/en"]) == (2, 1, 1, 0)
    assert metrics["reward/ja"] == 0.5, "the mean is over the rewards that are there"
    assert observed(plan, scores) == set(scores)


def test_too_many_missing_rewards_refuse_the_step() -> None:
    with pytest.raises(MissingRewards, match=r"2 of 9 rewards are missing \(de: 1, ja: 1\).*max_missing_share"):
        collect(Service(lose=frozenset({"7/q1/1", "7/q2/0"})), max_missing_share=0.2)


def test_answers_masked_by_the_gate_leave_the_update_and_are_not_missing() -> None:
    masked = frozenset({"7/q1/1", "7/q1/2", "7/q2/0"})
    scores = collect(Service(mask=masked), max_missing_share=0.0)
    plan = make_plan()
    metrics = rollout_metrics(plan, make_rollouts(plan), scores)
    assert (metrics["masked"], metrics["masked/ja"], metrics["missing"], metrics["scored"]) == (3, 1, 0, 6)
    assert metrics["abstained"] == pytest.approx(3 / 9) and metrics["truncated"] == 0.0
    assert metrics["reward/ja"] == 0.5, "the mean is over the rewards that are there"
    assert observed(plan, scores) == set(scores) - masked


def test_a_reward_that_a_verifier_could_not_give_is_missing() -> None:
    class Unjudged(Service):
        def submit(self, requests: Sequence[ScoreRequest]) -> Pending:
            found = super().submit(requests).result()
            return Pending({k: dataclasses.replace(v, reward=None, quality=None) for k, v in found.items()})

    with pytest.raises(MissingRewards, match="9 of 9 rewards are missing"):
        collect(Unjudged(), max_missing_share=0.5)


def test_an_error_while_submitting_is_raised_when_joining() -> None:
    plan = make_plan()
    collector = ScoreCollector(FailingService(), plan)
    collector.submit(make_rollouts(plan))
    with pytest.raises(RewardsUnavailable, match="ConnectionError: no server"):
        collector.join(OneRank(), 0.0)


def test_metrics_by_language() -> None:
    plan = make_plan()
    metrics = rollout_metrics(plan, make_rollouts(plan), collect(Service()))
    assert metrics["count"] == 9 and metrics["count/ja"] == 3
    assert metrics["reward"] == pytest.approx(0.5) and metrics["reward/en"] == 1.0
    assert metrics["length"] == pytest.approx(sum(1 + index % 4 for index in range(9)) / 9)
    assert metrics["ended"] == pytest.approx(7 / 9)
    assert metrics["gate/de"] == 1.0 and metrics["invalid"] == 0.0
    assert metrics["part_similarity/en"] == metrics["cosine/en"] == 1.0


def test_a_resumed_log_repeats_no_step_and_drops_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step in (1, 2, 3):
        log.write({"step": step, "value": math.nan if step == 2 else float(step)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "val')
    log = JsonLines(path, resume_step=2)
    log.write({"step": 3, "value": 30.0})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "value": 1.0},
        {"step": 2, "value": None},
        {"step": 3, "value": 30.0},
    ]


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_missing(reward: float) -> None:
    class Broken(Service):
        def submit(self, requests: Sequence[ScoreRequest]) -> Pending:
            found = super().submit(requests).result()
            return Pending({k: dataclasses.replace(v, reward=reward) if "q1" in k else v for k, v in found.items()})

    with pytest.raises(MissingRewards, match="3 of 9 rewards are missing"):
        collect(Broken(), max_missing_share=0.3)
    scores = collect(Broken(), max_missing_share=0.5)
    plan = make_plan()
    metrics = rollout_metrics(plan, make_rollouts(plan), scores)
    assert (metrics["missing"], metrics["scored"]) == (3, 6)
    assert observed(plan, scores) == {routed.sample_id for routed in plan if routed.prompt.question_id != "q1"}


def test_invalid_token_ids_and_empty_answers_are_counted_by_language() -> None:
    plan = make_plan()
    rollouts = make_rollouts(plan)
    rollouts.valid[4] = False
    rollouts.lengths[7] = rollouts.prompt_lengths[7]
    scores = collect(Service())
    empty = plan[7].sample_id
    scores[empty] = dataclasses.replace(scores[empty], reward=0.0, gate=0.0, flags=("abstained", "empty"))
    metrics = rollout_metrics(plan, rollouts, scores)
    assert metrics["invalid"] == pytest.approx(1 / 9) and metrics["invalid/ja"] == pytest.approx(1 / 3)
    assert metrics["empty"] == pytest.approx(1 / 9) and metrics["empty/ja"] == pytest.approx(1 / 3)
    assert metrics["invalid/de"] == metrics["empty/de"] == 0.0


def test_answers_that_a_rank_could_not_generate_refuse_the_step_and_cancel_its_scores() -> None:
    cancelled = []

    class Told(Service):
        def submit(self, requests: Sequence[ScoreRequest]) -> Pending:
            pending = super().submit(requests)
            pending.cancel = lambda: cancelled.append(len(requests))  # type: ignore[method-assign]
            return pending

    with pytest.raises(GenerationFailed, match="no answers for this step: rank 3: MemoryError: too long"):
        ScoreCollector(Told(), make_plan()).generate(OneRank(), [], [])
    assert cancelled == [9]


def test_a_step_that_failed_is_left_behind_and_read_again(tmp_path: Path) -> None:
    plan = [dataclasses.replace(routed, thinking="ja" if routed.slot else None) for routed in make_plan()]
    rollouts = make_rollouts(plan)
    advantages = torch.linspace(-1, 1, len(plan))
    batch = TrainingBatch(
        rollouts.tokens, rollouts.prompt_lengths, rollouts.lengths, advantages, rollouts.ended, divergence=False
    )
    scores = collect(Service(lose=frozenset({"7/q1/1"})), max_missing_share=0.5)
    prompts = [TaggedPrompt(routed, tuple(range(2 + row % 3))) for row, routed in enumerate(plan)]
    config = {"seed": 7, "trainer": {"lrpo": {}}}
    failed = FailedSteps(tmp_path / "failed", OneRank(), config, {"layout": {"tensor": 2}, "total_steps": 9})
    with pytest.raises(MissingRewards, match=r"too many\. The step is left in .*step_00000007 for tools/replay\.py"):
        with failed.left_behind(7) as parts:
            parts.plan, parts.prompts, parts.seeds = plan, prompts, list(range(2**64 - 9, 2**64))
            parts.rollouts, parts.scores, parts.batch = rollouts, scores, batch
            raise MissingRewards("too many.")
    found = load_failed_step(tmp_path / "failed" / "step_00000007")
    assert found.config == config and (found.parts.step, found.reason["total_steps"]) == (7, 9)
    assert found.reason["error"] == "MissingRewards" and "raise MissingRewards" in found.reason["traceback"]
    assert list(found.parts.plan) == plan and list(found.parts.prompts) == prompts
    assert found.parts.seeds == parts.seeds and found.parts.scores == scores
    assert found.parts.batch is not None and torch.equal(found.parts.batch.advantages, advantages)
    assert torch.equal(found.parts.batch.use, rollouts.ended) and found.parts.batch.divergence is False
    assert found.parts.rollouts is not None and torch.equal(found.parts.rollouts.tokens, rollouts.tokens)
    (tmp_path / "failed" / "step_00000007" / "plan.jsonl").write_text("{}\n")
    with pytest.raises(FailedStepError, match="step_00000007: not a complete dump"):
        load_failed_step(tmp_path / "failed" / "step_00000007")


def test_a_step_that_failed_early_is_left_as_far_as_it_came(tmp_path: Path) -> None:
    failed = FailedSteps(tmp_path, OneRank(), {}, {})
    with pytest.raises(KeyError), failed.left_behind(7) as parts:
        parts.plan = make_plan()
        raise KeyError("router")
    found = load_failed_step(tmp_path / "step_00000007").parts
    assert list(found.plan) == make_plan() and (found.rollouts, found.batch, found.scores) == (None, None, {})


def test_a_step_that_cannot_be_left_behind_still_says_what_was_wrong(tmp_path: Path) -> None:
    (tmp_path / "failed").write_text("a file is in the way")
    failed = FailedSteps(tmp_path / "failed", OneRank(), {}, {})
    with pytest.raises(MissingRewards, match=r"too many\. The step could not be left in .*failed"):
        with failed.left_behind(0):
            raise MissingRewards("too many.")


def raised(error: Exception, cause: Exception | None) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (ValueError("here"), True),
        (NonFiniteError(math.nan, 1.0, 0), False),
        (raised(NonFiniteStep("x"), NonFiniteError(math.nan, 1.0, 0)), False),
        (MissingRewards("x"), False),
        (raised(GenerationFailed("x"), RankFailure("rank 3: x")), False),
        (raised(GenerationFailed("x"), raised(RankFailure("rank 0: x"), ValueError("here"))), True),
    ],
)
def test_only_ranks_that_know_more_than_the_others_leave_a_reason(error: Exception, own: bool) -> None:
    assert concerns_this_rank(error) == own


def test_a_run_goes_on_with_more_languages_not_with_fewer_nor_another_seed() -> None:
    checkpoint = Checkpoint(Path("step_00000002"), {"languages": ["de", "en", "ja"], "seed": 7})
    check_resumable(checkpoint, 7, ("en", "fr", "ja", "de"))
    with pytest.raises(CheckpointError, match=r"this run has de, fr\. en, ja cannot be taken away"):
        check_resumable(checkpoint, 7, ("de", "fr"))
    with pytest.raises(CheckpointError, match="saved with seed=7, this run has seed=8"):
        check_resumable(checkpoint, 8, ("de", "en", "ja"))


def test_a_run_does_not_go_on_with_a_data_file_that_has_changed() -> None:
    def sampler(answer: str) -> PromptSampler:
        prompts = [Prompt(f"q{n}", "question", answer, "de", "de", ("Chat",)) for n in range(4)]
        return PromptSampler(prompts, 2, seed=7)

    state = {"languages": ["de"], "seed": 7, "data": sampler("answer").state_dict()}
    check_resumable(Checkpoint(Path("step_00000002"), state), 7, ["de"], sampler("answer").state_dict())
    with pytest.raises(CheckpointError, match=r"data\.train are not those .* \(4 then, 4 now"):
        check_resumable(Checkpoint(Path("step_00000002"), state), 7, ["de"], sampler("another").state_dict())
