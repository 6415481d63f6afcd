"""Parallel texts from a file of any size: a bounded number of facts, the same whatever the order of the rows."""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.data.languages import language_code
from nemo_lrpo.seeding import derive_seed

Facts = dict[str, dict[str, list[str]]]
"""Language -> fact id -> its distinct texts; languages and ids in sorted order."""

WORDINGS = 4
"""Texts kept of one fact in one language."""

_IDS = ("fact_id", "id")
_LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*")
_SUFFIXES = (".parquet", ".jsonl", ".json", ".tsv")


class ParallelText(NamedTuple):
    """A text; `row` is the number of its row, the first being 1 (in a TSV the header)."""

    row: int
    fact: str
    language: str
    text: str
    split: str | None


def read_texts(path: Path, progress: bool = False) -> Iterator[ParallelText]:
    """The texts of a parquet, JSONL or TSV file, read as they are asked for.

    A row is one text (`fact_id` or `id`, `language`, `text`), or, in parquet and TSV without these two columns, one
    fact with a column per language, an empty cell being no text. `split` may be there in either. Raises ConfigError
    naming file, row and field.
    """
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"--data {path}: {path.suffix!r} is not known; accepted: {', '.join(_SUFFIXES)}.")
    read = {".parquet": _read_parquet, ".tsv": _read_tsv}.get(path.suffix, _read_jsonl)
    with tqdm(desc=f"reading {path.name}", disable=not progress, mininterval=0.5) as bar:
        for number, row, languages in read(path, bar):
            yield from _texts(row, number, languages, f"--data {path}: row {number}")


def _texts(row: Mapping[str, Any], number: int, languages: Sequence[str], at: str) -> Iterator[ParallelText]:
    fact = next((row[name] for name in _IDS if name in row), None)
    if isinstance(fact, bool) or not isinstance(fact, (str, int)) or fact == "":
        raise ConfigError(f"{at}: fact_id={fact!r}; expected an id ('fact_id' or 'id').")
    split = row.get("split")
    split = None if split is None else str(split)
    if languages:
        for language in languages:
            text = row[language]
            if text is not None and not isinstance(text, str):
                raise ConfigError(f"{at}: {language}={text!r}; expected text, or nothing.")
            if text and text.strip():
                yield ParallelText(number, str(fact), _code(language, at), text, split)
        return
    for name in ("language", "text"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ConfigError(f"{at}: {name}={row.get(name)!r}; expected text.")
    yield ParallelText(number, str(fact), _code(row["language"], at), row["text"], split)


def _code(name: str, at: str) -> str:
    """The code of a language that is named by code or in English, as in training data."""
    code = language_code(name) or name
    if not _LANGUAGE.fullmatch(code):
        raise ConfigError(f"{at}: language={name!r} is not known; expected an ISO 639-1 code or an English name.")
    return code


def _language_columns(names: Sequence[str], path: Path) -> list[str]:
    """The columns of a table with one per language; empty for a table with one text in a row."""
    if "language" in names and "text" in names:
        return []
    columns = [name for name in names if name not in (*_IDS, "split")]
    for name in columns:
        if not _LANGUAGE.fullmatch(language_code(name) or name):
            raise ConfigError(
                f"--data {path}: the column {name!r} is no language code; expected fact_id, language and text (and "
                "split), or fact_id and a column per language."
            )
    if not columns:
        raise ConfigError(f"--data {path}: no columns of texts among {', '.join(names)}.")
    return columns


_Rows = Iterator[tuple[int, Mapping[str, Any], Sequence[str]]]


def _read_parquet(path: Path, bar: tqdm) -> _Rows:
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            bar.reset(total=file.metadata.num_rows)
            if long := "language" in names and "text" in names:
                languages = []
                names = [name for name in names if name in (*_IDS, "language", "text", "split")]
            else:
                languages = _language_columns(names, path)
            for batch in file.iter_batches(columns=names, batch_size=4096 if long else 512):
                for row in batch.to_pylist():
                    number += 1
                    bar.update()
                    yield number, row, languages
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--data {path}: cannot be read as parquet: {error}.") from error


def _read_jsonl(path: Path, bar: tqdm) -> _Rows:
    for number, line in _lines(path, bar):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--data {path}: row {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ConfigError(f"--data {path}: row {number} is not a JSON object.")
        yield number, row, ()


def _read_tsv(path: Path, bar: tqdm) -> _Rows:
    """Fields as they stand between tabs: no quotes, no escapes."""
    lines = _lines(path, bar)
    names = next(lines, (1, ""))[1].split("\t")
    if len(set(names)) != len(names) or not set(names) & set(_IDS):
        raise ConfigError(f"--data {path}: row 1 is {names!r}; expected the names of columns, fact_id among them.")
    languages = _language_columns(names, path)
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) != len(names):
            raise ConfigError(f"--data {path}: row {number} has {len(fields)} fields, the header {len(names)}.")
        yield number, dict(zip(names, fields)), languages


def _lines(path: Path, bar: tqdm) -> Iterator[tuple[int, str]]:
    bar.unit, bar.unit_scale = "B", True
    bar.reset(total=path.stat().st_size)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            bar.update(len(line))
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ConfigError(f"--data {path}: row {number} is not UTF-8: {error}.") from error


class FactSample:
    """At most `limit` facts: those whose hash with `seed` is smallest, so that neither their number in the file nor the
    order of its rows matters. What is dropped leaves memory at once."""

    def __init__(self, limit: int, seed: int):
        self._limit = limit
        self._seed = seed
        # Largest hash first: the next to go.
        self._heap: list[tuple[int, str]] = []
        self._texts: dict[str, dict[str, dict[str, int]]] = {}

    def add(self, text: ParallelText) -> None:
        """Take `text` if its fact is among the sample so far."""
        fact = text.fact
        if fact not in self._texts:
            place = (-derive_seed(self._seed, "fact", fact), fact)
            if len(self._heap) >= self._limit:
                if place < self._heap[0]:
                    return
                del self._texts[heapq.heappushpop(self._heap, place)[1]]
            else:
                heapq.heappush(self._heap, place)
            self._texts[fact] = {}
        wordings = self._texts[fact].setdefault(text.language, {})
        wordings[text.text] = derive_seed(self._seed, "wording", text.text)
        if len(wordings) > WORDINGS:
            del wordings[max(wordings, key=lambda wording: (wordings[wording], wording))]

    def __len__(self) -> int:
        return len(self._texts)

    def ids(self) -> set[str]:
        """The facts of the sample."""
        return set(self._texts)

    def facts(self) -> Facts:
        """The sample by language."""
        languages = sorted({language for by_language in self._texts.values() for language in by_language})
        return {
            language: {
                fact: sorted(self._texts[fact][language])
                for fact in sorted(self._texts)
                if language in self._texts[fact]
            }
            for language in languages
        }


class Wanted(NamedTuple):
    """Which facts are for the statistics, and which are held out to check them. split, check_split: values of the
    column `split`; with check_split alone, all others are for the statistics. holdout: share of the facts, by hash."""

    split: str | None = None
    check_split: str | None = None
    holdout: float = 0.0

    def place(self, text: ParallelText, seed: int) -> str | None:
        """statistics, check, or None."""
        if self.check_split is not None and text.split == self.check_split:
            return "check"
        if self.split is not None and text.split != self.split:
            return None
        if self.holdout and derive_seed(seed, "holdout", text.fact) < self.holdout * 2**64:
            return "check"
        return "statistics"


def read_facts(path: Path, wanted: Wanted, limit: int, seed: int, progress: bool = False) -> tuple[Facts, Facts]:
    """At most `limit` facts for the statistics, and as many to check them (none where `wanted` names none).

    Raises ConfigError for rows that cannot be used, for a split that is not there, and for a fact in both.
    """
    samples = {"statistics": FactSample(limit, seed), "check": FactSample(limit, seed)}
    marked = wanted.split is not None or wanted.check_split is not None
    splits: set[str] = set()
    for text in read_texts(path, progress):
        if marked and text.split is None:
            raise ConfigError(f"--data {path}: row {text.row} has no 'split'; leave --split out or mark every row.")
        if marked and len(splits) < 20:
            splits.add(str(text.split))
        place = wanted.place(text, seed)
        if place:
            samples[place].add(text)
    statistics, check = samples["statistics"], samples["check"]
    for sample, option, value in ((statistics, "split", wanted.split), (check, "check-split", wanted.check_split)):
        if not len(sample) and value is not None:
            raise ConfigError(
                f"--data {path} has no rows with split={value!r} (--{option}); it has "
                f"{', '.join(map(repr, sorted(splits))) or 'no rows'}."
            )
    if not len(statistics) or (wanted.holdout and not len(check)):
        raise ConfigError(
            f"--data {path} has too few facts: {len(statistics)} for the statistics, {len(check)} to check."
        )
    if both := statistics.ids() & check.ids():
        raise ConfigError(
            f"--data {path}: the fact {min(both)!r} is in both {wanted.split!r} and {wanted.check_split!r}; a check "
            "needs other facts than the statistics."
        )
    return statistics.facts(), check.facts()
