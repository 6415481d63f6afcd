"""Cosine similarity of answers under a sentence encoder, the s of r_qual."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.scoring import EncoderConfig, ScorerConfig
from nemo_lrpo.rewards.calibration import build_calibration
from nemo_lrpo.rewards.encoder import REFERENCE, RESPONSE, SentenceEncoder
from nemo_lrpo.rewards.statistics import file_hash
from nemo_lrpo.rewards.verifier import FLAG_UNREADABLE_REFERENCE, ShouldStop, Verdict, never
from nemo_lrpo.types import FLAG_CHUNKED, FLAG_TRUNCATED, FLAG_UNKNOWN_PAIR, ScoreRequest


@dataclass(frozen=True)
class Comparison:
    """cosines: float64 [N] in [-1, 1], NaN where an embedding is not finite. truncated, chunked: bool [N], of the
    response or the reference."""

    cosines: NDArray[np.float64]
    truncated: NDArray[np.bool_]
    chunked: NDArray[np.bool_]


@dataclass(frozen=True)
class _Embedded:
    """row: float32 [D]."""

    row: NDArray[np.float32]
    truncated: bool
    chunked: bool


class _Cache:
    """The `size` most recently used embeddings, by a hash of their text: texts may be long."""

    def __init__(self, size: int):
        self._size = size
        self._entries: OrderedDict[bytes, _Embedded] = OrderedDict()

    def get(self, text: str) -> _Embedded | None:
        key = self._key(text)
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, text: str, found: _Embedded) -> None:
        self._entries[self._key(text)] = found
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)

    @staticmethod
    def _key(text: str) -> bytes:
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class ReferenceSimilarity:
    """Cosine of response and reference. Each distinct text of a call is encoded once, and embeddings of earlier calls
    are kept: `config.cache_size` of references, which recur over groups and epochs, and as many of responses, which
    must not drive them out. May be shared by threads."""

    def __init__(self, config: EncoderConfig):
        self.encoder = SentenceEncoder(config)
        self._caches = {role: _Cache(config.cache_size) for role in (REFERENCE, RESPONSE)}
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def compare(
        self, responses: Sequence[str], references: Sequence[str], should_stop: ShouldStop = never
    ) -> Comparison:
        """Cosines of N responses and references. Raises ScoringAbandoned once `should_stop` says so, ValueError for
        sequences of unequal length."""
        if len(responses) != len(references):
            raise ValueError(f"{len(responses)} responses for {len(references)} references.")
        if not responses:
            return Comparison(np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0, dtype=bool))
        keys = [*((REFERENCE, text) for text in references), *((RESPONSE, text) for text in responses)]
        found = self._embed(keys, should_stop)
        left = [found[RESPONSE, text] for text in responses]
        right = [found[REFERENCE, text] for text in references]
        rows = (np.stack([text.row for text in side]).astype(np.float64) for side in (left, right))
        return Comparison(
            np.clip(np.einsum("nd,nd->n", *rows), -1.0, 1.0),
            np.array([a.truncated or b.truncated for a, b in zip(left, right)]),
            np.array([a.chunked or b.chunked for a, b in zip(left, right)]),
        )

    def counts(self) -> dict[str, float]:
        """Totals since construction: what SentenceEncoder counts; cache_hits/reference, cache_misses/response, ... of
        each call's distinct texts."""
        with self._lock:
            counts: dict[str, float] = {
                f"{name}/{role}": self._counts[f"{name}/{role}"]
                for name in ("cache_hits", "cache_misses")
                for role in self._caches
            }
        return {**self.encoder.counts(), **counts}

    def close(self) -> None:
        """See SentenceEncoder."""
        self.encoder.close()

    def _embed(self, keys: Sequence[tuple[str, str]], should_stop: ShouldStop) -> dict[tuple[str, str], _Embedded]:
        """Embeddings by role and text, from the caches or the encoder."""
        found: dict[tuple[str, str], _Embedded] = {}
        new = []
        with self._lock:
            # dict.fromkeys rather than a set: the order of a set of strings changes from process to process.
            for role, text in dict.fromkeys(keys):
                cached = self._caches[role].get(text)
                self._counts[f"cache_{'misses' if cached is None else 'hits'}/{role}"] += 1
                if cached is None:
                    new.append((role, text))
                else:
                    found[role, text] = cached
        encoded = self.encoder.embed([text for _, text in new], [role for role, _ in new], should_stop)
        finite = np.isfinite(encoded.rows).all(axis=1)
        with self._lock:
            for place, (role, text) in enumerate(new):
                # A copy: a row is a view that would keep the whole batch alive.
                row = encoded.rows[place].copy()
                entry = _Embedded(row, bool(encoded.truncated[place]), bool(encoded.chunked[place]))
                found[role, text] = entry
                if finite[place]:
                    self._caches[role].put(text, entry)
        return found


class SimilarityVerifier:
    """Calibrated similarity s' to the reference answer, brought to [0, 1]. Measures: similarity, calibrated."""

    def __init__(self, config: ScorerConfig):
        self._config = config.calibration
        self._similarity = ReferenceSimilarity(config.encoder)
        self._calibration = build_calibration(config.calibration, self._similarity.encoder.identity, config.languages)

    def verify(
        self, requests: Sequence[ScoreRequest], languages: Sequence[str], should_stop: ShouldStop = never
    ) -> list[Verdict]:
        """See Verifier."""
        found = self._similarity.compare([r.response for r in requests], [r.reference for r in requests], should_stop)
        verdicts = []
        for i, (request, language, similarity) in enumerate(zip(requests, languages, found.cosines.tolist())):
            if not request.reference.strip():
                verdicts.append(Verdict(None, flags=(FLAG_UNREADABLE_REFERENCE,)))
                continue
            if math.isnan(similarity):
                verdicts.append(Verdict(None))
                continue
            calibrated = self._calibration.apply(similarity, request.reference_language, language)
            flags = [
                flag
                for flag, holds in (
                    (FLAG_CHUNKED, found.chunked[i]),
                    (FLAG_TRUNCATED, found.truncated[i]),
                    (FLAG_UNKNOWN_PAIR, not calibrated.known),
                )
                if holds
            ]
            measures = {"similarity": similarity, "calibrated": calibrated.value}
            verdicts.append(Verdict(calibrated.quality, measures, tuple(flags)))
        return verdicts

    def identity(self) -> dict[str, object]:
        """See Verifier: hashes of the encoder and of the statistics."""
        calibration: dict[str, object] = {"method": self._config.method}
        if self._config.method != "none":
            calibration |= {
                "statistics": file_hash(str(self._config.path)),
                "shrinkage_k": self._config.shrinkage_k,
                "unknown_pair": self._config.unknown_pair,
                "anchor": self._config.anchor,
                "bounds": self._config.bounds,
            }
        return {"encoder": self._similarity.encoder.identity, "calibration": calibration}

    def counts(self) -> dict[str, float]:
        """See Verifier, and ReferenceSimilarity."""
        return self._similarity.counts()

    def healthy(self) -> bool:
        """See Supervised."""
        return self._similarity.encoder.healthy()

    def close(self) -> None:
        """See Verifier."""
        self._similarity.close()
