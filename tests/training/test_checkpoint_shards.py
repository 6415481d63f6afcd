"""The store over Megatron's own writer: kills, full disks on one rank of two, and saves in the background."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT, run

pytestmark = pytest.mark.slow

WORKER = str(ROOT / "tests" / "training" / "shards_worker.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One start of the stack for all of it."""
    path = tmp_path_factory.mktemp("shards")
    run([WORKER, str(path)], timeout=500)
    return json.loads((path / "result.json").read_text())


def test_killed_while_megatron_writes(seen: dict[str, Any]) -> None:
    """Every start found a whole checkpoint, with the shards of its step, and none older than one found before."""
    kills = seen["kills"]
    assert kills["steps"] == sorted(kills["steps"]) and kills["steps"][0] == 2
    assert kills["steps"][-1] > 2 and kills["went_on"], "no child got as far as a save"
    assert kills["left"] <= 2


def test_no_process_outlives_a_killed_rank(seen: dict[str, Any]) -> None:
    assert seen["processes"] == []


@pytest.mark.parametrize(
    ("fault", "failed", "words"),
    [
        ("rank 0 False", 0, "a shard was not written"),
        ("rank 1 False", 1, "a shard was not written"),
        ("rank 1 True", 1, "a shard was not written"),
        ("metadata False", 0, "No space left on device: 'metadata.json'"),
    ],
)
def test_a_disk_that_is_full_on_one_rank_ends_the_save_on_both(
    seen: dict[str, Any], fault: str, failed: int, words: str
) -> None:
    """Also in the background, and after all shards are written; the older checkpoint stays, the next save works."""
    ranks = seen[fault]
    assert "CheckpointError" in ranks[failed]["error"] and words in ranks[failed]["error"]
    assert f"RankFailure: rank {failed}: " in ranks[1 - failed]["error"]
    assert [(rank["newest"], rank["after"]) for rank in ranks] == [(1, 2), (1, 2)]
    assert max(rank["seconds"] for rank in ranks) < 30


def test_a_background_save_holds_the_moment_it_was_asked_for(seen: dict[str, Any]) -> None:
    for rank in seen["background"]:
        assert (rank["step"], rank["values"]) == (5, [5.0])


def test_the_manifest_lists_every_shard(seen: dict[str, Any]) -> None:
    shards = {Path(name).name for name in seen["files"] if name.startswith("shards/")}
    assert {".metadata", "common.pt", "metadata.json", "__0_0.distcp"} <= shards
