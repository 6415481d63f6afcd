"""The whole scorer on a real, randomly initialised encoder and the real language model."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
from encoder_fixture import build_tiny_encoder
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import (
    CalibrationConfig,
    EncoderConfig,
    LanguageIdConfig,
    ScorerConfig,
    VerifierConfig,
)
from nemo_lrpo.rewards.build import Part
from nemo_lrpo.rewards.encoder import encoder_identity
from nemo_lrpo.rewards.scorer import RewardScorer, combine, score_answers
from nemo_lrpo.rewards.statistics import Moments, PairStatistics, write_statistics
from nemo_lrpo.rewards.verifier import Verdict
from nemo_lrpo.types import Score, ScoreRequest, ScoringAbandoned

GERMAN = "Die Währung von Japan ist der Yen."
FRENCH = "La monnaie du Japon est le yen."
JAPANESE = "日本の通貨は円です。"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def config(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> ScorerConfig:
    statistics = tmp_path_factory.mktemp("statistics") / "statistics.json"
    pairs = {("de", "de"): Moments(20, 1.0, 0.0), ("de", "fr"): Moments(20, 0.8, 0.1)}
    settings = EncoderConfig(path=str(encoder), device="cpu")
    write_statistics(statistics, PairStatistics(encoder_identity(settings), pairs))
    return ScorerConfig(encoder=settings, calibration=CalibrationConfig(path=str(statistics), shrinkage_k=0.0))


@pytest.fixture(scope="module")
def scorer(config: ScorerConfig) -> RewardScorer:
    return RewardScorer(config)


def request(sample_id: str, response: str, language: str, reference: str = GERMAN) -> ScoreRequest:
    return ScoreRequest(sample_id, response, reference, "de", language)


def quality(score: Score) -> float:
    assert score.quality is not None
    return score.quality


def test_every_part_by_the_equation(scorer: RewardScorer, encoder: Path) -> None:
    """mu_ref = 0.9: German with German is corrected by +0.1, French by -0.1; s' lies in [-1.1, 1.1]."""
    own, other = scorer.score([request("1/q/0", GERMAN, "de"), request("1/q/1", FRENCH, "fr")])
    assert own.measures["similarity"] == pytest.approx(1.0, abs=1e-6)
    assert own.measures["calibrated"] == pytest.approx(own.measures["similarity"] - 0.1)
    assert (own.sample_id, own.language, own.gate) == ("1/q/0", "de", 1.0)
    left, right = SentenceTransformer(str(encoder), device="cpu").encode([FRENCH, GERMAN]).astype(np.float64)
    cosine = float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))
    assert other.measures["similarity"] == pytest.approx(cosine, abs=1e-5)
    assert other.measures["calibrated"] == pytest.approx(cosine + 0.1, abs=1e-5)
    for score in (own, other):
        assert score.quality == pytest.approx((score.measures["calibrated"] + 1.1) / 2.2)
        assert score.parts == {"similarity": score.quality} and score.flags == ()
        assert score.reward == quality(score) * score.gate > 0


def test_the_gate_closes_on_another_language_or_none(scorer: RewardScorer, config: ScorerConfig) -> None:
    requests = [request("wrong", GERMAN, "fr"), request("digits", "12345", "de"), request("right", GERMAN, "de")]
    wrong, digits, right = scorer.score(requests)
    assert (wrong.language, wrong.gate, wrong.reward, wrong.flags) == ("de", 0.0, 0.0, ()) and quality(wrong) > 0
    assert (digits.language, digits.gate, digits.reward) == (None, 0.0, 0.0) and quality(digits) > 0
    assert digits.flags == ("abstained",)
    assert right.reward > 0
    passing = RewardScorer(dataclasses.replace(config, language_id=LanguageIdConfig(on_abstain="pass")))
    wrong, digits, right = passing.score(requests)
    assert (wrong.gate, digits.gate, right.gate) == (0.0, 1.0, 1.0)
    # Calibrated as the requested language, German: a known pair.
    assert digits.measures["calibrated"] == pytest.approx(digits.measures["similarity"] - 0.1)
    assert passing.score([request("empty", " \n", "de")])[0].gate == 0.0


def test_a_gate_that_masks_leaves_no_reward(config: ScorerConfig) -> None:
    masking = RewardScorer(dataclasses.replace(config, language_id=LanguageIdConfig(on_abstain="mask")))
    digits, wrong, empty = masking.score(
        [request("digits", "12345", "de"), request("wrong", GERMAN, "fr"), request("empty", "", "de")]
    )
    assert (digits.reward, digits.gate, digits.masked) == (None, None, True) and quality(digits) > 0
    assert (wrong.reward, empty.reward, wrong.masked) == (0.0, 0.0, False)


def test_without_the_gate_quality_alone_pays(config: ScorerConfig) -> None:
    open_gate = RewardScorer(dataclasses.replace(config, language_id=LanguageIdConfig(gate="off")))
    (wrong,) = open_gate.score([request("wrong", GERMAN, "fr")])
    assert wrong.reward == quality(wrong) > 0 and wrong.language == "de"


def test_empty_responses_keep_their_own_place(scorer: RewardScorer) -> None:
    responses = ["", GERMAN, "  \n", FRENCH, "", GERMAN, "\u3000"]
    languages = ["de", "de", "fr", "fr", "ja", "fr", "de"]
    requests = [request(f"s{i}", r, lang) for i, (r, lang) in enumerate(zip(responses, languages))]
    scores = scorer.score(requests)
    assert [score.sample_id for score in scores] == [f"s{i}" for i in range(7)]
    assert [score.reward > 0 for score in scores] == [False, True, False, True, False, False, False]
    for i in (0, 2, 4, 6):
        assert (scores[i].quality, scores[i].gate, scores[i].language) == (0.0, 0.0, None)
    assert scorer.score([]) == []


def test_a_score_does_not_depend_on_its_neighbours(scorer: RewardScorer) -> None:
    texts = {"de": GERMAN, "fr": FRENCH, "ja": JAPANESE, "es": "", "en": "The yen " * 40, "it": "\ud800 12"}
    requests = [request(f"{a}{b}", texts[a], b, texts[a] or "x") for a in texts for b in ("de", "fr", "ja")]
    alone = {r.sample_id: scorer.score([r])[0] for r in requests}
    random.Random(0).shuffle(requests)
    for score in scorer.score(requests):
        expected = alone[score.sample_id]
        assert score.reward == pytest.approx(expected.reward, abs=1e-5)
        assert (score.language, score.gate) == (expected.language, expected.gate)


def test_what_happened_is_counted_by_language(config: ScorerConfig) -> None:
    scorer = RewardScorer(config)
    scorer.score([request("a", JAPANESE, "ja"), request("b", JAPANESE, "ja"), request("c", "", "ja")])
    scorer.score([request("d", "12345", "de")])
    counts = scorer.counts()
    own = ("scored", "empty", "abstained", "unknown_pair", "without_reward")
    assert {name: value for name, value in counts.items() if name.split("/")[0] in own} == {
        "scored/ja": 3,
        "scored/de": 1,
        "empty/ja": 1,
        "abstained/de": 1,
        "unknown_pair/ja": 2,
    }
    assert counts["encoder_texts"] > 0, "the verifiers' own totals are among them"


def test_a_language_that_is_not_served_is_refused(scorer: RewardScorer) -> None:
    with pytest.raises(ValueError, match=r"sample '9/q/1': language='sv' is not served; accepted: ar, de"):
        scorer.score([request("9/q/0", GERMAN, "de"), request("9/q/1", GERMAN, "sv")])


def test_a_request_that_nobody_waits_for_is_abandoned(config: ScorerConfig) -> None:
    scorer = RewardScorer(config)
    with pytest.raises(ScoringAbandoned):
        scorer.score([request("a", "an answer that no cache holds", "en")], should_stop=lambda: True)
    assert "scored/en" not in scorer.counts()


def test_identity_tells_scorers_apart(scorer: RewardScorer, config: ScorerConfig) -> None:
    identity = json.loads(json.dumps(scorer.identity()))
    assert identity["encoder"] == encoder_identity(config.encoder)
    assert identity["languages"] == config.languages
    calibration = identity["verifiers"]["similarity"]["calibration"]
    assert calibration["method"] == "mean" and calibration["statistics"].startswith("sha256:")
    assert RewardScorer(config).identity() == scorer.identity()
    for change in (
        {"calibration": CalibrationConfig(method="none")},
        {"language_id": LanguageIdConfig(gate="soft")},
        {"verifiers": {"similarity": VerifierConfig(), "exact": VerifierConfig(kind="exact")}},
    ):
        assert RewardScorer(dataclasses.replace(config, **change)).identity() != scorer.identity()


def test_statistics_of_another_encoder_are_refused(config: ScorerConfig, encoder: Path, tmp_path: Path) -> None:
    other = build_tiny_encoder(tmp_path / "other", seed=1)
    changed = dataclasses.replace(config, encoder=EncoderConfig(path=str(other), device="cpu"))
    names = f"{encoder_identity(config.encoder)}, this one is {encoder_identity(changed.encoder)}"
    with pytest.raises(ConfigError, match=names):
        RewardScorer(changed)
    cut = dataclasses.replace(config, encoder=EncoderConfig(path=str(encoder), device="cpu", max_tokens=16))
    with pytest.raises(ConfigError, match="measured with encoder"):
        RewardScorer(cut)


# -- several verifiers -----------------------------------------------------------------------------------------------


def part(name: str, weight: float, mode: str) -> Part:
    return Part(name, None, VerifierConfig(kind="exact", weight=weight, combine=mode))


def test_parts_are_combined_as_configured() -> None:
    parts = [part("a", 1.0, "sum"), part("b", 3.0, "sum"), part("c", 9.0, "product"), part("d", 1.0, "product")]
    assert combine(parts, [Verdict(v) for v in (0.2, 0.6, 0.5, 0.8)]) == pytest.approx((0.2 + 1.8) / 4 * 0.5 * 0.8)
    assert combine(parts[2:], [Verdict(0.5), Verdict(0.8)]) == pytest.approx(0.4)
    assert combine(parts[:2], [Verdict(None), Verdict(0.5)]) is None
    assert combine(parts[:2], [Verdict(float("nan")), Verdict(0.5)]) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 10), st.sampled_from(["sum", "product"])), min_size=1))
def test_a_combination_of_values_between_0_and_1_lies_there(rows: list[tuple[float, float, str]]) -> None:
    parts = [part(str(i), weight, mode) for i, (_, weight, mode) in enumerate(rows)]
    value = combine(parts, [Verdict(value) for value, _, _ in rows])
    assert value is not None and -1e-12 <= value <= 1 + 1e-12


def test_several_verifiers_are_returned_apart(config: ScorerConfig) -> None:
    verifiers = {
        "similarity": VerifierConfig(weight=1.0),
        "same": VerifierConfig(kind="exact", weight=3.0),
        "ends": VerifierConfig(kind="format", pattern=r".*\.", combine="product"),
    }
    scorer = RewardScorer(dataclasses.replace(config, verifiers=verifiers))
    same, other, endless = scorer.score(
        [
            request("a", GERMAN, "de"),
            request("b", "Der Euro gilt in Frankreich.", "de"),
            request("c", GERMAN[:-1], "de"),
        ]
    )
    assert same.parts["same"] == same.parts["ends"] == 1.0
    assert same.reward == pytest.approx((same.parts["similarity"] + 3) / 4)
    assert other.reward == pytest.approx(other.parts["similarity"] / 4) and other.parts["same"] == 0.0
    assert (endless.parts["ends"], endless.reward, endless.gate) == (0.0, 0.0, 1.0)
    scorer.close()


def test_without_similarity_no_encoder_is_needed() -> None:
    config = ScorerConfig(verifiers={"same": VerifierConfig(kind="exact")})
    scores = score_answers(
        config,
        [
            {
                "sample_id": str(i),
                "response": text,
                "reference": GERMAN,
                "reference_language": "de",
                "language": "de",
            }
            for i, text in enumerate([GERMAN, FRENCH])
        ],
    )
    assert [score.reward for score in scores] == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"answers\[0\] has the fields response; needed: language, reference"):
        score_answers(config, [{"response": "x"}])
