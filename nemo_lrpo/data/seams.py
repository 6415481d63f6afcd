"""Where a text may be cut so that its halves, tokenised apart, are the tokens of the whole.

A fast tokenizer (Hugging Face `tokenizers`) first takes the added tokens out of a text, leftmost and longest first,
normalises and splits each stretch between them into words, and only then merges inside each word. Two places are sure,
whatever stands around them:

- **before an added token** that takes no white space from its left and that no other added token can overlap: what
  stands before and after it are different stretches;
- **between a line feed and "<"**, where the words are found by one regular expression made of known alternatives
  (byte-level BPE of GPT-2, Llama 3, Qwen, o200k). None of them matches a text with "\\n<" in it, none looks back, and
  none looks further ahead than one character behind its match, so that a word ends there, the words before it depend
  on nothing after the "<", and the words after it on nothing before.

Everywhere else (SentencePiece, which merges a line feed with what follows, unknown expressions, normalisers that see
their surroundings) no promise is made.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_WORD_ALTERNATIVES = (
    # GPT-2
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    r" ?\p{L}+",
    r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+",
    r"\s+(?!\S)",
    r"\s+",
    # Llama 3, Qwen
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    # o200k
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    # the demo's tokenizer
    r" ?[\p{L}\p{M}]{1,12}",
    r" ?\p{N}",
    r" ?[^\s\p{L}\p{M}\p{N}]+",
)
"""None matches a text with "\\n<" in it, looks back, or looks further than one character ahead."""

_ALL_WHITE_SPACE = r"\s+"
"""The alternative without which a line feed might be in no word."""


def split_tokens(backend: Tokenizer) -> frozenset[str]:
    """The added tokens before which any text can be cut."""
    added = list(backend.get_added_tokens_decoder().values())
    if backend.encode_special_tokens or any(token.single_word for token in added):
        return frozenset()
    normalises = backend.normalizer is not None
    return frozenset(token.content for token in added if _splits(token, added, normalises))


def _splits(token: AddedToken, added: list[AddedToken], normalises: bool) -> bool:
    longer = [other for other in added if other.content.startswith(token.content)]
    if not token.content or token.content[0].isspace() or any(other.lstrip for other in longer):
        return False
    if any(_straddles(other.content, token.content) for other in added):
        return False
    if not token.normalized:
        return True
    # Such a token is looked for in what the others leave, after normalising: neither may take it apart.
    return not normalises and not any(_straddles(token.content, other.content) for other in added)


def _straddles(first: str, second: str) -> bool:
    """Whether a text that has `second` somewhere can have `first` begin before it and end inside it or after it."""
    tails = (first[i:] for i in range(1, len(first)))
    return any(second.startswith(tail) or tail.startswith(second) for tail in tails)


def splits_at_line_end(backend: Tokenizer) -> bool:
    """Whether any text can be cut between a line feed and a "<" with which no added token begins."""
    description = json.loads(backend.to_str())
    added = backend.get_added_tokens_decoder().values()
    return (
        _keeps_line_ends(description["normalizer"])
        and _is_known_split(description["pre_tokenizer"])
        and not any("\n<" in token.content or token.single_word for token in added)
    )


def _keeps_line_ends(normaliser: dict[str, Any] | None) -> bool:
    """Whether text is normalised alike on its own and beside a line feed or "<"."""
    return normaliser is None or normaliser["type"] in ("NFC", "NFD")


def _is_known_split(splitter: dict[str, Any] | None) -> bool:
    """Whether words are found by one expression of known alternatives, and then written as bytes."""
    if splitter is None:
        return False
    if splitter["type"] == "ByteLevel":
        return splitter["use_regex"] and not splitter["add_prefix_space"]
    if splitter["type"] != "Sequence" or len(splitter["pretokenizers"]) != 2:
        return False
    words, as_bytes = splitter["pretokenizers"]
    return (
        words["type"] == "Split"
        and (words["behavior"], words["invert"]) in (("Isolated", False), ("Removed", True))
        and _is_alternation(words["pattern"].get("Regex", ""))
        and as_bytes["type"] == "ByteLevel"
        and not (as_bytes["use_regex"] or as_bytes["add_prefix_space"])
    )


def _is_alternation(pattern: str) -> bool:
    """Whether `pattern` is `a|b|...` of known alternatives, one of which takes any white space."""
    found, rest = set(), pattern + "|"
    while rest:
        known = next((one for one in _WORD_ALTERNATIVES if rest.startswith(f"{one}|")), None)
        if known is None:
            return False
        found.add(known)
        rest = rest[len(known) + 1 :]
    return _ALL_WHITE_SPACE in found
