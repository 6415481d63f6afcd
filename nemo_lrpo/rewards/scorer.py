"""Rewards of answers, r = r_qual * r_lang (paper, reward section)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

from nemo_lrpo.config.scoring import ScorerConfig
from nemo_lrpo.rewards.calibration import MeanCalibration, build_calibration, file_hash
from nemo_lrpo.rewards.language import LanguageIdentifier, bundled_lid_path
from nemo_lrpo.rewards.similarity import ReferenceSimilarity
from nemo_lrpo.types import Score, ScoreRequest


@dataclass(frozen=True)
class Quality:
    """r_qual of one answer, in [0, 1], with the raw and the calibrated measure behind it, each in [-1, 1]."""

    similarity: float
    calibrated: float
    quality: float


class Verifier(Protocol):
    """How good an answer is, whatever the language gate says. Another kind of verifier is one more such class."""

    def verify(self, requests: Sequence[ScoreRequest], languages: Sequence[str]) -> list[Quality]:
        """One quality per request, in order; `languages` are those that the responses are written in."""

    def identity(self) -> dict[str, object]:
        """What a value depends on, JSON-able."""

    def counts(self) -> dict[str, int]:
        """Events since construction, by name."""


class SimilarityVerifier:
    """Calibrated similarity s' to the reference answer; r_qual = clip((s' + 1) / 2, 0, 1)."""

    def __init__(self, config: ScorerConfig):
        self._config = config.calibration
        self._similarity = ReferenceSimilarity(config.encoder)
        self._calibration = build_calibration(config.calibration, self._similarity.encoder.identity, config.languages)

    def verify(self, requests: Sequence[ScoreRequest], languages: Sequence[str]) -> list[Quality]:
        """See Verifier. NaN where an embedding is not finite: such a reward is missing, not zero."""
        cosines = self._similarity.cosines([r.response for r in requests], [r.reference for r in requests])
        qualities = []
        for request, language, similarity in zip(requests, languages, cosines.tolist()):
            calibrated = self._calibration.calibrate(similarity, request.reference_language, language)
            quality = calibrated if math.isnan(calibrated) else min(1.0, max(0.0, (calibrated + 1.0) / 2.0))
            qualities.append(Quality(similarity, calibrated, quality))
        return qualities

    def identity(self) -> dict[str, object]:
        """See Verifier: hashes of the encoder and of the statistics."""
        calibration: dict[str, object] = {"method": self._config.method}
        if self._config.method == "mean":
            calibration |= {
                "statistics": file_hash(str(self._config.path)),
                "shrinkage_k": self._config.shrinkage_k,
                "unknown_pair": self._config.unknown_pair,
            }
        return {"encoder": self._similarity.encoder.identity, "calibration": calibration}

    def counts(self) -> dict[str, int]:
        """See Verifier: unknown_pair/<a>-<b>, comparisons in pairs without statistics."""
        if not isinstance(self._calibration, MeanCalibration):
            return {}
        return {f"unknown_pair/{a}-{b}": n for (a, b), n in sorted(self._calibration.unknown_pairs.items())}


class RewardScorer:
    """Scores answers by similarity to the reference, gated by language. Loads its models; raises ConfigError where the
    configuration, the encoder or the statistics do not fit together."""

    def __init__(self, config: ScorerConfig):
        config.check()
        self._languages = list(config.languages)
        self._on_abstain = config.language_id.on_abstain
        # The cheap model first: what it refuses is refused before the encoder loads.
        self._identifier = LanguageIdentifier(config.language_id, config.languages)
        self._verifier: Verifier = SimilarityVerifier(config)
        self._counts: Counter[str] = Counter()
        self._identity: dict[str, object] = {
            **self._verifier.identity(),
            "languages": self._languages,
            "language_id": file_hash(config.language_id.path or bundled_lid_path()),
            "on_abstain": self._on_abstain,
            "versions": {name: version(name) for name in ("sentence-transformers", "torch", "fasttext")},
        }

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order, each with its request's sample id.

        An empty response (white space counts as none) gets quality and gate 0 and is not encoded. A response whose
        language cannot be said passes or fails by language_id.on_abstain and is calibrated as the requested language.
        Raises ValueError for a request in a language that is not configured.
        """
        for request in requests:
            if request.language not in self._languages:
                raise ValueError(
                    f"sample {request.sample_id!r}: language={request.language!r} is not served; accepted: "
                    f"{', '.join(self._languages)}."
                )
        scores: list[Score] = [Score(r.sample_id, 0.0, 0.0, 0.0, None, 0.0, 0.0, 0.0) for r in requests]
        places = [i for i, request in enumerate(requests) if request.response.strip()]
        answered = [requests[i] for i in places]
        identified = self._identifier.identify([request.response for request in answered])
        written = [found.language or request.language for found, request in zip(identified, answered)]
        qualities = self._verifier.verify(answered, written)
        for place, request, found, quality in zip(places, answered, identified, qualities):
            gate = self._gate(found.language, request.language)
            scores[place] = Score(
                sample_id=request.sample_id,
                similarity=quality.similarity,
                calibrated=quality.calibrated,
                quality=quality.quality,
                language=found.language,
                confidence=found.confidence,
                gate=gate,
                reward=quality.quality * gate,
            )
        self._counts["scored"] += len(requests)
        self._counts["empty"] += len(requests) - len(answered)
        self._counts["abstained"] += sum(found.language is None for found in identified)
        return scores

    def _gate(self, identified: str | None, requested: str) -> float:
        if identified is None:
            return 1.0 if self._on_abstain == "pass" else 0.0
        return 1.0 if identified == requested else 0.0

    def identity(self) -> dict[str, object]:
        """What the rewards depend on, JSON-able: encoder and calibration with their hashes, languages, the language
        model's hash, library versions. Runs that compare rewards compare this."""
        return dict(self._identity)

    def counts(self) -> dict[str, int]:
        """Since construction: answers scored, empty ones, abstentions, comparisons in unknown language pairs."""
        return {**self._counts, **self._verifier.counts()}
