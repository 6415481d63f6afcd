"""What a checkpoint is on the disk: a directory with a manifest, which a crash leaves whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
MANIFEST_FILE = "manifest.json"
SHARDS_DIR = "shards"
PARTIAL, REPLACED, PASSED_OVER = ".partial", ".replaced", ".passed_over"
"""Suffixes: being written or removed; complete, and about to make room for the same step; damaged, and left behind."""
HASHED_BELOW = 1 << 20
"""Files of fewer bytes are hashed, of larger ones only the size is kept."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written; the message names it, what is wrong with it and the remedy."""


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself, written after everything else in it.

    files: path in the checkpoint -> {"bytes": size, "sha256": of small ones}. metrics: of the step that was saved.
    save_seconds: from the start of the save to the manifest. written: seconds since 1970; tells two saves of one step
    apart. Version 1 had files only.
    """

    version: int
    files: dict[str, dict[str, Any]]
    step: int = -1
    written: float = 0.0
    save_seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(facts["bytes"] for facts in self.files.values())

    @property
    def order(self) -> tuple[int, float]:
        """Later saves have larger ones."""
        return self.step, self.written

    @property
    def shards(self) -> dict[str, int]:
        """Sizes of the files that hold model and optimizer, by name."""
        return {name: facts["bytes"] for name, facts in self.files.items() if name.startswith(f"{SHARDS_DIR}/")}


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`. Raises CheckpointError, naming what is wrong with it."""
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise CheckpointError(f"{path}: no {MANIFEST_FILE}; the checkpoint was never completed. Remove it.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["version"]
        if version not in READABLE_VERSIONS:
            accepted = ", ".join(map(str, READABLE_VERSIONS))
            raise CheckpointError(f"{path}: format version {version}; this release reads versions {accepted}.")
        if version == 1:
            content |= {"step": json.loads((path / "state.json").read_text(encoding="utf-8"))["step"]}
        manifest = Manifest(**content)
        if not all(isinstance(facts["bytes"], int) for facts in manifest.files.values()):
            raise TypeError("a file has no size")
        if not isinstance(manifest.step, int) or not isinstance(manifest.written, (int, float)):
            raise TypeError("step and time are no numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a manifest ({error}).") from error
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of the checkpoint at `path`."""
    text = json.dumps(asdict(manifest), indent=1, allow_nan=False)
    (path / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def describe_files(path: Path) -> dict[str, dict[str, Any]]:
    """Sizes of all files under `path`, hashes of the small ones: `Manifest.files`."""
    files = {}
    for file in sorted(one for one in path.rglob("*") if one.is_file()):
        size = file.stat().st_size
        facts: dict[str, Any] = {"bytes": size}
        if size < HASHED_BELOW:
            facts["sha256"] = _sha256(file)
        files[file.relative_to(path).as_posix()] = facts
    return files


def damage(path: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What of `files` (`Manifest.files`) is not at `path` as it was written; empty where all is well."""
    found = []
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif (size := file.stat().st_size) != facts["bytes"]:
            found.append(f"{name} has {size} bytes, {facts['bytes']} were written")
        elif "sha256" in facts and _sha256(file) != facts["sha256"]:
            found.append(f"{name} is not what was written (sha256 differs)")
    return found


def complete_checkpoints(directory: Path) -> Iterator[Path]:
    """Directories of checkpoints that were completed, damaged ones included, in no order."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.suffix not in (PARTIAL, PASSED_OVER) and (path / MANIFEST_FILE).is_file():
            yield path


def incomplete_checkpoints(directory: Path) -> Iterator[Path]:
    """Directories of checkpoints without a manifest, or whose writing or removal was interrupted."""
    for path in sorted(directory.glob("step_*")):
        if path.is_dir() and (path.suffix == PARTIAL or not (path / MANIFEST_FILE).is_file()):
            yield path


def left_behind(directory: Path, step: int) -> Iterator[Path]:
    """Damaged checkpoints that were set aside, of steps up to `step`; by their names, since all else may be damaged."""
    for path in sorted(directory.glob(f"step_*{PASSED_OVER}")):
        number = path.name.removeprefix("step_").removesuffix(PASSED_OVER)
        if number.isdecimal() and int(number) <= step:
            yield path


def publish(partial: Path, final: Path, flushed: Collection[Path] = ()) -> None:
    """Give a finished directory its name, durably; the disk has the files `flushed`. What had the name before stays
    complete until then, and goes."""
    sync_tree(partial, but=flushed)
    replaced = final.with_suffix(REPLACED)
    if final.exists():
        if replaced.exists():
            remove(replaced)
        final.rename(replaced)
    partial.rename(final)
    _sync(final.parent)
    if replaced.exists():
        remove(replaced)


def remove(path: Path) -> None:
    """Take a checkpoint away: it is incomplete by its name before the first file goes."""
    doomed = path if path.suffix == PARTIAL else path.with_name(path.name + PARTIAL)
    if doomed != path:
        path.rename(doomed)
    shutil.rmtree(doomed)


class Flushing:
    """Complete files on their way to the disk, while other work goes on."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = frozenset(files)
        pool = ThreadPoolExecutor(1, "flush")
        self._done = pool.submit(lambda: [_sync(file) for file in files])
        pool.shutdown(wait=False)

    def wait(self) -> frozenset[Path]:
        """The files, once the disk has them. Raises OSError where it could not take one."""
        self._done.result()
        return self._files


def sync_tree(directory: Path, but: Collection[Path] = ()) -> None:
    """Wait until the disk has every file under `directory` `but` some, and the directories that name them."""
    for root, _, names in os.walk(directory, topdown=False):
        for file in map(Path(root).joinpath, names):
            if file not in but:
                _sync(file)
        _sync(Path(root))


@contextmanager
def named_errors(path: Path, remedy: str) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the path, what the system said, the free space and a remedy."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: not written ({error}); {space(path)}. {remedy}") from error


def space(path: Path) -> str:
    """Free space where `path` is or would be, to read."""
    try:
        free = shutil.disk_usage(existing(path)).free
    except OSError as error:
        return f"free space unknown ({error})"
    return f"{size(free)} free"


def existing(path: Path) -> Path:
    """The nearest of `path` and its parents that exists."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def size(count: float) -> str:
    """Bytes, to read."""
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} {units[0]}" if units[0] == "bytes" else f"{count:.1f} {units[0]}"


def join(found: Iterable[str], most: int = 5) -> str:
    """A list to read, cut where it is long."""
    items = list(found)
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
