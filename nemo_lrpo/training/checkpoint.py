"""Checkpoints that are complete or not there.

Layout of one: `step_00000020/` with `shards/` (model, optimizer, schedule: Megatron's distributed checkpoint),
`state.json` and `arrays.npz` (router, data position, counters, layout) and `manifest.json`, written last. The directory
is built under a temporary name, verified, flushed to the disk and renamed. Which one is the newest is read from the
manifests, not from names.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import logging
import math
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lrpo.config.training import CheckpointConfig, LoopConfig
from nemo_lrpo.training import checkpoint_files as files
from nemo_lrpo.training.checkpoint_files import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    PARTIAL,
    PASSED_OVER,
    SHARDS_DIR,
    CheckpointError,
    Manifest,
    read_manifest,
)
from nemo_lrpo.training.protocols import Actor
from nemo_lrpo.training.state_files import STATE_FILE, read_state, write_state

__all__ = ["MANIFEST_FILE", "Checkpoint", "CheckpointError", "CheckpointStore", "load", "open_store"]

log = logging.getLogger(__name__)

REQUIRED_STATE = ("step", "updates", "seed", "data", "router", "languages", "layout")
PACKAGES = ("nemo_lrpo", "torch", "numpy", "megatron-core", "nemo-toolkit", "nemo-aligner")
"""Whose versions a manifest names."""
_KEPT_METRICS = {"reward", "gate", "quality", "length", "ended", "policy/loss", "policy/kl", "policy/lr", "epoch"}
_KEPT_METRICS |= {"loss", "accuracy", "margin"}
_KEPT_BY_LANGUAGE = ("reward/", "count/", "router/probability/", "accuracy/")
_HEADROOM = 1.05
"""Free space asked for, over the size of the last checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its directory and the state beside the shards."""

    path: Path
    state: dict[str, Any]
    manifest: Manifest | None = None

    @property
    def shards(self) -> Path:
        return self.path / SHARDS_DIR


@dataclass(frozen=True)
class Saved:
    """A completed checkpoint of which only the manifest has been read."""

    path: Path
    manifest: Manifest


@dataclass
class _Saving:
    """A save under way."""

    partial: Path
    final: Path
    step: int
    metrics: dict[str, float]
    started: float
    flushing: files.Flushing | None = None
    """Of the main rank, the state's files."""


class CheckpointStore:
    """The checkpoints of one run, under `directory`: the newest `keep` (0: all) and the best by a metric."""

    def __init__(self, directory: Path, keep: int, config: CheckpointConfig | None = None):
        self._directory = directory
        self._keep = keep
        self._config = config or CheckpointConfig()
        self._saving: _Saving | None = None
        self._save_seconds: float | None = None

    # -- saving --------------------------------------------------------------------------------------------------

    def save(
        self,
        actor: Actor,
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        wait: bool = True,
    ) -> Path:
        """All ranks: write a checkpoint of `state` (JSON values and arrays, REQUIRED_STATE present) and the actor's
        shards. metrics: of the step that is saved, for `best`.

        wait=False, with `async_save`: return as soon as the shards may change; `finish` ends the save. Raises
        CheckpointError, or another rank's error, on every rank; the older checkpoints are then as before.
        """
        missing = [key for key in REQUIRED_STATE if key not in state]
        if missing:
            raise CheckpointError(f"state to save lacks {', '.join(missing)}")
        self.finish(actor)
        final = self._directory / f"step_{state['step']:08d}"
        saving = _Saving(
            final.with_suffix(PARTIAL), final, state["step"], _kept(metrics or {}, self._config), time.monotonic()
        )
        with self._agreed(actor, saving):
            if actor.is_main:
                self._prepare(saving, state)
        background = self._config.async_save and not wait
        with self._agreed(actor, saving):
            (actor.begin_shards if background else actor.save_shards)(saving.partial / SHARDS_DIR)
        if background:
            self._saving = saving
            return final
        self._complete(actor, saving)
        return final

    def finish(self, actor: Actor, wait: bool = True) -> bool:
        """All ranks: end a save that goes on in the background, or, without `wait`, only if the shards are written.

        True if no save is under way any more. Raises as `save` does.
        """
        saving = self._saving
        if saving is None:
            return True
        with self._agreed(actor, saving):
            done = actor.end_shards(wait)
        if done:
            self._complete(actor, saving)
        return done

    def _prepare(self, saving: _Saving, state: Mapping[str, Any]) -> None:
        """Main rank: room for the checkpoint, its directory, and the state in it."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for leftover in files.incomplete_checkpoints(self._directory):
            if leftover.suffix == PARTIAL:
                log.warning("%s: was never completed; removed.", leftover)
                shutil.rmtree(leftover)
        self._leave_behind(saving.step)
        needed = max((saved.manifest.bytes for saved in self.saved()), default=0) * _HEADROOM
        if shutil.disk_usage(self._directory).free < needed:
            raise CheckpointError(
                f"{saving.partial}: not written; a checkpoint needs about {files.size(needed)}, "
                f"{files.space(self._directory)}. {_REMEDY}"
            )
        (saving.partial / SHARDS_DIR).mkdir(parents=True)
        saving.flushing = files.Flushing(write_state(saving.partial, state))

    def _complete(self, actor: Actor, saving: _Saving) -> None:
        """All ranks, shards written: manifest, verification, name."""
        with self._agreed(actor, saving):
            if actor.is_main:
                found = files.describe_files(saving.partial)
                seconds = time.monotonic() - saving.started
                manifest = Manifest(
                    FORMAT_VERSION, found, saving.step, time.time(), seconds, saving.metrics, _versions()
                )
                files.write_manifest(saving.partial, manifest)
                load(saving.partial)
                assert saving.flushing is not None
                files.publish(saving.partial, saving.final, saving.flushing.wait())
        self._saving = None
        self._save_seconds = time.monotonic() - saving.started
        with self._agreed(actor, None):
            if actor.is_main:
                self._prune()

    @contextmanager
    def _agreed(self, actor: Actor, saving: _Saving | None) -> Iterator[None]:
        """What fails on one rank fails on all; nothing of the save that failed stays behind."""
        error: Exception | None = None
        try:
            with files.named_errors(saving.partial if saving else self._directory, _REMEDY):
                yield
        except Exception as caught:
            error = caught
        try:
            actor.agree(error)
        except Exception:
            self._saving = None
            if actor.is_main and saving is not None:
                shutil.rmtree(saving.partial, ignore_errors=True)
            raise

    def _leave_behind(self, step: int) -> None:
        """Set damaged checkpoints of later steps aside: the run went on from an older one and is about to pass them."""
        for path in list(files.complete_checkpoints(self._directory)):
            try:
                if read_manifest(path).step > step:
                    load(path)
            except CheckpointError:
                aside = path.with_name(path.name + PASSED_OVER)
                log.warning("%s: damaged, and left behind; now %s, until the run gets there.", path, aside.name)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    def _prune(self) -> None:
        """Take away what is neither among the newest nor among the best, and damaged ones that the run has passed."""
        saved = self.saved()
        # Of one step, the last that was saved.
        steps = list({one.manifest.step: one for one in reversed(saved)}.values())[::-1]
        newest = steps[: self._keep] if self._keep else steps
        stay = {one.path for one in (*newest, *self._best_of(steps))}
        passed = files.left_behind(self._directory, steps[0].manifest.step) if steps else ()
        for path in (*(one.path for one in saved if one.path not in stay), *passed):
            try:
                files.remove(path)
            except OSError as error:
                log.warning("%s: could not be removed (%s).", path, error)

    # -- what is there -------------------------------------------------------------------------------------------

    def saved(self) -> list[Saved]:
        """Completed checkpoints with a readable manifest, the newest first; nothing else of them is read."""
        found = []
        for path in files.complete_checkpoints(self._directory):
            try:
                found.append(Saved(path, read_manifest(path)))
            except CheckpointError as error:
                log.warning("%s", error)
        return sorted(found, key=lambda one: one.manifest.order, reverse=True)

    def best(self) -> list[Saved]:
        """The `keep_best` checkpoints with the best value of the metric, the best first; of equals the newer."""
        return self._best_of(self.saved())

    def _best_of(self, saved: list[Saved]) -> list[Saved]:
        name, sign = self._config.best_metric, 1.0 if self._config.best_mode == "max" else -1.0
        scored = [one for one in saved if name in one.manifest.metrics]
        scored.sort(key=lambda one: sign * one.manifest.metrics[name], reverse=True)
        return scored[: self._config.keep_best]

    def latest(self) -> Checkpoint | None:
        """The newest completed checkpoint, verified; None where there is none. Incomplete ones are passed over.

        Raises CheckpointError where the newest is damaged, unless `on_damage` is `older` and an older one is whole.
        """
        for path in files.incomplete_checkpoints(self._directory):
            log.warning("%s: was never completed; passed over.", path)
        damaged: list[CheckpointError] = []
        candidates: list[Saved] = []
        for path in files.complete_checkpoints(self._directory):
            try:
                candidates.append(Saved(path, read_manifest(path)))
            except CheckpointError as error:
                damaged.append(error)
        candidates.sort(key=lambda one: one.manifest.order)
        # One whose manifest cannot be read may be the newest.
        for error in damaged:
            self._pass_over(error, bool(candidates))
        while candidates:
            try:
                return load(candidates.pop().path)
            except CheckpointError as error:
                self._pass_over(error, bool(candidates))
                damaged.append(error)
        if damaged:
            raise CheckpointError(f"{damaged[-1]} No older checkpoint in {self._directory} is whole.")
        return None

    def _pass_over(self, error: CheckpointError, others: bool) -> None:
        if self._config.on_damage != "older":
            hint = " trainer.lrpo.checkpoint.on_damage=older goes on from the next older one." if others else ""
            raise CheckpointError(f"{error}{hint}") from error
        log.warning("DAMAGED: %s An older checkpoint is taken (on_damage=older).", error)

    @property
    def last_save_seconds(self) -> float | None:
        """What the last save took, from its start to the last file; of an earlier process where this one has not saved
        yet, None where none has."""
        if self._save_seconds is None:
            newest = next(iter(self.saved()), None)
            self._save_seconds = newest and newest.manifest.save_seconds
        return self._save_seconds


_REMEDY = (
    "Older checkpoints are untouched. Free some space, lower trainer.lrpo.keep_checkpoints, or move run_dir to another "
    "disk; then start again."
)


def open_store(run_dir: str | Path, loop: LoopConfig) -> CheckpointStore:
    """The store of a run as configured."""
    return CheckpointStore(Path(run_dir) / "checkpoints", loop.keep_checkpoints, loop.checkpoint)


def load(path: Path) -> Checkpoint:
    """Verify the checkpoint at `path` and read its state. Raises CheckpointError naming what is wrong with it."""
    manifest = read_manifest(path)
    found = files.damage(path, manifest.files)
    if found:
        raise CheckpointError(f"{path}: {files.join(found)}. Restore it, or remove the checkpoint to use an older one.")
    state = read_state(path)
    missing = [key for key in REQUIRED_STATE if key not in state]
    if missing:
        raise CheckpointError(f"{path / STATE_FILE} lacks {', '.join(missing)}; the checkpoint cannot be resumed.")
    if state["step"] != manifest.step:
        raise CheckpointError(f"{path}: the state is of step {state['step']}, the manifest of {manifest.step}.")
    return Checkpoint(path, state, manifest)


def _kept(metrics: Mapping[str, float], config: CheckpointConfig) -> dict[str, float]:
    """What a manifest keeps of a step's metrics: a few means, the router's shares, and what `best` goes by."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    if config.keep_best and config.best_metric not in finite:
        near = difflib.get_close_matches(config.best_metric, finite, n=3)
        log.warning(
            "trainer.lrpo.checkpoint.best_metric=%r was not measured at this step; the checkpoint is none of the best."
            "%s",
            config.best_metric,
            f" Near: {', '.join(near)}." if near else "",
        )
    return {name: value for name, value in finite.items() if name == config.best_metric or _is_kept(name)}


def _is_kept(name: str) -> bool:
    name = name.removeprefix("validation/")
    return name in _KEPT_METRICS or name.startswith(_KEPT_BY_LANGUAGE)


@functools.cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
