"""Similarity to the reference: what is encoded, what is kept, what the verifier says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from encoder_fixture import SENTENCES, build_tiny_encoder
from sentence_transformers import SentenceTransformer

from nemo_lrpo.config.scoring import CalibrationConfig, EncoderConfig, ScorerConfig
from nemo_lrpo.rewards.calibration import Calibrated
from nemo_lrpo.rewards.encoder import Embeddings
from nemo_lrpo.rewards.similarity import ReferenceSimilarity, SimilarityVerifier
from nemo_lrpo.rewards.verifier import ShouldStop
from nemo_lrpo.types import ScoreRequest, ScoringAbandoned

ENGLISH, GERMAN, FRENCH = SENTENCES[:3]
LONG = GERMAN * 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder"), shape="e5")


@pytest.fixture
def config(path: Path) -> EncoderConfig:
    return EncoderConfig(
        path=str(path), device="cpu", reference_prompt="query", response_prompt="passage", max_chunks=2
    )


class Spy:
    """Passes texts on to the real encoder and remembers them."""

    def __init__(self, similarity: ReferenceSimilarity):
        self.encoder, self.calls = similarity.encoder, []
        similarity.encoder = self

    def embed(self, texts: Sequence[str], roles: Sequence[str], should_stop: ShouldStop) -> Embeddings:
        self.calls.append([f"{role}:{text}" for role, text in zip(roles, texts)])
        return self.encoder.embed(texts, roles, should_stop)

    def counts(self) -> dict[str, float]:
        return self.encoder.counts()


def test_cosines_are_those_of_the_library(config: EncoderConfig, path: Path) -> None:
    model = SentenceTransformer(str(path), device="cpu")
    responses, references = [*SENTENCES, GERMAN, ""], [*reversed(SENTENCES), GERMAN, GERMAN]
    left = model.encode(responses[:-1], prompt_name="passage").astype(np.float64)
    right = model.encode(references[:-1], prompt_name="query").astype(np.float64)
    found = ReferenceSimilarity(config).compare(responses, references)
    assert found.cosines.dtype == np.float64
    assert found.cosines[:-1] == pytest.approx((left * right).sum(axis=1), abs=1e-6)
    assert found.cosines[-1] == 0.0, "white space is like nothing"
    nothing = ReferenceSimilarity(config).compare([], [])
    assert len(nothing.cosines) == len(nothing.truncated) == len(nothing.chunked) == 0
    with pytest.raises(ValueError, match="2 responses for 1 references"):
        ReferenceSimilarity(config).compare(["a", "b"], ["a"])


def test_each_distinct_text_is_encoded_once_and_kept_by_role(config: EncoderConfig) -> None:
    similarity = ReferenceSimilarity(dataclasses.replace(config, cache_size=3))
    spy = Spy(similarity)
    first = similarity.compare(["a", "b", "a", "r"], ["r", "r", "q", "r"])
    assert spy.calls.pop() == ["reference:r", "reference:q", "response:a", "response:b", "response:r"]
    again = similarity.compare(["a", "b"], ["r", "r"])
    assert spy.calls.pop() == []
    assert (again.cosines == first.cosines[:2]).all()
    # The responses c, d and e drive out a, b and r, oldest use first, and no reference.
    similarity.compare(["c", "d"], ["r", "q"])
    assert spy.calls.pop() == ["response:c", "response:d"]
    similarity.compare(["b", "a", "r"], ["r", "r", "q"])
    assert spy.calls.pop() == ["response:a", "response:r"]
    counts = similarity.counts()
    assert counts["cache_hits/reference"] == 2 - 1 + 2 + 2
    assert counts["cache_misses/reference"] == 2
    assert counts["cache_hits/response"] == 2 + 1
    assert counts["cache_misses/response"] == 3 + 2 + 2
    assert counts["encoder_texts"] == 2 + 3 + 2 + 2


def test_equal_prompts_make_one_text_of_response_and_reference(path: Path) -> None:
    similarity = ReferenceSimilarity(EncoderConfig(path=str(path), device="cpu"))
    assert similarity.compare([GERMAN, FRENCH], [GERMAN, GERMAN]).cosines[0] == pytest.approx(1.0, abs=1e-6)
    assert similarity.counts()["encoder_texts"] == 2


def test_without_a_cache_nothing_is_kept(config: EncoderConfig) -> None:
    similarity = ReferenceSimilarity(dataclasses.replace(config, cache_size=0))
    for _ in range(2):
        similarity.compare(["a"], ["r"])
    assert similarity.counts()["encoder_texts"] == 4 and similarity.counts()["cache_hits/reference"] == 0


def test_long_texts_are_marked_when_they_come_from_the_cache_too(config: EncoderConfig) -> None:
    similarity = ReferenceSimilarity(config)
    for _ in range(2):
        found = similarity.compare([GERMAN, LONG, GERMAN, GERMAN * 8], [GERMAN, GERMAN, LONG, GERMAN])
        assert found.truncated.tolist() == [False, True, True, False]
        assert found.chunked.tolist() == [False, True, True, True]
    assert similarity.counts()["chunked_texts"] == 3 and similarity.counts()["truncated_texts"] == 2


def test_an_abandoned_comparison_leaves_nothing_behind(config: EncoderConfig) -> None:
    similarity = ReferenceSimilarity(config)
    with pytest.raises(ScoringAbandoned):
        similarity.compare(["a"], ["r"], lambda: True)
    assert similarity.compare(["a"], ["r"]).cosines == pytest.approx(
        ReferenceSimilarity(config).compare(["a"], ["r"]).cosines
    )
    similarity.close()
    assert len(similarity.compare(["a"], ["r"]).cosines) == 1, "the cache needs no encoder"
    with pytest.raises(RuntimeError, match="closed"):
        similarity.compare(["b"], ["r"])


def test_threads_share_caches_and_encoder(config: EncoderConfig) -> None:
    similarity = ReferenceSimilarity(dataclasses.replace(config, cache_size=4))
    expected = ReferenceSimilarity(config).compare(SENTENCES, SENTENCES[::-1]).cosines

    def work(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        for _ in range(10):
            order = rng.permutation(len(SENTENCES))[: int(rng.integers(1, 8))]
            found = similarity.compare([SENTENCES[i] for i in order], [SENTENCES[::-1][i] for i in order])
            if not np.allclose(found.cosines, expected[order], atol=2e-6):
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def verifier(config: EncoderConfig) -> SimilarityVerifier:
    return SimilarityVerifier(ScorerConfig(encoder=config, calibration=CalibrationConfig(method="none")))


def request(response: str, reference: str = GERMAN) -> ScoreRequest:
    return ScoreRequest("1/q/0", response, reference, "de", "fr")


def test_the_verifier_says_similarity_and_flags(config: EncoderConfig) -> None:
    judge = verifier(config)
    short, long = judge.verify([request(FRENCH), request(LONG)], ["fr", "de"])
    similarity = ReferenceSimilarity(config).compare([FRENCH], [GERMAN]).cosines[0]
    assert short.measures == {
        "similarity": pytest.approx(similarity, abs=1e-6),
        "calibrated": short.measures["similarity"],
    }
    assert short.value == pytest.approx((similarity + 1) / 2, abs=1e-6) and short.flags == ()
    assert sorted(long.flags) == ["chunked", "truncated"]
    assert judge.counts()["encoder_texts"] == 3 and judge.counts()["truncated_texts"] == 1
    assert judge.identity()["encoder"] == ReferenceSimilarity(config).encoder.identity
    judge.close()
    with pytest.raises(RuntimeError, match="closed"):
        judge.verify([request(ENGLISH)], ["fr"])


@pytest.mark.parametrize("reference", ["", " \n\u3000"])
def test_a_reference_that_says_nothing_earns_nothing_and_costs_nothing(config: EncoderConfig, reference: str) -> None:
    judge = verifier(config)
    [nothing] = judge.verify([request(FRENCH, reference)], ["fr"])
    assert nothing.value is None and nothing.flags == ("unreadable_reference",)
    judge.close()


class HalfKnown:
    """A calibration that knows French only."""

    def apply(self, similarity: float, reference_language: str, response_language: str) -> Calibrated:
        assert reference_language == "de"
        return Calibrated(similarity - 2, similarity / 2, response_language == "fr")


def test_the_verifier_calibrates_for_the_language_that_is_written(config: EncoderConfig) -> None:
    judge = verifier(config)
    judge._calibration = HalfKnown()
    known, unknown = judge.verify([request(FRENCH), request(FRENCH)], ["fr", "ja"])
    assert (known.flags, unknown.flags) == ((), ("unknown_pair",))
    for verdict in (known, unknown):
        assert verdict.measures["calibrated"] == verdict.measures["similarity"] - 2
        assert verdict.value == verdict.measures["similarity"] / 2


def test_an_embedding_that_is_not_finite_has_no_verdict_and_is_not_kept(
    config: EncoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = verifier(config)
    queue = judge._similarity.encoder._queue
    encode = queue._encode

    def broken(windows: Sequence[np.ndarray], width: int, group: int) -> np.ndarray:
        rows = encode(windows, width, group)
        rows[[len(window) > 30 for window in windows]] = np.nan
        return rows

    monkeypatch.setattr(queue, "_encode", broken)
    fine, lost = judge.verify([request(FRENCH), request(LONG)], ["fr", "de"])
    assert fine.value is not None and 0 < fine.value <= 1
    assert (lost.value, lost.measures) == (None, {})
    monkeypatch.undo()
    assert judge.verify([request(LONG)], ["de"])[0].value is not None
