"""Prompts in two halves, one of the question and one of the language, each tokenised once.

A prompt in language l is question half + language half (style `tag`, the request comes last) or language half +
question half (style `system`). What a half is follows from the template's formula, where the two may be parted from the
tokenizer's seams; both are proofs, so that a prompt put together has the very ids of the prompt tokenised in full.
Besides, each language is compared with full tokenisation once. Where a proof does not reach, the prompt is tokenised in
full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.data.chat_template import QUESTION, REQUEST, Formula, Parts, fields, fill
from nemo_lrpo.data.seams import split_tokens, splits_at_line_end
from nemo_lrpo.types import pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = tuple[int, ...]

_REQUEST_CHARACTER = "<"
"""With it begins a request that is no added token; question halves are tokenised in front of it."""


@dataclass(frozen=True)
class LanguageHalf:
    """The half that only the language decides. `before`: what the question half is tokenised in front of, so that its
    last word ends as in the whole prompt."""

    ids: TokenIds
    before: str


class PromptHalves:
    """The halves of a formula's prompts under a tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        formula: Formula | None,
        request: Callable[[str], str],
        example: str,
        cached_tokens: int,
    ) -> None:
        """`formula`: None where the template has none; nothing is in halves then. `request(language)`: what asks for a
        language. `example`: the question that every language is compared with full tokenisation on. `cached_tokens`:
        bound of the tokens kept of question halves."""
        self._tokenizer = tokenizer
        self._formula = formula
        self._request = request
        self._example = example
        # Slow tokenizers have none.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._split_tokens: frozenset[str] = frozenset()
        self._request_character_ids: TokenIds = ()
        self._question_parts: Parts = ()
        self._language_parts: Parts = ()
        self._question_first = True
        self._possible = False
        self._languages: dict[str, LanguageHalf | None] = {}
        self._questions = TokenStore(cached_tokens)
        if formula is not None and self._backend is not None and not tokenizer.split_special_tokens:
            self._split_tokens = split_tokens(self._backend)
            self._request_character_ids = self._ids_at_line_end()
            self._possible = self._part(formula.parts)

    def join(self, questions: Sequence[str], languages: Sequence[str]) -> list[bytes | None]:
        """The packed ids of each prompt, `questions[i]` in `languages[i]`; None where it is to be tokenised in full."""
        halves = {language: self.language(language) for language in dict.fromkeys(languages)}
        before = {language: None if half is None else half.before for language, half in halves.items()}
        places = set(before.values())
        packed: dict[str, dict[str, bytes | None]] = {}
        for place in places - {None}:
            asked = questions if len(places) == 1 else [q for q, x in zip(questions, languages) if before[x] == place]
            packed[place] = {
                question: None if ids is None else ids.tobytes()
                for question, ids in self.questions(dict.fromkeys(asked), place).items()
            }
        known = {
            x: (None, b"") if half is None else (packed[half.before], pack(half.ids)) for x, half in halves.items()
        }
        always = not self._possible or not self._formula.conditions
        joined: list[bytes | None] = []
        for question, language in zip(questions, languages):
            of_place, second = known[language]
            first = None if of_place is None else of_place[question]
            if first is None or not (always or self._holds(question, language)):
                joined.append(None)
            else:
                joined.append(first + second if self._question_first else second + first)
        return joined

    def longest(self, questions: Sequence[str], languages: Sequence[str]) -> list[int | None]:
        """Tokens of each question's prompt in the language that makes it longest; None where one of the prompts has to
        be tokenised in full."""
        halves = [self.language(language) for language in languages]
        if None in halves:
            return [None] * len(questions)
        most: dict[str, int] = {}
        for half in halves:
            most[half.before] = max(most.get(half.before, 0), len(half.ids))
        ids = {before: self.questions(questions, before) for before in most}
        return [
            max(len(ids[before][question]) + tokens for before, tokens in most.items())
            if all(ids[before][question] is not None for before in most)
            and (not self._formula.conditions or all(self._holds(question, language) for language in languages))
            else None
            for question in questions
        ]

    def language(self, language: str) -> LanguageHalf | None:
        """The half of a language, None where its prompts have to be tokenised in full."""
        if language not in self._languages:
            self._languages[language] = self._try_language(self._request(language)) if self._possible else None
        return self._languages[language]

    def questions(self, questions: Iterable[str], before: str) -> dict[str, NDArray[np.int32] | None]:
        """By question: the ids of its half in front of `before`, int32; None where it has to be tokenised in full."""
        found = {question: self._questions.get(question, before) for question in questions}
        missing = [question for question, ids in found.items() if ids is None]
        for question, ids in zip(missing, self._tokenise(missing, before)):
            found[question] = ids
            self._questions.put(question, before, ids)
        return {question: None if ids is _IN_FULL else ids for question, ids in found.items()}

    def _holds(self, question: str, language: str) -> bool:
        """Whether the template takes the formula's path for this prompt."""
        return self._formula.holds({QUESTION: question, REQUEST: self._request(language)})

    def _joined(self, question: TokenIds, language: TokenIds) -> TokenIds:
        return question + language if self._question_first else language + question

    # --- where the prompt is parted -------------------------------------------------------------------------------

    def _part(self, parts: Parts) -> bool:
        """Part the formula between question and request; whether that is possible."""
        asks = [i for i, part in enumerate(parts) if REQUEST in fields(part)]
        tells = [i for i, part in enumerate(parts) if QUESTION in fields(part)]
        if len(asks) != 1 or not tells:
            return False
        self._question_first = tells[-1] < asks[0]
        if self._question_first:
            self._question_parts, self._language_parts = parts[: asks[0]], parts[asks[0] :]
            return True
        # A seam in the literal text between request and question; the last one leaves the least to the question.
        between = asks[0] + 1
        if not between == tells[0] - 1 or not isinstance(parts[between], str):
            return False
        seam = max((parts[between].rfind(token) for token in self._split_tokens), default=-1)
        if seam < 0:
            return False
        self._language_parts = (*parts[:between], parts[between][:seam])
        self._question_parts = (parts[between][seam:], *parts[between + 1 :])
        return True

    def _try_language(self, request: str) -> LanguageHalf | None:
        text = fill(self._language_parts, {REQUEST: request})
        before = self._before(text) if self._question_first else ""
        if before is None or request != request.strip():
            return None
        question = fill(self._question_parts, {QUESTION: self._example})
        whole, starts = self._with_starts(question + text if self._question_first else text + question)
        seam = len(question) if self._question_first else len(text)
        if seam not in starts:
            return None
        first, second = tuple(whole[: starts.index(seam)]), tuple(whole[starts.index(seam) :])
        ids = second if self._question_first else first
        # The theory, compared with what the tokenizer does.
        half = next(self._tokenise([self._example], before))
        if half is _IN_FULL or self._joined(tuple(half.tolist()), ids) != tuple(whole):
            return None
        return LanguageHalf(ids, before)

    def _before(self, text: str) -> str | None:
        """What stands for a language half in tokenising question halves; None where there is no seam in front of it."""
        if any(text.startswith(token) for token in self._split_tokens):
            return ""
        added = self._backend.get_added_tokens_decoder().values()
        starts_added = any(text.startswith(token.content) for token in added)
        at_line_end = text.startswith(_REQUEST_CHARACTER) and not starts_added
        return _REQUEST_CHARACTER if at_line_end and self._request_character_ids else None

    def _ids_at_line_end(self) -> TokenIds:
        """Those of a request's first character behind a line feed; none where a line feed is no seam."""
        if not splits_at_line_end(self._backend):
            return ()
        ids, starts = self._with_starts(f"\n{_REQUEST_CHARACTER}")
        return tuple(ids[starts.index(1) :]) if 1 in starts else ()

    # --- tokenising -----------------------------------------------------------------------------------------------

    def _tokenise(self, questions: Sequence[str], before: str) -> Iterator[NDArray[np.int32]]:
        """int32 ids of question halves; `_IN_FULL` where there is no seam behind one."""
        texts = [fill(self._question_parts, {QUESTION: question}) for question in questions]
        tail = self._request_character_ids if before else ()
        # Without the Python objects that the tokenizer's own call makes of a batch.
        self._backend.no_truncation()
        self._backend.no_padding()
        encode = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)
        for text, encoding in zip(texts, encode([text + before for text in texts], add_special_tokens=False)):
            ids = encoding.ids
            if not before:
                yield np.array(ids, dtype=np.int32)
            elif text.endswith("\n") and tuple(ids[-len(tail) :]) == tail:
                yield np.array(ids[: -len(tail)], dtype=np.int32)
            else:
                yield _IN_FULL

    def _with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text as the tokenizer's own call gives them, and where in the text each begins."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]


# Stands for the half of a question that has none.
_IN_FULL = np.zeros(0, dtype=np.int32)


class TokenStore:
    """Question halves, the oldest dropped when together they exceed about `bound` tokens."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._tokens = 0
        self._ids: dict[tuple[str, str], NDArray[np.int32]] = {}

    def get(self, question: str, before: str) -> NDArray[np.int32] | None:
        return self._ids.get((question, before))

    def put(self, question: str, before: str, ids: NDArray[np.int32]) -> None:
        """Keep the ids of a half that is not there yet."""
        self._ids[question, before] = ids
        self._tokens += _weight(ids)
        while self._tokens > self._bound:
            self._tokens -= _weight(self._ids.pop(next(iter(self._ids))))


def _weight(ids: NDArray[np.int32]) -> int:
    # The entry itself takes memory, too.
    return len(ids) + 64
