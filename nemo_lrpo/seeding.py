"""Randomness as a function of what it is for: (seed, step, question id, slot) and nothing else."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 64-bit integer that depends on all `parts`, their order and their types.

    The same on every rank, after every resume and on every platform (BLAKE2b over an unambiguous encoding).
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(f"{type(part).__name__}:{len(data)}:".encode())
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")
