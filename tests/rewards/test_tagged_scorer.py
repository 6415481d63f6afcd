"""Responses with thinking blocks through the whole scorer: the gate judges the block, the verifier the answer."""

from __future__ import annotations

import pytest

from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.config.scoring import LanguageIdConfig, ScorerConfig, ThinkingConfig, VerifierConfig
from nemo_lrpo.explang.format import render, tag
from nemo_lrpo.rewards.scorer import RewardScorer
from nemo_lrpo.types import Score, ScoreRequest

MARKS = MarksConfig()
GERMAN = "Wir zählen zuerst die Äpfel und dann die Birnen zusammen, das sind siebzehn Früchte."
RIGHT = "Es sind im Ganzen siebzehn Früchte, also 17."
ENGLISH_ANSWER = "There are seventeen pieces of fruit in all of them, that is 17."
RESPONSES = {
    "right": render("de", GERMAN, RIGHT, MARKS),
    "wrong": render("de", GERMAN, "18", MARKS),
    "not compliant": render("ja", GERMAN, RIGHT, MARKS),
    "other answer": render("de", GERMAN, ENGLISH_ANSWER, MARKS),
    "cut off": tag("de", MARKS) + MARKS.thinking_open + GERMAN + " Also 17.",
    "unclear": render("de", "17", "17", MARKS),
    "no tag": "17",
    "not served": render("sw", GERMAN, "17", MARKS),
    "empty": "",
}


def scores(**settings: object) -> dict[str, Score]:
    config = ScorerConfig(
        languages=["de", "en", "ja"],
        verifiers={"math": VerifierConfig(kind="numeric")},
        thinking=ThinkingConfig(tagged=True),
        language_id=LanguageIdConfig(**settings),
    )
    scorer = RewardScorer(config)
    requests = [ScoreRequest(name, text, "17", "de", "de") for name, text in RESPONSES.items()]
    found = {score.sample_id: score for score in scorer.score(requests)}
    assert list(found) == list(RESPONSES)
    counts = scorer.counts()
    assert counts["selected/de"] == 5 and counts["defect/no_tag"] == 1 and counts["scored/de"] == len(RESPONSES)
    assert scorer.identity()["thinking"]["thinking_open"] == "<think>"
    scorer.close()
    return found


def test_every_part_of_a_response_is_judged_by_its_own_measure() -> None:
    found = scores()
    parts = {name: (score.gate, score.quality, score.reward) for name, score in found.items()}
    assert parts == {
        "right": (1.0, 1.0, 1.0),
        "wrong": (1.0, 0.0, 0.0),
        "not compliant": (0.0, 1.0, 0.0),
        "other answer": (1.0, 1.0, 1.0),
        "cut off": (1.0, 0.0, 0.0),
        "unclear": (0.0, 1.0, 0.0),
        "no tag": (0.0, 0.0, 0.0),
        "not served": (0.0, 0.0, 0.0),
        "empty": (0.0, 0.0, 0.0),
    }
    flags = {name: score.flags for name, score in found.items()}
    assert flags["right"] == ("selected:de",) and flags["not compliant"] == ("selected:ja",)
    assert flags["cut off"] == ("defect:thinking_not_closed", "selected:de")
    assert flags["unclear"] == ("abstained", "selected:de")
    assert flags["not served"] == ("defect:unknown_language",) and flags["empty"] == ("defect:empty", "empty")
    # The language of a score is the answer's, which the user asked for; that of a number cannot be said.
    languages = {name: (score.language, score.measures.get("answer_language")) for name, score in found.items()}
    assert languages["right"] == ("de", 1.0) and languages["other answer"] == ("en", 0.0)
    assert languages["wrong"] == languages["cut off"] == (None, None)
    assert found["right"].parts == {"math": 1.0} and found["cut off"].parts == {}


def test_without_a_gate_compliance_is_judged_and_does_not_enter_the_reward() -> None:
    found = scores(gate="off")
    assert (found["not compliant"].gate, found["not compliant"].reward) == (0.0, 1.0)
    assert (found["right"].gate, found["right"].reward) == (1.0, 1.0)
    assert (found["cut off"].gate, found["cut off"].reward) == (1.0, 0.0)


@pytest.mark.parametrize(("gate", "cut_off"), [("mask", None), ("pass", 1.0)])
def test_thinking_in_a_language_that_cannot_be_said(gate: str, cut_off: float | None) -> None:
    found = scores(on_abstain=gate)
    assert found["unclear"].gate == cut_off and found["unclear"].masked is (cut_off is None)
    assert found["unclear"].reward == cut_off
    assert found["right"].reward == 1.0 and found["wrong"].flags == ("selected:de",), "of the answer nothing is asked"


def test_the_thinking_blocks_share_is_a_measure() -> None:
    found = scores(gate="share")
    assert found["right"].measures["language_share"] == 1.0 and found["other answer"].measures["language_share"] == 1.0
    assert found["not compliant"].measures["language_share"] == 0.0


@pytest.mark.parametrize(
    ("kind", "reference", "right", "wrong"),
    [("exact", "siebzehn Früchte", "Siebzehn  Früchte", "siebzehn"), ("choice", "C", "Die Antwort ist C.", "B")],
)
def test_of_a_thinking_block_no_verifier_knows(kind: str, reference: str, right: str, wrong: str) -> None:
    """The right answer counts in the answer only, and what is thought before it does not spoil it."""
    texts = {
        "right": render("de", f"{GERMAN} {wrong}", right, MARKS),
        "thought only": render("de", f"{GERMAN} {right}", wrong, MARKS),
        "open": tag("de", MARKS) + MARKS.thinking_open + right,
    }
    verifiers = {"part": VerifierConfig(kind=kind)}
    scorer = RewardScorer(
        ScorerConfig(languages=["de", "en"], verifiers=verifiers, thinking=ThinkingConfig(tagged=True))
    )
    found = scorer.score([ScoreRequest(name, text, reference, "de", "de") for name, text in texts.items()])
    scorer.close()
    assert {score.sample_id: score.quality for score in found} == {"right": 1.0, "thought only": 0.0, "open": 0.0}
