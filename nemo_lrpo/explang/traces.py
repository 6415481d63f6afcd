"""Traces: questions with whole outputs, from which the cold start learns the format.

A JSON line for each:

    question_id, question
    question_language    of the question, and of the answer, ISO 639-1
    language             of the thinking block, as the tag of the response says
    response             the whole output, as `format.render` writes it
    attempt              optional: which of the teacher's tries it was
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.languages import LANGUAGES
from nemo_lrpo.data.rows import Row, json_lines
from nemo_lrpo.explang.format import parse


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
    response is not whole by `marks`, or chooses another language than the row says."""
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
            attempt=int(self.get("attempt") or 0),
        )
        parsed = parse(trace.response, marks, LANGUAGES)
        if parsed.defect:
            self.refuse("response", f"is no whole output by the marks of explang.marks: {parsed.defect.value}")
        if parsed.language != trace.language:
            self.refuse("response", f"chooses {parsed.language!r}, but language is {trace.language!r}")
        return trace

    def _language(self, field: str) -> str:
        code = self.required_text(field)
        if code not in LANGUAGES:
            self.refuse(field, f"{code!r} is not a known language; accepted: {', '.join(LANGUAGES)}")
        return code


def trace_record(trace: Trace) -> dict[str, Any]:
    """The row of a trace."""
    return dict(vars(trace))


def languages_of(traces: Iterable[Trace]) -> list[str]:
    """The thinking languages, sorted."""
    return sorted({trace.language for trace in traces})
