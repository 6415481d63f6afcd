"""UCB, Thompson sampling, the hierarchical and the feature policy, and their parts, against closed forms."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.router import FeaturesConfig, HierarchicalConfig, RouterConfig, ThompsonConfig, UcbConfig
from nemo_lrpo.router import RouterStateError, build_router
from nemo_lrpo.router.base import from_json, to_json
from nemo_lrpo.router.build import build_policy
from nemo_lrpo.router.cell_features import CellFeatures, Design, Predictions
from nemo_lrpo.router.discounted import DiscountedMeans
from nemo_lrpo.router.features import fitting_dimension
from nemo_lrpo.router.gaussian import log_cdf, probability_best, sharpened
from nemo_lrpo.router.hashing import ContextHasher
from nemo_lrpo.router.memories import Memories
from nemo_lrpo.router.numbering import numbered, numbered_runs
from nemo_lrpo.router.policy import Context, Evidence, LanguagePolicy
from nemo_lrpo.router.questions import QuestionEffects
from nemo_lrpo.router.tables import CellTable, PairTable, window_sums, with_whole_tables
from nemo_lrpo.router.tree import tree_posterior, updated_variances
from nemo_lrpo.router.typology import relatives
from nemo_lrpo.router.ucb import optimistic_shares

Array = NDArray[np.float64]
LANGUAGES = ("de", "nl", "es", "it", "ja")
TOPICS, REGIONS = ("Chat", "Facts", "Logic"), ("Chile", "Ghana", "Japan", "Kenya")
LEARNERS = ("ucb", "thompson", "hierarchical", "features")


def build(name: str, **changes: Any) -> LanguagePolicy:
    config = {"features": FeaturesConfig(dimension=32)} | changes
    return build_policy(RouterConfig(name=name, **config), LANGUAGES, TOPICS, REGIONS)


def evidence(rows: Sequence[tuple[Context, int, float]], steps: int = 5) -> Evidence:
    contexts = list(dict.fromkeys(context for context, _, _ in rows))
    return Evidence(
        contexts,
        np.array([contexts.index(context) for context, _, _ in rows], np.int32),
        np.array([language for _, language, _ in rows], np.int16),
        np.array([value for _, _, value in rows], np.float64),
        np.arange(len(rows), dtype=np.int32),
        steps,
    )


def some_rows(seed: int, count: int = 300) -> list[tuple[Context, int, float]]:
    """Rollouts in contexts of one or two topics and none to two regions; the third language pays most."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        topics = tuple(sorted(rng.choice(TOPICS, rng.integers(1, 3), replace=False)))
        regions = tuple(sorted(rng.choice(REGIONS, rng.integers(0, 3), replace=False)))
        language = int(rng.integers(len(LANGUAGES)))
        rows.append((Context(topics, regions), language, float(rng.random() < (0.7 if language == 2 else 0.3))))
    return rows


def normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


# --- which one is best ------------------------------------------------------------------------------------------------


def test_the_table_of_the_normal_distribution_is_exact_to_seven_digits() -> None:
    z = np.linspace(-8.5, 8.5, 1237)
    expected = [math.log(normal_cdf(max(min(x, 8.0), -8.0))) for x in z]
    np.testing.assert_allclose(log_cdf(z), expected, rtol=0, atol=3e-7)


@settings(deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.01, 3), st.floats(0.01, 3))
def test_of_two_languages_the_best_is_known_in_closed_form(a: float, b: float, da: float, db: float) -> None:
    p = probability_best(np.array([[a, b]]), np.array([[da, db]]))
    assert p[0, 0] == pytest.approx(normal_cdf((a - b) / math.hypot(da, db)), abs=3e-3)
    assert p.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("count", [2, 15, 500])
def test_equal_languages_are_equally_likely_best(count: int) -> None:
    np.testing.assert_allclose(probability_best(np.zeros((3, count)), np.ones((3, count))), 1.0 / count, rtol=1e-6)


@given(seed=st.integers(0, 2**32), count=st.integers(2, 20), shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
@settings(deadline=None)
def test_best_does_not_depend_on_order_origin_or_unit(seed: int, count: int, shift: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    mean, deviation, order = rng.normal(size=(2, count)), rng.uniform(0.05, 2.0, (2, count)), rng.permutation(count)
    p = probability_best(mean, deviation)
    np.testing.assert_allclose(probability_best(mean[:, order], deviation[:, order]), p[:, order], atol=1e-9)
    np.testing.assert_allclose(probability_best(scale * mean + shift, scale * deviation), p, atol=1e-6)


def test_best_of_many_agrees_with_sampling() -> None:
    rng = np.random.default_rng(4)
    mean, deviation = rng.normal(0.0, 1.0, (1, 12)), np.exp(rng.normal(-1.0, 0.7, (1, 12)))
    samples = mean + deviation * rng.normal(size=(200_000, 12))
    shares = np.bincount(samples.argmax(axis=1), minlength=12) / len(samples)
    np.testing.assert_allclose(probability_best(mean, deviation)[0], shares, atol=5e-3)


def test_a_power_sharpens_and_keeps_the_order() -> None:
    np.testing.assert_allclose(sharpened(np.array([[0.5, 0.25, 0.25]]), 2.0), [[4 / 6, 1 / 6, 1 / 6]])
    np.testing.assert_allclose(sharpened(np.array([[1e-200, 1e-200]]), 4.0), [[0.5, 0.5]])


# --- relatives --------------------------------------------------------------------------------------------------------


def test_relatives_share_a_branch_then_a_family_then_a_script() -> None:
    assert relatives(["de", "es", "nl", "it", "xx", "yy"]) == [0, 1, 0, 1, 2, 3]
    # Alone in their branches, hi and fa are both Indo-European; kk and mn both write Cyrillic.
    assert relatives(["hi", "de", "fa", "nl"]) == [0, 1, 0, 1]
    assert relatives(["kk", "ar", "mn"]) == [0, 1, 0]


def joint_posterior(information: Array, shift: Array, groups: Sequence[int], variances: Array) -> tuple[Array, Array]:
    """All w_l as one normal vector, by the inverse of the whole: mean [L, D] and covariance [L, D, L, D]."""
    count, size = shift.shape
    prior = np.zeros((count, size, count, size))
    for a in range(count):
        for b in range(count):
            shared = variances[2] + (groups[a] == groups[b]) * variances[1] + (a == b) * variances[0]
            prior[a, :, b, :] = np.diag(shared)
    precision = np.linalg.inv(prior.reshape(count * size, -1))
    for a in range(count):
        part = slice(a * size, (a + 1) * size)
        precision[part, part] += information[a]
    covariance = np.linalg.inv(precision)
    return (covariance @ shift.ravel()).reshape(count, size), covariance.reshape(count, size, count, size)


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_the_tree_is_the_joint_normal_distribution(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, size = [0, 0, 1, 2, 1, 1], 3
    variances = np.exp(rng.normal(size=(3, size)))
    information, shift = np.zeros((6, size, size)), np.zeros((6, size))
    for language, rows in enumerate(rng.integers(0, 6, 6)):  # some languages have no data
        x = rng.normal(size=(rows, size))
        information[language], shift[language] = x.T @ x / 0.7, x.T @ rng.normal(size=rows) / 0.7
    found = tree_posterior(information, shift, groups, variances)
    mean, covariance = joint_posterior(information, shift, groups, variances)
    np.testing.assert_allclose(found.mean, mean, atol=1e-9)
    for language in range(6):
        np.testing.assert_allclose(found.covariance[language], covariance[language, :, language, :], atol=1e-9)


def test_large_trees_predict_in_parts_and_one_language_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same to the bit for all languages at once; one language's rows agree to rounding."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(6, 60, 33))
    found = tree_posterior(x.swapaxes(1, 2) @ x, rng.normal(size=(6, 33)), [0, 0, 1, 2, 1, 1], np.ones((3, 33)))
    features = rng.normal(size=(200, 33))
    mean, variance = found.predict(features)
    monkeypatch.setattr("nemo_lrpo.router.tree._CHUNK", 1)
    for whole, parts in zip((mean, variance), found.predict(features)):
        np.testing.assert_array_equal(parts, whole)
    for language in range(6):
        alone = found.predict_one(language, features)
        np.testing.assert_allclose(alone, (mean[:, language], variance[:, language]), rtol=1e-9)


def test_cells_predict_as_their_features_do_and_the_same_in_any_company() -> None:
    """Names that were not declared share a feature; results are those of dense sums, to the bit for a cell alone."""
    rng = np.random.default_rng(3)
    features = CellFeatures(TOPICS, REGIONS)
    names = (*TOPICS, "new", "newer"), (*REGIONS, "new", "newer")
    cells = [
        tuple(tuple(sorted(rng.choice(of, rng.integers(least, 5), replace=False))) for of, least in zip(names, (1, 0)))
        for _ in range(40)
    ]
    assert len(set(cells)) > 30
    rows = features.rows(cells)
    phi = features.phi(rows)
    np.testing.assert_allclose(phi.sum(axis=1), [2.0 + bool(regions) for _, regions in cells])
    x = rng.normal(size=(6, 60, phi.shape[1]))
    posterior = tree_posterior(x.swapaxes(1, 2) @ x, rng.normal(size=x[:, 0].shape), [0, 0, 1, 2, 1, 1], x[:3, 0] ** 2)
    together = Predictions(features, posterior)(rows)
    np.testing.assert_allclose(together, posterior.predict(phi), rtol=1e-9)
    one_by_one = Predictions(features, posterior)
    for row in rng.permutation(rows):
        for alone, whole in zip(one_by_one(np.array([row])), together):
            np.testing.assert_array_equal(alone[0], whole[list(rows).index(row)])
    weight = rng.random((40, 6))
    np.testing.assert_allclose(
        Design(phi).information(weight), np.einsum("cl,ci,cj->lij", weight, phi, phi), rtol=1e-12
    )
    assert not Design(phi[:0]).information(weight[:0]).any()


@given(st.lists(st.integers(0, 40)), st.sampled_from([41, 10**6]))
def test_numbers_are_those_of_sorting(values: list[int], bound: int) -> None:
    array = np.array(values, np.int64)
    for found, expected in zip(numbered(array, bound), np.unique(array, return_inverse=True)):
        assert found.tolist() == expected.tolist()
    first, run = numbered_runs(np.sort(array))
    assert (np.sort(array)[first].tolist(), run.tolist()) == (
        sorted(set(values)),
        numbered(np.sort(array), bound)[1].tolist(),
    )


def test_without_data_variances_stay_at_their_prior_and_with_much_they_are_found() -> None:
    rng = np.random.default_rng(0)
    prior, truth, groups = np.full((3, 1), 0.5), (0.04, 0.25, 1.0), np.arange(400) // 2
    nothing = tree_posterior(np.zeros((400, 1, 1)), np.zeros((400, 1)), groups, prior)
    np.testing.assert_allclose(updated_variances(nothing, [0], prior, 1.0), prior, rtol=1e-9)
    w = rng.normal(0, truth[1] ** 0.5, 200)[groups] + rng.normal(0, truth[0] ** 0.5, 400) + 1.3
    information, variances = np.full((400, 1, 1), 200.0), prior
    for _ in range(60):
        variances = updated_variances(
            tree_posterior(information, 200.0 * w[:, None], groups, variances), [0], prior, 1.0
        )
    np.testing.assert_allclose(variances[:2, 0], truth[:2], rtol=0.25)


# --- the bank of memories ---------------------------------------------------------------------------------------------


def test_memories_are_weighted_by_what_they_predicted_and_none_is_lost() -> None:
    memories = Memories([1.0, 0.5])
    memories.judge(np.array([math.log(0.3), math.log(0.1)]))
    np.testing.assert_allclose(memories.weights, [0.98 * 0.75 + 0.01, 0.98 * 0.25 + 0.01])
    memories.judge(np.array([0.0, -1e5]))
    assert memories.weights[1] == pytest.approx(0.01)


def test_a_memory_that_was_wrong_for_long_costs_no_time_until_it_comes_back() -> None:
    memories, means, variances = Memories([1.0, 0.5]), np.array([[[0.0, 1.0]], [[1.0, 0.0]]]), np.full((2, 1, 2), 0.1)
    asked: list[int] = []

    def predicted(m: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(m)
        return means[m], variances[m]

    alone = [Memories([1.0]).probabilities(lambda _, m=m: predicted(m), None, 1.0) for m in (0, 1)]
    np.testing.assert_allclose(memories.probabilities(predicted, None, 1.0), 0.5)
    for m, likelihoods in enumerate(([0.0, -1e5], [-1e5, 0.0])):
        memories.judge(np.array(likelihoods))
        asked.clear()
        np.testing.assert_allclose(memories.probabilities(predicted, None, 1.0), alone[m], rtol=1e-12)
        assert asked == [m]
    memories.judge(np.array([1.0, 0.0]))
    shift = memories.probabilities(predicted, None, 1.0) - alone[1]
    assert np.abs(shift).min() > 1e-3, "above its smallest weight it counts"


def test_after_a_change_the_hierarchical_policy_forgets() -> None:
    policy = build("hierarchical")
    rng = np.random.default_rng(0)
    context = Context(("Chat",), ("Chile",))
    for window in range(12):
        best = 0 if window < 8 else 4
        languages = rng.integers(5, size=200).tolist()
        policy.learn(evidence([(context, x, float(rng.random() < 0.3 + 0.4 * (x == best))) for x in languages]))
        long = policy.metrics(0)["memory/1"] + policy.metrics(0)["memory/0.97"]
        if window == 7:
            assert long > 0.7 and policy.probabilities([context], 0)[0].argmax() == 0
    assert long < 0.05 and policy.probabilities([context], 0)[0].argmax() == 4


# --- UCB and Thompson sampling ----------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), window=st.floats(1, 500))
@settings(deadline=None)
def test_ucb_gives_a_window_out_until_all_indices_that_got_any_are_equal(seed: int, window: float) -> None:
    rng = np.random.default_rng(seed)
    mean, count, scale = rng.random((3, 6)), rng.uniform(2, 80, (3, 6)), rng.uniform(0.05, 2.0, (3, 1))
    p = optimistic_shares(mean, count, scale, window)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-12)
    after = mean + np.sqrt(scale / (count + window * p))
    for row, shares in zip(after, p):
        level = row[shares > 1e-6]
        np.testing.assert_allclose(level, level[0], rtol=1e-5)
        assert (row <= level[0] + 1e-5).all()


def test_ucb_without_exploration_takes_the_best_mean_and_shares_ties() -> None:
    p = optimistic_shares(np.array([[0.1, 0.5, 0.5], [0.9, 0.5, 0.5]]), np.full((2, 3), 9.0), np.zeros((2, 1)), 5.0)
    np.testing.assert_allclose(p, [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    policy = build("ucb", ucb=UcbConfig(exploration=0.0))
    np.testing.assert_allclose(policy.probabilities([Context(("Chat",), ())], 0), [[0.2] * 5])


def test_thompson_is_the_closed_form_of_two_languages() -> None:
    """Counts of 8 and 4 rollouts after a discount of 0.9^5, prior of 2 rollouts at the overall mean."""
    config = RouterConfig(name="thompson", thompson=ThompsonConfig(discount=0.9))
    policy = build_policy(config, ("de", "en"), TOPICS, REGIONS)
    context, other = Context(("Chat",), ()), Context(("Logic",), ())
    rewards = {0: [1, 1, 1, 0, 1, 0, 1, 1], 1: [0, 1, 0, 0]}
    policy.learn(evidence([(context, x, float(r)) for x in rewards for r in rewards[x]]))
    policy.learn(evidence([], steps=5))
    kept = 0.9**5
    overall = 7 / 12
    means = {x: (kept * sum(r) + 2 * overall) / (kept * len(r) + 2) for x, r in rewards.items()}
    # Squared differences within cells over their degrees of freedom; the discount cancels.
    noise = (8 * (6 / 8) * (2 / 8) + 4 * (1 / 4) * (3 / 4)) / (7 + 3)
    spread = math.sqrt(sum(noise / (kept * len(r) + 2) for r in rewards.values()))
    expected = normal_cdf((means[0] - means[1]) / spread)
    assert policy.probabilities([context], 0)[0, 0] == pytest.approx(expected, abs=2e-3)
    np.testing.assert_allclose(policy.values([context]), [[6 / 8, 1 / 4]])
    np.testing.assert_allclose(policy.probabilities([other], 0), [[0.5, 0.5]], atol=1e-6)
    assert np.isnan(policy.values([other])).all()


def test_noise_is_that_of_recent_windows() -> None:
    means, context = DiscountedMeans(0.5, 2), Context(("Chat",), ())
    for spread in (10.0, 1.0):
        means.learn(evidence([(context, 0, spread * value) for value in (-1.0, 0.0, 1.0)], steps=2))
    # Squares of 200 and 2 with 2 degrees of freedom each, the older kept to a quarter.
    assert means.read([context]).noise == pytest.approx((200 / 4 + 2) / (2 / 4 + 2))
    assert means.window == 3.0


def test_the_order_of_topics_and_regions_does_not_make_another_cell() -> None:
    table = CellTable(1, 1)
    table.add([Context(("b", "a"), ("y", "x"))], np.array([[3.0]]), np.array([[1.0]]))
    assert table.read([Context(("a", "b"), ("x", "y"))])[0][0, 0, 0] == 3.0


def test_a_question_of_several_topics_is_shared_out_and_reads_all() -> None:
    table = PairTable(1, 1)
    both, one = Context(("Chat", "Logic"), ("Chile",)), Context(("Chat",), ("Chile",))
    table.add([both, one], np.array([[4.0], [1.0]]), np.array([[2.0], [1.0]]))
    assert float(table.count.sum()) == 5.0 and len(table.cells) == 2
    count, total = table.read([both, one, Context(("Facts",), ())])
    np.testing.assert_allclose(count[:, 0, 0], [5.0, 3.0, 0.0])
    np.testing.assert_allclose(total[:, 0, 0], [3.0, 2.0, 0.0])


@given(seed=st.integers(0, 2**32), models=st.integers(1, 4), windows=st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_a_table_comes_back_to_the_bit_from_few_windows_of_its_cells(seed: int, models: int, windows: int) -> None:
    """Cells that are seen once, now and then, always or no more; some models forget all of it."""
    rng = np.random.default_rng(seed)
    contexts = [Context((f"topic {i}",), ()) for i in range(4)]
    often = rng.choice([0.02, 0.3, 1.0], (4, 6))
    whole = restored = CellTable(models, 6)
    for _ in range(windows):
        met = np.flatnonzero(rng.random(4) < 0.8)
        count = (rng.random((4, 6)) < often) * rng.choice([1.0, 2.0, rng.random()], (4, 6))
        total, kept = count * rng.normal(size=(4, 6)), rng.choice([1.0, 0.9, 1e-180], models)
        for table in {id(t): t for t in (whole, restored)}.values():
            table.decay(kept)
            table.add([contexts[i] for i in met], count[met], total[met])
        state = json.dumps(to_json(whole.state()))
        assert json.dumps(to_json(restored.state())) == state
        restored = CellTable(models, 6).loaded(from_json(json.loads(state)))
        for name in ("count", "total"):
            assert getattr(restored, name).tobytes() == getattr(whole, name).tobytes()
        found = whole.state()
        additions = np.zeros((len(whole.count), 6), np.int64)
        np.add.at(additions, (found["early_cell"], found["early_language"]), 1)
        assert additions.max(initial=0) <= models + 1
        sums = found["count"].any(axis=1)
        assert not (sums & (additions > 0)).any() and (sums | (additions > 0) | ~whole.count.any(axis=1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"early_window": [1, 0]}, "'early_window' is not sorted"),
        ({"early_window": [0, 3]}, "'early_window' is not all whole numbers below 3"),
        ({"early_cell": [0, 2]}, "'early_cell' is not all whole numbers below 2"),
        ({"early_language": [0.5, 1]}, "'early_language' is not all whole numbers below 3"),
        ({"early_count": [1.0]}, "columns of different lengths.*'early_count': 1"),
        (
            {"count": np.ones((2, 1, 3))},
            "'early_cell' and 'early_language' have a cell too often, or one that has sums",
        ),
        (
            {"early_window": [0] * 3, "early_cell": [0] * 3, "early_language": [0] * 3}
            | {"early_count": [1.0] * 3, "early_total": [1.0] * 3},
            "too often",
        ),
    ],
)
def test_a_history_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    """One model of three languages: two windows, each with one language in a cell of its own."""
    table = CellTable(1, 3)
    for window, topic in enumerate(("a", "b")):
        one = np.eye(1, 3, window)
        table.decay(np.array([0.9]))
        table.add([Context((topic,), ())], one, 0.5 * one)
    table.decay(np.array([0.9]))
    state = table.state()
    assert [state[name].tolist() for name in ("early_window", "early_cell", "early_language")] == [[0, 1]] * 3
    np.testing.assert_array_equal(CellTable(1, 3).loaded(state).count, table.count)
    with pytest.raises(RouterStateError, match=message):
        CellTable(1, 3).loaded({**state, **change})


def test_a_table_of_few_windows_is_short_however_many_models_share_it() -> None:
    table, rng = CellTable(4, 50), np.random.default_rng(0)
    contexts = [Context((f"topic {i}",), ()) for i in range(40)]
    for _ in range(3):
        table.decay(np.array([1.0, 0.9, 0.5, 0.1]))
        count = (rng.random((40, 50)) < 0.1).astype(np.float64)
        table.add(contexts, count, count * rng.random((40, 50)))
    state = table.state()
    assert not state["count"].any() and not state["total"].any() and table.count.all(axis=1).any()
    size = sum(part.nbytes for name, part in state.items() if name.startswith("early_"))
    assert 2 * size < table.count.itemsize * 2 * np.count_nonzero(table.count)
    # Seen in every window, they are sums, and the windows are gone.
    for _ in range(6):
        table.decay(np.full(4, 0.9))
        table.add(contexts, np.ones((40, 50)), rng.random((40, 50)))
    state = table.state()
    np.testing.assert_array_equal(state["count"], table.count)
    assert [len(state[name]) for name in ("windows", "early_window")] == [0, 0]


# --- the hierarchical policy ------------------------------------------------------------------------------------------


def direct_posterior(policy: LanguagePolicy, contexts: Sequence[Context]) -> Array:
    """Values [C, L] by one normal vector of all (cell, language) values, from the policy's saved sums and variances."""
    state = with_whole_tables(policy.state())
    count, total = (state[name][:, 0] for name in ("count", "total"))
    levels, own, noise = np.asarray(state["levels"])[0], float(state["own"][0]), float(state["noise"][0])
    centre = total.sum() / count.sum()
    everything = [Context(tuple(t), tuple(g)) for t, g in state["cells"]] + list(contexts)
    groups = relatives(LANGUAGES)

    def shared(a: Context, b: Context) -> Array:
        """Covariance of two contexts' sums of effects, [3 levels]."""
        topics = sum((x == y) for x in a.topics for y in b.topics) / (len(a.topics) * len(b.topics))
        regions = sum((x == y) for x in a.regions for y in b.regions) / max(len(a.regions) * len(b.regions), 1)
        return levels @ np.array([1.0, topics, regions])

    size, cells = len(LANGUAGES), len(state["cells"])
    kernel = np.zeros((len(everything), size, len(everything), size))
    for i, a in enumerate(everything):
        for j, b in enumerate(everything):
            language, group, every = shared(a, b)
            for x in range(size):
                for y in range(size):
                    same = (a.topics, a.regions) == (b.topics, b.regions)
                    kernel[i, x, j, y] = every + group * (groups[x] == groups[y]) + (language + own * same) * (x == y)
    kernel = kernel.reshape(len(everything) * size, -1)
    seen = np.flatnonzero(count.ravel() > 0)
    noisy = kernel[np.ix_(seen, seen)] + np.diag(noise / count.ravel()[seen])
    weights = np.linalg.solve(noisy, (total.ravel() / np.maximum(count.ravel(), 1.0))[seen] - centre)
    return centre + (kernel[cells * size :, seen] @ weights).reshape(len(contexts), size)


def test_the_hierarchical_posterior_is_that_of_one_normal_vector() -> None:
    policy = build("hierarchical", hierarchical=HierarchicalConfig(memory=[1.0]))
    for seed in range(2):
        policy.learn(evidence(some_rows(seed)))
    contexts = [
        Context(("Chat",), ()),
        Context(("Facts", "Logic"), ("Ghana", "Japan")),
        Context(("Logic",), ("Kenya",)),
    ]
    np.testing.assert_allclose(policy.values(contexts), direct_posterior(policy, contexts), atol=1e-8)


def test_sizes_of_effects_are_found_with_the_first_window() -> None:
    """One language pays: languages differ by more than was thought before."""
    policy = build("hierarchical")
    before = policy.metrics(0)
    policy.learn(evidence(some_rows(0)))
    after = policy.metrics(0)
    assert after["effect/language"] / after["noise"] > 1.5 * before["effect/language"] / before["noise"]


def test_a_new_region_starts_from_its_topic_and_a_new_language_from_its_relatives() -> None:
    policy, rng = build("hierarchical"), np.random.default_rng(1)
    rows = []
    for _ in range(1500):
        # Spanish (2) pays under Logic, German and Dutch (0, 1) elsewhere; Italian (3) and Kenya are never seen.
        topic, language = str(rng.choice(TOPICS)), int(rng.choice([0, 1, 2, 4]))
        pays = language == 2 if topic == "Logic" else language in (0, 1)
        rows.append(
            (Context((topic,), (str(rng.choice(REGIONS[:3])),)), language, float(rng.random() < 0.2 + 0.6 * pays))
        )
    for start in range(0, 1500, 300):
        policy.learn(evidence(rows[start : start + 300]))
    known = Context(("Logic",), ("Kenya",))
    assert policy.probabilities([known], 0)[0].argmax() == 2
    values = policy.values([known, Context(("Chat",), ("Kenya",))])
    assert values[0, 3] > values[0, 4] + 0.05  # Spanish lends to Italian, not to Japanese
    assert values[0, 2] > values[0, 3]  # but not all that it has
    assert values[1, 3] < values[1, 0]


def test_an_unknown_topic_reads_what_all_topics_share_and_leaves_no_trace() -> None:
    policy = build("hierarchical")
    for seed in range(5):
        policy.learn(evidence(some_rows(seed)))
    before = json.dumps(to_json(policy.state()))
    strange = [Context(("Weather",), ()), Context(("Weather",), ("Atlantis",)), Context(("Chat", "Weather"), ())]
    p = policy.probabilities(strange, 0)
    assert (p.argmax(axis=1) == 2).all() and (p[:, 2] < 1.0).all()
    assert json.dumps(to_json(policy.state())) == before


def test_nothing_is_asked_of_the_order_of_rows_unit_or_origin_of_values() -> None:
    contexts = [Context(("Chat",), ("Chile",)), Context(("Logic", "Facts"), ())]
    reference, shuffled, scaled = (build("hierarchical") for _ in range(3))
    for seed in range(3):
        rows = some_rows(seed)
        reference.learn(evidence(rows))
        shuffled.learn(evidence([rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]))
        scaled.learn(evidence([(context, language, 250.0 * value - 40.0) for context, language, value in rows]))
    p = reference.probabilities(contexts, 0)
    np.testing.assert_allclose(shuffled.probabilities(contexts, 0), p, atol=1e-9)
    np.testing.assert_allclose(scaled.probabilities(contexts, 0), p, atol=1e-6)
    np.testing.assert_allclose(scaled.values(contexts), 250.0 * reference.values(contexts) - 40.0, atol=1e-5)


def grouped_rows(
    rng: np.random.Generator, questions: int, difficulty: float, noise: float
) -> list[tuple[Context, int, float, int]]:
    """(context, language, value, group) of groups of 8, two rollouts in the second language, six drawn from all."""
    rows = []
    for group in range(questions):
        context, hardness = Context((TOPICS[group % 3],), ()), rng.normal(0.0, difficulty)
        for language in [1, 1, *rng.integers(0, 5, 6).tolist()]:
            rows.append((context, language, 0.3 * (language == 2) + hardness + rng.normal(0.0, noise), group))
    return rows


def grouped_evidence(rows: Sequence[tuple[Context, int, float, int]]) -> Evidence:
    plain = evidence([row[:3] for row in rows])
    return replace(plain, group=np.array([row[3] for row in rows], np.int32))


@pytest.mark.parametrize(("difficulty", "noise"), [(0.0, 0.5), (0.4, 0.3)])
def test_how_much_questions_differ_is_found(difficulty: float, noise: float) -> None:
    effects, truth = QuestionEffects.unknown(), np.zeros((3, 5))
    truth[:, 2] = 0.3
    window = effects.take_out(grouped_evidence(grouped_rows(np.random.default_rng(0), 900, difficulty, noise)), truth)
    assert effects.variances[0] == pytest.approx(noise**2, rel=0.1)
    assert effects.variances[1] == pytest.approx(difficulty**2, rel=0.15, abs=0.004)
    means = window.total / window.count
    # Hundreds of groups a context: what is left is mostly the noise of a rollout over their effective number.
    np.testing.assert_allclose(
        means - means.mean(axis=1, keepdims=True), truth - truth.mean(axis=1, keepdims=True), atol=0.1
    )
    # 2 reserved rollouts and a fifth of 6 in each group, fewer where they share their question's effect.
    least, most = (0.9, 1.0) if difficulty == 0.0 else (0.6, 0.85)
    assert least * 960 <= window.count[0, 1] <= most * 960 + 60


def test_rollouts_of_one_question_alone_in_its_context_count_by_the_design_effect() -> None:
    """m rollouts whose question is unknown are worth m s^2 / (s^2 + m v)."""
    effects = QuestionEffects(np.array([50.0, 200.0, 20.0, 100.0, 0.0]))  # s^2 = 0.25, v = 0.2
    rows = [(Context(("Chat",), ()), language, value, 0) for language, value in [(0, 1.0)] * 4 + [(3, 0.0)]]
    effects = QuestionEffects(1e6 * effects.sums)
    window = effects.take_out(grouped_evidence(rows), np.zeros((1, 5)))
    noise, between = effects.variances
    assert (noise, between) == (pytest.approx(0.25, rel=1e-3), pytest.approx(0.2, rel=1e-3))
    np.testing.assert_allclose(window.count[0, [0, 3]], [m * 0.25 / (0.25 + m * 0.2) for m in (4, 1)], rtol=1e-3)
    np.testing.assert_allclose(window.total[0, [0, 3]] / window.count[0, [0, 3]], [1.0, 0.0], atol=1e-9)


def test_hard_questions_do_not_speak_against_the_language_that_they_were_asked_in() -> None:
    """The third language is best, but the questions that came with it are the hard ones."""
    policy, rng = build("hierarchical"), np.random.default_rng(3)
    for _ in range(6):
        rows = []
        for group in range(80):
            hard = group % 2
            languages = [1, 1, *([2] * 5 + [0] if hard else [0] * 6)]
            values = [0.8 + 0.15 * (x == 2) - 0.5 * hard + rng.normal(0.0, 0.2) for x in languages]
            rows += [(Context(("Chat",), ()), x, v, group) for x, v in zip(languages, values)]
        policy.learn(grouped_evidence(rows))
    # Plain means: 0.45 in the third language, about 0.77 in the first.
    values = policy.values([Context(("Chat",), ())])[0]
    assert values[2] - values[0] == pytest.approx(0.15, abs=0.08)


def test_topics_beyond_the_longest_list_still_learn_their_own() -> None:
    topics = tuple(f"topic {i:03d}" for i in range(200))
    policy = build_policy(RouterConfig(name="hierarchical"), LANGUAGES, topics, ())
    rng = np.random.default_rng(0)
    for _ in range(3):
        rows = []
        for _ in range(600):
            topic, language = int(rng.choice([0, 198, 199])), int(rng.integers(5))
            rows.append(
                (Context((topics[topic],), ()), language, float(rng.random() < 0.2 + 0.6 * (language == topic % 5)))
            )
        policy.learn(evidence(rows))
    p = policy.probabilities([Context((topics[t],), ()) for t in (0, 198, 199)], 0)
    assert p.argmax(axis=1).tolist() == [0, 3, 4]


# --- the feature policy -----------------------------------------------------------------------------------------------


def test_hashed_features_are_the_same_everywhere_and_of_length_one() -> None:
    hasher = ContextHasher(64)
    contexts = [
        Context(("Chat",), ("Chile",), "de", "Wie heißt die Hauptstadt?"),
        Context(("Chat",), ("Chile",), "de", "日本の通貨は何ですか"),
        Context(("Chat",), (), "", ""),
    ]
    phi = hasher(contexts)
    assert phi.shape == (3, 64) and np.bincount(hasher.blocks).tolist() == [1, 8, 16, 39]
    lengths = np.stack([(phi[:, hasher.blocks == block] ** 2).sum(axis=1) for block in range(4)], axis=1)
    np.testing.assert_allclose(lengths, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]], atol=1e-12)
    # Written down once: another machine or version must not move what a checkpoint has learned.
    np.testing.assert_array_equal(np.flatnonzero(phi[2, 1:9]), [1])
    np.testing.assert_allclose(phi[0, 25:29], [0.0, -0.15347097, 0.05115699, 0.0], atol=1e-7)
    same = hasher([Context(("Chat",), ("Chile",), "de", "WIE HEISST die Hauptstadt?")])
    np.testing.assert_array_equal(same[0], phi[0])


def test_similar_texts_have_similar_features() -> None:
    phi = ContextHasher(1024)(
        [
            Context(("t",), (), "", text)
            for text in (
                "solve the quadratic equation for x",
                "solve the cubic equation for y",
                "which river flows through Cairo",
            )
        ]
    )
    text = phi[:, ContextHasher(1024).blocks == 3]
    near, far = text[0] @ text[1], text[0] @ text[2]
    assert near > 0.45 and abs(far) < 0.25


def test_the_feature_policy_tells_topics_that_it_never_saw_by_their_words() -> None:
    policy = build("features", features=FeaturesConfig(dimension=128))
    rng = np.random.default_rng(0)
    words = {2: ["integral", "matrix", "theorem", "algebra"], 4: ["sushi", "kimono", "samurai", "ramen"]}

    def context(best: int, number: int) -> Context:
        return Context((f"topic {number}",), (), "", " ".join(rng.choice(words[best], 3)))

    for window in range(8):
        rows = []
        for i in range(150):
            best, language = int(rng.choice([2, 4])), int(rng.integers(5))
            rows.append(
                (context(best, 150 * window + i), language, float(rng.random() < 0.2 + 0.6 * (language == best)))
            )
        policy.learn(evidence(rows))
    for best in words:
        p = policy.probabilities([context(best, 9000 + i) for i in range(20)], 0)
        assert p[:, best].mean() > 0.8


def test_the_feature_policy_sums_every_rollout_in_its_language() -> None:
    """Gram matrices and products by a loop over rollouts, some contexts several times, a language without any."""
    policy = build("features", features=FeaturesConfig(dimension=16, memory=[0.9]))
    rows = [row for row in some_rows(1, 60) if row[1] != 3]
    policy.learn(evidence(rows[:30], steps=1))
    policy.learn(evidence(rows[30:], steps=2))
    gram, product, hasher = np.zeros((5, 16, 16)), np.zeros((5, 16)), ContextHasher(16)
    for i, (context, language, value) in enumerate(rows):
        (phi,), weight = hasher([context]), 0.9**2 if i < 30 else 1.0
        gram[language] += weight * np.outer(phi, phi)
        product[language] += weight * value * phi
    state = policy.state()
    rows_below, columns_below = np.tril_indices(16)
    np.testing.assert_allclose(state["gram"][0], gram[:, rows_below, columns_below], atol=1e-12)
    np.testing.assert_allclose(state["product"][0], product, atol=1e-12)


def test_the_feature_posterior_is_that_of_one_normal_vector() -> None:
    """Values by the covariances of all rollouts with each other, from the features and the saved variances."""
    policy = build("features", features=FeaturesConfig(dimension=32, memory=[1.0]))
    rows = [
        (replace(c, question=f"{c.topics[0]} {i % 7}?", language="de"), x, y)
        for i, (c, x, y) in enumerate(some_rows(2))
    ]
    for part in (rows[:150], rows[150:]):
        policy.learn(evidence(part))
    state, hasher, groups = policy.state(), ContextHasher(32), np.array(relatives(LANGUAGES))
    levels, noise = state["levels"][0], state["sums"][0, 2]
    value = np.array([y for *_, y in rows])

    def covariance(a: Array, x: Array, b: Array, y: Array) -> Array:
        language, group, every = (a * level[hasher.blocks] @ b.T for level in levels)
        same, related = x[:, None] == y, groups[x][:, None] == groups[y]
        return every + group * related + language * same

    asked = [rows[0][0], Context(("new",), ("Kenya",), "ja", "unheard of")]
    phi, x = hasher([c for c, *_ in rows]), np.array([x for _, x, _ in rows])
    at, y = np.repeat(hasher(asked), len(LANGUAGES), axis=0), np.tile(np.arange(len(LANGUAGES)), len(asked))
    weights = np.linalg.solve(covariance(phi, x, phi, x) + noise * np.eye(len(rows)), value - value.mean())
    expected = value.mean() + covariance(at, y, phi, x) @ weights
    np.testing.assert_allclose(policy.values(asked).ravel(), expected, atol=1e-8)
    assert np.ptp(expected[: len(LANGUAGES)]) > 0.1


def test_the_feature_vector_shrinks_with_the_number_of_languages() -> None:
    assert fitting_dimension(256, 15) == 256 and fitting_dimension(256, 32) == 256
    assert fitting_dimension(256, 500) == 64 and 500 * 64**2 <= 2**21 < 500 * 65**2


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
def test_before_any_data_every_language_is_alike_and_no_value_is_known(name: str) -> None:
    policy = build(name)
    contexts = [Context(("Chat",), ("Chile",), "de", "Hallo"), Context(("new",), ())]
    np.testing.assert_allclose(policy.probabilities(contexts, 0), 0.2, atol=1e-9)
    assert np.isnan(policy.values(contexts)).all()
    policy.learn(evidence([], steps=5))
    np.testing.assert_allclose(policy.probabilities(contexts, 5), 0.2, atol=1e-9)


@pytest.mark.parametrize("name", LEARNERS)
def test_equal_rewards_teach_no_preference(name: str) -> None:
    """No reward differs: nothing to divide by; what little differs is how much relatives add to what is known."""
    policy = build(name)
    contexts = [Context((topic,), (), "de", topic) for topic in TOPICS]
    for _ in range(4):
        policy.learn(evidence([(context, x, 1.0) for context in contexts for x in range(5) for _ in range(3)]))
    np.testing.assert_allclose(policy.probabilities(contexts, 0), 0.2, atol=0.02)
    np.testing.assert_allclose(policy.values(contexts), 1.0, atol=1e-6)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_loaded_state_goes_on_to_the_bit(name: str) -> None:
    policy, loaded = build(name), build(name)
    for seed in range(3):
        policy.learn(evidence(some_rows(seed)))
    loaded.load(from_json(json.loads(json.dumps(to_json(policy.state())))))
    contexts = [row[0] for row in some_rows(9, 20)]
    for seed in range(3, 5):
        np.testing.assert_array_equal(loaded.probabilities(contexts, 0), policy.probabilities(contexts, 0))
        np.testing.assert_array_equal(loaded.values(contexts), policy.values(contexts))
        for each in (policy, loaded):
            each.learn(evidence(some_rows(seed)))
    np.testing.assert_array_equal(loaded.probabilities(contexts, 0), policy.probabilities(contexts, 0))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_context_has_the_same_probabilities_to_the_bit_in_other_company(name: str) -> None:
    """A resumed run, or another rank, asks for a context together with others than before."""
    policy = build(name)
    for seed in range(3):
        policy.learn(evidence(some_rows(seed)))
    contexts = [*dict.fromkeys(row[0] for row in some_rows(9, 150)), Context(("new",), ())]
    together = policy.probabilities(contexts, 0)
    for part in (1, 7):
        fresh = build(name)
        fresh.load(policy.state())
        parts = [fresh.probabilities(contexts[i : i + part], 0) for i in range(0, len(contexts), part)]
        np.testing.assert_array_equal(np.concatenate(parts), together)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_damaged_state_is_refused_and_changes_nothing(name: str) -> None:
    policy, other = build(name), build(name)
    policy.learn(evidence(some_rows(0)))
    for seed in (1, 3):
        other.learn(evidence(some_rows(seed)))
    contexts = [row[0] for row in some_rows(2, 10)]
    before, state = policy.probabilities(contexts, 0), other.state()
    for part, value in state.items():
        damaged = [{k: v for k, v in state.items() if k != part}]
        if isinstance(value, np.ndarray):
            nothing = np.full_like(value, np.nan if value.dtype.kind == "f" else -1)
            damaged += [{**state, part: value[..., :-1]}, {**state, part: nothing}]
        if part in ("weights", "own", "noise", "levels", "sums"):
            damaged += [{**state, part: np.zeros_like(value)}]
        for bad in damaged:
            with pytest.raises(RouterStateError, match=part):
                policy.load(bad)
            np.testing.assert_array_equal(policy.probabilities(contexts, 0), before)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_language_that_joins_starts_at_the_prior_and_the_others_keep_what_they_know(name: str) -> None:
    config = RouterConfig(name=name, update_every=1, features=FeaturesConfig(dimension=32))
    old = build_router(config, ("de", "es", "ja"), TOPICS, REGIONS, 1)
    columns = [0, 2, 1, 2, 0]  # of `old`; what pays is Spanish here
    old.policy.learn(evidence([(context, columns[x], value) for context, x, value in some_rows(0)]))
    new = build_router(config, ("de", "es", "it", "ja"), TOPICS, REGIONS, 1)
    new.load_state_dict(from_json(json.loads(json.dumps(to_json(old.state_dict())))))
    contexts = [Context(("Chat",), ("Chile",)), Context(("Logic",), ())]
    before, after = old.policy.values(contexts), new.policy.values(contexts)
    if name in ("ucb", "thompson"):
        np.testing.assert_allclose(after[:, [0, 1, 3]], before, atol=1e-12)
        assert np.isnan(after[:, 2]).all()
    else:
        # Relatives move a little with their new sister; she has what Spanish lends her, and less of it.
        np.testing.assert_allclose(after[:, [0, 1, 3]], before, atol=0.02)
        assert (after[:, 2] < after[:, 1]).all() and (new.policy.probabilities(contexts, 0)[:, 2] > 1e-3).all()


@pytest.mark.parametrize("name", ("hierarchical", "features"))
def test_another_bank_of_memories_than_the_saved_one_is_refused_by_its_key(name: str) -> None:
    policy = build(name)
    state = {**policy.state(), "memory": [1.0]}
    with pytest.raises(RouterStateError, match=rf"memory=\[1.0\].*router\.{name}\.memory"):
        policy.load(state)


@pytest.mark.parametrize("section", [HierarchicalConfig(memory=[]), FeaturesConfig(memory=[0.0])])
def test_a_bank_without_a_usable_memory_is_refused(section: HierarchicalConfig | FeaturesConfig) -> None:
    with pytest.raises(ConfigError, match=r"router\.x\.memory"):
        section.check("router.x")


def test_sums_of_a_window_are_counts_totals_and_squares_within() -> None:
    rows = [(Context(("a",), ()), 1, value) for value in (1.0, 2.0, 6.0)] + [(Context(("b",), ()), 0, 5.0)]
    count, total, squares = window_sums(evidence(rows), 2)
    np.testing.assert_allclose(count, [[0, 3], [1, 0]])
    np.testing.assert_allclose(total, [[0, 9], [5, 0]])
    assert squares == pytest.approx(4 + 1 + 9)


@pytest.mark.parametrize("name", LEARNERS)
def test_rewards_without_noise_teach_too(name: str) -> None:
    """Easy questions are answered in the third language every time, hard ones never, as at a low temperature."""
    policy = build(name)
    rng = np.random.default_rng(0)
    context = Context(("Facts",), ())
    for _ in range(6):
        group = np.repeat(np.arange(12, dtype=np.int32), 8)
        language = rng.integers(0, 5, len(group)).astype(np.int16)
        easy = rng.random(12) < 0.7
        value = ((language == 2) & easy[group]).astype(np.float64)
        policy.learn(Evidence([context], np.zeros(len(group), np.int32), language, value, group, 5))
    p = policy.probabilities([context], 30)[0]
    assert np.argmax(p) == 2 and p[2] > 0.6, p
