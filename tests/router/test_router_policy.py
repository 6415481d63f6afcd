"""The router's equations, draws, state and refusals, against values computed by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_rows import Seen, observe

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.loader import CONFIG_DIR, compose, to_dataclass
from nemo_lrpo.config.router import RouterConfig, ScheduleConfig
from nemo_lrpo.router import build_router, to_json
from nemo_lrpo.router.draws import question_key, run_key, slot_uniforms
from nemo_lrpo.router.published import PublishedPolicy, normalised, prior_row, scheduled
from nemo_lrpo.types import ORIGIN_DRAWN, ORIGIN_FIXED, ORIGIN_RESERVED, Prompt

LANGUAGES = ("de", "en", "ja")
TOPICS = ("Chat", "Logic", "Regional Knowledge", "Translation")
REGIONS = ("Germany", "Japan")


def build(seed: int = 7, **changes):
    return build_router(RouterConfig(**changes), LANGUAGES, TOPICS, REGIONS, seed)


def plain(**changes) -> dict:
    """No exploration, no annealing, raw bucket means, learning at every step."""
    settings = {
        "temperature": ScheduleConfig(init=1.0, min=1.0),
        "epsilon": ScheduleConfig(init=0.0),
        "normalisation": "none",
        "update_every": 1,
        "alpha": 0.5,
    }
    return settings | changes


def prompt(name: str = "q", language: str = "de", topics=("Chat",), regions=(), fixed=None) -> Prompt:
    return Prompt(name, "question", "answer", language, "en", tuple(topics), tuple(regions), fixed)


def seen(name: str, language: str, reward: float, topics=("Chat",), regions=(), origin=ORIGIN_DRAWN) -> Seen:
    return Seen(name, language, reward, tuple(topics), tuple(regions), origin)


def saved(router) -> str:
    return json.dumps(to_json(router.state_dict()))


# --- slots and draws ---------------------------------------------------------------------------------------------


def test_first_slots_are_reserved_and_groups_stay_together() -> None:
    routed = build(reserved_slots=2).route([prompt("a", "de"), prompt("b", "ja")], 5, step=3)
    assert [r.sample_id for r in routed] == [f"3/{q}/{k}" for q in "ab" for k in range(5)]
    assert [r.origin for r in routed] == ([ORIGIN_RESERVED] * 2 + [ORIGIN_DRAWN] * 3) * 2
    assert [r.language for r in routed if r.origin == ORIGIN_RESERVED] == ["de", "de", "ja", "ja"]
    assert all(r.probability == 1.0 for r in routed if r.origin == ORIGIN_RESERVED)


def test_translation_and_fixed_rows_leave_no_choice() -> None:
    router = build()
    routed = router.route([prompt("t", "ja", ("Chat", "Translation")), prompt("f", "de", fixed="en")], 4, step=0)
    assert [(r.language, r.origin, r.probability) for r in routed] == [("ja", ORIGIN_FIXED, 1.0)] * 4 + [
        ("en", ORIGIN_FIXED, 1.0)
    ] * 4
    assert router.distribution(prompt("f", "de", fixed="en")).tolist() == [0.0, 1.0, 0.0]


@given(
    order=st.permutations(range(12)),
    size=st.integers(1, 12),
    num_rollouts=st.integers(1, 8),
    step=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_plan_depends_on_nothing_but_seed_step_question_and_slot(order, size, num_rollouts, step) -> None:
    """Any order, any subset, any larger group: the same language in the same slot."""
    router, prompts = build(), [prompt(f"q{i}", LANGUAGES[i % 3]) for i in range(12)]
    whole = {r.sample_id: r for r in router.route(prompts, 8, step)}
    part = build().route([prompts[i] for i in order[:size]], num_rollouts, step)
    assert len(part) == size * num_rollouts
    assert all(whole[r.sample_id] == r for r in part)


def uniforms(seed: int, step: int, question: str, slots) -> np.ndarray:
    keys = np.array([question_key(run_key(seed), question)], np.uint64)
    slots = np.asarray(slots)
    return slot_uniforms(keys, step, np.zeros(slots.shape, np.int64), slots)


def test_seed_step_question_and_slot_each_matter() -> None:
    base = (1, 2, "q", 3)
    variants = [base, (2, 2, "q", 3), (1, 3, "q", 3), (1, 2, "p", 3), (1, 2, "q", 4), (12, 3, "q", 3)]
    values = [float(uniforms(seed, step, question, [slot])[0]) for seed, step, question, slot in variants]
    assert len(set(values)) == len(values) and all(0.0 <= u < 1.0 for u in values)
    # The same on every machine, in every release: a saved run goes on with these.
    assert uniforms(1, 2, "q", [3, 4]).tolist() == [0.575776320033748, 0.2985125019378234]


@pytest.mark.parametrize("along", ["question", "slot", "step", "seed"])
def test_uniforms_are_uniform_and_unrelated_to_their_neighbours(along: str) -> None:
    """Kolmogorov-Smirnov (1.95 / sqrt n at p = 0.001) and serial correlation, along every counter alone."""
    count = 4000
    if along == "slot":
        values = uniforms(0, 0, "q", range(count))
    else:
        names = {"seed": 0, "step": 0, "question": "q"}
        values = np.array(
            [uniforms(slots=[0], **(names | {along: f"q{i}" if along == "question" else i}))[0] for i in range(count)]
        )
    assert np.abs(np.sort(values) - (np.arange(count) + 0.5) / count).max() < 1.95 / math.sqrt(count)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 3.3 / math.sqrt(count)


def test_draw_frequencies_follow_the_reported_distribution() -> None:
    """Chi-square over 20,000 draws, epsilon mixture included (2 degrees of freedom: 13.8 at p = 0.001)."""
    router = build(reserved_slots=0, epsilon=ScheduleConfig(init=0.3), prior={"de": 0.7, "en": 0.25, "ja": 0.05})
    expected = router.distribution(prompt())
    np.testing.assert_allclose(expected, 0.1 + 0.7 * np.array([0.7, 0.25, 0.05]), rtol=1e-12)
    routed = router.route([prompt(f"q{i}") for i in range(2500)], 8, step=0)
    counts = Counter(r.language for r in routed)
    observed = np.array([counts[language] for language in LANGUAGES])
    assert ((observed - 20000 * expected) ** 2 / (20000 * expected)).sum() < 13.8
    for r in routed:
        assert r.probability == expected[LANGUAGES.index(r.language)]


def test_route_changes_no_state() -> None:
    router = build()
    before = saved(router)
    router.route([prompt("a"), prompt("b", topics=("no such topic",), regions=("nowhere",))], 8, 0)
    assert saved(router) == before


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([prompt("q9", language="sw")], r"question 'q9': language='sw' .*accepted: de, en, ja"),
        ([prompt("q9", fixed="sw")], r"question 'q9': fixed_language='sw'"),
        ([prompt("q9"), prompt("q9")], r"question 'q9' occurs twice"),
    ],
)
def test_route_refuses(prompts, message) -> None:
    with pytest.raises(ValueError, match=message):
        build().route(prompts, 4, 0)


# --- the distribution --------------------------------------------------------------------------------------------


def test_topics_and_regions_add_up_under_the_temperature() -> None:
    router = build(**plain(temperature=ScheduleConfig(init=0.5, min=0.5), epsilon=ScheduleConfig(init=0.2)))
    router.policy.topic_values[:2] = [[1.0, 0.0, 0.0], [0.5, 0.2, 0.0]]
    router.policy.region_values[:] = [[0.0, 0.1, 0.0], [0.0, 0.0, 0.4]]
    weights = np.exp(np.array([1.5, 0.3, 0.4]) / 0.5)
    expected = 0.2 / 3 + 0.8 * weights / weights.sum()
    asked = prompt(topics=("Chat", "Logic"), regions=("Germany", "Japan"))
    np.testing.assert_allclose(router.distribution(asked), expected, rtol=1e-12)


def test_a_context_named_twice_counts_once_and_regions_may_be_absent() -> None:
    router = build_router(RouterConfig(**plain()), LANGUAGES, TOPICS, (), 0)
    observe(router, [seen("a", "en", 1.0, ("Chat", "Chat"))])
    assert router.policy.topic_values[0].tolist() == [0.0, 0.5, 0.0] and router.policy.region_values.shape == (0, 3)
    once, twice = (router.distribution(prompt(topics=topics)) for topics in (("Chat",), ("Chat", "Chat")))
    assert once.tolist() == twice.tolist()
    router.load_state_dict(json.loads(saved(router)))


def test_regions_count_only_under_a_regional_topic_where_so_configured() -> None:
    router = build(**plain(region_values="regional_topic"))
    router.policy.region_values[1] = [0.0, 0.0, 2.0]
    np.testing.assert_allclose(router.distribution(prompt(regions=("Japan",))), 1 / 3)
    both = prompt(topics=("Chat", "Regional Knowledge"), regions=("Japan",))
    assert router.distribution(both)[2] > 0.7
    observe(router, [seen("a", "ja", 1.0, ("Chat",), ("Germany",))])
    assert not router.policy.region_values[0].any()
    observe(router, [seen("a", "ja", 1.0, ("Regional Knowledge",), ("Germany",))])
    assert router.policy.region_values[0].tolist() == [0.0, 0.0, 0.5]


@given(tables=st.lists(st.floats(-500, 500), min_size=3, max_size=3), epsilon=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_distribution_is_one_for_any_table(tables, epsilon) -> None:
    router = build(**plain(temperature=ScheduleConfig(init=0.01, min=0.01), epsilon=ScheduleConfig(init=epsilon)))
    router.policy.topic_values[0] = tables
    values = router.distribution(prompt())
    assert abs(values.sum() - 1.0) < 1e-12 and values.min() >= epsilon / 3 - 1e-15
    routed = router.route([prompt()], 8, 0)
    assert all(0.0 < r.probability <= 1.0 for r in routed)


def test_annealing() -> None:
    schedule = ScheduleConfig(init=1.0, decay=0.9, min=0.3)
    assert scheduled(schedule, 0) == 1.0
    assert scheduled(schedule, 2) == pytest.approx(0.81)
    assert scheduled(schedule, 100) == 0.3
    assert scheduled(ScheduleConfig(init=0.2, decay=1.0), 10**6) == 0.2
    router = build(temperature=schedule, epsilon=ScheduleConfig(init=0.2, decay=0.5))
    for _ in range(3):
        observe(router, [])
    metrics = router.metrics()
    assert (metrics["temperature"], metrics["epsilon"]) == (pytest.approx(0.729), pytest.approx(0.025))


def test_priors_are_what_is_drawn_from_at_first() -> None:
    router = build(
        **plain(
            prior={"de": 2.0, "en": 1.0, "ja": 1.0},
            topic_priors={"Logic": {"en": 0.6, "ja": 0.2}},
            region_priors={"Japan": {"ja": 4.0, "en": 1.0}},
        )
    )
    np.testing.assert_allclose(router.distribution(prompt()), [0.5, 0.25, 0.25])
    # German is not in Logic's mix: it gets the smallest listed share, not a vanishing one.
    np.testing.assert_allclose(router.distribution(prompt(topics=("Logic",))), [0.2, 0.6, 0.2])
    product = np.array([2.0, 1.0, 1.0]) * np.array([1.0, 1.0, 4.0])
    np.testing.assert_allclose(router.distribution(prompt(regions=("Japan",))), product / product.sum())
    np.testing.assert_allclose(router.distribution(prompt(regions=("Germany",))), [0.5, 0.25, 0.25])
    # Contexts that were not declared count with their initial rows.
    router.policy.topic_values += 3.0 * np.eye(4, 3)
    np.testing.assert_allclose(router.distribution(prompt(topics=("new",), regions=("new",))), [0.5, 0.25, 0.25])
    assert prior_row({}, LANGUAGES).tolist() == [0.0, 0.0, 0.0]


# --- learning ----------------------------------------------------------------------------------------------------


def test_normalisations_by_hand() -> None:
    """Each cell for itself: the first has three languages, the second one."""
    means, cell = np.array([0.1, 0.4, 0.7, 0.9]), np.array([0, 0, 0, 1])
    assert normalised(means, cell, "none", 1e-6).tolist() == means.tolist()
    np.testing.assert_allclose(normalised(means, cell, "center", 1e-6), [-0.3, 0.0, 0.3, 0.0], atol=1e-15)
    z = np.array([-0.3, 0.0, 0.3]) / (math.sqrt(0.06) + 1e-6)
    np.testing.assert_allclose(normalised(means, cell, "zscore", 1e-6), [*z, 0.0], atol=1e-12)


def test_update_by_hand() -> None:
    """Chat was seen with two regions and with none; alpha 0.5; entries that nothing was observed for stay."""
    router = build(**plain())
    router.policy.topic_values[0] = [0.2, 0.4, 0.6]
    observe(
        router,
        [
            seen("a", "de", 1.0, regions=("Germany",)),
            seen("b", "de", 0.0, regions=("Germany",)),
            seen("c", "de", 0.8, regions=("Japan",)),
            seen("d", "en", 0.6),
        ],
    )
    np.testing.assert_allclose(router.policy.topic_values[0], [0.5 * 0.2 + 0.5 * 0.6, 0.5 * 0.4 + 0.5 * 0.6, 0.6])
    np.testing.assert_allclose(router.policy.region_values, [[0.25, 0.0, 0.0], [0.4, 0.0, 0.0]])
    assert not router.policy.topic_values[1:].any()


def test_update_per_cell_by_hand() -> None:
    """One moving-average step per bucket in the order of first entry: Germany (mean 0.5), then Japan (0.8)."""
    router = build(**plain(topic_update="per_cell"))
    rows = [("a", 1.0, "Germany"), ("b", 0.8, "Japan"), ("c", 0.0, "Germany")]
    observe(router, [seen(name, "de", reward, regions=(region,)) for name, reward, region in rows])
    assert router.policy.topic_values[0, 0] == pytest.approx(0.5 * (0.5 * 0.5) + 0.5 * 0.8)
    np.testing.assert_allclose(router.policy.region_values[:, 0], [0.25, 0.4])


def test_zscore_is_within_topic_and_region() -> None:
    router = build(**plain(normalisation="zscore"))
    rows = [("a", "de", 0.2, "Japan"), ("b", "ja", 0.8, "Japan"), ("c", "de", 0.9, "Germany")]
    observe(router, [seen(name, language, reward, regions=(g,)) for name, language, reward, g in rows])
    z = 0.3 / (0.3 + 1e-6)
    # Germany knows one language only: its bucket is worth 0 and halves German's value in the topic.
    np.testing.assert_allclose(router.policy.topic_values[0], [0.5 * -z / 2, 0.0, 0.5 * z], rtol=1e-12)
    np.testing.assert_allclose(router.policy.region_values, [[0.0, 0.0, 0.0], [-0.5 * z, 0.0, 0.5 * z]], rtol=1e-12)


def test_several_topics_and_regions_all_learn() -> None:
    router = build(**plain())
    observe(router, [seen("a", "en", 1.0, ("Chat", "Logic"), ("Germany", "Japan"))])
    assert router.policy.topic_values[:, 1].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert router.policy.region_values[:, 1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("teach", "expected"), [("all", [0.25, 0.5, 0.4]), ("drawn", [0.0, 0.5, 0.0])])
def test_who_teaches(teach: str, expected: list[float]) -> None:
    router = build(**plain(teach=teach))
    observe(
        router,
        [
            seen("a", "de", 0.5, origin=ORIGIN_RESERVED),
            seen("b", "en", 1.0, origin=ORIGIN_DRAWN),
            seen("c", "ja", 0.8, origin=ORIGIN_FIXED),
        ],
    )
    assert router.policy.topic_values[0].tolist() == expected


def test_learns_every_m_steps_from_all_of_them() -> None:
    router = build(**plain(update_every=3))
    for reward in (0.0, 0.3):
        observe(router, [seen("a", "de", reward)])
        assert not router.policy.topic_values.any()
    observe(router, [])
    assert router.policy.topic_values[0, 0] == pytest.approx(0.5 * 0.15)
    for _ in range(3):
        observe(router, [])
    assert router.policy.topic_values[0, 0] == pytest.approx(0.5 * 0.15)


@given(order=st.permutations(range(9)), topic_update=st.sampled_from(["once", "per_cell"]))
@settings(max_examples=30, deadline=None)
def test_order_of_observations_does_not_matter(order, topic_update) -> None:
    rows = [seen(f"0/q/{i}", LANGUAGES[i % 3], 0.1 * i**1.5, regions=REGIONS[i % 2 :][:1]) for i in range(9)]
    first, second = (build(update_every=1, topic_update=topic_update) for _ in range(2))
    observe(first, rows)
    observe(second, [rows[i] for i in order])
    assert saved(first) == saved(second)


def test_contexts_that_were_not_declared_are_counted_and_ignored() -> None:
    router = build(**plain())
    observe(router, [seen("a", "de", 1.0, ("new",), ("Japan",)), seen("b", "en", 1.0, ("Chat",), ("new",))])
    assert router.metrics()["unknown_contexts"] == 2.0
    assert router.policy.topic_values[0].tolist() == [0.0, 0.5, 0.0] and not router.policy.region_values.any()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([seen("q1", "de", math.inf)], r"sample '0/q1/0': reward .*inf.* is not finite"),
        ([seen("q2", "de", -math.inf)], r"sample '0/q2/0': reward"),
        ([seen("q4", "de", 1.0)] * 2, r"sample '0/q4/0' was observed twice"),
        ([seen("q4", "de", 1.0), seen("q4", "de", 1.0, ("Logic",))], r"question 'q4' was observed twice"),
    ],
)
@pytest.mark.parametrize("name", ["published", "uniform"])
def test_observe_refuses_and_leaves_the_state(name, rows, message) -> None:
    router = build(name=name)
    before = saved(router)
    with pytest.raises(ValueError, match=message):
        observe(router, [seen("p", "en", 0.5), *rows])
    assert saved(router) == before


def test_observe_refuses_a_plan_that_is_not_its_own() -> None:
    router = build()
    with pytest.raises(ValueError, match=r"sample '0/a/0': language 'sw'"):
        observe(router, [seen("a", "sw", 1.0)])
    plan = router.route([prompt()], 4, 0)
    with pytest.raises(ValueError, match=r"rewards have shape \(3,\); expected one for each of 4 rows"):
        router.observe(plan, np.zeros(3))
    with pytest.raises(ValueError, match="the plan is for languages"):
        build_router(RouterConfig(), ["en", "de", "ja"], TOPICS, REGIONS, 0).observe(plan, np.zeros(4))


def test_router_moves_towards_the_language_that_knows() -> None:
    """The whole loop: draw, reward Japanese in Japan and English elsewhere, observe. K_on keeps German alive."""
    router = build(update_every=2, alpha=0.3, temperature=ScheduleConfig(init=1.0, decay=0.97, min=0.3))
    prompts = [prompt(f"q{i}", "de", ("Chat",), ("Japan",) if i % 2 else ()) for i in range(24)]
    for step in range(60):
        routed = router.route(prompts, 8, step)
        rewards = np.array([0.9 if r.language == ("ja" if r.prompt.regions else "en") else 0.2 for r in routed])
        router.observe(routed, rewards)
    japan = router.distribution(prompts[1])
    assert japan[2] > 0.6 and japan[0] < 0.3
    # The other half of the topic's questions prefer English: the region's row has to tell the two apart.
    assert router.distribution(prompts[0])[1] > router.distribution(prompts[1])[1]


# --- the fixed mixes ---------------------------------------------------------------------------------------------


def test_monolingual_is_plain_grpo() -> None:
    router = build(name="monolingual", reserved_slots=0)
    routed = router.route([prompt("a", "de"), prompt("b", "ja")], 8, 5)
    assert [(r.language, r.probability) for r in routed] == [("de", 1.0)] * 8 + [("ja", 1.0)] * 8


def test_uniform_and_fixed_mixes() -> None:
    np.testing.assert_allclose(build(name="uniform").distribution(prompt()), 1 / 3)
    router = build(name="fixed", mix={"question": 1.0, "en": 3.0})
    assert router.distribution(prompt(language="ja")).tolist() == [0.0, 0.75, 0.25]
    assert router.distribution(prompt(language="en")).tolist() == [0.0, 1.0, 0.0]
    languages = {r.language for r in router.route([prompt(f"q{i}", "ja") for i in range(99)], 8, 0)}
    assert languages == {"en", "ja"}
    spread = build(name="fixed", mix={"question": 1.4, "uniform": 0.6})
    np.testing.assert_allclose(spread.distribution(prompt(language="ja")), [0.1, 0.1, 0.8])
    observe(router, [seen("a", "en", 1.0)])
    assert router.state_dict()["step"] == 1


# --- the log ---------------------------------------------------------------------------------------------------


def test_metrics_report_what_was_drawn_from() -> None:
    router = build(**plain(epsilon=ScheduleConfig(init=0.3)))
    assert "entropy" not in router.metrics()
    router.policy.topic_values[1] = [0.0, 2.0, 0.0]
    prompts = [prompt("a"), prompt("b", topics=("Logic",)), prompt("c", "ja", ("Translation",))]
    router.route(prompts, 8, 0)
    metrics = router.metrics()
    rows = np.stack([router.distribution(p) for p in prompts[:2]])
    np.testing.assert_allclose([metrics[f"probability/{x}"] for x in LANGUAGES], rows.mean(axis=0))
    assert metrics["entropy"] == pytest.approx(-(rows * np.log(rows)).sum(axis=1).mean())
    assert metrics["value/Logic/en"] == 2.0 and metrics["epsilon"] == 0.3 and metrics["temperature"] == 1.0
    assert [metrics[f"slots/{o}"] for o in ("drawn", "reserved", "fixed")] == [12.0, 4.0, 8.0]
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


# --- configuration and weight -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "publisched"}, r"router\.name='publisched'.*accepted: 'published'"),
        ({"reserved_slots": -1}, r"router\.reserved_slots=-1"),
        ({"update_every": 0}, r"router\.update_every=0"),
        ({"alpha": 0.0}, r"router\.alpha=0\.0"),
        ({"normalisation": "z-score"}, r"router\.normalisation"),
        ({"region_values": "some"}, r"router\.region_values"),
        ({"topic_update": "twice"}, r"router\.topic_update"),
        ({"teach": "none"}, r"router\.teach"),
        ({"temperature": ScheduleConfig(init=1.0, min=0.0)}, r"router\.temperature\.min=0\.0"),
        ({"temperature": ScheduleConfig(init=0.2, min=0.3)}, r"router\.temperature\.min=0\.3"),
        ({"epsilon": ScheduleConfig(init=1.2)}, r"router\.epsilon\.init=1\.2"),
        ({"epsilon": ScheduleConfig(init=0.2, decay=1.1)}, r"router\.epsilon\.decay=1\.1"),
        ({"epsilon": ScheduleConfig(init=math.nan)}, r"router\.epsilon"),
        ({"region_values": "regional_topic", "regional_topics": []}, r"router\.regional_topics=\[\]"),
        ({"name": "fixed"}, r"router\.mix=\{\}"),
        ({"mix": {"en": 1.0}}, r"router\.mix=\{'en': 1\.0\} does not go with router\.name='published'"),
        ({"name": "fixed", "mix": {"en": 0.0}}, r"router\.mix: all weights are zero"),
        ({"name": "fixed", "mix": {"eng": 1.0}}, r"router\.mix: unknown key 'eng'.*Did you mean 'en'"),
        ({"prior": {"en": 0.0}}, r"router\.prior\.en=0\.0"),
        ({"prior": {"sw": 1.0}}, r"router\.prior.*unknown key 'sw'"),
        ({"topic_priors": {"Logik": {"en": 1.0}}}, r"router\.topic_priors.*'Logik'.*Did you mean 'Logic'"),
        ({"topic_priors": {"Logic": {}}}, r"router\.topic_priors\['Logic'\] is empty"),
        ({"region_priors": {"Japan": {"jp": 1.0}}}, r"router\.region_priors\['Japan'\].*'jp'"),
    ],
)
def test_configuration_is_refused_by_key(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_candidate_languages_are_distinct() -> None:
    with pytest.raises(ConfigError, match="each once"):
        build_router(RouterConfig(), ["en", "en"], TOPICS, REGIONS, 0)


def test_the_published_group_is_the_default() -> None:
    from omegaconf import OmegaConf

    file = CONFIG_DIR / "router" / "published.yaml"
    loaded = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RouterConfig), OmegaConf.load(file)))
    assert loaded == RouterConfig()


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "router").glob("*.yaml")))
def test_every_shipped_group_routes_and_learns(name: str) -> None:
    config = to_dataclass(RouterConfig, compose("train", [f"router={name}"]).router)
    router = build_router(config, LANGUAGES, TOPICS, REGIONS, 0)
    for step in range(config.update_every + 1):
        plan = router.route(
            [prompt(f"q{i}", LANGUAGES[i % 3], (TOPICS[i % 2],), REGIONS[: i % 3]) for i in range(9)], 4, step
        )
        assert len(plan) == 36
        router.observe(plan, np.random.default_rng(step).random(36))
    assert all(math.isfinite(value) for value in router.metrics().values())


def test_importing_the_router_brings_no_torch() -> None:
    code = "import sys, nemo_lrpo.router; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_published_router_is_what_the_name_builds() -> None:
    assert isinstance(build().policy, PublishedPolicy)
