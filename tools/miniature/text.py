"""Results as Markdown: rows, means with intervals, and the block of a README that holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tools.miniature.kept import ResultsError
from tools.miniature.statistics import Estimate


def row(cells: Sequence[str]) -> str:
    """Of a table."""
    return "| " + " | ".join(cells) + " |"


def head(headings: Sequence[str]) -> list[str]:
    """The two first lines of a table: names at the left, numbers at the right."""
    return [row(headings), row(["---", *["---:"] * (len(headings) - 1)])]


def plus_minus(found: Estimate, digits: int, sign: str = "") -> str:
    """A mean with half of its interval; sign "+": of a difference."""
    return f"{found.mean:{sign}.{digits}f}" + ("" if math.isnan(found.half) else f" ±{found.half:.{digits}f}")


def marks(name: str) -> tuple[str, str]:
    """What stands before and after the block `name`."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def write_block(path: Path, name: str, body: str) -> None:
    """Replace what stands between the marks of `name`. Raises ResultsError without them."""
    opening, closing = marks(name)
    before, begin, rest = path.read_text(encoding="utf-8").partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end:
        raise ResultsError(f"{path}: has no block to write to; put {opening} and {closing} where it should stand.")
    write_whole(path, f"{before}{opening}\n{body}\n{closing}{after}")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there with all of `text`, or as it was."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
