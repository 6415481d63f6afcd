"""The world as files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .examples import base_records
from .facts import KNOWN, SPLITS, Fact
from .languages import LANGUAGES
from .parallel import parallel_texts

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
QUESTION_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(_MESSAGE)),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("ability", pa.list_(pa.string())),
        (
            "extra_info",
            pa.struct(
                [
                    ("id", pa.string()),
                    ("fact_id", pa.string()),
                    ("language", pa.string()),
                    ("region", pa.list_(pa.string())),
                    ("relation", pa.string()),
                    ("split", pa.string()),
                ]
            ),
        ),
    ]
)
PARALLEL_SCHEMA = pa.schema([(name, pa.string()) for name in ("fact_id", "language", "text", "kind", "split")])


def question_row(fact: Fact, language: str) -> dict[str, object]:
    """One question in one language, in verl's layout; `ability` and `region` are lists (`region` maybe empty)."""
    question, answer = fact.question(language), fact.answer(language)
    return {
        "data_source": "demo_world",
        "prompt": [{"role": "user", "content": question}],
        "question": question,
        "answer": answer,
        "reward_model": {"ground_truth": answer, "style": "reference"},
        "ability": list(fact.topics),
        "extra_info": {
            "id": f"{fact.fact_id}/{language}",
            "fact_id": fact.fact_id,
            "language": language,
            "region": list(fact.regions),
            "relation": fact.relation,
            "split": fact.split,
        },
    }


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Nobody ever sees half a file: it gets its name when it is complete."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _parquet(rows: Iterable[dict[str, object]], schema: pa.Schema) -> Callable[[Path], None]:
    table = pa.Table.from_pylist(list(rows), schema=schema)
    return lambda path: pq.write_table(table, path, compression="zstd")


def _jsonl(rows: Iterable[dict[str, object]]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    return write


def write_world(facts: Iterable[Fact], out: Path, seed: int = 0, **noise: float) -> dict[str, int]:
    """Write the five tables to `out`, and knowledge.json: by topic or region, the languages that know its facts.

    Returns the rows by file name of the tables. Equal arguments give equal bytes.

    `noise` goes to `base_records`. Raises OSError where `out` cannot be written.
    """
    facts = list(facts)
    # All rows exist before the first file does, so that a wrong argument leaves nothing behind.
    files: dict[str, tuple[list[dict[str, object]], pa.Schema | None]] = {}
    for split in SPLITS:
        questions = [question_row(fact, language) for fact in facts if fact.split == split for language in LANGUAGES]
        files[f"{split}.parquet"] = (questions, QUESTION_SCHEMA)
    files["parallel.parquet"] = ([asdict(text) for text in parallel_texts(facts, seed)], PARALLEL_SCHEMA)
    files["base_corpus.jsonl"] = ([asdict(record) for record in base_records(facts, seed, epoch=0, **noise)], None)
    out.mkdir(parents=True, exist_ok=True)
    for name, (rows, schema) in files.items():
        _write_whole(out / name, _jsonl(rows) if schema is None else _parquet(rows, schema))
    _write_whole(out / "knowledge.json", lambda path: path.write_text(json.dumps(KNOWN, indent=1) + "\n"))
    return {name: len(rows) for name, (rows, _) in files.items()}
