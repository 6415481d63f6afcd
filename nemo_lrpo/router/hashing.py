"""A question as a vector: hashed words and character n-grams of its text and of its topics' and regions' names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.router.policy import Context

Array = NDArray[np.float64]

_SIZES = (2, 3, 4)
"""Lengths of the n-grams, in characters; a space stands at both ends of the text."""
_CHARACTERS = 2000
"""Of a text that are read."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class ContextHasher:
    """Contexts to vectors phi, float64 [C, D], by signed hashing: no vocabulary, the same on every machine.

    Blocks, one after the other, each of length 1 (or 0 where a context has nothing for it):
    0, a constant; 1, which topics, regions, pairs of both and language, an eighth of the dimensions; 2, words and
    n-grams of the topics' and regions' names, a quarter; 3, words and n-grams of the question's text, the rest.
    """

    def __init__(self, dimension: int) -> None:
        """`dimension`: D, at least 8."""
        names, text = (dimension + 7) // 8, dimension // 4
        self._widths = (1, names, text, dimension - 1 - names - text)
        self.blocks = np.repeat(np.arange(4), self._widths)

    def __call__(self, contexts: Sequence[Context]) -> Array:
        """phi of each context."""
        _, names, name_text, text = self._widths
        rows = [
            np.concatenate(
                [
                    [1.0],
                    _signed_counts(_name_hashes(context), names),
                    _text_vector(" ".join([*context.topics, *context.regions]), name_text),
                    _text_vector(context.question, text),
                ]
            )
            for context in contexts
        ]
        return np.array(rows).reshape(len(contexts), len(self.blocks))


def _name_hashes(context: Context) -> NDArray[np.uint64]:
    """uint64 [n]: one per topic, region, pair of both and language of a context."""
    pairs = [f"{topic}\t{region}" for topic in context.topics for region in context.regions]
    names = [f"t:{t}" for t in context.topics] + [f"g:{g}" for g in context.regions] + [f"p:{p}" for p in pairs]
    if context.language:
        names.append(f"l:{context.language}")
    return _hashes(names)


def _hashes(names: Sequence[str]) -> NDArray[np.uint64]:
    """uint64 [n], one per name."""
    digests = [hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _text_vector(text: str, width: int) -> Array:
    """float64 [width], of length 1: words, and with half their weight n-grams, which also serve scripts that write no
    spaces and inflected words."""
    text = text[:_CHARACTERS].casefold()
    return _unit(_signed_counts(_hashes(text.split()), width) + 0.5 * _signed_counts(_gram_hashes(text), width))


def _gram_hashes(text: str) -> NDArray[np.uint64]:
    """uint64 [n]: one per n-gram of `text`."""
    padded = f" {text} " if text else ""
    letters = np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    found = []
    for size in _SIZES:
        windows = max(len(letters) - size + 1, 0)
        value = np.full(windows, size, np.uint64)
        for offset in range(size):
            value = _mixed(value ^ letters[offset : offset + windows])
        found.append(value)
    return np.concatenate(found)


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over the whole word (multiplication wraps around)."""
    value = value * _MULTIPLIER
    return value ^ (value >> np.uint64(29))


def _signed_counts(hashes: NDArray[np.uint64], width: int) -> Array:
    """float64 [width], of length 1: the sum over hashes of a sign in a place, zeros without hashes.

    The signs make what falls into the same place cancel on average, so that products of two vectors are unbiased.
    """
    spread = _mixed(_mixed(hashes))
    place = (spread >> np.uint64(33)) % np.uint64(max(width, 1))
    sign = np.where(spread & np.uint64(1 << 20), 1.0, -1.0)
    return _unit(np.bincount(place.astype(np.int64), sign, width))


def _unit(vector: Array) -> Array:
    return vector / max(float(np.sqrt(vector @ vector)), 1e-12)
