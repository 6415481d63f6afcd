"""r_lang of whole answers and of their sentences, by the real lid.176."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import cache

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lrpo.config.scoring import LanguageIdConfig, ScorerConfig
from nemo_lrpo.rewards.gate import PIECE_LETTERS, LanguageGate, pieces, sentences
from nemo_lrpo.rewards.language import LanguageIdentifier, count_letters
from tools.demo_world import build_facts, parallel_texts

LANGUAGES = ScorerConfig().languages


@cache
def gate(**settings: object) -> LanguageGate:
    return LanguageGate(LanguageIdConfig(**settings), LANGUAGES)


@cache
def real_sentences() -> Mapping[str, list[str]]:
    """Sentences of the demo world by language, each at least ten characters of Chinese or thirty letters long."""
    found = defaultdict(list)
    for text in parallel_texts(build_facts()):
        if text.kind in ("answer", "statement") and count_letters(text.text) >= 30:
            found[text.language].append(text.text)
    return found


def answer(language: str, count: int, seed: int) -> str:
    """`count` real sentences in one language."""
    glue = "" if language in ("ja", "zh") else " "
    return glue.join(random.Random(f"{language}/{seed}").choices(real_sentences()[language], k=count))


GERMAN = "Die Hauptstadt von Japan ist Tokio, und die Währung des Landes heißt Yen."
ENGLISH = "The capital of Japan is Tokyo, and the currency of the country is the yen."


# --- the whole response ---------------------------------------------------------------------------------------------


def test_response_is_judged_as_a_whole() -> None:
    right, wrong, neither = gate().judge([GERMAN, ENGLISH, "12345"], ["de", "de", "de"])
    assert (right.gate, right.language, right.share) == (1.0, "de", None) and right.confidence > 0.9
    assert (wrong.gate, wrong.language) == (0.0, "en")
    assert (neither.gate, neither.language, neither.abstained) == (0.0, None, True)


@pytest.mark.parametrize(("on_abstain", "expected"), [("fail", 0.0), ("pass", 1.0), ("mask", None)])
@pytest.mark.parametrize("kind", ["response", "share", "soft"])
def test_abstention_is_a_setting(kind: str, on_abstain: str, expected: float | None) -> None:
    texts = ["12345", "да", "```\nprint('hello, world')\n```", "x = f(y)", "\ud800"]
    for decision in gate(gate=kind, on_abstain=on_abstain).judge(texts, ["en", "ru", "en", "es", "de"]):
        assert decision.gate == expected and decision.abstained and decision.share is None
    # A wrong language stays wrong.
    assert gate(gate=kind, on_abstain=on_abstain).judge([ENGLISH], ["de"])[0].gate == 0.0


def test_off_judges_nothing_and_says_the_language() -> None:
    decisions = gate(gate="off").judge([ENGLISH, "12345"], ["de", "de"])
    assert [decision.gate for decision in decisions] == [1.0, 1.0]
    assert [decision.language for decision in decisions] == ["en", None]


# --- the share of the requested language ----------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_answer_in_one_language_has_all_of_it(language: str) -> None:
    texts = [answer(language, count, seed) for count in (1, 2, 3, 5, 8) for seed in range(8)]
    decisions = gate(gate="soft").judge(texts, [language] * len(texts))
    assert [decision.share for decision in decisions] == [1.0] * len(texts)
    assert {decision.language for decision in decisions} == {language}
    other = "de" if language == "en" else "en"
    assert {decision.share for decision in gate(gate="soft").judge(texts, [other] * len(texts))} == {0.0}


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
@pytest.mark.parametrize("glue", [" ", "\n\n"])
def test_half_in_english_is_half(language: str, glue: str) -> None:
    for seed in range(4):
        halves = [answer(language, 6, seed), answer("en", 6, seed)]
        true = count_letters(halves[0]) / sum(map(count_letters, halves))
        for order in (halves, halves[::-1]):
            found = gate(gate="soft").judge([glue.join(order)], [language])[0]
            # A sentence that is judged together with its neighbour may count for the other side.
            assert found.share == found.gate == pytest.approx(true, abs=0.1 if glue == " " else 0.001)


def test_share_closes_below_min_share_and_soft_scales() -> None:
    text = "\n".join([GERMAN, GERMAN, GERMAN, ENGLISH])
    share = 3 * count_letters(GERMAN) / count_letters(text)
    assert share == pytest.approx(0.75, abs=0.02)
    strict, lenient, soft = (
        gate(**settings).judge([text], ["de"])[0]
        for settings in ({"gate": "share"}, {"gate": "share", "min_share": 0.7}, {"gate": "soft"})
    )
    assert (strict.gate, lenient.gate, soft.gate) == (0.0, 1.0, share)
    assert strict.share == lenient.share == soft.share == share
    assert gate(gate="soft").judge([text], ["en"])[0].share == pytest.approx(1 - share)
    assert gate(gate="share", min_share=share).judge([text], ["de"])[0].gate == 1.0


def test_code_names_and_short_quotations_cost_nothing() -> None:
    texts = [
        f"{GERMAN}\n```python\nfor word in the_english_words_of_this_program:\n    print(word)\n```\n{GERMAN}",
        "Das Lied „Bohemian Rhapsody“ der Gruppe Queen ist überall auf der Welt bekannt. Freddie Mercury schrieb es.",
        "Am besten übersetzt man „Thank you very much“ ins Deutsche mit „Vielen Dank“, das ist sehr höflich.",
        "1. Berlin ist die Hauptstadt von Deutschland.\n2. Paris\n3. Rom\n4. Madrid ist die Hauptstadt von Spanien.",
        f"{GERMAN} Siehe https://example.com/the/english/words/of/a/long/link/that/nobody/reads dazu.",
        "Okay. Die Antwort lautet wie folgt, und sie ist ganz einfach zu verstehen. Yes!",
    ]
    decisions = gate(gate="soft").judge(texts, ["de"] * len(texts))
    assert [decision.share for decision in decisions] == [1.0] * len(texts)


def test_pieces_that_nobody_can_name_count_neither_way() -> None:
    noise = "zxcv bnmq wertz lkjh gfds qwpo nmbv hjkl trew yxcv bvcm plok."
    assert LanguageIdentifier(LanguageIdConfig(), LANGUAGES).identify([noise])[0].language is None
    decision = gate(gate="soft").judge([f"{GERMAN}\n{noise}\n{ENGLISH}"], ["de"])[0]
    assert decision.share == pytest.approx(count_letters(GERMAN) / count_letters(GERMAN + ENGLISH))


def test_where_the_whole_cannot_be_said_its_larger_part_stands_for_it() -> None:
    certain = {"gate": "soft", "min_confidence": 0.9}
    text = f"{GERMAN}\n{ENGLISH}\n{ENGLISH}"
    whole = gate(min_confidence=0.9).judge([text], ["de"])[0]
    decision = gate(**certain).judge([text], ["de"])[0]
    assert whole.language is None
    assert decision.language == "en" and not decision.abstained
    assert decision.confidence == pytest.approx(1 - decision.share) and decision.gate == decision.share


@pytest.mark.parametrize("text", ["Hallo, wie geht es dir heute?", "私は学生です。", "안녕하세요"])
def test_a_single_short_sentence_is_judged_as_the_whole(text: str) -> None:
    language = {"H": "de", "私": "ja", "안": "ko"}[text[0]]
    found = gate(gate="share").judge([text], [language])[0]
    assert (found.share, found.gate, found.language) == (1.0, 1.0, language)


# --- sentences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Das ist gut. Das ist 3.14 wert! Wirklich? Ja…", ["Das ist gut.", "Das ist 3.14 wert!", "Wirklich?", "Ja…"]),
        ("他来了。她说：“好！”然后走了？是的", ["他来了。", "她说：“好！”", "然后走了？", "是的"]),
        ("「行きます。」と言った。終わり！", ["「行きます。」", "と言った。", "終わり！"]),
        ("ما اسمك؟ اسمي علي۔ شكرا.", ["ما اسمك؟", "اسمي علي۔", "شكرا."]),
        ("यह घर है। वह भी।", ["यह घर है।", "वह भी।"]),
        ("Liste:\n- eins\n- zwei\n\n3) drei", ["Liste:", "- eins", "- zwei", "3) drei"]),
        ("He said “no.” Then he left.", ["He said “no.”", "Then he left."]),
    ],
)
def test_sentences_end_where_every_script_ends_them(text: str, expected: list[str]) -> None:
    assert [sentence.strip() for sentence in sentences(text) if sentence.strip()] == expected


def test_long_sentences_are_judged_in_parts() -> None:
    text = "wort " * 200 + "x" * 1000
    assert max(map(len, sentences(text))) <= 200
    # Without a single full stop between them.
    mixed = " ".join([GERMAN.strip(".")] * 8 + [ENGLISH.strip(".")] * 8)
    assert gate(gate="soft").judge([mixed], ["de"])[0].share == pytest.approx(0.5, abs=0.1)


ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()), max_size=80)
MIXED = st.lists(st.sampled_from([GERMAN, ENGLISH, "日本の通貨は円です。", "да", "12345", "`x`", "\n", " ", ". "])).map(
    "".join
)


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT | MIXED)
def test_nothing_of_a_text_is_lost(text: str) -> None:
    assert "".join(sentences(text)) == text
    parts = pieces(text)
    assert "".join(part for part, _ in parts) == text
    assert [letters for _, letters in parts] == [count_letters(part) for part, _ in parts]
    assert len(parts) <= 1 or all(letters >= PIECE_LETTERS for _, letters in parts)


@settings(max_examples=150, deadline=None)
@given(st.lists(ANY_TEXT | MIXED, max_size=6), st.sampled_from(["response", "share", "soft", "off"]), st.randoms())
def test_any_texts_in_any_order(texts: list[str], kind: str, draw: random.Random) -> None:
    judged = gate(gate=kind)
    requested = [LANGUAGES[len(text) % len(LANGUAGES)] for text in texts]
    decisions = judged.judge(texts, requested)
    for decision in decisions:
        assert decision.gate is not None and 0.0 <= decision.gate <= 1.0
        assert 0.0 <= decision.confidence <= 1.0
        assert decision.share is None or (0.0 <= decision.share <= 1.0 and not decision.abstained)
    order = draw.sample(range(len(texts)), len(texts))
    assert judged.judge([texts[i] for i in order], [requested[i] for i in order]) == [decisions[i] for i in order]


def test_texts_and_languages_must_pair_up() -> None:
    for kind in ("response", "soft"):
        with pytest.raises(ValueError, match="shorter"):
            gate(gate=kind).judge([GERMAN, ENGLISH], ["de"])


UNITS = [GERMAN + " ", "日本の通貨は円です。", "a", "a. ", "\n", ".", ".'", "。", "`", "$a ", "<a", "(", "\ud800"]


@pytest.mark.parametrize("unit", UNITS)
def test_a_megabyte_is_bounded_by_max_chars(unit: str) -> None:
    text = (unit * (10**6 // len(unit) + 1))[: 10**6]
    judged = gate(gate="soft", max_chars=200_000)
    started = time.thread_time()
    decision = judged.judge([text], ["de"])[0]
    # Measured: below 0.2 s; what is quadratic in the text takes many seconds.
    assert time.thread_time() - started < 2.0
    assert decision == judged.judge([text[:200_000]], ["de"])[0]


def test_helper_processes_end_with_the_gate() -> None:
    config = LanguageIdConfig(gate="soft", threads=2)
    helped = LanguageGate(config, LANGUAGES)
    children = [
        child for child in psutil.Process().children() if "nemo_lrpo.rewards.language_helpers" in child.cmdline()
    ]
    assert len(children) == 1
    texts = [f"{GERMAN} {ENGLISH}"] * 40
    assert helped.judge(texts, ["de"] * 40) == gate(gate="soft").judge(texts, ["de"] * 40)
    helped.close()
    assert not children[0].is_running()
    gate().close()
