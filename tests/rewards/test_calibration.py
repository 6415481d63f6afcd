"""Calibrations against values worked out by hand, against those recorded from the released code, and their laws."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import CalibrationConfig
from nemo_lrpo.rewards.calibration import (
    MAX_SLOPE,
    UNIFORM,
    Calibration,
    NoCalibration,
    QuantileCalibration,
    affine_calibration,
    build_calibration,
    calibration_from,
    main_effects,
    mean_calibration,
)
from nemo_lrpo.rewards.statistics import (
    RELEASED_NAMES,
    Moments,
    PairStatistics,
    file_hash,
    moments,
    read_released_table,
    read_statistics,
    weighted_mean,
    write_statistics,
)

DATA = Path(__file__).parents[1] / "data"
RELEASED = DATA / "pair_statistics_released.csv"
BY_HAND = PairStatistics(
    "sha256:one",
    {("de", "en"): Moments(30, 0.9, 0.01), ("en", "fr"): Moments(10, 0.7, 0.1), ("de", "de"): Moments(10, 1.0, 0.0)},
    {("de", "en"): Moments(30, 0.2, 0.1), ("en", "fr"): Moments(10, 0.1, 0.1), ("de", "de"): Moments(10, 0.3, 0.1)},
    source={"seed": 0},
)
"""mu_ref = (27 + 7 + 10) / 50 = 0.88; of the pairs of two languages (27 + 7) / 40 = 0.85."""

LANGUAGES = ["de", "en", "fr", "xx"]


def drawn_statistics(seed: int = 0, samples: int = 200) -> PairStatistics:
    """Of cosines drawn around other means for each pair; a text of de or en is compared with itself, fr twice worded;
    no pair with xx."""
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for a in LANGUAGES[:3] for b in LANGUAGES[:3] if a <= b]
    kinds: list[dict] = [{}, {}, {}]
    for place, pair in enumerate(pairs):
        identical = pair[0] == pair[1] != "fr"
        equivalent = np.ones(samples) if identical else rng.normal(0.7 + 0.03 * place, 0.05, samples)
        for kind, cosines in zip(kinds, (equivalent, rng.normal(0.1, 0.1, samples), rng.normal(0.6, 0.1, samples))):
            kind[pair] = moments(cosines)
    return PairStatistics("sha256:drawn", *kinds)


DRAWN = drawn_statistics()
SETTINGS = [
    CalibrationConfig(method=method, shrinkage_k=k, unknown_pair=unknown)
    for method in ("none", "mean", "quantile", "affine")
    for k in (0.0, 50.0)
    for unknown in ("reference", "raw")
]
EVERY = [calibration_from(config, DRAWN) for config in SETTINGS]


# --- the released code ----------------------------------------------------------------------------------------------


def test_the_released_code_is_reproduced() -> None:
    golden = json.loads((DATA / "golden_calibration.json").read_text())
    statistics = read_released_table(RELEASED)
    assert len(statistics.equivalent) == golden["n_pairs"] == 119
    assert ("en", "en") not in statistics.equivalent
    assert weighted_mean(statistics.equivalent.values()) == pytest.approx(golden["mu_ref"], abs=1e-14)
    calibration = mean_calibration(statistics, unknown_pair="raw", bounds="clip")
    unknown = 0
    for case in golden["cases"]:
        reference = RELEASED_NAMES.get(case["gt_language"], case["gt_language"] or "und")
        calibrated = calibration.apply(case["raw_sim"], reference, case["pred_lang"] or "und")
        assert calibrated.value == pytest.approx(case["calibrated_sim"], abs=1e-12), case
        assert calibrated.quality == pytest.approx(case["embed_reward_float32"], abs=1e-6), case
        unknown += not calibrated.known
    assert 0 < unknown < len(golden["cases"])
    # The table lacks this pair, and released rewards keep the raw value.
    assert calibration.apply(0.98, "en", "en").value == 0.98


def test_english_is_not_ahead_of_chinese() -> None:
    """The released table has no English-English."""
    statistics = read_released_table(RELEASED)
    released, ours = mean_calibration(statistics, unknown_pair="raw", bounds="clip"), mean_calibration(statistics)

    def lead(calibration: Calibration, similarity: float) -> float:
        english, chinese = (calibration.apply(similarity, code, code).quality for code in ("en", "zh"))
        return english - chinese

    for similarity in (0.5, 0.9, 0.98):
        assert lead(released, similarity) == pytest.approx(0.0202, abs=1e-4)
        assert abs(lead(ours, similarity)) < 0.0035
    # An answer as good as the average equivalent in one language has the reward of one across languages.
    own = weighted_mean(m for (a, b), m in statistics.equivalent.items() if a == b)
    mu_ref = weighted_mean(statistics.equivalent.values())
    assert ours.apply(own, "en", "en").value == pytest.approx(mu_ref, abs=1e-12)
    assert not ours.apply(own, "en", "en").known


def test_the_ranking_is_kept_up_to_the_top() -> None:
    statistics = read_released_table(RELEASED)
    released, ours = mean_calibration(statistics, bounds="clip"), mean_calibration(statistics)
    top = [0.97, 0.98, 0.99, 0.999, 1.0]
    lost = 0
    for pair in [*statistics.equivalent, ("en", "en")]:
        qualities = [ours.apply(s, *pair).quality for s in top]
        assert all(one < other for one, other in pairwise(qualities)) and qualities[-1] <= 1.0
        lost += released.apply(0.999, *pair).quality == released.apply(1.0, *pair).quality
    # The pair with the lowest mean needs all of the room; nothing is given away beyond it.
    assert max(ours.apply(1.0, *pair).quality for pair in statistics.equivalent) == 1.0
    assert min(ours.apply(-1.0, *pair).quality for pair in statistics.equivalent) == 0.0
    assert lost > 50


# --- by hand --------------------------------------------------------------------------------------------------------


def test_the_mean_by_hand() -> None:
    calibration = mean_calibration(BY_HAND)
    assert calibration.apply(0.5, "de", "en").value == pytest.approx(0.5 - 0.02)
    assert calibration.apply(0.5, "en", "fr").value == pytest.approx(0.5 + 0.18)
    assert calibration.apply(0.95, "fr", "en").value == pytest.approx(1.13)
    # s' lies in [-1 - 0.12, 1 + 0.18].
    assert calibration.apply(0.95, "fr", "en").quality == pytest.approx((1.13 + 1.12) / 2.3)
    assert calibration.apply(-1.0, "de", "de").quality == 0.0
    clipped = mean_calibration(BY_HAND, bounds="clip")
    assert clipped.apply(0.95, "fr", "en").value == clipped.apply(0.95, "fr", "en").quality == 1.0
    assert clipped.apply(-0.95, "de", "de").value == -1.0
    shrunk = mean_calibration(BY_HAND, shrinkage_k=10.0)
    assert shrunk.apply(0.5, "de", "en").value == pytest.approx(0.5 - 30 / 40 * 0.02)
    assert shrunk.apply(0.5, "en", "fr").value == pytest.approx(0.5 + 10 / 20 * 0.18)


def test_unknown_pairs_by_setting() -> None:
    reference = mean_calibration(BY_HAND, shrinkage_k=10.0)
    assert reference.apply(0.5, "de", "fr").value == pytest.approx(0.5 - (0.85 - 0.88))
    assert reference.apply(0.5, "en", "en").value == pytest.approx(0.5 - (1.0 - 0.88))
    raw = mean_calibration(BY_HAND, unknown_pair="raw")
    assert raw.apply(0.5, "fr", "de").value == 0.5
    assert [raw.apply(0.5, *pair).known for pair in (("fr", "de"), ("en", "de"))] == [False, True]
    no_own = mean_calibration(PairStatistics("", {("de", "en"): Moments(30, 0.9, 0.01)}))
    assert no_own.apply(0.5, "en", "en").value == 0.5
    # There is room for them too, though here no known pair moves as far.
    far = mean_calibration(BY_HAND, shrinkage_k=1e6)
    assert far.apply(1.0, "de", "fr").quality > far.apply(0.999, "de", "fr").quality
    # Whatever the method: of its kind.
    for name in ("mean", "quantile", "affine"):
        built = {
            u: calibration_from(CalibrationConfig(method=name, unknown_pair=u), DRAWN) for u in ("reference", "raw")
        }
        assert built["raw"].apply(0.5, "xx", "de").value == pytest.approx(0.5)
        own, across = (built["reference"].apply(0.9, *pair) for pair in (("xx", "xx"), ("xx", "de")))
        assert not own.known and not across.known
        assert own.quality < across.quality


def test_the_affine_by_hand() -> None:
    calibration = affine_calibration(BY_HAND)
    top, bottom = 0.88, (30 * 0.2 + 10 * 0.1 + 10 * 0.3) / 50
    for a, b, upper, lower in (("de", "en", 0.9, 0.2), ("fr", "en", 0.7, 0.1), ("de", "de", 1.0, 0.3)):
        assert calibration.apply(upper, a, b).value == pytest.approx(top)
        assert calibration.apply(lower, a, b).value == pytest.approx(bottom)
        assert calibration.apply((upper + lower) / 2, a, b).value == pytest.approx((top + bottom) / 2)


def test_the_affine_serves_pairs_that_were_never_measured() -> None:
    effects = {"de": 0.05, "en": 0.02, "fr": -0.01, "it": -0.06}
    pairs = [("de", "en"), ("de", "fr"), ("de", "it"), ("en", "fr"), ("en", "it")]
    counts = dict(zip(pairs, (10, 20, 30, 40, 50)))
    statistics = PairStatistics(
        "",
        {(a, b): Moments(counts[a, b], 0.8 + effects[a] + effects[b], 0.1) for a, b in pairs},
        {(a, b): Moments(counts[a, b], 0.1 + 2 * (effects[a] + effects[b]), 0.1) for a, b in pairs},
    )
    calibration = affine_calibration(statistics)
    top, bottom = (weighted_mean(side.values()) for side in (statistics.equivalent, statistics.mismatch))
    # French and Italian were never compared: their effects say where their equivalents lie.
    found = calibration.apply(0.8 - 0.01 - 0.06, "it", "fr")
    assert found.known and found.value == pytest.approx(top)
    assert calibration.apply(0.1 - 0.02 - 0.12, "fr", "it").value == pytest.approx(bottom)
    assert not calibration.apply(0.5, "fr", "fr").known and not calibration.apply(0.5, "fr", "xx").known


def test_effects_leave_every_language_at_its_own_mean() -> None:
    """Least squares: the weighted residuals of a language's pairs add up to nothing."""
    rng = np.random.default_rng(1)
    codes = "abcdef"
    samples = {
        (a, b): Moments(int(rng.integers(5, 90)), rng.uniform(0.5, 0.9), 0.1) for a in codes for b in codes if a < b
    }
    fit = main_effects(samples)
    for language in codes:
        residuals = [m.count * (m.mean - fit(*pair)) for pair, m in samples.items() if language in pair]
        assert math.fsum(residuals) == pytest.approx(0.0, abs=1e-9)
    # What a language is to itself is of another kind and changes nothing.
    assert main_effects({**samples, ("a", "a"): Moments(1000, 1.0, 0.0)}).effects == fit.effects


def test_the_affine_is_bounded_where_nothing_is_told_apart() -> None:
    equivalent = {
        ("de", "en"): Moments(90, 0.9, 0.1),
        ("de", "fr"): Moments(90, 0.8, 0.1),
        ("en", "fr"): Moments(9, 0.7, 0.1),
    }
    mismatch = {
        ("de", "en"): Moments(90, 0.2, 0.1),
        ("de", "fr"): Moments(90, 0.2, 0.1),
        ("en", "fr"): Moments(9, 0.7, 0.1),
    }
    calibration = affine_calibration(PairStatistics("", equivalent, mismatch))
    one, other = (calibration.apply(s, "fr", "en").value for s in (0.3, 0.8))
    assert (other - one) / 0.5 == pytest.approx(MAX_SLOPE)
    top = weighted_mean(equivalent.values())
    assert calibration.apply(0.7, "fr", "en").value == pytest.approx(top)
    with pytest.raises(ConfigError, match=r"equivalent texts \(mean cosine 0\.2238\) are no more similar"):
        affine_calibration(PairStatistics("", mismatch, equivalent))
    with pytest.raises(ConfigError, match="needs the mismatches"):
        affine_calibration(PairStatistics("", equivalent))


def test_the_quantile_by_hand() -> None:
    statistics = PairStatistics(
        "",
        {("de", "en"): Moments(30, 0.8, 0.1, (0.6, 0.8, 1.0))},
        {("de", "en"): Moments(30, 0.0, 0.1, (-0.2, 0.0, 0.2))},
        {("de", "en"): Moments(30, 0.4, 0.1, (0.2, 0.4, 0.6))},
    )
    calibration = QuantileCalibration(statistics)
    for s, level in ((-0.2, 0), (0.0, 1 / 6), (0.2, 1 / 3), (0.3, 5 / 12), (0.6, 2 / 3), (0.9, 11 / 12), (1.0, 1)):
        expected = (1 - UNIFORM) * level + UNIFORM * (s + 1) / 2
        found = calibration.apply(s, "en", "de")
        assert found.quality == pytest.approx(expected) and found.value == pytest.approx(2 * expected - 1)
    assert calibration.apply(-1.0, "de", "en").quality == 0.0


def test_a_copy_is_worth_as_much_as_the_average_equivalent() -> None:
    """With the quantile, where all equivalents of a pair are 1."""
    calibration = QuantileCalibration(DRAWN)
    copy = calibration.apply(1.0, "de", "de").quality
    assert copy == pytest.approx((1 - UNIFORM) * 5 / 6 + UNIFORM, abs=1e-3)
    rng = np.random.default_rng(0)
    # de-en has its equivalents at 0.73, well above its mismatches and partly above its hardest negatives.
    equivalents = [calibration.apply(s, "de", "en").quality for s in np.clip(rng.normal(0.73, 0.05, 2000), -1, 1)]
    assert np.mean(equivalents) < copy


def test_the_quantile_spreads_every_pair_alike() -> None:
    """Samples of a pair in equal parts have the quantiles of a uniform distribution, whatever the encoder's scale."""
    rng = np.random.default_rng(3)
    raw = {
        pair: [rng.normal(m, s, 3000).clip(-1, 1) for m, s in parts]
        for pair, parts in {
            ("de", "en"): ((0.9, 0.02), (0.5, 0.05), (0.8, 0.03)),
            ("en", "fr"): ((0.6, 0.1), (0.0, 0.2), (0.4, 0.1)),
        }.items()
    }
    kinds = [{pair: moments(parts[i]) for pair, parts in raw.items()} for i in range(3)]
    calibration = QuantileCalibration(PairStatistics("", *kinds))
    for pair, parts in raw.items():
        levels = np.sort([calibration.apply(s, *pair).quality for part in parts for s in part.tolist()])
        uniform = (np.arange(len(levels)) + 0.5) / len(levels)
        # Kolmogorov's distance: what 33 quantiles and the uniform share take.
        assert np.abs(levels - uniform).max() < 0.02


# --- laws -----------------------------------------------------------------------------------------------------------

similarity = st.floats(-1, 1)
language = st.sampled_from(LANGUAGES)


@given(similarity, similarity, language, language)
def test_every_method_is_monotone_bounded_and_symmetric(s: float, other: float, a: str, b: str) -> None:
    for calibration in EVERY:
        found, back, second = (calibration.apply(*call) for call in ((s, a, b), (s, b, a), (other, a, b)))
        assert found == back
        assert 0.0 <= found.quality <= 1.0
        if s - other > 1e-6:
            assert found.quality > second.quality and found.value > second.value


@given(st.lists(st.tuples(similarity, language, language), min_size=2, max_size=6))
def test_quality_is_one_increasing_function_of_the_value(calls: list[tuple[float, str, str]]) -> None:
    """Whatever the pair; otherwise s' would not be comparable between languages."""
    for calibration in EVERY:
        found = sorted((calibration.apply(*call) for call in calls), key=lambda one: one.value)
        assert all(one.quality <= other.quality + 1e-12 for one, other in pairwise(found))


@given(st.lists(similarity, min_size=2, max_size=30), language, language, st.floats(0, 1000))
def test_the_mean_leaves_the_ranking_within_a_pair(similarities: list[float], a: str, b: str, k: float) -> None:
    # Apart by more than the rounding of a sum.
    similarities = [round(s, 6) for s in similarities]
    calibration = mean_calibration(DRAWN, k)
    qualities = [calibration.apply(s, a, b).quality for s in similarities]
    _, ranks = np.unique(similarities, return_inverse=True)
    _, after = np.unique(np.round(qualities, 9), return_inverse=True)
    assert ranks.tolist() == after.tolist()


def test_anchored_quantiles_bring_the_means_of_equivalents_together() -> None:
    """One pair's equivalents lie among its hardest negatives, the other's far above."""
    points = np.linspace(0.0, 1.0, 33)
    statistics = PairStatistics(
        "",
        {
            ("de", "en"): Moments(100, 0.6, 0.1, tuple(0.4 + 0.4 * points)),
            ("de", "fr"): Moments(300, 0.9, 0.1, tuple(0.8 + 0.2 * points)),
        },
        {pair: Moments(100, 0.2, 0.1, tuple(0.4 * points)) for pair in (("de", "en"), ("de", "fr"))},
        {pair: Moments(100, 0.5, 0.1, tuple(0.3 + 0.4 * points)) for pair in (("de", "en"), ("de", "fr"))},
    )
    means = {}
    for anchor in (False, True):
        calibration = QuantileCalibration(statistics, 0.0, anchor=anchor)
        means[anchor] = [
            np.mean([calibration.apply(s, *pair).quality for s in np.linspace(low, high, 2001)])
            for pair, low, high in ((("de", "en"), 0.4, 0.8), (("de", "fr"), 0.8, 1.0))
        ]
        for pair in (("de", "en"), ("de", "fr"), ("en", "fr")):
            qualities = [calibration.apply(s, *pair).quality for s in np.linspace(-1.0, 1.0, 101)]
            assert qualities[0] == 0.0 and qualities[-1] == 1.0 and (np.diff(qualities) > 0.0).all()
    apart, together = means[False], means[True]
    assert apart[1] - apart[0] > 0.05
    assert together == pytest.approx([0.25 * apart[0] + 0.75 * apart[1]] * 2, abs=2e-3)


def test_affine_lines_shrink_to_the_common_one() -> None:
    own, half, pooled, other = (
        affine_calibration(DRAWN, k).apply(0.7, *pair).value
        for k, pair in ((0.0, ("de", "en")), (200.0, ("de", "en")), (1e12, ("de", "en")), (1e12, ("en", "fr")))
    )
    assert pooled == pytest.approx(other, abs=1e-6) and abs(own - pooled) > 0.01
    assert min(own, pooled) < half < max(own, pooled)


@pytest.mark.parametrize("build", [mean_calibration, QuantileCalibration])
def test_the_limits_of_shrinkage(build: Callable[[PairStatistics, float], Calibration]) -> None:
    pair = ("de", "en")
    own, half, pooled = (build(DRAWN, k).apply(0.7, *pair).value for k in (0.0, 200.0, 1e12))
    assert half == pytest.approx((own + pooled) / 2, abs=1e-9)
    assert abs(own - pooled) > 0.01
    if build is mean_calibration:
        assert own == pytest.approx(0.7 - DRAWN.equivalent[pair].mean + weighted_mean(DRAWN.equivalent.values()))
        assert pooled == pytest.approx(0.7, abs=1e-9)
    else:
        # As a pair that was never measured.
        assert pooled == pytest.approx(build(DRAWN, 0.0).apply(0.7, "de", "xx").value, abs=1e-9)


def test_the_pooled_distribution_weighs_pairs_by_their_samples() -> None:
    few, many = (drawn_statistics(seed, samples) for seed, samples in ((1, 20), (2, 2000)))
    sides = [
        {("de", "en"): getattr(few, k)["de", "en"], ("en", "fr"): getattr(many, k)["en", "fr"]}
        for k in ("equivalent", "mismatch", "hardest")
    ]
    calibration = QuantileCalibration(PairStatistics("", *sides))
    rare, common, pooled = (calibration.apply(0.8, *p).quality for p in (("de", "en"), ("en", "fr"), ("de", "fr")))
    assert pooled == pytest.approx((20 * rare + 2000 * common) / 2020, abs=2e-3)
    assert abs(rare - common) > 0.05


# --- files ----------------------------------------------------------------------------------------------------------


def test_statistics_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    for statistics in (BY_HAND, DRAWN):
        write_statistics(path, statistics)
        assert read_statistics(path) == statistics
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.json"]
    broken = PairStatistics("sha256:one", {("de", "en"): Moments(1, math.nan, 0.0)})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_statistics(path, broken)
    assert read_statistics(path) == DRAWN
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.json"]


def version_1() -> dict:
    def rows(side: dict) -> list[dict]:
        return [{"languages": pair, "count": m.count, "mean": m.mean, "std": m.std} for pair, m in side.items()]

    return {
        "format": "nemo_lrpo pair statistics",
        "version": 1,
        "encoder": "sha256:one",
        "source": {"seed": 0},
        "pairs": rows(BY_HAND.equivalent),
        "extra": {"mismatch": rows(BY_HAND.mismatch)},
    }


def test_files_of_the_first_version_are_read_and_have_no_quantiles(tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(version_1()))
    assert read_statistics(path) == BY_HAND
    for method in ("mean", "affine"):
        build_calibration(CalibrationConfig(path=str(path), method=method), "sha256:one", ["de"])
    with pytest.raises(ConfigError, match=r"calibration\.path=.* hold none of de-de\. Measure it again"):
        build_calibration(CalibrationConfig(path=str(path), method="quantile"), "sha256:one", ["de"])


def test_building_refuses_what_does_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "statistics.json"
    write_statistics(path, BY_HAND)
    config = CalibrationConfig(path=str(path), shrinkage_k=0.0)
    built = build_calibration(config, "sha256:one", ["de", "en", "fr"])
    assert built.apply(0.5, "de", "en").value == pytest.approx(0.48)
    with pytest.raises(ConfigError, match=r"encoder sha256:one, this one is sha256:two"):
        build_calibration(config, "sha256:two", ["de"])
    config.unknown_pair = "error"
    with pytest.raises(ConfigError, match="no statistics for de-fr, en-en, fr-fr"):
        build_calibration(config, "sha256:one", ["de", "en", "fr"])
    # Whatever the order of the languages.
    with pytest.raises(ConfigError, match="no statistics for en-en,"):
        build_calibration(config, "sha256:one", ["en", "de"])
    build_calibration(config, "sha256:one", ["de"])
    config.unknown_pair = "reference"
    with pytest.raises(ConfigError, match="so for none of `languages`; it has de, en, fr"):
        build_calibration(config, "sha256:one", ["German", "English"])
    with caplog.at_level("WARNING"):
        build_calibration(config, "sha256:one", ["en", "de"])
    assert "1 of 3 pairs" in caplog.text and caplog.text.rstrip().endswith("en-en")
    config.unknown_pair = "error"
    config.method = "affine"
    with pytest.raises(ConfigError, match="no statistics for en-en, fr-fr, and"):
        build_calibration(config, "sha256:one", ["de", "en", "fr"])
    assert isinstance(build_calibration(CalibrationConfig(method="none"), "", []), NoCalibration)
    with pytest.raises(ConfigError, match=r"calibration\.path is not set"):
        build_calibration(CalibrationConfig(), "sha256:one", ["de"])
    with pytest.raises(ConfigError, match=r"calibration\.unknown_pair='keep'"):
        CalibrationConfig(path=str(path), unknown_pair="keep").check("calibration")


def entry(**change: object) -> dict:
    numbers = {"count": 1, "mean": 0, "std": 0, **change}
    return {
        "pairs": [{"languages": ["de", "en"], "equivalent": {"count": 1, "mean": 0, "std": 0}, "mismatch": numbers}]
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no pair statistics"),
        ({"version": 3}, "version 3 is not known; accepted: 1, 2"),
        ({"encoder": ""}, "encoder=''"),
        ({"source": []}, r"source=\[\]"),
        ({"pairs": []}, "pairs is empty"),
        ({"pairs": {"de-en": 1}}, "pairs is not a list"),
        ({"pairs": [7]}, r"pairs\[0\]\.languages=None"),
        ({"pairs": [{"languages": ["de"]}]}, r"pairs\[0\]\.languages=\['de'\]; expected two"),
        ({"pairs": [{"languages": ["de", "en"]}]}, r"pairs\[0\] \(de-en\) has no 'equivalent'"),
        (entry(count=0), r"pairs\[0\]\.mismatch\.count=0"),
        (entry(count=True), r"pairs\[0\]\.mismatch\.count=True"),
        (entry(mean=1.5), r"pairs\[0\]\.mismatch\.mean=1\.5"),
        (entry(mean=math.nan), r"pairs\[0\]\.mismatch\.mean=nan"),
        (entry(std=-1), r"pairs\[0\]\.mismatch\.std=-1"),
        (entry(quantiles=[0.1, 0.0]), r"pairs\[0\]\.mismatch\.quantiles=\[0\.1, 0\.0\]; .* none descending"),
        (entry(quantiles=[0.1]), r"pairs\[0\]\.mismatch\.quantiles=\[0\.1\]"),
        (entry(quantiles=[0.1, "x"]), r"pairs\[0\]\.mismatch\.quantiles="),
        ({"pairs": [*entry()["pairs"], {**entry()["pairs"][0], "languages": ["en", "de"]}]}, "en-de is listed twice"),
        (
            {**version_1(), "pairs": [{"languages": ["de", "en"], "count": 1, "mean": 2, "std": 0}]},
            r"pairs\[0\]\.mean=2",
        ),
        ({**version_1(), "extra": {"hardest": 1}}, r"extra\.hardest is not a list"),
        ({**version_1(), "extra": []}, r"extra=\[\]"),
    ],
)
def test_a_broken_file_is_refused_by_entry(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "statistics.json"
    write_statistics(path, BY_HAND)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message) as refused:
        read_statistics(path)
    assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff"])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "statistics.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_statistics(path)


def test_a_broken_table_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("lang_a,lang_b,count,mean,std\nGerman,English,30,0.9,0.1\nGerman,Klingon,30,0.9,0.1\n")
    with pytest.raises(ConfigError, match=r"line 3: KeyError\('Klingon'\)"):
        read_released_table(path)


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"x" * (1 << 20) + b"a")
    other.write_bytes(b"x" * (1 << 20) + b"b")
    assert file_hash(one).startswith("sha256:") and file_hash(one) != file_hash(other)
