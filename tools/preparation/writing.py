"""What is written: the training layout, split by language and topic, and the data card."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_lrpo.seeding import derive_seed
from tools.preparation.sources import Example

_TEXT = pa.string()
SCHEMA = pa.schema(
    {
        "data_source": _TEXT,
        "prompt": pa.list_(pa.struct({"role": _TEXT, "content": _TEXT})),
        "question": _TEXT,
        "answer": _TEXT,
        "ability": _TEXT,
        "reward_model": pa.struct({"ground_truth": _TEXT, "style": _TEXT}),
        "extra_info": pa.struct(
            {
                "id": _TEXT,
                "split": _TEXT,
                "language": _TEXT,
                "reference_language": _TEXT,
                "region": _TEXT,
                "where": _TEXT,
            }
        ),
    }
)
_ROWS_AT_ONCE = 4096


def example_id(example: Example) -> str:
    """The same for the same question in the same language, wherever it is read from."""
    digest = hashlib.blake2b(f"{example.language}:{example.question}".encode("utf-8", "replace"), digest_size=12)
    return digest.hexdigest()


def stratified(examples: Sequence[Example], share: float, seed: int) -> list[bool]:
    """Which examples are set aside: `share` of them in all, of each language and topic as nearly as whole numbers
    allow (largest remainders). A function of (seed, question) alone within a stratum."""
    strata: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, example in enumerate(examples):
        strata[example.language, example.topic or ""].append(number)
    wanted = {key: share * len(numbers) for key, numbers in strata.items()}
    taken = {key: math.floor(count) for key, count in wanted.items()}
    missing = round(share * len(examples)) - sum(taken.values())
    for key in sorted(wanted, key=lambda key: (taken[key] - wanted[key], key))[: max(missing, 0)]:
        taken[key] += 1
    aside = [False] * len(examples)
    for key, numbers in strata.items():
        drawn = sorted(numbers, key=lambda number: derive_seed("split", seed, example_id(examples[number])))
        for number in drawn[: taken[key]]:
            aside[number] = True
    return aside


def write_split(path: Path, examples: Iterable[Example], split: str) -> int:
    """The number of rows written; the file is there whole, or as it was."""
    partial = path.with_name(path.name + ".partial")
    count = 0
    with pq.ParquetWriter(partial, SCHEMA) as writer:
        rows: list[dict[str, object]] = []
        for example in examples:
            rows.append(_row(example, split))
            count += 1
            if len(rows) == _ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    partial.replace(path)
    return count


def _row(example: Example, split: str) -> dict[str, object]:
    return {
        "data_source": example.source,
        "prompt": [{"role": "user", "content": example.question}],
        "question": example.question,
        "answer": example.reference,
        "ability": example.topic,
        "reward_model": {"ground_truth": example.reference, "style": "model"},
        "extra_info": {
            "id": example_id(example),
            "split": split,
            "language": example.language,
            "reference_language": example.reference_language,
            "region": example.region,
            "where": example.where,
        },
    }


@dataclass
class Card:
    """What the data card says."""

    command: str
    read: Counter[str] = field(default_factory=Counter)
    """Rows by source."""
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By source and reason."""
    splits: dict[str, list[Example]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Markdown."""
        sources = sorted(self.read)
        everything = [example for examples in self.splits.values() for example in examples]
        lines = ["# Data card", "", f"Written by `{self.command}`.", ""]
        lines += _table(("setting", "value"), sorted(self.settings.items()))
        rows = []
        for source in sources:
            kept = sum(example.source == source for example in everything)
            rows.append((source, self.read[source], self.read[source] - kept, kept))
        rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
        lines += ["## Rows", "", *_table(("source", "read", "rejected", "kept"), rows)]
        reasons = sorted(self.rejected.items(), key=lambda one: -one[1])
        lines += ["## Rejected", "", *_table(("source", "reason", "rows"), [(*key, n) for key, n in reasons])]
        for title, key in (("Languages", "language"), ("Topics", "topic"), ("Regions", "region")):
            lines += [f"## {title}", "", *self._counts(key, everything)]
        lines += ["## Languages by topic", "", *_crossed(everything)]
        lines += ["## Lengths", "", *_lengths(self.splits)]
        return "\n".join(lines)

    def _counts(self, key: str, everything: Sequence[Example]) -> list[str]:
        total = Counter(getattr(example, key) or "(none)" for example in everything)
        by_split = {
            split: Counter(getattr(example, key) or "(none)" for example in examples)
            for split, examples in self.splits.items()
        }
        rows = [
            (
                name,
                *(by_split[split][name] for split in by_split),
                count,
                f"{100 * count / max(len(everything), 1):.1f} %",
            )
            for name, count in total.most_common()
        ]
        return _table((key, *by_split, "all", "share"), rows)


def _crossed(examples: Sequence[Example]) -> list[str]:
    topics = sorted({example.topic or "" for example in examples})
    count = Counter((example.language, example.topic or "") for example in examples)
    languages = sorted({example.language for example in examples})
    return _table(("language", *topics), [(x, *(count[x, topic] for topic in topics)) for x in languages])


def _lengths(splits: Mapping[str, Sequence[Example]]) -> list[str]:
    rows = []
    for split, examples in splits.items():
        for name in ("question", "reference"):
            lengths = sorted(len(getattr(example, name)) for example in examples)
            if lengths:
                rows.append(
                    (split, name, lengths[len(lengths) // 2], lengths[(len(lengths) - 1) * 95 // 100], lengths[-1])
                )
    return _table(("split", "characters of", "median", "95 %", "longest"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows), ""]
