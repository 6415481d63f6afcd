"""Rewards of a group of responses against values worked out by hand; the stages' schedule."""

from __future__ import annotations

import dataclasses
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lrpo.config.explang import ExplangConfig, StageConfig
from nemo_lrpo.explang.format import Defect, Parsed
from nemo_lrpo.explang.rewards import Outcome, assemble, diversity, language_pass_at_k
from nemo_lrpo.explang.stages import exploration_steps, stage_of

CONFIG = ExplangConfig()


def outcome(name, language="de", verified=1.0, compliance=1.0, defect=None, group="q1"):
    return Outcome(f"{group}/{name}", group, language, defect, compliance, verified, 10)


# Of eight: de four times, en twice, ja once, no tag once. Right: one in de, the one in ja.
GROUP = [
    outcome(0, "de", 1.0),
    outcome(1, "de", 0.0),
    outcome(2, "de", 0.0, compliance=0.0),
    outcome(3, "de", 0.0, defect=Defect.THINKING_NOT_CLOSED),
    outcome(4, "en", 0.0),
    outcome(5, "en", 0.0),
    outcome(6, "ja", 1.0, compliance=0.0),
    outcome(7, None, 0.0, compliance=0.0, defect=Defect.NO_TAG),
]


def totals(outcomes, stage, config=CONFIG):
    return [reward.total for reward in assemble(outcomes, config, stage).values()]


def test_a_group_in_exploration_by_hand() -> None:
    """r_d: de 1/4, en 1/2, ja 1, none 0."""
    expected = [
        0.2 + 0.2 + 0.05 + 1.0,
        0.2 + 0.2 + 0.05,
        0.2 + 0.0 + 0.05,
        0.0 + 0.2 + 0.05,
        0.2 + 0.2 + 0.1,
        0.2 + 0.2 + 0.1,
        0.2 + 0.0 + 0.2 + 1.0,
        0.0,
    ]
    assert totals(GROUP, CONFIG.exploration) == pytest.approx(expected)


def test_a_group_in_exploitation_by_hand() -> None:
    """r_p: every response in de and ja, whether right itself or not; en and none 0."""
    expected = [0.4 + 0.5 + 1.0, 0.4 + 0.5, 0.2 + 0.5, 0.2 + 0.5, 0.4, 0.4, 0.2 + 0.5 + 1.0, 0.0]
    assert totals(GROUP, CONFIG.exploitation) == pytest.approx(expected)


def test_parts_come_with_the_total() -> None:
    reward = assemble(GROUP, CONFIG, CONFIG.exploration)["q1/4"]
    parts = (reward.format, reward.compliance, reward.diversity, reward.pass_at_k, reward.verification)
    assert parts == (1.0, 1.0, 0.5, 0.0, 0.0)


def test_a_rare_language_may_have_to_be_kept_to() -> None:
    config = ExplangConfig(diversity_needs_compliance=True)
    assert totals(GROUP, config.exploration, config)[6] == pytest.approx(0.2 + 0.0 + 0.0 + 1.0)


def test_groups_are_told_apart_however_they_are_mixed() -> None:
    other = [outcome(i, "en", float(i == 0), group="q2") for i in range(3)]
    mixed = [*GROUP, *other]
    random.Random(3).shuffle(mixed)
    for weights in (CONFIG.exploration, CONFIG.exploitation):
        apart = assemble(GROUP, CONFIG, weights) | assemble(other, CONFIG, weights)
        assert assemble(mixed, CONFIG, weights) == apart
    assert diversity(mixed)["q1/4"] == 0.5 and diversity(mixed)["q2/1"] == 1.0
    assert language_pass_at_k(mixed, 1.0)["q1/4"] == 0.0 and language_pass_at_k(mixed, 1.0)["q2/1"] == 1.0


def test_what_has_no_verdict_or_is_masked_has_no_reward_but_has_chosen() -> None:
    group = [outcome(0, "de", None), outcome(1, "de", 0.0), outcome(2, "en", 1.0, compliance=None)]
    rewards = assemble(group, CONFIG, StageConfig(1.0, 1.0))
    assert rewards["q1/0"].total is None and rewards["q1/2"].total is None
    assert rewards["q1/1"].diversity == 0.5 and rewards["q1/1"].pass_at_k == 0.0


def test_a_partial_verdict_is_correct_from_the_threshold_on() -> None:
    group = [outcome(0, "de", 0.7), outcome(1, "de", 0.2)]
    assert set(language_pass_at_k(group, 0.7).values()) == {1.0}
    assert set(language_pass_at_k(group, 0.8).values()) == {0.0}


def test_a_defect_takes_the_verdict_and_a_missing_block_the_compliance() -> None:
    cut_off = Outcome.of("a", "q", Parsed("de", "Zwei", "", Defect.THINKING_NOT_CLOSED), 1.0, 1.0, 3)
    assert (cut_off.language, cut_off.compliance, cut_off.verified) == ("de", 1.0, 0.0)
    bare = Outcome.of("a", "q", Parsed("de", "", "", Defect.NO_THINKING), 1.0, None, 3)
    assert (bare.compliance, bare.verified) == (0.0, 0.0)
    whole = Outcome.of("a", "q", Parsed("de", "Zwei", "2", None), None, None, 3)
    assert (whole.compliance, whole.verified) == (None, None)


@pytest.mark.parametrize("wrong", [{"verified": 1.5}, {"compliance": -0.1}, {"verified": float("nan")}])
def test_a_value_outside_its_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"'q1/0': {next(iter(wrong))}="):
        outcome(0, **wrong)


def test_a_sample_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'q1/0' comes twice"):
        assemble([outcome(0), outcome(0)], CONFIG, CONFIG.exploration)


groups = st.lists(
    st.tuples(st.sampled_from(["q1", "q2"]), st.sampled_from(["de", "en", "ja", None]), st.booleans()), max_size=16
).map(lambda rows: [outcome(i, language, float(right), group=group) for i, (group, language, right) in enumerate(rows)])


@given(outcomes=groups, seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_laws_of_the_group_terms(outcomes, seed) -> None:
    rare, solved = diversity(outcomes), language_pass_at_k(outcomes, 1.0)
    for group in {o.group_id for o in outcomes}:
        rows = [o for o in outcomes if o.group_id == group and o.language]
        counts = [sum(o.language == language for o in rows) for language in {o.language for o in rows}]
        # Each language earns k_min in all, however often it was chosen: there is nothing to gain in numbers.
        earned = sum(Fraction(rare[o.sample_id]).limit_denominator(100) for o in rows)
        assert earned == (min(counts) * len(counts) if counts else 0)
    for o in outcomes:
        assert (rare[o.sample_id] > 0) == (o.language is not None) and rare[o.sample_id] <= 1
        assert solved[o.sample_id] >= o.verified if o.language else solved[o.sample_id] == 0
    shuffled = random.Random(seed).sample(outcomes, len(outcomes))
    assert assemble(shuffled, CONFIG, CONFIG.exploration) == assemble(outcomes, CONFIG, CONFIG.exploration)


@pytest.mark.parametrize(
    ("share", "total", "steps"),
    [(0.25, 100, 25), (0.25, 10, 3), (0.25, 1, 1), (0.07, 100, 7), (0.0, 10, 0), (1.0, 10, 10), (0.25, 0, 0)],
)
def test_how_many_steps_explore(share: float, total: int, steps: int) -> None:
    config = ExplangConfig(exploration_share=share)
    assert exploration_steps(config, total) == steps
    names = [stage_of(config, step, steps).name for step in range(total)]
    assert names == ["exploration"] * steps + ["exploitation"] * (total - steps)


def test_weights_and_kl_change_with_the_stage() -> None:
    before, after = stage_of(CONFIG, 24, 25), stage_of(CONFIG, 25, 25)
    assert (before.weights.diversity, before.weights.pass_at_k, before.weights.kl) == (0.2, 0.0, False)
    assert (after.weights.diversity, after.weights.pass_at_k, after.weights.kl) == (0.0, 0.5, True)


def forced(name, language, verified=1.0, **more):
    return dataclasses.replace(outcome(name, language, verified, **more), forced=True)


# Of eight: three made to think in ja (right), ja (wrong) and fr (right); five that chose de, de, en, ja and nothing.
HYBRID = [
    forced(0, "ja", 1.0),
    forced(1, "ja", 0.0, compliance=0.0),
    forced(2, "fr", 1.0),
    outcome(3, "de", 0.0),
    outcome(4, "de", 0.0),
    outcome(5, "en", 1.0),
    outcome(6, "ja", 0.0),
    outcome(7, None, 0.0, compliance=0.0, defect=Defect.NO_TAG),
]


def test_a_group_with_forced_responses_by_hand() -> None:
    """k counts those that chose: de 2, en 1, ja 1. r_d: de 1/2, en 1, ja 1, none 0; their mean, 3/5, for the forced.
    r_p: en by itself, ja by a forced response, de not; their mean, 2/5, for the forced."""
    rare, solved = diversity(HYBRID), language_pass_at_k(HYBRID, 1.0)
    assert list(rare.values()) == pytest.approx([0.6, 0.6, 0.6, 0.5, 0.5, 1.0, 1.0, 0.0])
    assert list(solved.values()) == pytest.approx([0.4, 0.4, 0.4, 0.0, 0.0, 1.0, 1.0, 0.0])
    explored = [1.4 + 0.12, 0.2 + 0.12, 1.4 + 0.12, 0.4 + 0.1, 0.4 + 0.1, 1.4 + 0.2, 0.4 + 0.2, 0.0]
    assert totals(HYBRID, CONFIG.exploration) == pytest.approx(explored)
    exploited = [1.4 + 0.2, 0.2 + 0.2, 1.4 + 0.2, 0.4, 0.4, 1.4 + 0.5, 0.4 + 0.5, 0.0]
    assert totals(HYBRID, CONFIG.exploitation) == pytest.approx(exploited)


@given(outcomes=groups, marked=st.sets(st.integers(0, 15)))
@settings(max_examples=100, deadline=None)
def test_forced_responses_do_not_move_what_a_group_compares(outcomes, marked) -> None:
    """r_d of those that chose is that of a group without the forced ones, and the group's mean r_d is theirs."""
    mixed = [dataclasses.replace(o, forced=i in marked) for i, o in enumerate(outcomes)]
    free = [o for o in mixed if not o.forced]
    rare, alone = diversity(mixed), diversity(free)
    assert {o.sample_id: rare[o.sample_id] for o in free} == alone
    for group in {o.group_id for o in free}:
        whole, own = ([rare[o.sample_id] for o in rows if o.group_id == group] for rows in (mixed, free))
        assert sum(whole) / len(whole) == pytest.approx(sum(own) / len(own))


def test_a_group_that_is_forced_as_a_whole_earns_nothing_by_its_choice() -> None:
    whole = [forced(0, "de"), forced(1, "ja", 0.0)]
    assert diversity(whole) == language_pass_at_k(whole, 1.0) == {"q1/0": 0.0, "q1/1": 0.0}
