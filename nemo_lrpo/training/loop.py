"""The loop around a run's steps, whatever a step is: measurements, logs and checkpoints between them, stops, resume."""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from nemo_lrpo.config.schema import RunConfig
from nemo_lrpo.config.training import StepsConfig
from nemo_lrpo.training.checkpoint import Checkpoint, CheckpointError, open_store
from nemo_lrpo.training.layout import layout_news
from nemo_lrpo.training.metrics import Timer
from nemo_lrpo.training.protocols import Actor, Logger
from nemo_lrpo.training.runlog import EVALUATION, VALIDATION, RunLog, StepRecord
from nemo_lrpo.training.scoring import EnginesDisagree, NonFiniteStep, StepRefused
from nemo_lrpo.training.stopping import Stop, describe
from nemo_lrpo.types import MismatchError, NonFiniteError, StepAbandoned, TrainingBatch

_log = logging.getLogger(__name__)

_MISMATCH_REMEDY = (
    "Where it grew slowly, rollout.mismatch.correct=truncated makes up for it; where it came at once, the engine may "
    "not have the policy's weights, or not its architecture."
)
_STATE_OF = {VALIDATION: "validated_step", EVALUATION: "evaluated_step"}


class Sampler(Protocol):
    """The position in the training data."""

    @property
    def epoch(self) -> int:
        """Completed passes over the data."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises ValueError for one of other data."""


class _Stopped(Exception):
    """The loop ends here, before its last step."""

    def __init__(self, reason: int):
        super().__init__(reason)
        self.reason = reason


class TrainingLoop(ABC):
    """Runs the steps between checkpoints; the same object on every rank, with the same decisions on all of them.

    A subclass says what a step is, what is measured between steps, and what is exported with the policy.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        actor: Actor,
        sampler: Sampler,
        log: Logger,
        total_steps: int,
        layout: Mapping[str, int],
        stop: Stop,
        intervals: Mapping[str, int],
    ):
        """intervals: of what is measured, VALIDATION or EVALUATION in the order in which that is done, every how many
        steps; 0: at the start at most."""
        self._config = config
        self._actor = actor
        self._sampler = sampler
        self._log = log
        self._total_steps = total_steps
        self._layout = dict(layout)
        self._store = open_store(config.run_dir, config.loop)
        self._stop = stop
        self._intervals = dict(intervals)
        self._timer = Timer()
        self._step = 0
        self._saved_step: int | None = None
        self._measured_step: dict[str, int | None] = dict.fromkeys(_STATE_OF)
        self._skipped_in_a_row = 0
        self._metrics: dict[str, float] = {}

    @abstractmethod
    def step(self) -> StepRecord:
        """All ranks: one step. Raises StepRefused or StepAbandoned where it has changed nothing but the position in the
        training data."""

    @abstractmethod
    def measure(self, kind: str) -> Mapping[str, float]:
        """All ranks: a validation or evaluation after the present step. Raises as `step` does."""

    @abstractmethod
    def export(self, path: Path) -> None:
        """All ranks: write the policy as a .nemo."""

    @abstractmethod
    def _open_log(self) -> RunLog:
        """The files of this start of the run."""

    # -- the loop ------------------------------------------------------------------------------------------------

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
        """All ranks: give up what is under way where it does not fit any more."""
        if self._actor.max_over_ranks(int(self._stop.must_abandon())):
            raise StepAbandoned("told to stop before the update.")

    def _is_due(self, kind: str) -> bool:
        """Whether what is measured after the present step is still to come."""
        if self._measured_step[kind] == self._step:
            return False
        return _due(self._step, self._intervals[kind], self.finished) if self._step else self._config.loop.val_at_start

    def _still_due(self) -> list[str]:
        return [kind for kind in self._intervals if self._is_due(kind)]

    def _measure_if_due(self, log: RunLog) -> None:
        for kind in self._still_due():
            with self._whole_or_undone(kind):
                values = self.measure(kind)
            self._measured_step[kind] = self._step
            self._metrics |= {f"{kind}/{name}": value for name, value in values.items()}
            log.between(kind, self._step, values)

    # -- a part of every step ------------------------------------------------------------------------------------

    def _update_or_pass_over(self, batch: TrainingBatch, left: Callable[[Exception], str]) -> dict[str, float]:
        """Update the policy, or pass over a step whose loss or gradient is not finite, if the run is to go on then.

        left: leaves behind what the step had, and says where. Raises NonFiniteStep where it is not finite,
        NonFiniteError where earlier updates of the step have moved the policy; EnginesDisagree where generation has
        sampled from another policy than the one that trains.
        """
        loop = self._config.loop
        try:
            metrics = self._actor.update(batch)
        except MismatchError as error:
            raise EnginesDisagree(f"{error} {_MISMATCH_REMEDY}") from error
        except NonFiniteError as error:
            in_a_row = self._skipped_in_a_row + 1
            if loop.on_non_finite == "stop" or in_a_row > loop.max_non_finite:
                if error.updates_done:
                    raise
                raise NonFiniteStep(f"{error} {_non_finite_remedy(loop)}") from error
            self._skipped_in_a_row = in_a_row
            _log.warning("step %d is passed over: %s %s", self._step, error, left(error))
            skipped = self._config.algorithm.num_updates - error.updates_done
            return {"loss": error.loss, "grad_norm": error.grad_norm, "skipped_updates": float(skipped)}
        self._skipped_in_a_row = 0
        return {**metrics, "skipped_updates": 0.0}

    def _times(self) -> dict[str, float]:
        """Seconds of the step by part, and in all."""
        times = self._timer.take()
        return {**times, "time/step": sum(times.values())}

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything besides shards that the next step depends on."""
        return {
            "step": self._step,
            **{name: self._measured_step[kind] for kind, name in _STATE_OF.items()},
            "updates": self._step * self._config.algorithm.num_updates,
            "seed": self._config.seed,
            "data": self._sampler.state_dict(),
            "layout": self._layout,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` stopped. Raises CheckpointError if it belongs to another run."""
        state = checkpoint.state
        try:
            self._sampler.load_state_dict(state["data"])
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
        self._step = self._saved_step = state["step"]
        if self._store.last_save_seconds is not None:
            self._stop.took("save", self._store.last_save_seconds)
        # Earlier releases validated before every save.
        self._measured_step = {kind: state.get(name, self._step) for kind, name in _STATE_OF.items()}
        self._skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self._say(f"Continuing after step {self._step} from {checkpoint.path}")
        if news := layout_news(state["layout"], self._layout):
            self._say(news)

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

    def _say(self, text: str) -> None:
        """Print on the main rank, past the progress bar."""
        if self._actor.is_main:
            tqdm.write(text)
            sys.stdout.flush()


def check_seed(checkpoint: Checkpoint, seed: int) -> None:
    """Raise CheckpointError unless the checkpoint was saved with `seed`."""
    saved = checkpoint.state["seed"]
    if saved != seed:
        raise CheckpointError(
            f"{checkpoint.path}: saved with seed={saved}, this run has seed={seed}; the same plan and samples need the "
            "same seed."
        )


def _non_finite_remedy(loop: StepsConfig) -> str:
    if loop.on_non_finite == "skip":
        return f"More than trainer.lrpo.max_non_finite={loop.max_non_finite} steps in a row were like that."
    return "The next start meets it again; trainer.lrpo.on_non_finite=skip passes over it."


def _due(step: int, interval: int, done: bool) -> bool:
    """After every `interval` steps and after the last; never with interval 0."""
    return interval > 0 and (done or step % interval == 0)
