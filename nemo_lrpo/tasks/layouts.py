"""The layouts of public test sets, as their cards describe them, and where a file's language is said.

    mgsm          MGSM and its revision MGSM-Rev2 (mGSM-v2). TSV without header: question, answer (a number); or rows
                  with question, answer_number. One file or directory per language; row n asks the same in all of them.
    global_mmlu   Global-MMLU(-Lite). Rows with sample_id, question, option_a ... option_d, answer (A to D),
                  subject_category; one directory per language; sample_id is the same in all of them.
    include       Include(-Lite). Rows with language (English name), question, choices (or option_a ... option_d),
                  answer (index from 0), domain, country.
    care          CARE's test files: question, answer, culture_type, associated_culture; one file per language.
    care_pro      The same with a short `answer` (or `target`), and `language` where one file holds several. Of CARE-pro
                  only the grading is published, so any such file is taken.

Other fields are ignored. A bad row is refused by file, row, field and what is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.languages import language_code
from nemo_lrpo.data.rows import Row, json_lines, json_rows, kind_of, parquet_rows, tsv_rows

LETTERS = "ABCDEFGHIJ"
SUFFIXES = (".parquet", ".tsv", ".jsonl", ".json")
_TSV_COLUMNS = ("question", "answer_number")
_NUMBER = re.compile(r"[-+−]?\d[\d.,\s\u202f]*%?")
_OPTION_FIELDS = tuple(f"option_{letter}" for letter in "abcdefghij")
_NAMES = {"north macedonian": "mk", "filipino": "tl", "farsi": "fa"}
"""Names of languages in these data sets that are not the project's own."""


@dataclass(frozen=True)
class Question:
    """One row. `parallel`: shared with the rows that ask the same in other languages, else None. `options` with the
    index `answer` of the right one; else `reference` is the answer."""

    language: str
    text: str
    reference: str
    topic: str
    region: str | None = None
    parallel: str | None = None
    options: tuple[str, ...] = ()
    answer: int | None = None


def questions(
    kind: str, path: Path, language: str | None, remedy: str = "set the task's `language`"
) -> Iterator[Question]:
    """All questions of a task of `kind` below `path`, in order (files by name). remedy: what to do where neither
    `language` nor a file says its language, in the words of the caller's options. Raises DataError."""
    read = _READERS[kind]
    for file in files_below(path):
        own = language or language_of(file, path, remedy)
        for number, (where, fields) in enumerate(rows_of(file)):
            yield read(_TaskRow(where, fields, own, remedy), number)


def rows_of(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a file by its suffix; a .tsv holds questions and numbers, as MGSM's do."""
    if file.suffix == ".parquet":
        return parquet_rows(file)
    if file.suffix == ".tsv":
        return tsv_rows(file, _TSV_COLUMNS)
    return json_lines(file) if file.suffix == ".jsonl" else json_rows(file)


def files_below(path: Path) -> list[Path]:
    """`path` itself, or the files of a directory and of its directories: those of the first of SUFFIXES that is there,
    and of these, where some are named for a test split, those."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: unknown format; accepted: {', '.join(SUFFIXES)}, or a directory of such files.")
        return [path]
    for suffix in SUFFIXES:
        if found := sorted(path.rglob(f"*{suffix}")):
            return [file for file in found if "test" in re.split(r"[-_.]", file.stem.lower())] or found
    raise DataError(f"{path}: holds no file of questions; accepted: {', '.join(SUFFIXES)}.")


def language_of(file: Path, root: Path, remedy: str = "give `language`") -> str | None:
    """The language that a file's name says, else that of its directories, the last one `root` or the file's own.

    A name says one as a whole, by an English name among its words, or by a code as its last word. None where none does.
    """
    names = [file.stem]
    for directory in file.parents:
        names.append(directory.name)
        if directory in (root, root.parent):
            break
    for name in names:
        words = re.split(r"[-_.\s]", name)
        said = [language_code(word) for word in (name, *(word for word in words if len(word) > 2), words[-1])]
        found = {code for code in said if code is not None}
        if len(found) == 1:
            return found.pop()
        if found:
            raise DataError(f"{file}: {name!r} names several languages ({', '.join(sorted(found))}); {remedy}.")
    return None


class _TaskRow(Row):
    """A row of a file whose name says `file_language`, or nothing; remedy: see `questions`."""

    def __init__(self, where: str, fields: Mapping[str, Any], file_language: str | None, remedy: str) -> None:
        super().__init__(where, fields)
        self._file_language = file_language
        self._remedy = remedy

    def language(self) -> str:
        """That of the row, where it says one, else that of the file."""
        if self.get("language") is None:
            if self._file_language is None:
                self.refuse("language", f"is missing, and the file's name says none; {self._remedy}")
            return self._file_language
        name = self.required_text("language")
        code = _NAMES.get(name.casefold()) or language_code(name)
        if code is None:
            self.refuse("language", f"{name!r} is not known; accepted: an ISO 639-1 code or English name")
        return code

    def optional(self, *fields: str) -> str | None:
        """The text of the first of `fields` that is there and not empty."""
        for field in fields:
            value = self.get(field)
            if isinstance(value, str) and value.strip():
                return value
        return None

    def number(self) -> str:
        """The right answer as digits."""
        value = self.get("answer_number")
        field = "answer" if value is None else "answer_number"
        value = self.required(field)
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            self.refuse(field, f"is {kind_of(value)}; accepted: a number")
        text = str(value).strip()
        if not _NUMBER.fullmatch(text):
            self.refuse(field, f"{text[:40]!r} is no number; accepted: digits, with a sign or separators")
        return text

    def options(self) -> tuple[str, ...]:
        """The texts to choose from, two to ten of them."""
        if self.get("choices") is not None:
            values = self.get("choices")
            if not isinstance(values, list):
                self.refuse("choices", f"is {kind_of(values)}; accepted: a list of texts")
            given = [(f"choices[{i}]", value) for i, value in enumerate(values)]
        else:
            given = [(field, self.get(field)) for field in _OPTION_FIELDS]
            while given and given[-1][1] is None:
                given.pop()
        if not 2 <= len(given) <= len(LETTERS):
            self.refuse("choices", f"has {len(given)} options; accepted: {len(LETTERS)} at most, two at least")
        return tuple(self.text(field, value) for field, value in given)

    def letter(self, count: int) -> int:
        """The index of the right option, of `answer` as a letter."""
        value = self.required_text("answer").strip().upper()
        accepted = LETTERS[:count]
        if len(value) != 1 or value not in accepted:
            self.refuse("answer", f"{value[:40]!r} is no option; accepted: {', '.join(accepted)}")
        return accepted.index(value)

    def index(self, count: int) -> int:
        """The index of the right option, of `answer` as a number or a letter."""
        value = self.required("answer")
        if isinstance(value, str):
            return self.letter(count)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            self.refuse("answer", f"{value!r} is no option; accepted: a whole number from 0 to {count - 1}")
        return value


def _mgsm(row: _TaskRow, number: int) -> Question:
    return Question(row.language(), row.required_text("question"), row.number(), "Mathematics", parallel=str(number))


def _global_mmlu(row: _TaskRow, number: int) -> Question:
    options = row.options()
    answer = row.letter(len(options))
    return Question(
        language=row.language(),
        text=row.required_text("question"),
        reference=LETTERS[answer],
        topic=row.optional("subject_category", "subject") or "General Knowledge",
        parallel=row.required_text("sample_id"),
        options=options,
        answer=answer,
    )


def _include(row: _TaskRow, number: int) -> Question:
    options = row.options()
    answer = row.index(len(options))
    return Question(
        language=row.language(),
        text=row.required_text("question"),
        reference=LETTERS[answer],
        topic=row.optional("domain", "subject") or "Regional Knowledge",
        region=row.optional("country"),
        options=options,
        answer=answer,
    )


def _care(row: _TaskRow, number: int) -> Question:
    field = "target" if row.get("answer") is None and row.get("target") is not None else "answer"
    return Question(
        language=row.language(),
        text=row.required_text("question"),
        reference=row.required_text(field),
        topic=row.optional("culture_type", "cul_type", "topic") or "Regional Knowledge",
        region=row.optional("associated_culture", "region"),
    )


_READERS: dict[str, Callable[[_TaskRow, int], Question]] = {
    "mgsm": _mgsm,
    "global_mmlu": _global_mmlu,
    "include": _include,
    "care": _care,
    "care_pro": _care,
}
