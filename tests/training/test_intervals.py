"""Averages by language and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lrpo.training.intervals import averages


def made(values: dict[str, list[float]], *, shared: bool = False, **more: object):
    rows = [(value, language, i) for language, own in values.items() for i, value in enumerate(own)]
    parallel = [str(i) if shared else f"{language}-{i}" for _, language, i in rows]
    settings = {"unseen": (), "seed": 1, **more}
    return averages([v for v, _, _ in rows], [language for _, language, _ in rows], parallel, **settings)


def test_means_are_those_of_the_languages_and_macro_counts_each_once() -> None:
    found = made({"de": [1.0, 0.0, 1.0, 1.0], "ja": [0.0, 0.0], "sw": [1.0]}, unseen=("sw", "te"))
    assert {language: one.mean for language, one in found.languages.items()} == {"de": 0.75, "ja": 0.0, "sw": 1.0}
    assert found.all.mean == pytest.approx(4 / 7) and found.all.count == 7
    assert found.macro.mean == pytest.approx(1.75 / 3)
    assert found.seen.mean == pytest.approx(0.375) and found.unseen.mean == 1.0 and found.unseen.count == 1
    assert made({"de": [1.0]}).unseen is None and made({"de": [1.0]}, unseen=("de",)).seen is None


def test_the_interval_is_that_of_the_mean() -> None:
    """Against the normal one of many coin flips, where both must agree."""
    flips = (np.random.default_rng(0).random(4000) < 0.3).astype(float)
    found = made({"de": flips.tolist()}).languages["de"]
    half = 1.96 * math.sqrt(found.mean * (1 - found.mean) / 4000)
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)


def test_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        values = {language: (generator.random(60) < 0.6).astype(float).tolist() for language in ("de", "ja")}
        macro = made(values, replicates=200, seed=trial).macro
        hits += macro.low <= 0.6 <= macro.high
    assert 0.91 <= hits / 300 <= 0.98


def test_a_question_in_several_languages_is_one_draw() -> None:
    """Where all languages agree, more of them make the macro average no surer; as separate questions they would."""
    flips = (np.random.default_rng(0).random(200) < 0.5).astype(float).tolist()
    same = {language: flips for language in ("de", "en", "ja", "zh")}
    width = {shared: (one := made(same, shared=shared).macro).high - one.low for shared in (True, False)}
    alone = made({"de": flips}).macro
    assert width[True] == pytest.approx(alone.high - alone.low, rel=0.1)
    assert width[False] == pytest.approx(width[True] / 2, rel=0.15)


@settings(max_examples=25)
@given(
    st.dictionaries(st.sampled_from(["de", "ja", "sw"]), st.lists(st.floats(0, 1), min_size=1, max_size=6), min_size=1),
    st.booleans(),
)
def test_laws(values: dict[str, list[float]], shared: bool) -> None:
    found = made(values, shared=shared, replicates=50)
    assert found == made(values, shared=shared, replicates=50)
    for one in (*found.languages.values(), found.all, found.macro):
        assert -1e-9 <= one.low <= one.high <= 1 + 1e-9
        if one.count == 1:
            assert one.low == one.mean == one.high
    assert sum(one.count for one in found.languages.values()) == found.all.count == found.macro.count


def test_nothing_to_average() -> None:
    found = averages([], [], [], unseen=(), seed=0)
    assert not found.languages and found.all.count == 0 and math.isnan(found.macro.mean)


def test_several_values_of_a_question_are_one_draw_whether_some_are_missing_or_not() -> None:
    """Equal values of a question make its mean no surer, however many: each question here has another number."""
    flips = (np.random.default_rng(0).random(100) < 0.5).astype(float).tolist()
    alone = made({"de": flips}).languages["de"]
    rows = [(value, str(i)) for i, value in enumerate(flips) for _ in range(100 + i)]
    found = averages([v for v, _ in rows], ["de"] * len(rows), [q for _, q in rows], unseen=(), seed=1).languages["de"]
    assert found.count == len(rows) and found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.15)
