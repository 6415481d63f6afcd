"""r_lang: whether a response is in the language that was asked for, as a whole or sentence by sentence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nemo_lrpo.config.scoring import LanguageIdConfig
from nemo_lrpo.rewards.language import Identification, LanguageIdentifier, count_letters, prose_lines
from nemo_lrpo.rewards.language_helpers import HelpedIdentifier

_ON_ABSTAIN = {"fail": 0.0, "pass": 1.0, "mask": None}

PIECE_LETTERS = 40
"""A shorter sentence is judged together with the next one, the last with the one before: too short to identify. So a
foreign name or a short quotation belongs to the sentence around it."""
_PIECE_CHARS = 200  # a longer sentence is judged in parts
# Looked for at the start of a run of stops only, so that time stays linear in the run.
_SENTENCE_END = re.compile(
    r"""(?<![.!?…؟۔।]) [.!?…؟۔।]++ ["'”’»)\]]*+ (?=\s) | (?<![。！？｡]) [。！？｡]++ [」』”’）]*+ | \n""", re.VERBOSE
)


@dataclass(frozen=True)
class GateDecision:
    """`gate`: r_lang in [0, 1], None where the sample leaves the update. `language`: of the response as a whole, None
    where the identifier abstains, with its `confidence`. `share`: letters in the requested language over all letters in
    sentences whose language can be said, None where it was not asked for or nothing can be said."""

    gate: float | None
    language: str | None
    confidence: float
    share: float | None = None

    @property
    def abstained(self) -> bool:
        """Whether the language of the response cannot be said."""
        return self.language is None


def sentences(text: str) -> Iterator[str]:
    """The sentences of `text`, in order and without a character lost: they end at a full stop of any of the scripts or
    at a line's end (an item of a list is a sentence), and after 200 characters."""
    start = 0
    for end in (*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)):
        while end - start > _PIECE_CHARS:
            cut = text.rfind(" ", start + _PIECE_CHARS // 2, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
            yield text[start:cut]
            start = cut
        if end > start:
            yield text[start:end]
        start = end


def pieces(text: str) -> list[tuple[str, int]]:
    """Neighbouring sentences, of the same line where that is enough, joined until there are PIECE_LETTERS of them; each
    piece with its letters (count_letters). Together they are the whole of `text`."""
    lines = text.splitlines(keepends=True)
    return _joined(piece for line in lines for piece in _joined((s, count_letters(s)) for s in sentences(line)))


def _joined(parts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Each part that is too short joined to the next, the last to the one before."""
    groups: list[list[str]] = []
    letters: list[int] = []
    for part, count in parts:
        if not groups or letters[-1] >= PIECE_LETTERS:
            groups.append([])
            letters.append(0)
        groups[-1].append(part)
        letters[-1] += count
    if len(groups) > 1 and letters[-1] < PIECE_LETTERS:
        groups[-2:] = [groups[-2] + groups[-1]]
        letters[-2:] = [letters[-2] + letters[-1]]
    return [("".join(group), count) for group, count in zip(groups, letters, strict=True)]


class LanguageGate:
    """The gate that `config` describes. With gate=share and gate=soft, a(l) the letters in pieces identified as l,

        share = a(requested) / sum of a(l) over all l;

    pieces whose language cannot be said count neither way. May be shared by threads; `close` it after use."""

    def __init__(self, config: LanguageIdConfig, languages: Sequence[str]):
        self._config = config
        identifier = HelpedIdentifier if config.threads > 1 else LanguageIdentifier
        self._identifier = identifier(config, languages)

    def judge(self, responses: Sequence[str], requested: Sequence[str]) -> list[GateDecision]:
        """One decision per response, in order; `requested` are ISO 639-1 codes."""
        if self._config.gate in ("share", "soft"):
            return self._judge_shares(responses, requested)
        found = self._identifier.identify(responses)
        return [
            GateDecision(self._gate(identified.language, language), identified.language, identified.confidence)
            for identified, language in zip(found, requested, strict=True)
        ]

    def close(self) -> None:
        """End the helper processes, where there are any."""
        self._identifier.close()

    def _gate(self, identified: str | None, requested: str) -> float | None:
        if self._config.gate == "off":
            return 1.0
        if identified is None:
            return _ON_ABSTAIN[self._config.on_abstain]
        return 1.0 if identified == requested else 0.0

    def _judge_shares(self, responses: Sequence[str], requested: Sequence[str]) -> list[GateDecision]:
        texts = [prose_lines(response[: self._config.max_chars]) for response in responses]
        parts = [pieces(text) for text in texts]
        # The whole first, then its pieces where it has more than one, all in one batch.
        rows = [[text, *(piece for piece, _ in part[1:] and part)] for text, part in zip(texts, parts)]
        found = iter(self._identifier.identify_prose([text for row in rows for text in row]))
        decisions = []
        for row, part, language in zip(rows, parts, requested, strict=True):
            whole, *each = (next(found) for _ in row)
            letters: Counter[str] = Counter()
            for identified, (_, count) in zip(each, part):
                if identified.language is not None:
                    letters[identified.language] += count
            decisions.append(self._share_decision(whole, letters, language))
        return decisions

    def _share_decision(self, whole: Identification, letters: Counter[str], requested: str) -> GateDecision:
        if not letters:
            # One piece, or none that can be said alone: the whole speaks for all of it.
            if whole.language is None:
                return GateDecision(self._gate(None, requested), None, whole.confidence)
            letters = Counter({whole.language: 1})
        share = letters[requested] / letters.total()
        gate = share if self._config.gate == "soft" else float(share >= self._config.min_share)
        if whole.language is None:
            # As much in one language as in another: the one with more letters stands for the whole.
            language, count = letters.most_common(1)[0]
            whole = Identification(language, count / letters.total())
        return GateDecision(gate, whole.language, whole.confidence, share)
