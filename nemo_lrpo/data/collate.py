"""Rows of different length as one rectangular array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, multiple_of: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`rows` left-aligned and filled up with `pad_id`.

    Returns (int64 [B, S], lengths int64 [B]); S is the longest row, rounded up to a multiple of `multiple_of`. Raises
    ValueError for multiple_of < 1.
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of={multiple_of}; it must be >= 1.")
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    width = -(-longest // multiple_of) * multiple_of
    padded = np.full((len(rows), width), pad_id, dtype=np.int64)
    for target, row in zip(padded, rows):
        target[: len(row)] = row
    return padded, lengths
