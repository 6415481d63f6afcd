"""The training loop. `LrpoTrainer.step` is the method, top to bottom; everything distributed is behind the actor."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from nemo_lrpo.algorithms.advantages import GroupStatistics, group_advantages
from nemo_lrpo.config.loader import train_config_tree
from nemo_lrpo.config.schema import TrainConfig
from nemo_lrpo.config.training import LoopConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.prompts import PromptRenderer
from nemo_lrpo.data.sampler import PromptSampler
from nemo_lrpo.router import LanguagePlan, LanguageRouter, to_json
from nemo_lrpo.seeding import derive_seed
from nemo_lrpo.training.checkpoint import Checkpoint, CheckpointError, open_store
from nemo_lrpo.training.evaluation import Suite, evaluate
from nemo_lrpo.training.failed import FailedSteps, StepParts
from nemo_lrpo.training.layout import layout_news
from nemo_lrpo.training.lengths import ExpectedLengths
from nemo_lrpo.training.metrics import Timer, rollout_metrics
from nemo_lrpo.training.protocols import Actor, Logger, RewardService
from nemo_lrpo.training.runlog import EVALUATION, VALIDATION, RunLog, StepRecord
from nemo_lrpo.training.scoring import (
    EnginesDisagree,
    NonFiniteStep,
    RowRefused,
    ScoreCollector,
    StepRefused,
    has_reward,
)
from nemo_lrpo.training.stopping import Stop, describe
from nemo_lrpo.types import (
    MismatchError,
    NonFiniteError,
    Prompt,
    Rollouts,
    Score,
    StepAbandoned,
    TaggedPrompts,
    TrainingBatch,
)

_log = logging.getLogger(__name__)

_MISMATCH_REMEDY = (
    "Where it grew slowly, rollout.mismatch.correct=truncated makes up for it; where it came at once, the engine may "
    "not have the policy's weights, or not its architecture."
)


class _Stopped(Exception):
    """The loop ends here, before its last step."""

    def __init__(self, reason: int):
        super().__init__(reason)
        self.reason = reason


class LrpoTrainer:
    """Runs the steps between checkpoints; the same object on every rank, with the same decisions on all of them."""

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
    ):
        """suite: the tasks of `config.evaluation`, None where there are none."""
        self._config = config
        self._actor = actor
        self._router = router
        self._sampler = sampler
        self._renderer = renderer
        self._rewards = rewards
        self._validation = validation
        self._log = log
        self._total_steps = total_steps
        self._layout = dict(layout)
        self._store = open_store(config.run_dir, config.loop)
        facts = {"layout": self._layout, "total_steps": total_steps}
        self._failed = FailedSteps(Path(config.run_dir) / "failed", actor, train_config_tree(config), facts)
        self._stop = stop
        self._suite = suite
        self._timer = Timer()
        self._step = 0
        self._saved_step: int | None = None
        self._validated_step: int | None = None
        self._evaluated_step: int | None = None
        self._skipped_in_a_row = 0
        self._lengths = ExpectedLengths(config.rollout.max_new_tokens)
        self._metrics: dict[str, float] = {}

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self) -> StepRecord:
        """One step of LRPO.

        questions -> router: a language per rollout -> policy: K answers per question, scored as they are finished
        -> group advantages over all languages of a question -> GRPO update -> router learns what paid.
        """
        config, time = self._config, self._timer
        with self._failed.left_behind(self._step, unless=self._stop.must_abandon) as parts:
            with time("route"):
                prompts = self._sampler.next()
                plan = parts.plan = self._router.route(prompts, config.loop.rollouts_per_prompt, self._step)
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
            )
            self._abandon_if_due()
            with time("reference"):
                self._actor.reference_logprobs(batch)
            with time("score_wait"), self._stop.cancelling(scoring.cancel):
                scores = parts.scores = scoring.join(self._actor, config.reward.max_missing_share)
            rewards = reward_column(plan, scores)
            groups = self._advantages(batch, plan, rewards)
            self._abandon_if_due()
            with time("update"):
                self._actor.reseed(derive_seed("update", config.seed, self._step))
                metrics = self._update(parts)
        with time("observe"):
            self._router.observe(plan, rewards)
            self._router.observe_costs(plan, cost_column(rollouts, config.router.price.unit))
            self._lengths.observe(plan, (rollouts.lengths - rollouts.prompt_lengths).tolist())
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
        """Update the policy, or pass over a step whose loss or gradient is not finite, if the run is to go on then.

        Raises NonFiniteStep where it is not, NonFiniteError where earlier updates of the step have moved the policy;
        EnginesDisagree where generation has sampled from another policy than the one that trains.
        """
        assert parts.batch is not None
        loop = self._config.loop
        try:
            metrics = self._actor.update(parts.batch)
        except MismatchError as error:
            raise EnginesDisagree(f"{error} {_MISMATCH_REMEDY}") from error
        except NonFiniteError as error:
            in_a_row = self._skipped_in_a_row + 1
            if loop.on_non_finite == "stop" or in_a_row > loop.max_non_finite:
                if error.updates_done:
                    raise
                raise NonFiniteStep(f"{error} {_non_finite_remedy(loop)}") from error
            self._skipped_in_a_row = in_a_row
            _log.warning("step %d is passed over: %s %s", parts.step, error, self._failed.dump(parts, error))
            skipped = self._config.algorithm.num_updates - error.updates_done
            return {"loss": error.loss, "grad_norm": error.grad_norm, "skipped_updates": float(skipped)}
        self._skipped_in_a_row = 0
        return {**metrics, "skipped_updates": 0.0}

    def _record(
        self,
        plan: LanguagePlan,
        rollouts: Rollouts,
        scores: dict[str, Score],
        batch: TrainingBatch,
        groups: GroupStatistics,
        metrics: dict[str, float],
    ) -> StepRecord:
        values = rollout_metrics(plan, rollouts, scores)
        values.update({f"policy/{name}": value for name, value in metrics.items()})
        values.update({f"router/{name}": value for name, value in self._router.metrics().items()})
        values["policy/masked"] = float((~batch.use).sum())
        values["groups/zero_variance"] = float(groups.zero_variance.sum())
        values["groups/undersized"] = float(groups.undersized.sum())
        values["groups/reward_std"] = float(groups.std.mean())
        values["epoch"] = float(self._sampler.epoch)
        values.update({f"reward_service/{name}": value for name, value in self._rewards.counters().items()})
        values.update(self._timer.take())
        values["time/step"] = sum(seconds for name, seconds in values.items() if name.startswith("time/"))
        return StepRecord(plan, rollouts, scores, batch.advantages.tolist(), values)

    # -- the loop around it --------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all steps of the run are done."""
        return self._step >= self._total_steps

    @property
    def steps_done(self) -> int:
        """Completed steps of the run, those of earlier starts included."""
        return self._step

    def fit(self) -> int:
        """Train until the configured number of steps, with validations, logs and checkpoints between them.

        Returns 0, or why the run stops before its last step (a signal's number or TIME_LIMIT). Both ways it is saved as
        of the last step that was completed. Raises what ends a step for good; a StepRefused leaves the run saved.
        """
        last, log = self._last_step(), self._open_log()
        try:
            self._measure_if_due(log)
            while self._step < last:
                with self._whole_or_undone("step"):
                    record = self.step()
                self._metrics = dict(record.metrics)
                self._store.finish(self._actor, wait=False)
                log.step(self._step, record, self._actor.decode)
                self._measure_if_due(log)
                if self._step == last or _due(self._step, self._config.loop.save_interval, self.finished):
                    self._save_once(log, wait=self._step == last)
        except _Stopped as stopped:
            self._save_once(log)
            why = describe(stopped.reason)
            self._say(f"Stopped by {why} after step {self._step}. Nothing is lost: the same command goes on.")
            return stopped.reason
        except StepRefused as error:
            if not self._step:
                raise
            self._save_once(log)
            raise type(error)(f"after step {self._step}: {error} The run is saved; start it again to go on.") from error
        finally:
            log.close()
        return 0

    def _last_step(self) -> int:
        own = self._config.loop.stop_after_steps
        return min(self._total_steps, self._step + own) if own else self._total_steps

    def _open_log(self) -> RunLog:
        loop = self._config.loop
        return RunLog(
            Path(self._config.run_dir) if self._actor.is_main else None,
            total_steps=self._total_steps,
            resume_step=self._step or None,
            repeats=[kind for kind, due in ((VALIDATION, self._validation_due), (EVALUATION, self._tasks_due)) if due],
            logger=self._log,
            samples=loop.log_samples,
        )

    @contextmanager
    def _whole_or_undone(self, kind: str) -> Iterator[None]:
        """A "step", "validation" or "evaluation" that all ranks complete, or that none has begun.

        One that does not fit into the time left is not begun, or given up; one that is refused while the run is to stop
        counts as given up, since what it asks for may be stopping too. Raises _Stopped.
        """
        if reason := self._reason(kind):
            raise _Stopped(reason)
        position = self._sampler.state_dict()
        try:
            with self._stop.timed(kind):
                yield
        except (StepAbandoned, StepRefused) as error:
            self._sampler.load_state_dict(position)
            if reason := self._reason(kind):
                raise _Stopped(reason) from error
            raise

    def _reason(self, kind: str) -> int:
        """All ranks: the reason not to begin that any of them has, or 0."""
        return self._actor.max_over_ranks(self._stop.reason(kind))

    def _abandon_if_due(self) -> None:
        """All ranks: give the step up where it does not fit any more."""
        if self._actor.max_over_ranks(int(self._stop.must_abandon())):
            raise StepAbandoned("told to stop before the update.")

    @property
    def _validation_due(self) -> bool:
        """Whether the validation after the present step is still to come."""
        loop = self._config.loop
        if not self._validation or self._validated_step == self._step:
            return False
        return _due(self._step, loop.val_check_interval, self.finished) if self._step else loop.val_at_start

    @property
    def _tasks_due(self) -> bool:
        """Whether the tasks' evaluation after the present step is still to come."""
        if self._suite is None or self._evaluated_step == self._step:
            return False
        interval = self._config.evaluation.interval
        return _due(self._step, interval, self.finished) if self._step else self._config.loop.val_at_start

    def _measure_if_due(self, log: RunLog) -> None:
        if self._validation_due:
            self._validate(log)
        if self._tasks_due:
            self._evaluate_tasks(log)

    def _evaluate_tasks(self, log: RunLog) -> None:
        assert self._suite is not None
        with self._whole_or_undone(EVALUATION):
            values = self._suite.measure(self._actor, self._renderer, self._stop)
        self._evaluated_step = self._step
        self._metrics |= {f"{EVALUATION}/{name}": value for name, value in values.items()}
        log.between(EVALUATION, self._step, values)

    def _validate(self, log: RunLog) -> None:
        with self._whole_or_undone(VALIDATION):
            result = evaluate(
                self._actor,
                self._rewards,
                self._renderer,
                self._validation,
                seed=self._config.seed,
                temperature=self._config.loop.val_temperature,
                max_missing_share=self._config.reward.max_missing_share,
                stop=self._stop,
                lengths=self._lengths,
            )
        self._validated_step = self._step
        self._metrics |= {f"{VALIDATION}/{name}": value for name, value in result.metrics.items()}
        log.between(VALIDATION, self._step, result.metrics)

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything besides shards that the next step depends on."""
        return {
            "step": self._step,
            "validated_step": self._validated_step,
            "evaluated_step": self._evaluated_step,
            "updates": self._step * self._config.algorithm.num_updates,
            "seed": self._config.seed,
            "data": self._sampler.state_dict(),
            "router": to_json(self._router.state_dict()),
            "languages": list(self._router.languages),
            "layout": self._layout,
            "skipped_in_a_row": self._skipped_in_a_row,
            "lengths": self._lengths.state_dict(),
        }

    def save(self, wait: bool = True) -> None:
        """All ranks: write a checkpoint of this moment; without `wait` it may be written in the background."""
        with self._stop.timed("save"):
            self._store.save(self._actor, self.state_dict(), self._metrics, wait=wait)
        self._saved_step = self._step

    def _save_once(self, log: RunLog, wait: bool = True) -> None:
        """All ranks: save, unless this step is saved. Before the first one there is nothing that a new start lacks."""
        if self._step and self._saved_step != self._step:
            log.sync()
            self.save(wait)
        else:
            self._store.finish(self._actor, wait)

    def export(self, path: Path) -> None:
        """All ranks: write the policy as a .nemo that carries the router's final state, readable, and how it ended."""
        router = json.dumps(to_json(self._router.state_dict()), ensure_ascii=False, indent=1)
        summary = json.dumps({"step": self._step, "seed": self._config.seed, "languages": self._router.languages})
        self._actor.export(path, {"lrpo_router.json": router, "lrpo_training.json": summary})

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` stopped. Raises CheckpointError if it belongs to another run."""
        state = checkpoint.state
        check_resumable(checkpoint, self._config.seed, self._router.languages, self._sampler.state_dict())
        try:
            self._sampler.load_state_dict(state["data"])
            self._router.load_state_dict(state["router"])
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
        self._step = self._saved_step = state["step"]
        if self._store.last_save_seconds is not None:
            self._stop.took("save", self._store.last_save_seconds)
        # Earlier releases validated before every save.
        self._validated_step = state.get("validated_step", self._step)
        self._evaluated_step = state.get("evaluated_step", self._step)
        self._skipped_in_a_row = state.get("skipped_in_a_row", 0)
        # Absent in checkpoints of earlier releases.
        self._lengths.load_state_dict(state.get("lengths", {}))
        self._say(f"Continuing after step {self._step} from {checkpoint.path}")
        if news := layout_news(state["layout"], self._layout):
            self._say(news)

    def _say(self, text: str) -> None:
        """Print on the main rank, past the progress bar."""
        if self._actor.is_main:
            tqdm.write(text)
            sys.stdout.flush()


def check_resumable(
    checkpoint: Checkpoint, seed: int, languages: Sequence[str], data: Mapping[str, Any] | None = None
) -> None:
    """Raise CheckpointError unless the checkpoint has this run's seed and questions, and its languages are among this
    run's. data: the state of this run's sampler; None leaves the questions out."""
    state = checkpoint.state
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
    if state["seed"] != seed:
        raise CheckpointError(
            f"{checkpoint.path}: saved with seed={state['seed']}, this run has seed={seed}; the same plan and samples "
            "need the same seed."
        )


def reward_column(plan: LanguagePlan, scores: Mapping[str, Score]) -> NDArray[np.float64]:
    """float64 [R]: the reward of each row of `plan`, NaN where there is none."""
    found = [scores.get(sample_id) for sample_id in plan.sample_ids]
    return np.array([score.reward if has_reward(score) else np.nan for score in found], np.float64)


def cost_column(rollouts: Rollouts, unit: str) -> NDArray[np.float64]:
    """float64 [R]: what each rollout cost, `unit` as in router.price: response tokens or seconds of generating."""
    if unit == "tokens":
        return (rollouts.lengths - rollouts.prompt_lengths).double().numpy()
    if rollouts.seconds is None:
        raise ValueError("router.price.unit=seconds: the actor did not measure them; accepted here: tokens.")
    return rollouts.seconds.numpy()


def _non_finite_remedy(loop: LoopConfig) -> str:
    if loop.on_non_finite == "skip":
        return f"More than trainer.lrpo.max_non_finite={loop.max_non_finite} steps in a row were like that."
    return "The next start meets it again; trainer.lrpo.on_non_finite=skip passes over it."


def _due(step: int, interval: int, done: bool) -> bool:
    """After every `interval` steps and after the last; never with interval 0."""
    return interval > 0 and (done or step % interval == 0)
