"""Rewards of answers, r = r_qual * r_lang (paper, reward section)."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from nemo_lrpo.config.scoring import ScorerConfig
from nemo_lrpo.rewards.build import Part, build_parts
from nemo_lrpo.rewards.gate import GateDecision, LanguageGate
from nemo_lrpo.rewards.language import bundled_lid_path
from nemo_lrpo.rewards.statistics import file_hash
from nemo_lrpo.rewards.verifier import ShouldStop, Supervised, Verdict, never
from nemo_lrpo.types import FLAG_ABSTAINED, FLAG_EMPTY, Score, ScoreRequest


class RewardScorer:
    """Scores answers by what `config.verifiers` say of them, gated by language. Loads its models; raises ConfigError
    where the configuration, the encoder or the statistics do not fit together. May be shared by threads."""

    def __init__(self, config: ScorerConfig):
        config.check()
        self._languages = list(config.languages)
        # The cheap model first: what it refuses is refused before the encoder loads.
        self._gate = LanguageGate(config.language_id, config.languages)
        self._parts = build_parts(config)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        gate = dataclasses.asdict(config.language_id)
        self._identity: dict[str, object] = {
            "languages": self._languages,
            "verifiers": {
                part.name: {**dataclasses.asdict(part.config), **part.verifier.identity()} for part in self._parts
            },
            "encoder": next(
                (found["encoder"] for part in self._parts if "encoder" in (found := part.verifier.identity())), None
            ),
            "language_id": {
                **{name: value for name, value in gate.items() if name not in ("path", "threads")},
                "model": file_hash(config.language_id.path or bundled_lid_path()),
            },
            "versions": {name: version(name) for name in ("sentence-transformers", "torch", "fasttext")},
        }

    def score(self, requests: Sequence[ScoreRequest], should_stop: ShouldStop = never) -> list[Score]:
        """One score per request, in order, each with its request's sample id.

        An empty response (white space counts as none) gets quality and gate 0 and no verifier sees it. A response whose
        language cannot be said is calibrated as the requested one; its gate is language_id.on_abstain's. Raises
        ValueError for a request in a language that is not configured, ScoringAbandoned once `should_stop` says so.
        """
        for request in requests:
            if request.language not in self._languages:
                raise ValueError(
                    f"sample {request.sample_id!r}: language={request.language!r} is not served; accepted: "
                    f"{', '.join(self._languages)}."
                )
        answered = [request for request in requests if request.response.strip()]
        decisions = self._gate.judge([r.response for r in answered], [r.language for r in answered])
        written = [found.language or request.language for found, request in zip(decisions, answered)]
        columns = [part.verifier.verify(answered, written, should_stop) for part in self._parts]
        judged = iter(zip(decisions, zip(*columns, strict=True), strict=True))
        scores = []
        for request in requests:
            if not request.response.strip():
                scores.append(Score(request.sample_id, 0.0, 0.0, 0.0, None, 0.0, flags=(FLAG_EMPTY,)))
            else:
                decision, verdicts = next(judged)
                scores.append(self._combine(request.sample_id, decision, verdicts))
        self._count(requests, scores)
        return scores

    def _combine(self, sample_id: str, decision: GateDecision, verdicts: Sequence[Verdict]) -> Score:
        quality = combine(self._parts, verdicts)
        measures: dict[str, float] = {}
        flags = {FLAG_ABSTAINED} if decision.abstained else set()
        for verdict in verdicts:
            measures.update(verdict.measures)
            flags.update(verdict.flags)
        if decision.share is not None:
            measures["language_share"] = decision.share
        # A closed gate decides alone: whatever the quality would have been, the reward is 0.
        if decision.gate == 0.0:
            reward: float | None = 0.0
        else:
            reward = None if quality is None or decision.gate is None else quality * decision.gate
        return Score(
            sample_id=sample_id,
            reward=reward,
            quality=quality,
            gate=decision.gate,
            language=decision.language,
            confidence=decision.confidence,
            parts={
                part.name: verdict.value for part, verdict in zip(self._parts, verdicts) if verdict.value is not None
            },
            measures=measures,
            flags=tuple(sorted(flags)),
        )

    def identity(self) -> dict[str, object]:
        """What the rewards depend on, JSON-able: verifiers with the hashes of encoder and calibration, languages, the
        gate and the language model's hash, library versions. Runs that compare rewards compare this."""
        return dict(self._identity)

    def counts(self) -> dict[str, float]:
        """Totals since construction by `name` or `name/label`: answers scored by requested language, each flag and
        answers without reward likewise, and what the verifiers count."""
        with self._lock:
            counts: dict[str, float] = dict(self._counts)
        for part in self._parts:
            counts.update(part.verifier.counts())
        return counts

    def healthy(self) -> bool:
        """False where a part of it has died or hangs, so that nothing could be scored."""
        return all(part.verifier.healthy() for part in self._parts if isinstance(part.verifier, Supervised))

    def close(self) -> None:
        """Give back threads, processes and connections."""
        self._gate.close()
        for part in self._parts:
            part.verifier.close()

    def _count(self, requests: Sequence[ScoreRequest], scores: Sequence[Score]) -> None:
        with self._lock:
            for request, score in zip(requests, scores):
                self._counts[f"scored/{request.language}"] += 1
                if score.reward is None:
                    self._counts[f"without_reward/{request.language}"] += 1
                for flag in score.flags:
                    self._counts[f"{flag}/{request.language}"] += 1


def combine(parts: Sequence[Part], verdicts: Sequence[Verdict]) -> float | None:
    """r_qual: (sum of w_i v_i / sum of w_i over the sum parts) * product of the product parts; the first factor is 1
    without any sum part. None where a part has no value."""
    values = [verdict.value for verdict in verdicts]
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    total = weights = 0.0
    factor = 1.0
    for part, value in zip(parts, values, strict=True):
        assert value is not None
        if part.config.combine == "product":
            factor *= value
        else:
            total += part.config.weight * value
            weights += part.config.weight
    return factor * (total / weights if weights else 1.0)


def score_answers(config: ScorerConfig, answers: Sequence[Mapping[str, str]]) -> list[Score]:
    """Scores without a server: each answer is a mapping with the fields of ScoreRequest. For more than one call make a
    RewardScorer, which keeps its models. Raises ConfigError, and ValueError naming the answer's field."""
    fields = {field.name for field in dataclasses.fields(ScoreRequest)}
    needed = fields - {"question"}
    requests = []
    for index, answer in enumerate(answers):
        if not needed <= set(answer) <= fields:
            raise ValueError(
                f"answers[{index}] has the fields {', '.join(sorted(answer))}; needed: {', '.join(sorted(needed))}; "
                "optional: question."
            )
        requests.append(ScoreRequest(**answer))
    scorer = RewardScorer(config)
    try:
        return scorer.score(requests)
    finally:
        scorer.close()
