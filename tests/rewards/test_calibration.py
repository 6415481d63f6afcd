"""Mean calibration against values worked out by hand and against those recorded from the released code."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import CalibrationConfig
from nemo_lrpo.rewards.calibration import (
    RELEASED_NAMES,
    MeanCalibration,
    Moments,
    NoCalibration,
    PairStatistics,
    build_calibration,
    read_released_table,
    read_statistics,
    write_statistics,
)

DATA = Path(__file__).parents[1] / "data"
BY_HAND = PairStatistics(
    "sha256:one",
    {("de", "en"): Moments(30, 0.9, 0.01), ("en", "fr"): Moments(10, 0.7, 0.1), ("de", "de"): Moments(10, 1.0, 0.0)},
    {"mismatch": {("de", "en"): Moments(30, 0.2, 0.1)}},
    {"seed": 0},
)
"""mu_ref = (27 + 7 + 10) / 50 = 0.88; of the pairs of two languages (27 + 7) / 40 = 0.85."""


def test_the_released_code_is_reproduced() -> None:
    golden = json.loads((DATA / "golden_calibration.json").read_text())
    statistics = read_released_table(DATA / "pair_statistics_released.csv")
    assert len(statistics.pairs) == golden["n_pairs"] == 119
    assert ("en", "en") not in statistics.pairs
    calibration = MeanCalibration(statistics, unknown_pair="raw")
    assert calibration.mu_ref == pytest.approx(golden["mu_ref"], abs=1e-14)
    for case in golden["cases"]:
        reference = RELEASED_NAMES.get(case["gt_language"], case["gt_language"] or "und")
        response = case["pred_lang"] or "und"
        calibrated = calibration.calibrate(case["raw_sim"], reference, response)
        assert calibrated == pytest.approx(case["calibrated_sim"], abs=1e-12), case
        assert (calibrated + 1) / 2 == pytest.approx(case["embed_reward_float32"], abs=1e-6), case
    assert calibration.unknown_pairs
    # The table lacks this pair, and released rewards keep the raw value.
    assert calibration.calibrate(0.98, "en", "en") == 0.98


def test_the_default_does_not_leave_english_raw() -> None:
    statistics = read_released_table(DATA / "pair_statistics_released.csv")
    own = [m.mean for (a, b), m in statistics.pairs.items() if a == b]
    calibration = MeanCalibration(statistics)
    expected = 0.98 - (math.fsum(own) / len(own) - calibration.mu_ref)
    assert calibration.calibrate(0.98, "en", "en") == pytest.approx(expected, abs=1e-12)
    assert expected < 0.97


def test_the_equation_by_hand() -> None:
    calibration = MeanCalibration(BY_HAND)
    assert calibration.mu_ref == pytest.approx(0.88)
    assert calibration.calibrate(0.5, "de", "en") == pytest.approx(0.5 - 0.02)
    assert calibration.calibrate(0.5, "en", "de") == pytest.approx(0.5 - 0.02)
    assert calibration.calibrate(0.5, "en", "fr") == pytest.approx(0.5 + 0.18)
    assert calibration.calibrate(0.95, "fr", "en") == 1.0
    assert calibration.calibrate(-0.95, "de", "de") == -1.0
    assert math.isnan(calibration.calibrate(math.nan, "de", "en"))
    assert not calibration.unknown_pairs
    shrunk = MeanCalibration(BY_HAND, shrinkage_k=10.0)
    assert shrunk.calibrate(0.5, "de", "en") == pytest.approx(0.5 - 30 / 40 * 0.02)
    assert shrunk.calibrate(0.5, "en", "fr") == pytest.approx(0.5 + 10 / 20 * 0.18)


def test_unknown_pairs_by_setting() -> None:
    reference = MeanCalibration(BY_HAND, shrinkage_k=10.0)
    assert reference.calibrate(0.5, "de", "fr") == pytest.approx(0.5 - (0.85 - 0.88))
    assert reference.calibrate(0.5, "en", "en") == pytest.approx(0.5 - (1.0 - 0.88))
    raw = MeanCalibration(BY_HAND, unknown_pair="raw")
    assert raw.calibrate(0.5, "fr", "de") == 0.5
    assert dict(reference.unknown_pairs) == {("de", "fr"): 1, ("en", "en"): 1}
    assert dict(raw.unknown_pairs) == {("de", "fr"): 1}
    no_own = MeanCalibration(PairStatistics("", {("de", "en"): Moments(30, 0.9, 0.01)}))
    assert no_own.calibrate(0.5, "en", "en") == 0.5


@given(
    st.floats(-1, 1),
    st.sampled_from(["de", "en", "fr", "xx"]),
    st.sampled_from(["de", "en", "fr", "xx"]),
    st.floats(0, 100),
    st.sampled_from(["reference", "raw"]),
)
def test_symmetric_bounded_and_monotone(s: float, a: str, b: str, k: float, unknown: str) -> None:
    calibration = MeanCalibration(BY_HAND, k, unknown)
    value = calibration.calibrate(s, a, b)
    assert -1.0 <= value <= 1.0
    assert value == calibration.calibrate(s, b, a)
    assert calibration.calibrate(-1.0, a, b) <= value <= calibration.calibrate(1.0, a, b)


def test_statistics_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    write_statistics(path, BY_HAND)
    assert read_statistics(path) == BY_HAND
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.json"]
    broken = PairStatistics("sha256:one", {("de", "en"): Moments(1, math.nan, 0.0)})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_statistics(path, broken)
    assert read_statistics(path) == BY_HAND
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.json"]


def test_building_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    write_statistics(path, BY_HAND)
    config = CalibrationConfig(path=str(path))
    built = build_calibration(config, "sha256:one", ["de", "en", "fr"])
    assert built.calibrate(0.5, "de", "en") == pytest.approx(0.48)
    with pytest.raises(ConfigError, match=r"encoder sha256:one, this one is sha256:two"):
        build_calibration(config, "sha256:two", ["de"])
    config.unknown_pair = "error"
    with pytest.raises(ConfigError, match="no statistics for de-fr, en-en, fr-fr"):
        build_calibration(config, "sha256:one", ["de", "en", "fr"])
    # Whatever the order of the languages.
    with pytest.raises(ConfigError, match="no statistics for en-en,"):
        build_calibration(config, "sha256:one", ["en", "de"])
    build_calibration(config, "sha256:one", ["de"])
    assert isinstance(build_calibration(CalibrationConfig(method="none"), "", []), NoCalibration)
    with pytest.raises(ConfigError, match=r"calibration\.path is not set"):
        build_calibration(CalibrationConfig(), "sha256:one", ["de"])
    with pytest.raises(ConfigError, match=r"calibration\.unknown_pair='keep'"):
        CalibrationConfig(path=str(path), unknown_pair="keep").check("calibration")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no pair statistics"),
        ({"version": 2}, "version 2 is not known; accepted: 1"),
        ({"encoder": ""}, "encoder=''"),
        ({"pairs": []}, "pairs is empty"),
        ({"pairs": {"de-en": 1}}, "pairs is not a list"),
        ({"pairs": [{"languages": ["de"], "count": 1, "mean": 0, "std": 0}]}, r"pairs\[0\]"),
        ({"pairs": [{"languages": ["de", "en"], "count": 0, "mean": 0, "std": 0}]}, r"pairs\[0\]\.count=0"),
        ({"pairs": [{"languages": ["de", "en"], "count": 1, "mean": 1.5, "std": 0}]}, r"pairs\[0\]\.mean=1\.5"),
        ({"pairs": [{"languages": ["de", "en"], "count": 1, "mean": 0, "std": -1}]}, r"pairs\[0\]\.std=-1"),
        (
            {"pairs": [{"languages": pair, "count": 1, "mean": 0, "std": 0} for pair in (["de", "en"], ["en", "de"])]},
            "en-de is listed twice",
        ),
    ],
)
def test_a_broken_file_is_refused_by_entry(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "statistics.json"
    write_statistics(path, BY_HAND)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        read_statistics(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_statistics(path)


def test_a_broken_table_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("lang_a,lang_b,count,mean,std\nGerman,English,30,0.9,0.1\nGerman,Klingon,30,0.9,0.1\n")
    with pytest.raises(ConfigError, match=r"line 3: KeyError\('Klingon'\)"):
        read_released_table(path)
