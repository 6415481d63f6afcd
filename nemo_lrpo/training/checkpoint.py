"""Checkpoints that are complete or not there.

Layout of one: `step_00000020/` with `shards/` (model, optimizer, schedule: Megatron's distributed checkpoint),
`state.json` (router, data position, counters, randomness, layout, versions) and `manifest.json`, written last. The
directory is built under a temporary name and renamed; without a manifest it does not count. Nothing is read from the
name of a directory but its place in the listing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lrpo.training.protocols import Actor

FORMAT_VERSION = 1
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
SHARDS_DIR = "shards"
REQUIRED_STATE = ("step", "updates", "seed", "data", "router", "languages", "layout")
_HASHED_BELOW = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names it, the missing or differing part and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its directory and the state beside the shards."""

    path: Path
    state: dict[str, Any]

    @property
    def shards(self) -> Path:
        return self.path / SHARDS_DIR


class CheckpointStore:
    """The checkpoints of one run, under `directory`."""

    def __init__(self, directory: Path, keep: int):
        self._directory = directory
        self._keep = keep

    def save(self, actor: Actor, state: dict[str, Any]) -> Path:
        """All ranks: write a checkpoint of `state` (JSON-able, REQUIRED_STATE present) and the actor's shards."""
        missing = [key for key in REQUIRED_STATE if key not in state]
        if missing:
            raise CheckpointError(f"state to save lacks {', '.join(missing)}")
        final = self._directory / f"step_{state['step']:08d}"
        partial = final.with_suffix(".partial")
        if actor.is_main:
            self._directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        actor.barrier()
        actor.save_shards(partial / SHARDS_DIR)
        actor.barrier()
        if actor.is_main:
            _write(partial / STATE_FILE, json.dumps(state, ensure_ascii=False, indent=1, allow_nan=False))
            _write(partial / MANIFEST_FILE, json.dumps(_manifest(partial), indent=1))
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            self._prune()
        actor.barrier()
        return final

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, verified; None where there is none. Partial ones are passed over."""
        complete = sorted(self._directory.glob(f"step_*/{MANIFEST_FILE}"))
        return load(complete[-1].parent) if complete else None

    def _prune(self) -> None:
        complete = sorted(path.parent for path in self._directory.glob(f"step_*/{MANIFEST_FILE}"))
        for path in complete[: -self._keep] if self._keep else []:
            shutil.rmtree(path)


def load(path: Path) -> Checkpoint:
    """Verify the checkpoint at `path` and read its state. Raises CheckpointError naming what is wrong with it."""
    manifest_file = path / MANIFEST_FILE
    if not manifest_file.is_file():
        raise CheckpointError(f"{path}: no {MANIFEST_FILE}; the checkpoint was never completed. Remove it.")
    try:
        manifest = json.loads(manifest_file.read_text())
        version, files = manifest["version"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest_file}: not a manifest ({error}).") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}; this release reads version {FORMAT_VERSION}.")
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(
                f"{path}: {name} is missing. Restore it, or remove the checkpoint to use an older one."
            )
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{path}: {name} has {file.stat().st_size} bytes, {facts['bytes']} were written.")
        if "sha256" in facts and _sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{path}: {name} is not what was written (sha256 differs).")
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE_FILE}: unreadable ({error}).") from error
    missing = [key for key in REQUIRED_STATE if key not in state]
    if missing:
        raise CheckpointError(f"{path / STATE_FILE} lacks {', '.join(missing)}; the checkpoint cannot be resumed.")
    return Checkpoint(path, state)


def _manifest(directory: Path) -> dict[str, Any]:
    """Sizes of all files, hashes of the small ones."""
    files = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        size = file.stat().st_size
        facts: dict[str, Any] = {"bytes": size}
        if size < _HASHED_BELOW:
            facts["sha256"] = _sha256(file)
        files[file.relative_to(directory).as_posix()] = facts
    return {"version": FORMAT_VERSION, "files": files}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, text: str) -> None:
    """Write and flush to the disk before anything is renamed over it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
