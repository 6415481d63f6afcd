"""A checkpoint is complete or it is not there, and one that lacks a part is refused with its name."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from nemo_lrpo.config.training import CheckpointConfig
from nemo_lrpo.training import checkpoint_files
from nemo_lrpo.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore, load
from nemo_lrpo.training.trainer import check_resumable
from tools import replay

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


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("mode", "best"), [("max", [3, 1]), ("min", [2, 4])])
def test_the_best_stay_beside_the_newest(tmp_path: Path, mode: str, best: list[int]) -> None:
    config = CheckpointConfig(keep_best=2, best_metric="validation/reward/sw", best_mode=mode)
    store = CheckpointStore(tmp_path, 2, config)
    rewards = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.3, 5: None, 6: float("nan"), 7: 0.4}
    for step, reward in rewards.items():
        store.save(OneRank(), state(step), {} if reward is None else {"validation/reward/sw": reward})
    assert [one.manifest.step for one in store.best()] == best
    assert [one.manifest.step for one in store.saved()] == sorted({6, 7, *best}, reverse=True)
    assert store.best()[0].manifest.metrics == {"validation/reward/sw": rewards[best[0]]}


def test_of_equals_the_newer_is_the_best_and_the_newest_is_never_taken_away(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1, CheckpointConfig(keep_best=1))
    for step, reward in ((1, 0.5), (2, 0.5), (3, 0.1)):
        store.save(OneRank(), state(step), {"reward": reward})
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_a_metric_that_was_not_measured_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, 1, CheckpointConfig(keep_best=1, best_metric="rewrad"))
    store.save(OneRank(), state(1), {"reward": 0.5})
    assert "best_metric='rewrad' was not measured" in caplog.text and "Near: reward" in caplog.text


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    for seed in (1, 2):
        store.save(OneRank(), state(5) | {"seed": seed})
    latest = store.latest()
    assert latest is not None and latest.state["seed"] == 2
    assert names(tmp_path) == ["step_00000005"]


def test_what_is_newest_is_not_read_from_names(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 0)
    for step in (1, 2, 3):
        store.save(OneRank(), state(step))
    (tmp_path / "step_00000003").rename(tmp_path / "a_copy_of_mine")
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000099")
    latest = store.latest()
    assert latest is not None and latest.state["step"] == 3


def test_a_damaged_newest_stops_the_run_unless_an_older_one_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        CheckpointStore(tmp_path, 0).save(OneRank(), state(step))
    remove_shard(tmp_path / "step_00000003")
    with pytest.raises(CheckpointError, match=r"step_00000003: .*distcp is missing.*on_damage=older goes on"):
        CheckpointStore(tmp_path, 0).latest()
    store = CheckpointStore(tmp_path, 0, CheckpointConfig(on_damage="older"))
    latest = store.latest()
    assert latest is not None and latest.state["step"] == 2
    assert "DAMAGED" in caplog.text and "step_00000003" in caplog.text
    # The next save goes past it: from then on, the run's own newest is the newest.
    store.save(OneRank(), state(3) | {"seed": 7})
    latest = CheckpointStore(tmp_path, 0).latest()
    assert latest is not None and latest.state["seed"] == 7


def test_a_later_damaged_one_is_set_aside_until_the_run_has_caught_up(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 0, CheckpointConfig(on_damage="older"))
    for step in (1, 9):
        store.save(OneRank(), state(step))
    (tmp_path / "step_00000009" / "manifest.json").write_text("{")
    store.save(OneRank(), state(2))
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000009.passed_over"]
    latest = CheckpointStore(tmp_path, 0).latest()
    assert latest is not None and latest.state["step"] == 2
    (tmp_path / "step_old.passed_over").mkdir()
    store.save(OneRank(), state(8))
    assert "step_00000009.passed_over" in names(tmp_path), "it may still be mended"
    store.save(OneRank(), state(10))
    assert names(tmp_path) == [*(f"step_{step:08}" for step in (1, 2, 8, 10)), "step_old.passed_over"]


def test_a_damaged_state_that_no_hash_covers_does_not_take_the_place_of_a_new_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "HASHED_BELOW", 0)
    store = CheckpointStore(tmp_path, 1, CheckpointConfig(on_damage="older"))
    store.save(OneRank(), state(9))
    edited = (tmp_path / "step_00000009" / "state.json").read_text().replace('"seed"', '"sead"')
    (tmp_path / "step_00000009" / "state.json").write_text(edited)
    store.save(OneRank(), state(2))
    assert names(tmp_path) == ["step_00000002", "step_00000009.passed_over"]


def test_a_replay_begins_from_the_nearest_whatever_became_of_the_others(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 0)
    for step in (1, 3, 5):
        store.save(OneRank(), state(step))
    remove_shard(tmp_path / "step_00000005")
    shutil.copytree(tmp_path / "step_00000005", tmp_path / "step_00000002.passed_over")
    shutil.copytree(tmp_path / "step_00000005", tmp_path / "step_00000004.partial")
    found = [replay.find_checkpoint(tmp_path, step, None) for step in (0, 2, 4)]
    assert found[0] is None and [one and one.state["step"] for one in found[1:]] == [1, 3]
    with pytest.raises(CheckpointError, match="step_00000005: .*missing"):
        replay.find_checkpoint(tmp_path, 6, None)


def test_where_all_are_damaged_nothing_starts_from_scratch(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 0, CheckpointConfig(on_damage="older"))
    store.save(OneRank(), state(1))
    remove_shard(tmp_path / "step_00000001")
    with pytest.raises(CheckpointError, match="No older checkpoint"):
        store.latest()


def test_a_damaged_manifest_is_no_reason_to_take_an_older_one_silently(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 0)
    for step in (1, 2):
        store.save(OneRank(), state(step))
    manifest = tmp_path / "step_00000002" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(CheckpointError, match=r"step_00000002/manifest\.json: not a manifest"):
        store.latest()


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, 2)
    store.save(OneRank(), state(1))
    usage = type("Usage", (), {"free": 700})
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs about 1\.\d KB, 700 bytes free.*keep_checkpoints"):
        store.save(OneRank(), state(2))
    assert names(tmp_path) == ["step_00000001"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"checkpoints/step_00000001\.partial: not written"):
        CheckpointStore(tmp_path / "checkpoints", 2).save(OneRank(), state(1))


def test_a_directory_that_may_only_be_read_keeps_what_it_holds() -> None:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "checkpoints"
        store = CheckpointStore(directory, 2)
        store.save(OneRank(), state(1))
        Path(place).chmod(0o755)
        directory.chmod(0o555)
        with without_privileges(), pytest.raises(CheckpointError, match=r"not written .*Permission denied.* free"):
            store.save(OneRank(), state(2))
        directory.chmod(0o755)
        latest = store.latest()
        assert latest is not None and latest.state["step"] == 1 and names(directory) == ["step_00000001"]


@contextmanager
def without_privileges() -> Iterator[None]:
    """Permissions hold for this process, root or not."""
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_that_vanishes_while_it_is_saved_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, 2)
    store.save(OneRank(), state(1))
    plain = checkpoint_files.write_manifest

    def lose(path: Path, manifest: object) -> None:
        plain(path, manifest)
        remove_shard(path)

    monkeypatch.setattr("nemo_lrpo.training.checkpoint_files.write_manifest", lose)
    with pytest.raises(CheckpointError, match="distcp is missing"):
        store.save(OneRank(), state(2))
    monkeypatch.undo()
    latest = store.latest()
    assert latest is not None and latest.state["step"] == 1 and names(tmp_path) == ["step_00000001"]


def test_a_disk_that_fills_up_leaves_the_older_one_and_no_rubbish(tmp_path: Path) -> None:
    """The system's own error: no file may grow beyond 1,500 bytes, and the state is larger."""
    store = CheckpointStore(tmp_path, 2)
    store.save(OneRank(), state(1))
    large = state(2) | {"router": {"values": np.random.default_rng(0).random(4000)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step_00000002\.partial: not written .*File too large.*free"):
            store.save(OneRank(), large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["step_00000001"]
    store.save(OneRank(), large)
    latest = store.latest()
    assert latest is not None and latest.state["step"] == 2


def test_a_state_that_the_disk_does_not_take_is_an_error_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is flushed beside the shards' writing, and the save still hears of it."""
    store, plain = CheckpointStore(tmp_path, 2), checkpoint_files._sync
    store.save(OneRank(), state(1))

    def broken(path: Path) -> None:
        if path.name == "state.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(path)

    monkeypatch.setattr(checkpoint_files, "_sync", broken)
    with pytest.raises(CheckpointError, match=r"step_00000002\.partial: not written .*Input/output error"):
        store.save(OneRank(), state(2))
    assert names(tmp_path) == ["step_00000001"]


class Background(OneRank):
    """Writes its shard when asked for the third time whether it is done."""

    def begin_shards(self, directory: Path) -> None:
        self._directory, self._asked = directory, 0

    def end_shards(self, wait: bool) -> bool:
        self._asked += 1
        if not wait and self._asked < 3:
            return False
        self.save_shards(self._directory)
        return True


def test_a_save_in_the_background_counts_once_it_is_whole(tmp_path: Path) -> None:
    store, actor = CheckpointStore(tmp_path, 2, CheckpointConfig(async_save=True)), Background()
    store.save(actor, state(1), wait=False)
    assert store.latest() is None
    assert [store.finish(actor, wait=False) for _ in range(3)] == [False, False, True]
    latest = store.latest()
    assert latest is not None and latest.state["step"] == 1
    store.save(actor, state(2), wait=False)
    # The next save, and the end of the run, wait for the one before.
    store.save(actor, state(3))
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_a_background_save_that_fails_is_raised_and_gone(tmp_path: Path) -> None:
    store, actor = CheckpointStore(tmp_path, 2, CheckpointConfig(async_save=True)), Background(fail=True)
    store.save(actor, state(1), wait=False)
    with pytest.raises(CheckpointError, match="no space left"):
        store.finish(actor)
    assert store.finish(actor) and names(tmp_path) == []


def test_how_long_a_save_takes_is_known_to_the_next_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    assert store.last_save_seconds is None
    store.save(OneRank(), state(1))
    assert store.last_save_seconds is not None and store.last_save_seconds > 0
    later = CheckpointStore(tmp_path, 2).last_save_seconds
    assert later is not None and 0 < later <= store.last_save_seconds


def test_a_checkpoint_of_format_version_1_is_read(tmp_path: Path) -> None:
    """As written before this release: files only in the manifest, arrays in the JSON."""
    path = CheckpointStore(tmp_path, 1).save(OneRank(), state(4))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({"version": 1, "files": manifest["files"]}))
    store = CheckpointStore(tmp_path, 1)
    latest = store.latest()
    assert latest is not None and latest.state == state(4) and latest.manifest is not None
    assert store.last_save_seconds is None
    store.save(OneRank(), state(6))
    assert names(tmp_path) == ["step_00000006"]


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
