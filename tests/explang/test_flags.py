"""What was parsed of a response, there and back through the flags of its score."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.explang.flags import flags_of, is_own, outcomes_of
from nemo_lrpo.explang.format import Defect, Parsed, check_marks, forced, parse, render
from nemo_lrpo.explang.rewards import Outcome
from nemo_lrpo.types import Prompt, RoutedPrompt, Score

MARKS = MarksConfig()
PROMPT = Prompt("q", "2 + 3?", "5", "de", "de", ("math",))


def row(slot: int, thinking: str | None = None) -> RoutedPrompt:
    return RoutedPrompt(PROMPT, 4, slot, "de", "fixed", 1.0, thinking)


@given(
    language=st.sampled_from([None, "de", "ja"]),
    defect=st.sampled_from([None, *Defect]),
    compliance=st.sampled_from([None, 0.0, 0.5, 1.0]),
    thinking=st.sampled_from([None, "ja"]),
)
def test_a_score_says_what_was_parsed(language, defect, compliance, thinking) -> None:
    parsed = Parsed(language, "Zwei", "", defect)
    if language is None and defect is None:
        return
    score = Score("4/q/1", 0.0, 1.0, compliance, None, 0.0, flags=("abstained", *flags_of(parsed)))
    (outcome,) = outcomes_of([row(1, thinking)], {"4/q/1": score}, [7])
    assert outcome == Outcome("4/q/1", "4/q", language, defect, compliance, 1.0, 7, thinking is not None)
    assert [is_own(flag) for flag in score.flags] == [False] + [True] * (len(score.flags) - 1)


def test_what_was_not_parsed_has_no_outcome() -> None:
    """An answer without a score, and one that was too long to be sent."""
    scores = {"4/q/1": Score("4/q/1", None, None, None, None, 0.0, flags=("too_long",))}
    assert outcomes_of([row(0), row(1)], scores, [3, 4]) == []


def test_an_output_begins_with_what_forces_its_language() -> None:
    text = render("ar", "اثنان", "٢", MARKS)
    assert text.startswith(forced("ar", MARKS)) and parse(text, MARKS, ["ar"]).language == "ar"
    rest = text.removeprefix(forced("ar", MARKS))
    assert rest.startswith(MARKS.thinking_open)


@pytest.mark.parametrize(
    ("thinking", "thinks"), [("Zwei", True), ("", False), ("\u200b\u200f", False), ("\u200b2", True)]
)
def test_a_block_of_invisible_characters_is_no_thinking(thinking: str, thinks: bool) -> None:
    assert Parsed("de", thinking, "", Defect.THINKING_NOT_CLOSED).thinks is thinks
    assert Parsed(None, thinking, "", Defect.UNKNOWN_LANGUAGE).thinks is False


def test_marks_that_decoding_drops_are_refused() -> None:
    check_marks(MARKS, ["de", "ja"], lambda text: text)
    with pytest.raises(ConfigError, match=r"mode\.marks: the tokenizer gives .* back as .*not special"):
        check_marks(MARKS, ["de"], lambda text: text.replace("<think>", ""))
