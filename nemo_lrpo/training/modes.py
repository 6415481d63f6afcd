"""What the modes of training differ in: who chooses languages, what a reward is made of, what the router learns from.

The step is the same for all (training/trainer.py); it asks the mode. All are on-policy: the update trains on the tokens
behind each prompt, which are drawn from the policy given all that stands before them. A thinking language that the
policy chose is among them, log pi(tag, rest | question); one that it was made to think in is part of the prompt,
log pi(rest | question, tag), and is not trained on. Both kinds share the mean and standard deviation of their group, as
all languages of a question do in LRPO: where a proposed language succeeds and the chosen ones fail, these lose
probability.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.evaluation import OWN
from nemo_lrpo.config.mode import EXPLANG, LRPO, ModeConfig
from nemo_lrpo.data.prompts import Prefill
from nemo_lrpo.explang.flags import outcomes_of
from nemo_lrpo.explang.format import prefill
from nemo_lrpo.explang.metrics import outcome_metrics
from nemo_lrpo.explang.rewards import assemble
from nemo_lrpo.explang.stages import EXPLORATION, Stage, exploration_steps, stage_of
from nemo_lrpo.router import LanguagePlan, LanguageRouter
from nemo_lrpo.router.plan import FIXED
from nemo_lrpo.training.scoring import has_reward
from nemo_lrpo.types import Prompt, RoutedPrompt, Score


@dataclass(frozen=True)
class Lesson:
    """What the router learns of a step: n rows of a plan of its own. rows: int64 [n], which of the step's they are;
    rewards: float64 [n], NaN where there is none."""

    plan: LanguagePlan
    rows: NDArray[np.int64]
    rewards: NDArray[np.float64]


class Mode(Protocol):
    """The same object on every rank. `scores` are by sample id, `tokens` those of each row's response."""

    name: str

    def route(self, router: LanguageRouter, prompts: Sequence[Prompt], rollouts: int, step: int) -> LanguagePlan:
        """The rollouts of a step: a row for each slot of each question, with the language of its answer."""

    def diverges(self, step: int) -> bool:
        """Whether the step's loss has the divergence from the initial policy."""

    def judge(
        self, plan: LanguagePlan, scores: Mapping[str, Score], tokens: Sequence[int], step: int
    ) -> dict[str, Score]:
        """The scores with the rewards that the policy learns from."""

    def lesson(self, plan: LanguagePlan, scores: Mapping[str, Score]) -> Lesson:
        """What the router learns, of what `route` and `judge` have returned."""

    def metrics(
        self,
        rows: Sequence[RoutedPrompt],
        scores: Mapping[str, Score],
        tokens: Sequence[int | None],
        step: int | None = None,
    ) -> dict[str, float]:
        """Of a training step, or without `step` of an evaluation; the mode's own, under its name."""

    def thinking(self, prompt: Prompt) -> str | None:
        """In an evaluation: the language that the policy is made to think in, None where it chooses."""

    def check_service(self, identity: Mapping[str, object]) -> None:
        """Raise ConfigError for a scorer of that identity (RewardService) that judges another form of responses."""

    def state_dict(self) -> dict[str, Any]:
        """For JSON; `name` is that of the mode."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, of the same mode."""


class LrpoMode:
    """The router chooses the language of every answer; the reward is the score's own."""

    name = LRPO

    def route(self, router: LanguageRouter, prompts: Sequence[Prompt], rollouts: int, step: int) -> LanguagePlan:
        return router.route(prompts, rollouts, step)

    def diverges(self, step: int) -> bool:
        return True

    def judge(
        self, plan: LanguagePlan, scores: Mapping[str, Score], tokens: Sequence[int], step: int
    ) -> dict[str, Score]:
        return dict(scores)

    def lesson(self, plan: LanguagePlan, scores: Mapping[str, Score]) -> Lesson:
        return Lesson(plan, np.arange(len(plan)), reward_column(plan, scores))

    def metrics(
        self,
        rows: Sequence[RoutedPrompt],
        scores: Mapping[str, Score],
        tokens: Sequence[int | None],
        step: int | None = None,
    ) -> dict[str, float]:
        return {}

    def thinking(self, prompt: Prompt) -> str | None:
        return None

    def check_service(self, identity: Mapping[str, object]) -> None:
        if identity.get("thinking"):
            raise ConfigError(
                "what scores the answers judges thinking blocks (thinking.tagged=true), which mode.name=lrpo has none "
                "of; start it without, or train with mode=explang."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@dataclass(frozen=True, eq=False)
class ThinkingPlan(LanguagePlan):
    """Answers in the questions' languages; the first slots of each question think in a language that the router chose.

    forced: those slots' rows as the router gave them, with the thinking language as their language. thinking: int16
    [R], into languages, -1 where the policy chooses.
    """

    forced: LanguagePlan
    thinking: NDArray[np.int16]

    def __getitem__(self, index: Any) -> Any:
        rows = super().__getitem__(index)
        return rows if isinstance(index, slice) else replace(rows, thinking=self._name(int(self.thinking[index])))

    def __iter__(self) -> Iterator[RoutedPrompt]:
        for routed, thinking in zip(super().__iter__(), self.thinking.tolist()):
            yield routed if thinking < 0 else replace(routed, thinking=self._name(thinking))

    def _name(self, thinking: int) -> str | None:
        return None if thinking < 0 else self.languages[thinking]


class ExplangMode:
    """The policy chooses the language that it thinks in, but for the first `forced_rollouts` of each question."""

    name = EXPLANG

    def __init__(self, config: ModeConfig, total_steps: int, think_in: str | None = None) -> None:
        """total_steps: of the run, by which its stages are set. think_in: see evaluation.think_in."""
        self._config = config
        self._exploring = exploration_steps(config, total_steps)
        self._think_in = think_in

    def route(self, router: LanguageRouter, prompts: Sequence[Prompt], rollouts: int, step: int) -> LanguagePlan:
        """`rollouts` slots for each question, in its own (or fixed) language."""
        count = min(self._config.forced_rollouts, rollouts)
        proposed = router.route(prompts, count, step) if count else LanguagePlan.of([], router.languages, step)
        questions = len(prompts)
        group = np.repeat(np.arange(questions, dtype=np.int32), rollouts)
        slot = np.tile(np.arange(rollouts, dtype=np.int16), questions)
        thinking = np.full((questions, rollouts), -1, np.int16)
        thinking[:, :count] = proposed.language.reshape(questions, count)
        index = {language: place for place, language in enumerate(router.languages)}
        own = np.array([index[prompt.fixed_language or prompt.language] for prompt in prompts], np.int16)
        return ThinkingPlan(
            prompts=tuple(prompts),
            step=step,
            languages=router.languages,
            group=group,
            slot=slot,
            language=own[group],
            origin=np.full(len(group), FIXED, np.int8),
            probability=np.ones(len(group)),
            forced=proposed,
            thinking=thinking.reshape(-1),
        )

    def stage(self, step: int) -> Stage:
        """Exploration or exploitation, with its weights."""
        return stage_of(self._config, step, self._exploring)

    def diverges(self, step: int) -> bool:
        return self.stage(step).weights.kl

    def judge(
        self, plan: LanguagePlan, scores: Mapping[str, Score], tokens: Sequence[int], step: int
    ) -> dict[str, Score]:
        """Their reward is the sum of nemo_lrpo.explang.rewards, not bounded by 1; r_f, r_d and r_p are added to their
        measures (r_c is `gate`, r_v `quality`). What was not parsed has no reward."""
        weights = self.stage(step).weights
        rewards = assemble(outcomes_of(plan, scores, tokens), self._config, weights)
        judged = {}
        for sample_id, score in scores.items():
            parts = rewards.get(sample_id)
            if parts is None:
                judged[sample_id] = replace(score, reward=None)
            else:
                own = {"r_f": parts.format, "r_d": parts.diversity, "r_p": parts.pass_at_k}
                judged[sample_id] = replace(score, reward=parts.total, measures={**score.measures, **own})
        return judged

    def lesson(self, plan: LanguagePlan, scores: Mapping[str, Score]) -> Lesson:
        """r_c * r_v of the forced rows: r_d says how rare a choice is, not how good, and r_p pays wrong answers too."""
        assert isinstance(plan, ThinkingPlan)
        found = [scores.get(sample_id) for sample_id in plan.forced.sample_ids]
        products = [
            score.gate * score.quality
            if score is not None and has_reward(score) and score.gate is not None and score.quality is not None
            else np.nan
            for score in found
        ]
        return Lesson(plan.forced, np.flatnonzero(plan.thinking >= 0), np.array(products, np.float64))

    def metrics(
        self,
        rows: Sequence[RoutedPrompt],
        scores: Mapping[str, Score],
        tokens: Sequence[int | None],
        step: int | None = None,
    ) -> dict[str, float]:
        """See `outcome_metrics`; `exploration` is 1 in that stage, else 0."""
        stage = None if step is None else self.stage(step).name
        outcomes = outcomes_of(rows, scores, tokens)
        values = outcome_metrics(outcomes, self._config.seen, self._config.correct_from, stage)
        if stage is not None:
            values["exploration"] = float(stage == EXPLORATION)
        return {f"{self.name}/{name}": value for name, value in values.items()}

    def thinking(self, prompt: Prompt) -> str | None:
        return prompt.language if self._think_in == OWN else self._think_in

    def check_service(self, identity: Mapping[str, object]) -> None:
        marks, found = dataclasses.asdict(self._config.marks), identity.get("thinking")
        if found != marks:
            raise ConfigError(
                f"mode.name=explang with mode.marks={marks}: what scores the answers "
                + (f"has thinking.marks={found}; give both the same." if found else "judges them as a whole; start it ")
                + ("" if found else "with thinking.tagged=true.")
            )

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "exploration_steps": self._exploring}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A run that is started again with more steps does not fall back into exploration."""
        self._exploring = int(state["exploration_steps"])


def build_mode(config: ModeConfig, total_steps: int, think_in: str | None = None) -> Mode:
    """The mode of `config`, checked before."""
    return ExplangMode(config, total_steps, think_in) if config.name == EXPLANG else LrpoMode()


def prefill_of(config: ModeConfig) -> Prefill | None:
    """How responses are made to think in a language; None in a mode that does not."""
    return prefill(config.marks) if config.name == EXPLANG else None


def reward_column(plan: LanguagePlan, scores: Mapping[str, Score]) -> NDArray[np.float64]:
    """float64 [R]: the reward of each row of `plan`, NaN where there is none."""
    found = [scores.get(sample_id) for sample_id in plan.sample_ids]
    return np.array([score.reward if has_reward(score) else np.nan for score in found], np.float64)
