"""The whole scorer on a real, randomly initialised encoder and the real language model."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_fixture import build_tiny_encoder
from sentence_transformers import SentenceTransformer

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import CalibrationConfig, EncoderConfig, LanguageIdConfig, ScorerConfig
from nemo_lrpo.rewards.calibration import Moments, PairStatistics, write_statistics
from nemo_lrpo.rewards.scorer import RewardScorer
from nemo_lrpo.rewards.similarity import ReferenceSimilarity, SentenceEncoder, encoder_identity
from nemo_lrpo.types import ScoreRequest

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
    write_statistics(statistics, PairStatistics(encoder_identity(encoder), pairs))
    return ScorerConfig(
        encoder=EncoderConfig(path=str(encoder), device="cpu"), calibration=CalibrationConfig(path=str(statistics))
    )


@pytest.fixture(scope="module")
def scorer(config: ScorerConfig) -> RewardScorer:
    return RewardScorer(config)


def request(sample_id: str, response: str, language: str, reference: str = GERMAN) -> ScoreRequest:
    return ScoreRequest(sample_id, response, reference, "de", language)


def test_every_part_by_the_equation(scorer: RewardScorer, encoder: Path) -> None:
    """mu_ref = 0.9: German with German is corrected by +0.1, French by -0.1."""
    own, other = scorer.score([request("1/q/0", GERMAN, "de"), request("1/q/1", FRENCH, "fr")])
    assert own.similarity == pytest.approx(1.0, abs=1e-6)
    assert own.calibrated == pytest.approx(own.similarity - 0.1)
    assert (own.sample_id, own.language, own.gate) == ("1/q/0", "de", 1.0)
    left, right = SentenceTransformer(str(encoder), device="cpu").encode([FRENCH, GERMAN]).astype(np.float64)
    cosine = float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))
    assert other.similarity == pytest.approx(cosine, abs=1e-5)
    assert other.calibrated == pytest.approx(min(1.0, cosine + 0.1), abs=1e-5)
    for score in (own, other):
        assert score.quality == pytest.approx((score.calibrated + 1) / 2)
        assert score.reward == score.quality * score.gate > 0


def test_the_gate_closes_on_another_language_or_none(scorer: RewardScorer, config: ScorerConfig) -> None:
    requests = [request("wrong", GERMAN, "fr"), request("digits", "12345", "de"), request("right", GERMAN, "de")]
    wrong, digits, right = scorer.score(requests)
    assert (wrong.language, wrong.gate, wrong.reward) == ("de", 0.0, 0.0) and wrong.quality > 0
    assert (digits.language, digits.gate, digits.reward) == (None, 0.0, 0.0) and digits.quality > 0
    assert right.reward > 0
    passing = RewardScorer(dataclasses.replace(config, language_id=LanguageIdConfig(on_abstain="pass")))
    wrong, digits, right = passing.score(requests)
    assert (wrong.gate, digits.gate, right.gate) == (0.0, 1.0, 1.0)
    # Calibrated as the requested language, German: a known pair.
    assert digits.calibrated == pytest.approx(digits.similarity - 0.1)
    assert passing.score([request("empty", " \n", "de")])[0].gate == 0.0


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


def test_unknown_pairs_empty_answers_and_abstentions_are_counted(config: ScorerConfig) -> None:
    scorer = RewardScorer(config)
    scorer.score([request("a", JAPANESE, "ja"), request("b", JAPANESE, "ja"), request("c", "", "ja")])
    scorer.score([request("d", "12345", "de")])
    assert scorer.counts() == {"scored": 4, "empty": 1, "abstained": 1, "unknown_pair/de-ja": 2}


def test_a_language_that_is_not_served_is_refused(scorer: RewardScorer) -> None:
    with pytest.raises(ValueError, match=r"sample '9/q/1': language='sv' is not served; accepted: ar, de"):
        scorer.score([request("9/q/0", GERMAN, "de"), request("9/q/1", GERMAN, "sv")])


def test_identity_tells_scorers_apart(scorer: RewardScorer, config: ScorerConfig, encoder: Path) -> None:
    identity = json.loads(json.dumps(scorer.identity()))
    assert identity["encoder"] == encoder_identity(encoder)
    assert identity["languages"] == config.languages
    assert identity["calibration"]["method"] == "mean" and identity["calibration"]["statistics"].startswith("sha256:")
    plain = RewardScorer(dataclasses.replace(config, calibration=CalibrationConfig(method="none")))
    assert plain.identity()["calibration"] == {"method": "none"}
    assert RewardScorer(config).identity() == scorer.identity()


def test_statistics_of_another_encoder_are_refused(config: ScorerConfig, encoder: Path, tmp_path: Path) -> None:
    other = build_tiny_encoder(tmp_path / "other", seed=1)
    changed = dataclasses.replace(config, encoder=EncoderConfig(path=str(other), device="cpu"))
    with pytest.raises(ConfigError, match=f"{encoder_identity(encoder)}, this one is {encoder_identity(other)}"):
        RewardScorer(changed)
    cut = dataclasses.replace(config, encoder=EncoderConfig(path=str(encoder), device="cpu", max_tokens=16))
    with pytest.raises(ConfigError, match="measured with encoder"):
        RewardScorer(cut)


def test_the_identity_follows_weights_and_configuration_alone(encoder: Path, tmp_path: Path) -> None:
    assert encoder_identity(build_tiny_encoder(tmp_path / "again")) == encoder_identity(encoder)
    copy = shutil.copytree(encoder, tmp_path / "copy")
    (copy / "README.md").write_text("about")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "x.json").write_text("{}")
    assert encoder_identity(copy) == encoder_identity(encoder)
    pooling = copy / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace('"pooling_mode_cls_token": false', '"pooling_mode_cls_token": true'))
    assert encoder_identity(copy) != encoder_identity(encoder)


class Counting:
    """Passes texts on to the real encoder and remembers them."""

    def __init__(self, encoder: SentenceEncoder):
        self.encoder, self.texts = encoder, []

    def encode(self, texts: list[str]) -> np.ndarray:
        self.texts.append(list(texts))
        return self.encoder.encode(texts)


def test_each_distinct_text_is_encoded_once_and_references_are_kept(encoder: Path) -> None:
    similarity = ReferenceSimilarity(EncoderConfig(path=str(encoder), device="cpu", cache_size=2))
    similarity.encoder = counting = Counting(similarity.encoder)
    first = similarity.cosines(["a", "b", "a", "r"], ["r", "r", "q", "r"])
    assert counting.texts == [["r", "q", "a", "b"]]
    assert first[3] == pytest.approx(1.0, abs=1e-6)
    # References come from the cache, responses do not.
    again = similarity.cosines(["a", "b"], ["r", "r"])
    assert counting.texts[1:] == [["a", "b"]]
    assert again == pytest.approx(first[:2], abs=1e-5)
    # q was used longest ago.
    similarity.cosines(["r", "r"], ["p", "r"])
    similarity.cosines(["r"], ["q"])
    assert counting.texts[2:] == [["p"], ["q"]]
    assert similarity.cosines([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 responses for 1 references"):
        similarity.cosines(["a", "b"], ["a"])


def test_embeddings_have_length_one_and_keep_their_order(encoder: Path) -> None:
    model = SentenceEncoder(EncoderConfig(path=str(encoder), device="cpu", batch_size=2))
    texts = ["short", "a much longer text " * 20, "", "\ud800", "\x00", GERMAN]
    rows = model.encode(texts)
    assert rows.dtype == np.float32
    # The empty text, to which this tokenizer gives no token at all.
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.array([1, 1, 0, 1, 1, 1]), abs=1e-6)
    for text, row in zip(texts, rows):
        assert model.encode([text])[0] == pytest.approx(row, abs=1e-5)


def test_broken_encoders_are_refused(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.path is not set"):
        ScorerConfig().check()
    with pytest.raises(ConfigError, match="holds neither modules.json nor config.json"):
        EncoderConfig(path=str(tmp_path)).check("encoder")
    with pytest.raises(ConfigError, match="device='gpu' is not known"):
        EncoderConfig(path=str(encoder), device="gpu").check("encoder")
    with pytest.raises(ConfigError, match=r"max_tokens=4096 exceeds the encoder's own limit, 128"):
        SentenceEncoder(EncoderConfig(path=str(encoder), device="cpu", max_tokens=4096))
    pickled = shutil.copytree(encoder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights are not loaded"):
        EncoderConfig(path=str(pickled)).check("encoder")
    truncated = shutil.copytree(encoder, tmp_path / "truncated")
    (truncated / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ConfigError, match="cannot be loaded on device 'cpu'"):
        SentenceEncoder(EncoderConfig(path=str(truncated), device="cpu"))
    not_finite = tmp_path / "not_finite"
    model = SentenceTransformer(str(encoder), device="cpu")
    with torch.no_grad():
        model[0].auto_model.embeddings.LayerNorm.weight.fill_(float("nan"))
    model.save(str(not_finite), create_model_card=False)
    with pytest.raises(ConfigError, match="not finite"):
        SentenceEncoder(EncoderConfig(path=str(not_finite), device="cpu"))
