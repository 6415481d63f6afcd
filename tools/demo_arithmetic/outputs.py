"""The world as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_lrpo.config.explang import MarksConfig
from tools.demo_world.facts import REASONING
from tools.demo_world.outputs import QUESTION_SCHEMA

from .corpus import teacher_replies
from .problems import SPLITS, Problem
from .wording import ASKED, answer, question


def question_row(problem: Problem, language: str) -> dict[str, object]:
    """One question in verl's layout; the reference is the value in digits."""
    text = question(problem, language)
    return {
        "data_source": "demo_arithmetic",
        "prompt": [{"role": "user", "content": text}],
        "question": text,
        "answer": answer(problem.value, language),
        "reward_model": {"ground_truth": str(problem.value), "style": "rule"},
        "ability": [REASONING],
        "extra_info": {
            "id": f"{problem.problem_id}/{language}",
            "fact_id": problem.problem_id,
            "language": language,
            "region": [],
            "relation": "arithmetic",
            "split": problem.split,
        },
    }


def write_questions(every: Iterable[Problem], out: Path) -> dict[str, int]:
    """train.parquet, validation.parquet and test.parquet in `out`, each problem in all languages of ASKED; rows by
    file name. Raises OSError."""
    counts = {}
    every = list(every)
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = [question_row(problem, language) for problem in every if problem.split == split for language in ASKED]
        name = f"{split}.parquet"
        partial = out / f".{name}.part"
        pq.write_table(pa.Table.from_pylist(rows, schema=QUESTION_SCHEMA), partial, compression="zstd")
        partial.replace(out / name)
        counts[name] = len(rows)
    return counts


def write_replies(asked: Sequence[Problem], path: Path, marks: MarksConfig, seed: int) -> int:
    """`teacher_replies` as JSONL; the number of rows."""
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in teacher_replies(asked, marks, seed)]
    partial = path.with_name(f".{path.name}.part")
    partial.write_text("".join(rows), encoding="utf-8", newline="\n")
    partial.replace(path)
    return len(rows)
