"""Questions from parquet and JSONL files, every row checked before anything else happens.

A row, in the layout of verl's data sets (other fields are ignored, `prompt` among them: the renderer writes it anew)::

    question                         text
    reward_model.ground_truth        text, the reference answer; without it, `answer`
    ability                          topic, or list of topics
    extra_info.language              of the question: ISO 639-1 code or English name, see languages.py
    extra_info.region                optional: region, or list of regions
    extra_info.id                    optional: text or whole number, unique; without it, extra_info.index; without
                                     both, a hash of question and language
    extra_info.reference_language    optional: of the reference answer, if not the question's
    extra_info.fixed_language        optional: of every rollout of the question

A JSONL file has one such object a line; blank lines are skipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.languages import check_candidates, language_code
from nemo_lrpo.types import Prompt

_COLUMNS = ("question", "answer", "reward_model", "ability", "extra_info")


def read_prompts(path: str | Path, languages: Sequence[str], topics: Sequence[str] | None = None) -> list[Prompt]:
    """The questions of a .parquet or .jsonl file, or of all .parquet files of a directory, in order (files by name).

    `languages`: candidate codes; every language that a row names must be one of them. `topics`: the accepted ones;
    None accepts any. Raises DataError naming file, row (parquet: from 0; JSONL: line, from 1), field and what is
    accepted at the first bad row, and ConfigError for a candidate that is no known language.
    """
    check_candidates(languages)
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for where, fields in _rows(Path(path)):
        row = _Row(where, fields, tuple(languages))
        prompt = row.prompt(topics)
        if prompt.question_id in seen:
            field = row.id_field()
            what = f"{field}={prompt.question_id!r}" if field else "the same question in the same language"
            raise DataError(f"{where}: {what} occurred before, in {seen[prompt.question_id]}; ids must be unique.")
        seen[prompt.question_id] = where
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path}: no rows; at least one question is needed.")
    return prompts


def contexts(prompts: Iterable[Prompt]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(topics, regions) that occur in `prompts`, sorted."""
    topics: set[str] = set()
    regions: set[str] = set()
    for prompt in prompts:
        topics.update(prompt.topics)
        regions.update(prompt.regions)
    return tuple(sorted(topics)), tuple(sorted(regions))


class _Row:
    """One row on its way to a Prompt; every refusal names where it is."""

    def __init__(self, where: str, fields: Mapping[str, Any], languages: tuple[str, ...]) -> None:
        self._where = where
        self._fields = fields
        self._languages = languages

    def prompt(self, topics: Sequence[str] | None) -> Prompt:
        question = self._text("question", self._required("question"))
        reference_field = "answer" if self._get("reward_model.ground_truth") is None else "reward_model.ground_truth"
        if self._get(reference_field) is None:
            self._refuse("reward_model.ground_truth", "is missing, and so is answer; give the reference answer as text")
        language = self._language("extra_info.language", self._required("extra_info.language"))
        reference_language = self._get("extra_info.reference_language")
        fixed_language = self._get("extra_info.fixed_language")
        self._required("ability")
        abilities = self._names("ability")
        if not abilities:
            self._refuse("ability", "is empty; give at least one topic")
        for ability in abilities if topics is not None else ():
            if ability not in topics:
                self._refuse("ability", f"{ability!r} is not a known topic; accepted: {', '.join(topics)}")
        return Prompt(
            question_id=self._id(question, language),
            question=question,
            reference=self._text(reference_field, self._get(reference_field)),
            language=language,
            reference_language=language
            if reference_language is None
            else self._language("extra_info.reference_language", reference_language),
            topics=abilities,
            regions=self._names("extra_info.region"),
            fixed_language=None
            if fixed_language is None
            else self._language("extra_info.fixed_language", fixed_language),
        )

    def id_field(self) -> str | None:
        """Where the row's id stands, None where it has none."""
        return next((f for f in ("extra_info.id", "extra_info.index") if self._get(f) is not None), None)

    def _id(self, question: str, language: str) -> str:
        field = self.id_field()
        if field is None:
            return hashlib.blake2b(f"{language}:{question}".encode(), digest_size=12).hexdigest()
        value = self._get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._text(field, value, "text or a whole number")

    def _get(self, field: str) -> Any:
        """The value at a dotted path, None where it or a parent is absent or null."""
        value: Any = self._fields
        path = field.split(".")
        for depth, name in enumerate(path):
            if not isinstance(value, Mapping):
                self._refuse(".".join(path[:depth]), f"is {_kind(value)}; accepted: an object with {name!r} in it")
            value = value.get(name)
            if value is None:
                return None
        return value

    def _required(self, field: str) -> Any:
        value = self._get(field)
        if value is None:
            self._refuse(field, "is missing; it is required")
        return value

    def _text(self, field: str, value: object, accepted: str = "text") -> str:
        if not isinstance(value, str):
            self._refuse(field, f"is {_kind(value)}; accepted: {accepted}")
        if not value.strip():
            self._refuse(field, f"is empty; accepted: {accepted}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            self._refuse(field, f"has a lone surrogate, {value[error.start]!r}, at character {error.start}")
        return value

    def _names(self, field: str) -> tuple[str, ...]:
        """One name or a list of names, each once; none where the field is absent or null."""
        value = self._get(field)
        accepted = "text or a list of texts"
        if value is None:
            return ()
        if isinstance(value, str):
            return (self._text(field, value, accepted),)
        if not isinstance(value, list):
            self._refuse(field, f"is {_kind(value)}; accepted: {accepted}")
        names = tuple(self._text(field, name, accepted) for name in value)
        if len(set(names)) < len(names):
            self._refuse(field, f"{list(names)!r} names one of them twice")
        return names

    def _language(self, field: str, value: object) -> str:
        text = self._text(field, value, "an ISO 639-1 code or an English name")
        code = language_code(text)
        if code is None or code not in self._languages:
            problem = "is not a known language" if code is None else "is not among data.languages"
            self._refuse(field, f"{text!r} {problem}; accepted: {', '.join(self._languages)}, or their English names")
        return code

    def _refuse(self, field: str, problem: str) -> NoReturn:
        raise DataError(f"{self._where}: {field} {problem}.")


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and row in words, fields) of every row below `path`."""
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise DataError(f"{path}: no .parquet file in this directory.")
        for file in files:
            yield from _parquet_rows(file)
    elif not path.is_file():
        raise DataError(f"{path}: no such file; accepted: a .parquet or .jsonl file, or a directory of .parquet files.")
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".jsonl":
        yield from _json_rows(path)
    else:
        raise DataError(f"{path}: unknown format; accepted: .parquet, .jsonl, or a directory of .parquet files.")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
            absent = [name for name in ("question", "ability", "extra_info") if name not in columns]
            if absent or not {"answer", "reward_model"} & set(columns):
                raise DataError(
                    f"{path}: column {(absent or ['reward_model'])[0]!r} is missing; required: question, ability, "
                    f"extra_info, and reward_model or answer. It has: {', '.join(file.schema_arrow.names) or 'none'}."
                )
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                for fields in _python_rows(path, batch, number):
                    yield f"{path}, row {number}", fields
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _python_rows(path: Path, batch: pa.RecordBatch, first: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        # Arrow does not say where; look again, cell by cell.
        for offset in range(batch.num_rows):
            for name in batch.schema.names:
                try:
                    batch.column(name)[offset].as_py()
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}, row {first + offset}: {name} is not valid UTF-8: {error}.") from error
        raise


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not valid UTF-8: {error}.") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise DataError(f"{where}: is {_kind(fields)}; accepted: one JSON object a line.")
        yield where, fields


def _kind(value: object) -> str:
    """What a value of the wrong type is, in a reader's words."""
    words = {
        str: "text",
        bool: "true or false",
        int: "a whole number",
        float: "a decimal number",
        list: "a list",
        dict: "an object",
    }
    return words.get(type(value), "null" if value is None else f"of type {type(value).__name__}")
