"""Rewards on their way: submitted while rollouts are still generated, joined by sample id when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from nemo_lrpo.training.protocols import Actor, PendingScores, RewardService
from nemo_lrpo.types import (
    AgreedError,
    RankFailure,
    Rollouts,
    RoutedPrompt,
    Score,
    ScoreRequest,
    TaggedPrompt,
    TaggedPrompts,
)


class StepRefused(AgreedError, RuntimeError):
    """A step that cannot be completed. It has changed nothing: policy and router are as they were before it."""


class GenerationFailed(StepRefused):
    """The policy's answers could not be generated on some rank."""


class RowRefused(StepRefused):
    """A question of this step cannot be put to the policy."""


class NonFiniteStep(StepRefused):
    """Loss or gradient is not finite; the optimizer has not moved."""


class EnginesDisagree(StepRefused):
    """Generation and training give the sampled tokens other probabilities; the optimizer has not moved."""


class RewardsUnavailable(StepRefused):
    """The reward service failed; the cause is its own error, or that of another rank."""


class MissingRewards(StepRefused):
    """More rewards are missing than `reward.max_missing_share` allows."""


class ScoreCollector:
    """The rewards of one step. `submit` is called on the rank that decoded a batch, `join` on all ranks."""

    def __init__(self, service: RewardService, plan: Sequence[RoutedPrompt]):
        self._service = service
        self._plan = {routed.sample_id: routed for routed in plan}
        self._prefilled: dict[str, str] = {}
        self._pending: list[PendingScores] = []
        self._error: Exception | None = None

    def submit(self, rollouts: Rollouts) -> None:
        """Send a finished batch to the reward server; returns at once, unless the server is far behind.

        What a response was prefilled with is put before it: both together are what is judged. An error is kept for
        `join`: raised here, on one rank, it would leave the others waiting in a collective.
        """
        requests = []
        for sample_id, text in zip(rollouts.sample_ids, rollouts.texts, strict=True):
            routed = self._plan[sample_id]
            requests.append(
                ScoreRequest(
                    sample_id=sample_id,
                    response=self._prefilled.get(sample_id, "") + text,
                    reference=routed.prompt.reference,
                    reference_language=routed.prompt.reference_language,
                    language=routed.language,
                    question=routed.prompt.question,
                )
            )
        try:
            self._pending.append(self._service.submit(requests))
        except Exception as error:
            self._error = self._error or error

    def cancel(self) -> None:
        """Nobody waits for the scores any more: `join` raises. Never blocks; safe to call from another thread."""
        for pending in self._pending:
            pending.cancel()

    def generate(
        self,
        actor: Actor,
        prompts: Sequence[TaggedPrompt],
        seeds: Sequence[int],
        temperature: float | None = None,
        should_stop: Callable[[], bool] | None = None,
        expected: Sequence[float] | None = None,
    ) -> Rollouts:
        """All ranks: the actor's answers, sent off to be scored as they are finished.

        Raises GenerationFailed, on every rank, where one of them could not generate its share.
        """
        prompts = TaggedPrompts.of(prompts)
        self._prefilled = dict(zip(prompts.sample_ids, prompts.prefilled or ()))
        try:
            return actor.generate(
                prompts,
                seeds,
                on_finished=self.submit,
                temperature=temperature,
                should_stop=should_stop,
                expected=expected,
            )
        except RankFailure as error:
            self.cancel()
            raise GenerationFailed(f"no answers for this step: {error}.") from error

    def join(self, actor: Actor, max_missing_share: float) -> dict[str, Score]:
        """All ranks: the step's scores by sample id; samples without a valid reply are absent.

        Raises RewardsUnavailable or MissingRewards, on every rank.
        """
        local: dict[str, Score] = {}
        try:
            if self._error:
                raise self._error
            for pending in self._pending:
                local.update(pending.result())
        except Exception as error:
            self._error = error
            self.cancel()
        try:
            actor.agree(self._error)
        except RankFailure as error:
            raise RewardsUnavailable(f"no rewards for this step: {error}") from error
        except Exception as error:
            raise RewardsUnavailable(f"no rewards for this step: {type(error).__name__}: {error}") from error
        scores = actor.join_scores(list(self._plan), local)
        refuse_if_missing(scores, self._plan, max_missing_share)
        return scores


def has_reward(score: Score | None) -> bool:
    """Whether the sample may enter the update and teach the router."""
    return score is not None and score.reward is not None and math.isfinite(score.reward)


def is_missing(score: Score | None) -> bool:
    """Whether a reward that was wanted is not there; answers that the gate masks by intent are not missing."""
    return not has_reward(score) and not (score is not None and score.masked)


def refuse_if_missing(scores: Mapping[str, Score], plan: Mapping[str, RoutedPrompt], max_missing_share: float) -> None:
    """Raise MissingRewards, counts by language included, if too many samples have no reward."""
    missing = [routed for sample_id, routed in plan.items() if is_missing(scores.get(sample_id))]
    if len(missing) <= max_missing_share * len(plan):
        return
    by_language: dict[str, int] = {}
    for routed in missing:
        by_language[routed.language] = by_language.get(routed.language, 0) + 1
    counts = ", ".join(f"{language}: {count}" for language, count in sorted(by_language.items()))
    raise MissingRewards(
        f"{len(missing)} of {len(plan)} rewards are missing ({counts}), more than reward.max_missing_share="
        f"{max_missing_share}; see the log of what scores them."
    )
