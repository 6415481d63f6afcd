"""The training loop. `LrpoTrainer.step` is the method, top to bottom; everything distributed is behind the actor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_lrpo.algorithms.advantages import GroupStatistics, group_advantages
from nemo_lrpo.config.loader import train_config_tree
from nemo_lrpo.config.mode import LRPO
from nemo_lrpo.config.schema import TrainConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.prompts import PromptRenderer
from nemo_lrpo.data.sampler import PromptSampler
from nemo_lrpo.router import LanguagePlan, LanguageRouter, to_json
from nemo_lrpo.seeding import derive_seed
from nemo_lrpo.training.checkpoint import Checkpoint, CheckpointError
from nemo_lrpo.training.evaluation import Suite, evaluate
from nemo_lrpo.training.failed import FailedSteps, StepParts
from nemo_lrpo.training.lengths import ExpectedLengths
from nemo_lrpo.training.loop import TrainingLoop, check_seed
from nemo_lrpo.training.metrics import rollout_metrics
from nemo_lrpo.training.modes import LrpoMode, Mode, reward_column
from nemo_lrpo.training.protocols import Actor, Logger, RewardService
from nemo_lrpo.training.runlog import EVALUATION, VALIDATION, RolloutRecord, RunLog
from nemo_lrpo.training.scoring import RowRefused, ScoreCollector
from nemo_lrpo.training.stopping import Stop
from nemo_lrpo.types import Prompt, Rollouts, Score, TaggedPrompts, TrainingBatch


class LrpoTrainer(TrainingLoop):
    """Training with LRPO."""

    _config: TrainConfig
    _sampler: PromptSampler

    def __init__(
        self,
        config: TrainConfig,
        *,
        actor: Actor,
        router: LanguageRouter,
        sampler: PromptSampler,
        renderer: PromptRenderer,
        rewards: RewardService,
        validation: Sequence[Prompt],
        log: Logger,
        total_steps: int,
        layout: Mapping[str, int],
        stop: Stop,
        suite: Suite | None = None,
        mode: Mode | None = None,
    ):
        """suite: the tasks of `config.evaluation`, None where there are none. mode: None for LRPO."""
        loop, intervals = config.loop, {}
        if validation:
            intervals[VALIDATION] = loop.val_check_interval
        if suite is not None:
            intervals[EVALUATION] = config.evaluation.interval
        super().__init__(
            config,
            actor=actor,
            sampler=sampler,
            log=log,
            total_steps=total_steps,
            layout=layout,
            stop=stop,
            intervals=intervals,
        )
        self._router = router
        self._renderer = renderer
        self._rewards = rewards
        self._validation = validation
        facts = {"layout": self._layout, "total_steps": total_steps}
        self._failed = FailedSteps(Path(config.run_dir) / "failed", actor, train_config_tree(config), facts)
        self._suite = suite
        self._mode = mode or LrpoMode()
        self._lengths = ExpectedLengths(config.rollout.max_new_tokens)

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self) -> RolloutRecord:
        """One step of LRPO, or of another mode.

        questions -> router: a language per rollout -> policy: K answers per question, scored as they are finished
        -> group advantages over all languages of a question -> GRPO update -> router learns what paid. The mode says
        what the router decides, what a reward is made of and what the router learns (training/modes.py).
        """
        config, time = self._config, self._timer
        with self._failed.left_behind(self._step, unless=self._stop.must_abandon) as parts:
            with time("route"):
                prompts = self._sampler.next()
                plan = parts.plan = self._mode.route(self._router, prompts, config.loop.rollouts_per_prompt, self._step)
                tagged = parts.prompts = self._render(plan)
                parts.seeds = self._seeds(plan)
                parts.expected = self._lengths.expect(plan)
            with time("generate"):
                scoring = ScoreCollector(self._rewards, plan)
                rollouts = parts.rollouts = scoring.generate(
                    self._actor,
                    tagged,
                    parts.seeds,
                    should_stop=self._stop.must_abandon,
                    expected=parts.expected,
                )
            batch = parts.batch = TrainingBatch(
                tokens=rollouts.tokens,
                prompt_lengths=rollouts.prompt_lengths,
                lengths=rollouts.lengths,
                advantages=torch.zeros(len(plan)),
                use=rollouts.ended & rollouts.valid,
                sampled_logprobs=rollouts.logprobs,
                languages=tuple(routed.language for routed in plan),
                divergence=self._mode.diverges(self._step),
            )
            tokens = (rollouts.lengths - rollouts.prompt_lengths).tolist()
            self._abandon_if_due()
            with time("reference"):
                self._actor.reference_logprobs(batch)
            with time("score_wait"), self._stop.cancelling(scoring.cancel):
                found = scoring.join(self._actor, config.reward.max_missing_share)
            scores = parts.scores = self._mode.judge(plan, found, tokens, self._step)
            groups = self._advantages(batch, plan, reward_column(plan, scores))
            self._abandon_if_due()
            with time("update"):
                self._actor.reseed(derive_seed("update", config.seed, self._step))
                metrics = self._update(parts)
        with time("observe"):
            lesson = self._mode.lesson(plan, scores)
            self._router.observe(lesson.plan, lesson.rewards)
            self._router.observe_costs(lesson.plan, cost_column(rollouts, config.router.price.unit)[lesson.rows])
            self._lengths.observe(plan, tokens)
        self._step += 1
        return self._record(plan, rollouts, scores, batch, groups, metrics)

    def _render(self, plan: LanguagePlan) -> TaggedPrompts:
        try:
            return self._renderer.render_all(plan)
        except DataError as error:
            raise RowRefused(str(error)) from error

    def _seeds(self, plan: LanguagePlan) -> list[int]:
        return [derive_seed("rollout", self._config.seed, r.step, r.prompt.question_id, r.slot) for r in plan]

    def _advantages(self, batch: TrainingBatch, plan: LanguagePlan, rewards: NDArray[np.float64]) -> GroupStatistics:
        """Fill in advantages over the rollouts of each question; samples without a reward leave the update."""
        algorithm = self._config.algorithm
        values = torch.from_numpy(rewards).float()
        batch.use = batch.use & ~values.isnan()
        batch.advantages, statistics = group_advantages(
            values,
            torch.from_numpy(plan.group).long(),
            batch.use,
            scaling=algorithm.advantage_scaling,
            eps=algorithm.advantage_eps,
        )
        return statistics

    def _update(self, parts: StepParts) -> dict[str, float]:
        assert parts.batch is not None
        return self._update_or_pass_over(parts.batch, lambda error: self._failed.dump(parts, error))

    def _record(
        self,
        plan: LanguagePlan,
        rollouts: Rollouts,
        scores: dict[str, Score],
        batch: TrainingBatch,
        groups: GroupStatistics,
        metrics: dict[str, float],
    ) -> RolloutRecord:
        values = rollout_metrics(plan, rollouts, scores)
        tokens = (rollouts.lengths - rollouts.prompt_lengths).tolist()
        values.update(self._mode.metrics(plan, scores, tokens, step=self._step - 1))
        values.update({f"policy/{name}": value for name, value in metrics.items()})
        values.update({f"router/{name}": value for name, value in self._router.metrics().items()})
        values["policy/masked"] = float((~batch.use).sum())
        values["groups/zero_variance"] = float(groups.zero_variance.sum())
        values["groups/undersized"] = float(groups.undersized.sum())
        values["groups/reward_std"] = float(groups.std.mean())
        values["epoch"] = float(self._sampler.epoch)
        values.update({f"reward_service/{name}": value for name, value in self._rewards.counters().items()})
        values.update(self._times())
        return RolloutRecord(values, plan, rollouts, scores, batch.advantages.tolist())

    # -- between steps -------------------------------------------------------------------------------------------

    def _open_log(self) -> RunLog:
        return RunLog(
            Path(self._config.run_dir) if self._actor.is_main else None,
            total_steps=self._total_steps,
            resume_step=self._step or None,
            repeats=self._still_due(),
            logger=self._log,
            samples=self._config.loop.log_samples,
        )

    def measure(self, kind: str) -> Mapping[str, float]:
        if kind == EVALUATION:
            assert self._suite is not None
            return self._suite.measure(self._actor, self._renderer, self._stop)
        return evaluate(
            self._actor,
            self._rewards,
            self._renderer,
            self._validation,
            seed=self._config.seed,
            temperature=self._config.loop.val_temperature,
            max_missing_share=self._config.reward.max_missing_share,
            stop=self._stop,
            lengths=self._lengths,
            mode=self._mode,
        ).metrics

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "router": to_json(self._router.state_dict()),
            "languages": list(self._router.languages),
            "lengths": self._lengths.state_dict(),
            "mode": self._mode.state_dict(),
        }

    def export(self, path: Path) -> None:
        """All ranks: write the policy as a .nemo that carries the router's final state, readable, and how it ended."""
        router = json.dumps(to_json(self._router.state_dict()), ensure_ascii=False, indent=1)
        summary = json.dumps({"step": self._step, "seed": self._config.seed, "languages": self._router.languages})
        self._actor.export(path, {"lrpo_router.json": router, "lrpo_training.json": summary})

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        check_resumable(
            checkpoint, self._config.seed, self._router.languages, self._sampler.state_dict(), self._mode.name
        )
        try:
            self._router.load_state_dict(state["router"])
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
        # Absent in checkpoints of earlier releases.
        self._lengths.load_state_dict(state.get("lengths", {}))
        super().load_state_dict(checkpoint)
        if "mode" in checkpoint.state:
            self._mode.load_state_dict(checkpoint.state["mode"])


def check_resumable(
    checkpoint: Checkpoint,
    seed: int,
    languages: Sequence[str],
    data: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> None:
    """Raise CheckpointError unless the checkpoint has this run's seed, mode and questions, and its languages are among
    this run's. data: the state of this run's sampler; None leaves the questions out. mode: None leaves it out."""
    state = checkpoint.state
    # Earlier releases had no other mode, and did not save it.
    saved_mode = state.get("mode", {"name": LRPO})["name"]
    if mode not in (None, saved_mode):
        raise CheckpointError(
            f"{checkpoint.path}: saved with mode.name={saved_mode}, this run has {mode}. Go on in that mode, or start "
            "in another run_dir, from a .nemo (pretrained_checkpoint.restore_from_path)."
        )
    if data is not None and state["data"].get("fingerprint") != data["fingerprint"]:
        raise CheckpointError(
            f"{checkpoint.path}: the questions of data.train are not those that it was saved with "
            f"({state['data'].get('questions')} then, {data['questions']} now; texts, ids, topics, regions and order "
            "count). Go on with the file as it was, or start in another run_dir."
        )
    gone = [language for language in state["languages"] if language not in languages]
    if gone:
        raise CheckpointError(
            f"{checkpoint.path}: saved for languages {', '.join(state['languages'])}; this run has "
            f"{', '.join(languages)}. {', '.join(gone)} cannot be taken away (others may be added): continue with the "
            "saved ones, or start in another run_dir."
        )
    check_seed(checkpoint, seed)


def cost_column(rollouts: Rollouts, unit: str) -> NDArray[np.float64]:
    """float64 [R]: what each rollout cost, `unit` as in router.price: response tokens or seconds of generating."""
    if unit == "tokens":
        return (rollouts.lengths - rollouts.prompt_lengths).double().numpy()
    if rollouts.seconds is None:
        raise ValueError("router.price.unit=seconds: the actor did not measure them; accepted here: tokens.")
    return rollouts.seconds.numpy()
