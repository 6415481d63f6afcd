"""Traces: questions with whole outputs, from which the cold start learns the format.

A JSON line for each:

    question_id, question
    question_language    of the question, and of the answer, ISO 639-1
    language             of the thinking block, as the tag of the response says
    response             the whole output, as `format.render` writes it
    attempt              optional: which of the teacher's tries it was
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.config.supervised import TraceDataConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.languages import LANGUAGES
from nemo_lrpo.data.prompts import PromptRenderer
from nemo_lrpo.data.rows import Row, json_lines, kind_of
from nemo_lrpo.explang.format import forced, parse
from nemo_lrpo.types import ORIGIN_FIXED, Example, Prompt, RoutedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """One row; see the module."""

    question_id: str
    question: str
    question_language: str
    language: str
    response: str
    attempt: int = 0


def read_traces(path: str | Path, marks: MarksConfig) -> list[Trace]:
    """The traces of a JSONL file, in order. Raises DataError, naming file, line and field, at the first row whose
    response is not whole by `marks`, chooses another language than the row says, or does not begin as one does that is
    made to think in it."""
    traces = [_TraceRow(where, fields).trace(marks) for where, fields in json_lines(Path(path))]
    if not traces:
        raise DataError(f"{path}: no rows; at least one trace is needed (tools/make_traces.py makes them).")
    return traces


class _TraceRow(Row):
    def trace(self, marks: MarksConfig) -> Trace:
        trace = Trace(
            question_id=self.required_text("question_id"),
            question=self.required_text("question"),
            question_language=self._language("question_language"),
            language=self._language("language"),
            response=self.required_text("response"),
            attempt=self._attempt(),
        )
        parsed = parse(trace.response, marks, LANGUAGES)
        if parsed.defect:
            self.refuse("response", f"is no whole output by the marks that are set: {parsed.defect.value}")
        if parsed.language != trace.language:
            self.refuse("response", f"chooses {parsed.language!r}, but language is {trace.language!r}")
        begins = forced(trace.language, marks) + marks.thinking_open
        if not trace.response.startswith(begins):
            self.refuse("response", f"begins with {trace.response[: len(begins)]!r}; accepted: {begins!r}")
        return trace

    def _attempt(self) -> int:
        value = self.get("attempt")
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            self.refuse("attempt", f"is {kind_of(value)}; accepted: a whole number")
        return value or 0

    def _language(self, field: str) -> str:
        code = self.required_text(field)
        if code not in LANGUAGES:
            self.refuse(field, f"{code!r} is not a known language; accepted: {', '.join(LANGUAGES)}")
        return code


def examples_of(
    traces: Sequence[Trace],
    tokenizer: PreTrainedTokenizerBase,
    renderer: PromptRenderer,
    config: TraceDataConfig,
) -> list[Example]:
    """The traces as token ids, in order: the prompt that training by reward will have, the response, the end token.

    A response has the ids with which the policy writes it behind the prompt; its first ones are those that `renderer`,
    which has a prefill, puts there to make the policy think in the language. Raises ConfigError where the tokenizer
    allows no such beginning; DataError for a trace whose tokens do not read back as its text (a mark that is a special
    token is lost), and for those longer than max_tokens, by over_long.
    """
    plan = []
    for trace in traces:
        language = trace.question_language
        prompt = Prompt(trace.question_id, trace.question, "", language, language, ())
        plan.append(RoutedPrompt(prompt, -1, 0, language, ORIGIN_FIXED, 1.0))
    examples = []
    for trace, prompt in zip(traces, renderer.render_all(plan), strict=True):
        name = f"trace {trace.question_id!r} in {trace.language!r}"
        ids = renderer.response(replace(prompt.routed, thinking=trace.language), trace.response)
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text != trace.response:
            raise DataError(
                f"{name} does not survive the tokenizer: {text[:80]!r}; a mark may be one of its special tokens, which "
                "decoding drops: give other marks."
            )
        length = len(prompt.token_ids) + len(ids) + 1
        if length <= config.max_tokens:
            examples.append(Example(prompt.token_ids, (*ids, tokenizer.eos_token_id)))
        elif config.over_long == "reject":
            raise DataError(
                f"{name} has {length} tokens, more than data.max_tokens={config.max_tokens}. Raise it, or leave such "
                "traces out with data.over_long=drop."
            )
    if len(examples) < len(traces):
        _log.warning("%d of %d traces are too long; left out.", len(traces) - len(examples), len(traces))
    return examples


def trace_record(trace: Trace) -> dict[str, Any]:
    """The row of a trace."""
    return dict(vars(trace))


def languages_of(traces: Iterable[Trace]) -> list[str]:
    """The thinking languages, sorted."""
    return sorted({trace.language for trace in traces})
