"""Rows of preference data as question and reference, and why a row is none.

helpsteer3   HelpSteer3's preferences: context (turns with role and content), response1, response2,
             overall_preference (-3 to 3, below 0 the first is better), language, domain
care         CARE: question, response, human_rating (or rating), source, associated_culture, optionally answer;
             a row per response, of which the best rated one is the reference, unless answer is there
lrpo         the released data's JSON: query, chosen, language, topic, region
training     the training layout itself (nemo_lrpo/data/reader.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.languages import language_code
from nemo_lrpo.data.rows import Row, json_lines, json_rows, kind_of, parquet_rows

SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass
class Example:
    """A question with its reference. `said_language`: what the source says of it, a code; None where it says nothing
    that is a language. `hint`: for labelling only. topic, region: of the source, else found later."""

    source: str
    where: str
    question: str
    reference: str
    said_language: str | None = None
    language: str = ""
    reference_language: str | None = None
    topic: str | None = None
    region: str | None = None
    hint: str | None = None


@dataclass(frozen=True)
class Rejected:
    """A row that is not taken: `reason` is one of few, `detail` says more of this row."""

    source: str
    where: str
    reason: str
    detail: str = ""
    question: str = ""


def rejected(example: Example, reason: str, detail: str = "") -> Rejected:
    return Rejected(example.source, example.where, reason, detail, example.question)


@dataclass
class _Rated:
    """A response to a question of CARE; rating: infinite where its reference is an answer of its own."""

    rating: float
    example: Example


class Source:
    """One source; iterating gives an Example or a Rejected for each row, those of CARE's best responses last, and shows
    a bar."""

    def __init__(self, layout: str, path: Path, *, min_preference: int, min_rating: float):
        """Raises DataError where there is no file to read."""
        self.layout = layout
        self.path = path
        self._min_preference = min_preference
        self._min_rating = min_rating
        self._files = [path] if path.is_file() else sorted(f for s in SUFFIXES for f in path.rglob(f"*{s}"))
        if not self._files or any(file.suffix not in SUFFIXES for file in self._files):
            raise DataError(f"{path}: no file of rows; accepted: {', '.join(SUFFIXES)}, or a directory of such files.")

    def __iter__(self) -> Iterator[Example | Rejected]:
        rated: dict[str, _Rated] = {}
        with tqdm(desc=f"reading {self.path.name}", total=self._count(), unit="row", mininterval=0.5) as bar:
            for found in self._found(bar.update):
                if not isinstance(found, _Rated):
                    yield found
                    continue
                best = rated.setdefault(found.example.question, found)
                if best is not found:
                    better, other = (found, best) if found.rating > best.rating else (best, found)
                    rated[found.example.question] = better
                    yield _passed_over(other, better)
        for one in rated.values():
            if one.rating < self._min_rating:
                yield rejected(one.example, "rated too low", f"best of its responses: {one.rating:g}")
            else:
                yield one.example

    def _found(self, on_row: Callable[[], object]) -> Iterator[Example | Rejected | _Rated]:
        bad: list[Rejected] = []

        def note(error: DataError) -> None:
            where, _, detail = str(error).partition(": ")
            bad.append(Rejected(self.layout, where, "not readable", detail))
            on_row()

        read = _READERS[self.layout]
        for file in self._files:
            for where, fields in _rows(file, note):
                on_row()
                yield from _drained(bad)
                try:
                    yield read(self, Row(where, fields))
                except DataError as error:
                    yield Rejected(self.layout, where, "not readable", str(error).removeprefix(f"{where}: "))
        yield from _drained(bad)

    def _count(self) -> int | None:
        """Rows in all; None where a file does not say before it is read as a whole."""
        counts = [_row_count(file) for file in self._files]
        return None if None in counts else sum(count or 0 for count in counts)

    def helpsteer3(self, row: Row) -> Example | Rejected:
        turns = row.required("context")
        if not isinstance(turns, list) or not turns:
            row.refuse("context", f"is {kind_of(turns)}; accepted: a list of turns with role and content")
        last = Row(f"{row.where}, last turn", turns[-1]) if isinstance(turns[-1], Mapping) else row
        question = last.required_text("content")
        preference = row.required("overall_preference")
        if isinstance(preference, bool) or not isinstance(preference, int) or not -3 <= preference <= 3:
            row.refuse("overall_preference", f"is {preference!r}; accepted: a whole number from -3 to 3")
        reference = row.required_text("response1" if preference < 0 else "response2")
        example = Example(
            self.layout, row.where, question, reference, _code(row.get("language")), hint=_name(row.get("domain"))
        )
        if len(turns) > 1:
            return rejected(example, "more than one turn", f"{len(turns)} turns")
        if abs(preference) < self._min_preference:
            return rejected(example, "no clear preference", f"overall_preference {preference}")
        return example

    def care(self, row: Row) -> _Rated | Example | Rejected:
        question = row.required_text("question")
        culture = _name(row.get("associated_culture"))
        example = Example(self.layout, row.where, question, "", _code(row.get("language")), hint=culture)
        if row.get("answer") is not None:
            example.reference = row.required_text("answer")
            # One row per response repeats the answer.
            return _Rated(float("inf"), example)
        example.reference = row.required_text("response")
        field = "rating" if row.get("human_rating") is None else "human_rating"
        rating = row.required(field)
        try:
            value = float(rating)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            row.refuse(field, f"is {rating!r}; accepted: a number from 1 to 10")
        return _Rated(value, example)

    def lrpo(self, row: Row) -> Example:
        return Example(
            self.layout,
            row.where,
            row.required_text("query"),
            row.required_text("chosen"),
            _code(row.get("language")),
            topic=_name(row.get("topic")),
            region=_name(row.get("region")),
        )

    def training(self, row: Row) -> Example:
        reference = "answer" if row.get("reward_model.ground_truth") is None else "reward_model.ground_truth"
        regions = row.names("extra_info.region")
        topics = row.names("ability")
        return Example(
            self.layout,
            row.where,
            row.required_text("question"),
            row.required_text(reference),
            _code(row.get("extra_info.language")),
            topic=topics[0] if topics else None,
            region=regions[0] if regions else None,
        )


_READERS: dict[str, Callable[[Source, Row], Example | Rejected | _Rated]] = {
    "helpsteer3": Source.helpsteer3,
    "care": Source.care,
    "lrpo": Source.lrpo,
    "training": Source.training,
}
LAYOUTS = tuple(_READERS)


def _rows(file: Path, note: Callable[[DataError], None]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if file.suffix == ".parquet":
        return parquet_rows(file)
    return json_lines(file, note) if file.suffix == ".jsonl" else json_rows(file)


def _row_count(file: Path) -> int | None:
    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as opened:
                return opened.metadata.num_rows
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                return sum(not line.isspace() for line in lines)
    except (pa.ArrowException, OSError):
        # Reading it says what is wrong.
        return None
    return None


def _passed_over(one: _Rated, better: _Rated) -> Rejected:
    if math.isinf(one.rating):
        return rejected(one.example, "the same question", f"its answer is taken from {better.example.where}")
    taken = "an answer of its own" if math.isinf(better.rating) else f"{better.rating:g}"
    return rejected(one.example, "not the best rated", f"{one.rating:g}; {better.example.where} has {taken}")


def _drained(bad: list[Rejected]) -> Iterator[Rejected]:
    yield from bad
    bad.clear()


def _code(value: object) -> str | None:
    """HelpSteer3 names a programming language for code."""
    return language_code(value) if isinstance(value, str) else None


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
