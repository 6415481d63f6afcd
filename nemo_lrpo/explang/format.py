"""The output's format: the thinking language's tag, the thinking block, the answer.

    <lang_select>de</lang_select>
    <think>
    Zwei und drei sind fünf.
    </think>

    5

Between these parts there may be white space, and the invisible controls that right-to-left text brings; around the code
in the tag white space. Nothing else: an output that is not exactly this has a defect, the first one in reading order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from enum import Enum

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.data.prompts import Prefill

# White space; soft hyphen, Arabic letter mark, zero-width space, direction marks and embeddings, word joiner, isolates,
# byte order mark. Bounded by what follows, so that a match takes time linear in the gap.
_GAP = re.compile("[\\s\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]*")


class Defect(str, Enum):
    """What is wrong with an output; the value is its name in logs."""

    EMPTY = "empty"
    """There is nothing to see."""
    NO_TAG = "no_tag"
    """It begins with something else than the tag."""
    TAG_NOT_CLOSED = "tag_not_closed"
    UNKNOWN_LANGUAGE = "unknown_language"
    """What stands in the tag is none of the languages."""
    NO_THINKING = "no_thinking"
    """Something else than the thinking block follows the tag, or nothing."""
    THINKING_NOT_CLOSED = "thinking_not_closed"
    EMPTY_THINKING = "empty_thinking"
    EMPTY_ANSWER = "empty_answer"
    REPEATED_MARK = "repeated_mark"
    """One of the four marks stands within the thinking block or the answer: where these end is open to doubt."""


@dataclass(frozen=True)
class Parsed:
    """The parts of an output; exactly one of `answer` and `defect` is there.

    language: the code that was chosen, None where no tag with one of the languages begins the output. thinking: the
    block as written, without white space at its ends; of a block that is not closed, what there is; "" without any.
    answer: likewise; "" with a defect. defect: None for an output that is whole.
    """

    language: str | None
    thinking: str
    answer: str
    defect: Defect | None

    @property
    def thinks(self) -> bool:
        """Whether a language was chosen and there is something in the thinking block, closed or not."""
        return self.language is not None and _after_gap(self.thinking, 0) < len(self.thinking)


def parse(text: str, marks: MarksConfig, languages: Collection[str]) -> Parsed:
    """The parts of `text`, any string at all, in time linear in its length. `languages`: codes that may be chosen."""
    start = _after_gap(text, 0)
    if start == len(text):
        return Parsed(None, "", "", Defect.EMPTY)
    if not text.startswith(marks.language_open, start):
        return Parsed(None, "", "", Defect.NO_TAG)
    start += len(marks.language_open)
    end = text.find(marks.language_close, start)
    if end < 0:
        return Parsed(None, "", "", Defect.TAG_NOT_CLOSED)
    language = text[start:end].strip()
    if language not in languages:
        return Parsed(None, "", "", Defect.UNKNOWN_LANGUAGE)

    start = _after_gap(text, end + len(marks.language_close))
    if not text.startswith(marks.thinking_open, start):
        return Parsed(language, "", "", Defect.NO_THINKING)
    start += len(marks.thinking_open)
    end = text.find(marks.thinking_close, start)
    if end < 0:
        return Parsed(language, text[start:].strip(), "", Defect.THINKING_NOT_CLOSED)
    thinking, answer = text[start:end].strip(), text[end + len(marks.thinking_close) :].strip()
    defect = _defect(thinking, answer, marks)
    return Parsed(language, thinking, "" if defect else answer, defect)


def tag(language: str, marks: MarksConfig) -> str:
    """The tag that chooses `language`."""
    return f"{marks.language_open}{language}{marks.language_close}"


def forced(language: str, marks: MarksConfig) -> str:
    """What an output is prefilled with to force `language`: the beginning of every output that `render` makes of it, up
    to the thinking block. The line's end belongs to it: many tokenizers have it in one token with the mark before."""
    return f"{tag(language, marks)}\n"


def prefill(marks: MarksConfig) -> Prefill:
    """What makes the policy think in a language."""
    return Prefill(lambda language: forced(language, marks), marks.thinking_open)


def check_marks(marks: MarksConfig, languages: Collection[str], decoded: Callable[[str], str]) -> None:
    """Raise ConfigError unless outputs survive the tokenizer. decoded: a text as it comes back when it was written by
    the policy; special tokens are dropped there."""
    for language in languages:
        text = render(language, "1", "2", marks)
        if parse(decoded(text), marks, languages) != Parsed(language, "1", "2", None):
            raise ConfigError(
                f"mode.marks: the tokenizer gives {text!r} back as {decoded(text)!r}. Give marks of plain text, or of "
                "tokens that are not special ones."
            )


def render(language: str, thinking: str, answer: str, marks: MarksConfig) -> str:
    """The output with these parts. Raises ValueError, naming the defect, where it would not be whole."""
    text = f"{forced(language, marks)}{marks.thinking_open}\n{thinking}\n{marks.thinking_close}\n\n{answer}"
    parsed = parse(text, marks, (language,))
    if parsed.defect:
        raise ValueError(f"these parts make no whole output: {parsed.defect.value}.")
    return text


def _after_gap(text: str, start: int) -> int:
    gap = _GAP.match(text, start)
    assert gap is not None
    return gap.end()


def _defect(thinking: str, answer: str, marks: MarksConfig) -> Defect | None:
    if _after_gap(thinking, 0) == len(thinking):
        return Defect.EMPTY_THINKING
    if _after_gap(answer, 0) == len(answer):
        return Defect.EMPTY_ANSWER
    if any(getattr(marks, mark.name) in part for mark in fields(marks) for part in (thinking, answer)):
        return Defect.REPEATED_MARK
    return None
