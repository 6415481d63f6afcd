"""Between the steps of a supervised training, whose loop is NeMo-Aligner's: logs, checkpoints, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from nemo_lrpo.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from nemo_lrpo.training.metrics import JsonLines
from nemo_lrpo.training.protocols import Actor, Logger
from nemo_lrpo.training.stopping import Stop

_KINDS = {"train/": "train", "val/": "validation"}
_NAMES = {"step_time": "time/step", "validation_step_time": "time/batch"}


class StoppedEarly(Exception):
    """The run stops before its last step; raised on all ranks. `reason`: see Stop."""

    def __init__(self, reason: int) -> None:
        super().__init__(reason)
        self.reason = reason


class _Norm(Protocol):
    gradient_norm: float


class Between:
    """Takes what the loop says after each step; the same on every rank."""

    def __init__(
        self,
        run_dir: Path,
        *,
        actor: Actor,
        model: _Norm,
        store: CheckpointStore,
        stop: Stop,
        log: Logger,
        state: Mapping[str, Any],
        step: int,
        on_progress: Callable[[str], None],
    ) -> None:
        """state: of a checkpoint, but for the step, which `step` is at the start."""
        self._actor, self._model, self._store, self._stop, self._log = actor, model, store, stop, log
        self._state = dict(state)
        self.step = step
        self._saved = step
        self._on_progress = on_progress
        self._metrics: dict[str, float] = {}
        self._file = JsonLines(run_dir / "metrics.jsonl", step or None) if actor.is_main else None
        if store.last_save_seconds is not None:
            stop.took("save", store.last_save_seconds)

    def log_metrics(self, metrics: Mapping[str, float], step: int, prefix: str = "") -> None:
        """Of a step or a validation. The loop counts steps from 0, and validations by the steps that are done."""
        self._on_progress("the next step")
        kind = _KINDS[prefix]
        values = {_NAMES.get(name, name): float(value) for name, value in metrics.items()}
        if kind == "train":
            step += 1
            self.step = step
            values["grad_norm"] = self._model.gradient_norm
            self._stop.took("step", values["time/step"])
            self._metrics = values
        if self._file is not None:
            self._file.write({"kind": kind, "step": step, **values})
            self._log({f"{kind}/{name}": value for name, value in values.items()}, step)

    def finalize(self) -> None:
        """The loop is at its end."""

    def start_time(self) -> None:
        """The loop begins."""

    def is_finished(self) -> bool:
        """False; where the next step would not fit into the time left, raises StoppedEarly."""
        reason = self._actor.max_over_ranks(self._stop.reason("step"))
        if reason:
            raise StoppedEarly(reason)
        return False

    def save(self) -> None:
        """All ranks: write a checkpoint of this step, unless it is written."""
        if self._saved == self.step:
            return
        if self._file is not None:
            self._file.sync()
        with self._stop.timed("save"):
            state = {**self._state, "step": self.step, "updates": self.step}
            self._store.save(self._actor, state, self._metrics)
        self._saved = self.step

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def check_same_run(checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the checkpoint was saved with the seed, traces and step size of `state`."""
    for name in ("seed", "data"):
        if checkpoint.state[name] != state[name]:
            raise CheckpointError(
                f"{checkpoint.path}: saved with {name}={checkpoint.state[name]}, this run has {state[name]}; go on "
                "with the traces and configuration as they were, or start in another run_dir."
            )
