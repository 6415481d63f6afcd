"""What is kept of a teacher's replies: whole in form, thought in the language of the tag, with a right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.config.scoring import LanguageIdConfig, ScorerConfig, VerifierConfig
from nemo_lrpo.explang.format import Parsed, parse, render
from nemo_lrpo.explang.rewards import Outcome
from nemo_lrpo.explang.traces import Trace
from nemo_lrpo.rewards.build import build_parts
from nemo_lrpo.rewards.gate import GateDecision, LanguageGate
from nemo_lrpo.rewards.verifier import Verdict
from nemo_lrpo.types import Prompt, ScoreRequest
from tools.preparation.endpoint import Reply
from tools.traces.teachers import Request

VERIFIERS = ("numeric", "exact", "choice")
CORRECT_FROM = 1.0


@dataclass(frozen=True)
class Examined:
    """A reply, and what became of it: `trace`, or the `reason` why there is none, with its `detail`. `outcome`: as the
    rewards see it; None where the teacher gave no reply."""

    request: Request
    reply: Reply | None
    trace: Trace | None
    reason: str = ""
    detail: str = ""
    outcome: Outcome | None = None

    def record(self) -> dict[str, object]:
        """A row of rejected.jsonl."""
        question, language, attempt = self.request.key
        said = "" if self.reply is None else self.reply.text[:400].encode("utf-8", "replace").decode("utf-8")
        where = {"question_id": question, "language": language, "attempt": attempt}
        return {**where, "reason": self.reason, "detail": self.detail, "reply": said}


class Examiner:
    """Judges replies by the reward room's own identifier and verifiers."""

    def __init__(
        self, marks: MarksConfig, thinking: Sequence[str], answering: Sequence[str], verifier: str, max_chars: int
    ) -> None:
        """thinking, answering: the languages to do so in. verifier: one of VERIFIERS. max_chars: of a reply."""
        self._marks, self._thinking, self._max_chars = marks, thinking, max_chars
        languages = sorted({*thinking, *answering})
        self._gate = LanguageGate(LanguageIdConfig(), languages)
        # An answer may be a number, of which no language can be said.
        self._answer_gate = LanguageGate(LanguageIdConfig(on_abstain="pass"), languages)
        config = ScorerConfig(languages=languages, verifiers={"answer": VerifierConfig(kind=verifier)})
        (self._part,) = build_parts(config)

    def examine(self, replies: Sequence[tuple[Request, Reply | None]]) -> list[Examined]:
        """One for each reply, in order."""
        parsed = [parse(reply.text if reply else "", self._marks, self._thinking) for _, reply in replies]
        thought = self._gate.judge([p.thinking for p in parsed], [p.language or "en" for p in parsed])
        spoken = self._answer_gate.judge([p.answer for p in parsed], [r.prompt.language for r, _ in replies])
        asked = [_score_request(request.prompt, parts.answer) for (request, _), parts in zip(replies, parsed)]
        verdicts = self._part.verifier.verify(asked, [one.language for one in asked])
        rows = zip(replies, parsed, thought, spoken, verdicts, strict=True)
        return [self._examined(request, reply, *rest) for (request, reply), *rest in rows]

    def _examined(
        self,
        request: Request,
        reply: Reply | None,
        parts: Parsed,
        thinking: GateDecision,
        answer: GateDecision,
        verdict: Verdict,
    ) -> Examined:
        if reply is None:
            return Examined(request, None, None, "no_reply")
        prompt, sample_id = request.prompt, "/".join(map(str, request.key))
        # Nobody counts tokens here.
        outcome = Outcome.of(sample_id, prompt.question_id, parts, thinking.gate, verdict.value, 0)
        found = self._refused(request, reply, parts, thinking, answer, verdict)
        if found is not None:
            return Examined(request, reply, None, *found, outcome)
        assert parts.language is not None
        # Written anew, so that all traces have one form; raises for what would not be read back.
        response = render(parts.language, parts.thinking, parts.answer, self._marks)
        trace = Trace(prompt.question_id, prompt.question, prompt.language, parts.language, response, request.attempt)
        return Examined(request, reply, trace, outcome=outcome)

    def _refused(
        self,
        request: Request,
        reply: Reply,
        parts: Parsed,
        thinking: GateDecision,
        answer: GateDecision,
        verdict: Verdict,
    ) -> tuple[str, str] | None:
        """Reason and detail why there is no trace."""
        prompt = request.prompt
        if len(reply.text) > self._max_chars:
            return "too_long", f"{len(reply.text)} characters"
        if parts.defect:
            return parts.defect.value, ""
        if not reply.ended:
            return "not_ended", ""
        if request.language and parts.language != request.language:
            return "another_tag", f"{parts.language}, asked for {request.language}"
        if thinking.gate != 1.0:
            return "thinking_in_another_language", f"{thinking.language}, by the tag {parts.language}"
        if answer.gate != 1.0:
            return "answer_in_another_language", f"{answer.language}, asked in {prompt.language}"
        if verdict.value is None:
            return "not_verified", ", ".join(verdict.flags)
        if verdict.value < CORRECT_FROM:
            return "wrong_answer", f"{parts.answer[:80]!r}, right is {prompt.reference[:80]!r}"
        return None

    def close(self) -> None:
        self._gate.close()
        self._answer_gate.close()
        self._part.verifier.close()


def _score_request(prompt: Prompt, answer: str) -> ScoreRequest:
    return ScoreRequest(
        prompt.question_id, answer, prompt.reference, prompt.reference_language, prompt.language, prompt.question
    )
