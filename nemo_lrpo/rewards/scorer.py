"""Rewards of answers, r = r_qual * r_lang (paper, reward section)."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from nemo_lrpo.config.scoring import ScorerConfig
from nemo_lrpo.explang.flags import flags_of, is_own
from nemo_lrpo.explang.format import Defect, Parsed, parse
from nemo_lrpo.rewards.build import Part, build_parts
from nemo_lrpo.rewards.gate import GateDecision, LanguageGate
from nemo_lrpo.rewards.language import bundled_lid_path
from nemo_lrpo.rewards.statistics import file_hash
from nemo_lrpo.rewards.verifier import ShouldStop, Supervised, Verdict, never
from nemo_lrpo.types import FLAG_ABSTAINED, FLAG_EMPTY, Score, ScoreRequest

_CLOSED = GateDecision(0.0, None, 0.0)
"""Of a response that chose no language to think in, or did not think."""


class RewardScorer:
    """Scores answers by what `config.verifiers` say of them, gated by language. Loads its models; raises ConfigError
    where the configuration, the encoder or the statistics do not fit together. May be shared by threads."""

    def __init__(self, config: ScorerConfig):
        config.check()
        self._languages = list(config.languages)
        # The cheap model first: what it refuses is refused before the encoder loads.
        self._gated = config.language_id.gate != "off"
        self._marks = config.thinking.marks if config.thinking.tagged else None
        open_anyway = self._marks is not None and not self._gated
        self._gate = LanguageGate(
            dataclasses.replace(config.language_id, gate="response") if open_anyway else config.language_id,
            config.languages,
        )
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
        if self._marks is not None:
            self._identity["thinking"] = dataclasses.asdict(self._marks)

    def score(self, requests: Sequence[ScoreRequest], should_stop: ShouldStop = never) -> list[Score]:
        """One score per request, in order, each with its request's sample id.

        An empty response (white space counts as none) gets quality and gate 0 and no verifier sees it. A response whose
        language cannot be said is calibrated as the requested one; its gate is language_id.on_abstain's. With
        thinking.tagged the gate is of the thinking block, see ThinkingConfig. Raises ValueError for a request in a
        language that is not configured, ScoringAbandoned once `should_stop` says so.
        """
        for request in requests:
            if request.language not in self._languages:
                raise ValueError(
                    f"sample {request.sample_id!r}: language={request.language!r} is not served; accepted: "
                    f"{', '.join(self._languages)}."
                )
        judge = self._score_plain if self._marks is None else self._score_tagged
        scores = judge(requests, should_stop)
        self._count(requests, scores)
        return scores

    def _score_plain(self, requests: Sequence[ScoreRequest], should_stop: ShouldStop) -> list[Score]:
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
        return scores

    def _score_tagged(self, requests: Sequence[ScoreRequest], should_stop: ShouldStop) -> list[Score]:
        """The gate judges thinking blocks by their tags, the verifiers see answers of whole outputs only."""
        assert self._marks is not None
        outputs = [parse(request.response, self._marks, self._languages) for request in requests]
        thoughts = [output for output in outputs if output.thinks]
        answered = [
            dataclasses.replace(request, response=output.answer)
            for request, output in zip(requests, outputs)
            if output.defect is None
        ]
        found = self._gate.judge(
            [output.thinking for output in thoughts] + [request.response for request in answered],
            [output.language or "" for output in thoughts] + [request.language for request in answered],
        )
        compliant, written = iter(found[: len(thoughts)]), found[len(thoughts) :]
        languages = [decision.language or request.language for decision, request in zip(written, answered)]
        columns = [part.verifier.verify(answered, languages, should_stop) for part in self._parts]
        judged = iter(zip(written, zip(*columns, strict=True), strict=True))
        return [
            self._combine_tagged(
                request,
                output,
                next(compliant) if output.thinks else _CLOSED,
                *(next(judged) if output.defect is None else (None, ())),
            )
            for request, output in zip(requests, outputs)
        ]

    def _combine_tagged(
        self,
        request: ScoreRequest,
        output: Parsed,
        thinking: GateDecision,
        answer: GateDecision | None,
        verdicts: Sequence[Verdict],
    ) -> Score:
        """answer: in which language it is, None of an output that is not whole."""
        flags = {*flags_of(output)} | ({FLAG_EMPTY} if output.defect == Defect.EMPTY else set())
        if output.thinks and thinking.abstained:
            flags.add(FLAG_ABSTAINED)
        if answer is None:
            score = Score(request.sample_id, None, 0.0, None, None, 0.0)
        else:
            score = self._combine(request.sample_id, answer, verdicts)
            flags |= {*score.flags} - {FLAG_ABSTAINED}
        measures = {name: value for name, value in score.measures.items() if name != "language_share"}
        if thinking.share is not None:
            measures["language_share"] = thinking.share
        if score.language is not None:
            measures["answer_language"] = float(score.language == request.language)
        gate = thinking.gate if self._gated else 1.0
        return dataclasses.replace(
            score,
            reward=None if score.quality is None or gate is None else score.quality * gate,
            gate=thinking.gate,
            measures=measures,
            flags=tuple(sorted(flags)),
        )

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
        answers without reward likewise, `selected/<language>` and `defect/<name>`, and what the verifiers count."""
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
                    name = flag.replace(":", "/") if is_own(flag) else f"{flag}/{request.language}"
                    self._counts[name] += 1


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
