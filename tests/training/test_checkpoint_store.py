"""A checkpoint is complete or it is not there, and one that lacks a part is refused with its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_lrpo.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore, load
from nemo_lrpo.training.trainer import check_resumable

LANGUAGES = ["de", "en"]


class OneRank:
    """The part of the actor that a store uses: one rank that writes a shard."""

    is_main = True

    def __init__(self, fail: bool = False):
        self._fail = fail

    def save_shards(self, directory: Path) -> None:
        (directory / "__0_0.distcp").write_bytes(bytes(range(256)) * 4)
        if self._fail:
            raise OSError("no space left on device")

    def agree(self, error: BaseException | None) -> None:
        if error is not None:
            raise error


def state(step: int) -> dict[str, object]:
    return {
        "step": step,
        "updates": step,
        "seed": 1,
        "data": {"consumed": step},
        "router": {"values": [0.1, -1e-300, 1 / 3]},
        "languages": LANGUAGES,
        "layout": {"tensor": 1},
    }


def test_state_survives_exactly_and_the_newest_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=0)
    for step in (2, 10, 4):
        store.save(OneRank(), state(step))
    latest = store.latest()
    assert latest is not None and latest.state == state(10)
    assert (latest.shards / "__0_0.distcp").stat().st_size == 1024


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 5):
        store.save(OneRank(), state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_a_save_that_fails_leaves_the_older_one_in_charge(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(OneRank(), state(1))
    with pytest.raises(CheckpointError, match=r"step_00000002.*no space left.* free\. Older checkpoints are untouched"):
        store.save(OneRank(fail=True), state(2))
    latest = store.latest()
    assert latest is not None and latest.state["step"] == 1
    # What the failed one left behind does not stand in the way of the next.
    store.save(OneRank(), state(2))
    latest = store.latest()
    assert latest is not None and latest.state["step"] == 2


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "nowhere", keep=1).latest() is None


def remove_state(path: Path) -> None:
    (path / "state.json").unlink()


def remove_shard(path: Path) -> None:
    (path / "shards" / "__0_0.distcp").unlink()


def shorten_shard(path: Path) -> None:
    (path / "shards" / "__0_0.distcp").write_bytes(b"short")


def edit_state(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"seed": 1', '"seed": 2'))


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_state, "state.json is missing"),
        (remove_shard, "__0_0.distcp is missing"),
        (shorten_shard, "5 bytes, 1024 were written"),
        (edit_state, "state.json is not what was written"),
        (remove_manifest, "never completed"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    path = CheckpointStore(tmp_path, keep=1).save(OneRank(), state(3))
    damage(path)
    with pytest.raises(CheckpointError, match=words):
        load(path)


def test_a_state_that_lacks_a_part_is_not_written(tmp_path: Path) -> None:
    incomplete = state(1)
    del incomplete["router"]
    with pytest.raises(CheckpointError, match="lacks router"):
        CheckpointStore(tmp_path, keep=1).save(OneRank(), incomplete)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, keep=1).save(OneRank(), state(1))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        load(path)


def test_a_checkpoint_of_other_languages_or_seed_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, state(1))
    check_resumable(checkpoint, seed=1, languages=LANGUAGES)
    with pytest.raises(CheckpointError, match="saved for languages de, en; this run has de, fr"):
        check_resumable(checkpoint, seed=1, languages=["de", "fr"])
    with pytest.raises(CheckpointError, match="saved with seed=1, this run has seed=2"):
        check_resumable(checkpoint, seed=2, languages=LANGUAGES)
