"""Counter-based randomness: a uniform per slot is a function of (seed, question id, step, slot) and nothing else.

It needs no state, so it is the same on every rank, in any order of the batch and after every resume.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.seeding import derive_seed

_GAMMA = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def run_key(seed: int) -> bytes:
    """8 bytes that stand for the run's seed."""
    return derive_seed("router", seed).to_bytes(8, "little")


def question_key(run: bytes, question_id: str) -> int:
    """64 bits (BLAKE2b) that stand for a question in every step of the run."""
    digest = blake2b(question_id.encode("utf-8", "surrogatepass"), digest_size=8, key=run).digest()
    return int.from_bytes(digest, "little")


def finalised(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: a bijection of 64 bits in which every input bit moves every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def slot_uniforms(
    keys: NDArray[np.uint64], step: int, group: NDArray[np.integer], slot: NDArray[np.integer]
) -> NDArray[np.float64]:
    """float64 [R] in [0, 1): one for each row's slot. keys: uint64 [N] by question_key; group (into keys), slot: [R].

    u = finalised(finalised(key + (step + 1) gamma) + (slot + 1) gamma) >> 11, over 2^53; gamma is splitmix64's.
    """
    streams = finalised(keys + np.uint64((step + 1) * _GAMMA & _WORD))
    words = finalised(streams[group] + (slot.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA))
    # The upper 53 bits fill a double's mantissa.
    return (words >> np.uint64(11)) * 2.0**-53
