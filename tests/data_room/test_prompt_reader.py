"""Good rows become prompts; each kind of bad row is refused by file, row and field."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.reader import contexts, read_prompts
from nemo_lrpo.types import Prompt

LANGUAGES = ("de", "en", "ja")


def row(number: int, **extra: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"Frage {number}?\n<placeholder>"}],
        "question": f"Frage {number}?",
        "answer": f"Antwort {number}.",
        "reward_model": {"style": "similarity", "ground_truth": f"Die Antwort ist {number}."},
        "ability": "General Knowledge",
        "extra_info": {"id": f"q{number}", "language": "de", "region": None, "split": "train", **extra},
    }


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def edited(field: str, value: Any) -> dict[str, Any]:
    """A good row with one (dotted) field set, or taken out where value is `...`."""
    bad = copy.deepcopy(row(1))
    target, *path = bad, *field.split(".")
    for name in path[:-1]:
        target = target[name]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return bad


@pytest.mark.parametrize(("write", "suffix"), [(write_jsonl, "jsonl"), (write_parquet, "parquet")])
def test_rows_become_prompts(tmp_path: Path, write: Callable[..., Path], suffix: str) -> None:
    several = row(2, region=["Europe", "Central Asia"], language="Japanese", reference_language="en")
    several["ability"] = ["Regional Knowledge", "General Knowledge"]
    one = row(1, region=["Europe"], fixed_language="GERMAN")
    one["ability"] = ["Translation"]
    prompts = read_prompts(write(tmp_path / f"data.{suffix}", [one, several]), LANGUAGES)
    assert prompts == [
        Prompt("q1", "Frage 1?", "Die Antwort ist 1.", "de", "de", ("Translation",), ("Europe",), "de"),
        Prompt(
            "q2",
            "Frage 2?",
            "Die Antwort ist 2.",
            "ja",
            "en",
            ("Regional Knowledge", "General Knowledge"),
            ("Europe", "Central Asia"),
        ),
    ]
    assert contexts(prompts) == (
        ("General Knowledge", "Regional Knowledge", "Translation"),
        ("Central Asia", "Europe"),
    )


def test_single_names_need_no_list(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write_parquet(tmp_path / "a.parquet", [row(1, region="Europe")]), LANGUAGES)
    assert (prompt.topics, prompt.regions) == (("General Knowledge",), ("Europe",))


def test_answer_is_the_reference_without_ground_truth(tmp_path: Path) -> None:
    bare = edited("reward_model", ...)
    (prompt,) = read_prompts(write_jsonl(tmp_path / "a.jsonl", [bare]), LANGUAGES)
    assert prompt.reference == "Antwort 1."


def test_ids_from_index_or_content(tmp_path: Path) -> None:
    """Without an id the index serves; without both, equal question and language give an equal id."""
    by_index = edited("extra_info", {"language": "de", "index": 7})
    by_content = edited("extra_info", {"language": "de"})
    other_language = edited("extra_info", {"language": "en"})
    first = read_prompts(write_jsonl(tmp_path / "a.jsonl", [by_index, by_content, other_language]), LANGUAGES)
    again = read_prompts(write_jsonl(tmp_path / "b.jsonl", [other_language, by_content]), LANGUAGES)
    assert first[0].question_id == "7"
    assert first[1].question_id == again[1].question_id != first[2].question_id == again[0].question_id
    # The recorded value: an id must not change from one version or machine to the next.
    assert first[1].question_id == "da1af29d2da674bf1fa49ae0"


def test_directory_is_read_by_file_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", [row(2), row(3)])
    write_parquet(tmp_path / "a.parquet", [row(1)])
    assert [prompt.question_id for prompt in read_prompts(tmp_path, LANGUAGES)] == ["q1", "q2", "q3"]


BAD_ROWS = [
    ("question", ..., "required"),
    ("question", "  \n", "empty"),
    ("question", 3, "a whole number; accepted: text"),
    ("question", "Was\ud800?", "lone surrogate"),
    ("reward_model.ground_truth", "", "empty"),
    ("reward_model", "Die Antwort.", "is text; accepted: an object"),
    ("ability", ..., "required"),
    ("ability", [], "at least one topic"),
    ("ability", "Astrology", "'Astrology' is not a known topic; accepted: General Knowledge"),
    ("ability", ["General Knowledge"] * 2, "twice"),
    ("ability", {"topic": "General Knowledge"}, "is an object; accepted: text or a list"),
    ("extra_info", ..., "required"),
    ("extra_info.language", ..., "required"),
    ("extra_info.language", "de-DE", "'de-DE' is not a known language; accepted: de, en, ja"),
    ("extra_info.language", "Germany", "'Germany' is not a known language"),
    ("extra_info.language", "French", "'French' is not among data.languages; accepted: de, en, ja"),
    ("extra_info.reference_language", "xx", "'xx' is not a known language"),
    ("extra_info.fixed_language", ["de"], "is a list; accepted: an ISO 639-1 code"),
    ("extra_info.region", 4, "accepted: text or a list of texts"),
    ("extra_info.region", ["Europe", None], "is null"),
    ("extra_info.id", 1.5, "a decimal number; accepted: text or a whole number"),
    ("extra_info.id", True, "true or false; accepted"),
    ("extra_info.id", "q0", "occurred before"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_ROWS)
def test_bad_row_is_refused_by_file_line_and_field(tmp_path: Path, field: str, value: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [row(0), row(2), edited(field, value), row(3)])
    with pytest.raises(DataError) as refused:
        read_prompts(path, LANGUAGES, topics=("General Knowledge",))
    named = "extra_info" if field == "extra_info" else field
    assert str(refused.value).startswith(f"{path}, line 3: {named}")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value", "message"), [case for case in BAD_ROWS if case[1] in ("  \n", "de-DE", "q0")]
)
def test_bad_parquet_row_is_counted_from_zero_across_batches(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    rows = [row(number) for number in [0, *range(10, 5010)]]
    rows.insert(4500, edited(field, value))
    path = write_parquet(tmp_path / "bad.parquet", rows)
    with pytest.raises(DataError) as refused:
        read_prompts(path, LANGUAGES)
    assert str(refused.value).startswith(f"{path}, row 4500: {field}")
    assert message in str(refused.value)


def test_missing_reference_names_both_places(tmp_path: Path) -> None:
    bad = edited("reward_model.ground_truth", None)
    del bad["answer"]
    with pytest.raises(DataError, match=r"line 1: reward_model.ground_truth is missing, and so is answer"):
        read_prompts(write_jsonl(tmp_path / "a.jsonl", [bad]), LANGUAGES)


def test_duplicate_names_the_first_occurrence(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [row(1), row(2)])
    write_parquet(tmp_path / "b.parquet", [row(3), row(2)])
    with pytest.raises(DataError) as refused:
        read_prompts(tmp_path, LANGUAGES)
    assert f"{tmp_path / 'b.parquet'}, row 1: extra_info.id='q2' occurred before" in str(refused.value)
    assert f"in {tmp_path / 'a.parquet'}, row 1;" in str(refused.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["question"]', "is a list; accepted: one JSON object a line"),
        (b'{"question": "W\xe4hrung"}', "not valid UTF-8"),
    ],
)
def test_broken_json_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row(1)])
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as refused:
        read_prompts(path, LANGUAGES)
    assert f"{path}, line 3: {message}" in str(refused.value)


def test_invalid_utf8_in_parquet(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row(1), row(2)])
    broken = pa.array([b"gut?", b"W\xe4hrung?"]).view(pa.string())
    path = tmp_path / "a.parquet"
    pq.write_table(table.set_column(table.column_names.index("question"), "question", broken), path)
    with pytest.raises(DataError) as refused:
        read_prompts(path, LANGUAGES)
    assert f"{path}, row 1: question is not valid UTF-8" in str(refused.value)


def test_missing_column_lists_what_is_there(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "x", "question": "y"}])
    with pytest.raises(DataError, match=r"column 'ability' is missing; required: .* It has: text, question"):
        read_prompts(path, LANGUAGES)


def test_unusable_sources(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.parquet"
    garbage.write_bytes(b"not parquet at all")
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("question\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    for path, message in [
        (garbage, "not a readable parquet file"),
        (tmp_path / "empty", "no .parquet file"),
        (tmp_path / "table.csv", "accepted: .parquet, .jsonl"),
        (tmp_path / "empty.jsonl", "no rows"),
        (tmp_path / "absent.parquet", "no such file"),
    ]:
        with pytest.raises(DataError) as refused:
            read_prompts(path, LANGUAGES)
        assert str(path) in str(refused.value) and message in str(refused.value)


def test_unknown_candidate_language(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.languages: 'xx' is not known; accepted: am, ar"):
        read_prompts(write_jsonl(tmp_path / "a.jsonl", [row(1)]), ("de", "xx"))
