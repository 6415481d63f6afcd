"""Cosines of equivalent texts, of mismatched ones and of the hardest negatives, by pair of languages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.rewards.statistics import KINDS, Moments, Pair, moments
from nemo_lrpo.seeding import derive_seed

from .reading import Facts

Encode = Callable[[Sequence[str], str], NDArray[np.float32]]
"""(distinct texts, role: reference or response) -> [N, D], rows of length 1."""

CHECK_NEGATIVES = 400
"""Facts of a pair whose negatives are measured in a check; of all languages together they are many."""

_BLOCK = 512
_TRIES = 16


@dataclass(frozen=True)
class Language:
    """The encoded texts of one language, T of them. rows: fact id -> its texts. text: int64 [T], equal for equal texts.
    references, responses: float32 [T, D], one and the same array where the roles have equal prompts."""

    rows: Mapping[str, Sequence[int]]
    text: NDArray[np.int64]
    references: NDArray[np.float32]
    responses: NDArray[np.float32]


def encode_facts(facts: Facts, encode: Encode, two_roles: bool) -> dict[str, Language]:
    """`facts` by language; each distinct text goes to `encode` once, or once a role with `two_roles`."""
    distinct: dict[str, int] = {}
    for by_fact in facts.values():
        for texts in by_fact.values():
            for text in texts:
                distinct.setdefault(text, len(distinct))
    references = encode(list(distinct), "reference")
    responses = encode(list(distinct), "response") if two_roles else references
    languages = {}
    for language, by_fact in facts.items():
        rows: dict[str, list[int]] = {}
        ids: list[int] = []
        for fact, texts in by_fact.items():
            rows[fact] = list(range(len(ids), len(ids) + len(texts)))
            ids += [distinct[text] for text in texts]
        left = references[ids]
        languages[language] = Language(rows, np.array(ids), left, responses[ids] if two_roles else left)
    return languages


@dataclass(frozen=True)
class Cosines:
    """Of references in one language and responses in another, a fact each: float64 [N] for equivalents, [M] for the
    negatives of the first M facts, NaN where a fact has none. `identical`: the responses are the references."""

    equivalent: NDArray[np.float64]
    mismatch: NDArray[np.float64]
    hardest: NDArray[np.float64]
    identical: bool = False

    def kind(self, name: str) -> NDArray[np.float64]:
        """The finite cosines of one of KINDS."""
        values = getattr(self, name)
        return values[np.isfinite(values)]


def compare(
    left: Language,
    right: Language,
    facts: Sequence[str],
    rng: np.random.Generator,
    identical: bool = True,
    negatives: int | None = None,
) -> Cosines | None:
    """References in `left` against responses in `right`, a comparison per fact of `facts`, which both have; negatives
    of the first `negatives` facts, by default of all.

    Where left is right, two wordings of a fact; if no fact has two, the text itself, or None without `identical`.
    mismatch: a text of another fact, drawn at random; hardest: the most similar one. Neither says what the fact does.
    """
    same = left is right
    twice = [fact for fact in facts if same and len(left.rows[fact]) > 1]
    itself = same and not twice
    if same and not itself:
        facts = twice
    if not facts or (itself and not identical):
        return None
    draws = rng.random((len(facts), 2))
    ones = np.array([left.rows[fact][int(draw * len(left.rows[fact]))] for fact, draw in zip(facts, draws[:, 0])])
    others = ones
    if not itself:
        choices = [[row for row in right.rows[fact] if not same or row != one] for fact, one in zip(facts, ones)]
        others = np.array([rows[int(draw * len(rows))] for rows, draw in zip(choices, draws[:, 1])])
    vectors = left.references[ones]
    equivalent = _cosines(vectors, right.responses[others])

    facts, vectors = facts[:negatives], vectors[:negatives]
    own = [{int(right.text[row]) for row in right.rows[fact]} for fact in facts]
    drawn = rng.integers(len(right.text), size=(len(facts), _TRIES))
    picks = [next((row for row in rows if int(right.text[row]) not in mine), -1) for rows, mine in zip(drawn, own)]
    random = np.array(picks)
    mismatch = _cosines(vectors, right.responses[random])
    mismatch[random < 0] = np.nan
    return Cosines(equivalent, mismatch, _hardest(vectors, right, own), itself)


def _cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.clip(np.einsum("nd,nd->n", left.astype(np.float64), right.astype(np.float64)), -1.0, 1.0)


def _hardest(vectors: NDArray[np.float32], right: Language, own: Sequence[set[int]]) -> NDArray[np.float64]:
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, text in enumerate(right.text.tolist()):
        rows_of[text].append(row)
    best = np.empty(len(vectors))
    for start in range(0, len(vectors), _BLOCK):
        cosines = vectors[start : start + _BLOCK] @ right.responses.T
        for i, mine in enumerate(own[start : start + _BLOCK]):
            cosines[i, [row for text in mine for row in rows_of[text]]] = -np.inf
        best[start : start + _BLOCK] = cosines.max(axis=1)
    return np.where(np.isneginf(best), np.nan, np.clip(best, -1.0, 1.0))


def _shared(languages: Mapping[str, Language], a: str, b: str, rng: np.random.Generator) -> list[str]:
    """The facts of both languages, in random order."""
    facts = [fact for fact in languages[a].rows if fact in languages[b].rows]
    return [facts[i] for i in rng.permutation(len(facts))]


def measure(
    languages: Mapping[str, Language], seed: int, identical: bool = True, progress: bool = False
) -> tuple[dict[str, dict[Pair, Moments]], list[str]]:
    """Statistics by kind and unordered pair, and the languages whose texts were compared with themselves.

    Every fact that a pair shares is compared once; one half with the reference in the one language, one half in the
    other. Raises ConfigError where no two languages share a fact.
    """
    found: dict[str, dict[Pair, Moments]] = {kind: {} for kind in KINDS}
    themselves: list[str] = []
    pairs = list(combinations_with_replacement(languages, 2))
    for a, b in tqdm(pairs, desc="pairs of languages", disable=not progress, mininterval=0.5):
        rng = np.random.default_rng(derive_seed(seed, "calibrate", a, b))
        facts = _shared(languages, a, b, rng)
        half = len(facts) if a == b else (len(facts) + 1) // 2
        there = compare(languages[a], languages[b], facts[:half], rng, identical)
        back = compare(languages[b], languages[a], facts[half:], rng, identical)
        sides = [side for side in (there, back) if side is not None]
        for kind in KINDS if sides else ():
            cosines = np.concatenate([side.kind(kind) for side in sides])
            if cosines.size:
                found[kind][a, b] = moments(cosines)
        if any(side.identical for side in sides):
            themselves.append(a)
    if not any(a != b for a, b in found["equivalent"]):
        raise ConfigError(
            f"--data: no fact is there in two languages (languages: {', '.join(languages)}); the texts of one fact_id "
            "must be translations of each other."
        )
    return found, themselves


def compare_all(
    languages: Mapping[str, Language], seed: int, identical: bool = True, progress: bool = False
) -> dict[Pair, Cosines]:
    """Every fact by (reference language, response language), and negatives of CHECK_NEGATIVES facts drawn for each."""
    found = {}
    pairs = list(product(languages, repeat=2))
    for a, b in tqdm(pairs, desc="check", disable=not progress, mininterval=0.5):
        rng = np.random.default_rng(derive_seed(seed, "check", a, b))
        cosines = compare(languages[a], languages[b], _shared(languages, a, b, rng), rng, identical, CHECK_NEGATIVES)
        if cosines is not None:
            found[a, b] = cosines
    return found
