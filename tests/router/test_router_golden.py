"""The released code's recorded tables and probabilities, reproduced with the switches that follow it.

Recorded values are float32: they are held to 1e-6.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from router_rows import Seen, observe

from nemo_lrpo.config.router import RouterConfig, ScheduleConfig
from nemo_lrpo.router import build_router
from nemo_lrpo.router.policy import Context
from nemo_lrpo.types import Prompt

DATA = Path(__file__).parents[1] / "data"
TOLERANCE = {"rtol": 0.0, "atol": 1e-6}


def released(**changes) -> RouterConfig:
    switches = {"region_values": "regional_topic", "topic_update": "per_cell", "alpha": 0.1}
    return RouterConfig(**{**switches, **changes})


def names(value) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def seen(row: dict, language: str, index: int) -> Seen:
    # Zero-padded: the ids sort in the order of the recording.
    return Seen(f"{index:04d}", language, row["reward"], names(row["topic"]), names(row["region"]))


@pytest.mark.parametrize("topic_update", ["per_cell", "once"])
def test_single_updates_and_probabilities(topic_update: str) -> None:
    """One rollout per update: both update rules are the same moving average, and both give the recorded tables."""
    golden = json.loads((DATA / "golden_router.json").read_text())
    config = released(
        topic_update=topic_update,
        update_every=1,
        normalisation="none",
        temperature=ScheduleConfig(init=golden["temperature"], min=golden["temperature"]),
        epsilon=ScheduleConfig(init=golden["epsilon"]),
    )
    router = build_router(config, golden["langs"], golden["topics"], golden["regions"], seed=0)
    snapshots = {snapshot["after"]: snapshot for snapshot in golden["snapshots"]}
    for i, row in enumerate(golden["updates"], start=1):
        observe(router, [seen(row, row["lang"], i)])
        if i not in snapshots:
            continue
        recorded = snapshots.pop(i)
        for topic, values in zip(golden["topics"], router.policy.topic_values):
            np.testing.assert_allclose(values, recorded["q"]["topic"][topic], **TOLERANCE)
        for region, values in zip(golden["regions"], router.policy.region_values):
            np.testing.assert_allclose(values, recorded["q"]["region"][region], **TOLERANCE)
        for context in recorded["contexts"]:
            topics, regions = names(context["topic"]), names(context["region"])
            logits = router.policy.values([Context(topics, regions)])[0]
            np.testing.assert_allclose(logits, context["logits"], **TOLERANCE)
            prompt = Prompt("q", "?", "!", "en", "en", topics, regions)
            np.testing.assert_allclose(router.distribution(prompt), context["effective"], **TOLERANCE)
    assert not snapshots


@pytest.mark.parametrize("normalisation", ["none", "zscore"])
def test_buffered_group_updates(normalisation: str) -> None:
    """Five steps of 64 rows, then one flush: bucket means, normalisation, one step per bucket."""
    golden = json.loads((DATA / "golden_group_update.json").read_text())
    recorded = golden["results"][normalisation]["q"]
    topics = list(recorded["topic"])
    # The released code also keeps a row for a region called 'None'; a rollout without a region teaches none here.
    regions = [name for name in recorded["region"] if name != "None"]
    router = build_router(
        released(normalisation=normalisation, update_every=5), golden["langs"], topics, regions, seed=0
    )
    for step in golden["results"]["zscore"]["steps"]:
        assert not router.policy.topic_values.any()
        # Rows without a drawn language are skipped in the recording.
        rows = [row for row in step if row["lang_idx"] >= 0]
        observe(router, [seen(row, golden["langs"][row["lang_idx"]], i) for i, row in enumerate(rows)])
    for topic, values in zip(topics, router.policy.topic_values):
        np.testing.assert_allclose(values, recorded["topic"][topic], **TOLERANCE)
    for region, values in zip(regions, router.policy.region_values):
        np.testing.assert_allclose(values, recorded["region"].get(region, 0.0), **TOLERANCE)


def test_one_step_per_topic_differs_where_a_topic_has_several_regions() -> None:
    """The switch is a real one: the paper's rule does not give the released tables."""
    golden = json.loads((DATA / "golden_group_update.json").read_text())
    recorded = golden["results"]["none"]["q"]["topic"]
    router = build_router(
        released(topic_update="once", normalisation="none"), golden["langs"], list(recorded), ["Italy", "Japan"], 0
    )
    sums: dict[tuple[str, int], list[float]] = {}
    for step in golden["results"]["zscore"]["steps"]:
        rows = [row for row in step if row["lang_idx"] >= 0]
        observe(router, [seen(row, golden["langs"][row["lang_idx"]], i) for i, row in enumerate(rows)])
        for row in rows:
            sums.setdefault((row["topic"], row["lang_idx"]), []).append(row["reward"])
    released_table = np.array([recorded[topic] for topic in router.topics])
    assert np.abs(router.policy.topic_values - released_table).max() > 0.01
    # Without normalisation one step goes to the plain average reward of the topic and language.
    expected = [[0.1 * np.mean(sums.get((t, i), [0.0])) for i in range(len(router.languages))] for t in router.topics]
    np.testing.assert_allclose(router.policy.topic_values, expected, rtol=0, atol=1e-12)
