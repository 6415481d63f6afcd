"""Verifiers by rule: exact, choice and format, and what all of them hold for any text. Numbers: test_numeric.py."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import JudgeConfig, ScorerConfig, VerifierConfig
from nemo_lrpo.rewards import answers
from nemo_lrpo.rewards.answers import AnswerVerifier, ChoiceVerifier, ExactVerifier, FormatVerifier, clean, plain
from nemo_lrpo.rewards.build import build_parts
from nemo_lrpo.rewards.numeric import NumericVerifier
from nemo_lrpo.types import ScoreRequest, ScoringAbandoned

KINDS = {"exact": ExactVerifier, "numeric": NumericVerifier, "choice": ChoiceVerifier, "format": FormatVerifier}


def make(kind: str, **settings: object) -> AnswerVerifier:
    return KINDS[kind](VerifierConfig(kind=kind, **settings), f"verifiers.{kind}")


def say(
    verifier: AnswerVerifier, response: str, reference: str = "B", question: str = ""
) -> tuple[float | None, tuple[str, ...]]:
    [verdict] = verifier.verify([ScoreRequest("1/q/0", response, reference, "en", "en", question)], ["en"])
    return verdict.value, verdict.flags


@pytest.fixture(scope="module")
def choice() -> AnswerVerifier:
    return make("choice")


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("  Paris \n", "paris"),
        ("“PARIS.”", "Paris"),
        ("**Paris**!", "Paris"),
        ("- `Paris`", "Paris"),
        ("ＰＡＲＩＳ", "Paris"),
        ("New\u00a0 York", "new york"),
        ("STRASSE", "Straße"),
        ("ΟΔΟΣ", "οδος"),
        ("「東京」。", "東京"),
        ("《紅樓夢》", "紅樓夢"),
        ("«Москва».", "москва"),
        ("¿Qué?", "qué"),
        ("\u200f\u202bالقاهرة؟\u202c", "القاهرة"),
        ("Cafe\u0301", "Café"),
        ("ﬁn", "fin"),
        ("...", "…"),
    ],
)
def test_exact_overlooks_case_width_space_and_outer_punctuation(response: str, reference: str) -> None:
    assert say(make("exact"), response, reference) == (1.0, ())


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("Paris, France", "Paris"),
        ("It is Paris.", "Paris"),
        ("newyork", "New York"),
        ("-5", "5"),
        (".5", "5"),
        ("5%", "5"),
        ("C", "C#"),
        ("(0, 1]", "[0, 1)"),
        ("rock'n'roll", "rocknroll"),
        ("!", "?"),
        ("東京", "京都"),
    ],
)
def test_exact_does_not_overlook_what_makes_another_answer(response: str, reference: str) -> None:
    assert say(make("exact"), response, reference) == (0.0, ())


def test_exact_has_nothing_to_say_without_a_reference() -> None:
    assert say(make("exact"), "Paris", " \n") == (None, ("unreadable_reference",))


@given(st.text(max_size=40))
def test_exact_is_an_equivalence(text: str) -> None:
    assert plain(plain(text)) == plain(text) == plain(f" {text}\n") == plain(clean(text))


def test_a_pattern_marks_the_answer_and_the_last_match_counts() -> None:
    exact = make("exact", pattern=r"Answer: (.*)")
    assert say(exact, "Answer: Rome\nno: Answer: Paris\nbye", "Paris") == (1.0, ())
    assert say(exact, "Paris", "Paris") == (0.0, ("no_answer",))
    optional = make("exact", pattern=r"Answer:(?: (\w+))?")
    assert say(optional, "Answer: Paris\nAnswer:", "Paris") == (1.0, ())
    assert say(make("choice", pattern=r"<(.+?)>"), "<A> B <(B)>") == (1.0, ())


def test_format_is_about_the_whole_response() -> None:
    verifier = make("format", pattern=r"<think>.*</think>\s*\S+")
    assert say(verifier, "<think>a\nb</think>\nParis") == (1.0, ())
    assert say(verifier, "So: <think>a</think> Paris") == (0.0, ())
    assert say(verifier, "<think>a</think>") == (0.0, ())


@pytest.mark.parametrize("kind", ["format", "exact", "choice", "numeric"])
def test_a_pattern_without_end_is_stopped_and_has_no_value(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PATTERN_TIMEOUT_S", 0.2)
    verifier = make(kind, pattern=r"((?:a|aa)+)$")
    start = time.monotonic()
    assert say(verifier, "a" * 60 + "b") == (None, (f"{kind}_timeout",))
    assert time.monotonic() - start < 5.0


def test_a_slow_pattern_does_not_stop_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PATTERN_TIMEOUT_S", 0.4)
    verifier = make("format", pattern=r"((?:a|aa)+)$")
    thread = threading.Thread(target=say, args=(verifier, "a" * 60 + "b"))
    start = time.monotonic()
    thread.start()
    longest, last = 0.0, start
    while thread.is_alive():
        time.sleep(0.001)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert last - start > 0.2 and longest < (last - start) / 2


def test_a_pattern_that_only_the_library_refuses_is_named() -> None:
    with pytest.raises(ConfigError, match=r"verifiers\.exact\.pattern"):
        make("exact", pattern=r"(?<=a+)(\d")


@pytest.mark.parametrize(
    "response",
    [
        "B",
        "b",
        "(B)",
        "b)",
        "Ｂ",
        "Ⓑ",
        "𝐁",
        "**B**",
        "B. Paris",
        "**B) Paris**",
        "Let me think.\nA is a city.\n\nB",
        "Answer: B",
        "answer: b",
        "**Answer:** (B) Paris",
        "Answer:\n\nB",
        "The answer is **B**.",
        "The correct answer is option B",
        "The answer is B because A is wrong.",
        "B is the correct answer.",
        "I choose B",
        r"Hence \boxed{B}.",
        r"Hence $\boxed{\text{(B)}}$",
        "The answer is A. Wait: the answer is B.",
        r"The answer is A. I mean \boxed{B}.",
        r"I thought \boxed{A}, but the answer is B.",
        "The answer is not A. The answer is B.",
        "A. London\nB. Paris\nC. Rome\n\nThe answer is B",
        "A. London\nB. Paris\nC. Rome\n\nB",
        "I think that (B) is right",
        "I'd say option B.",
        "الإجابة: ب",
        "الإجابة الصحيحة هي (ب)",
        "الجواب هو B",
        "Die richtige Antwort ist B.",
        "Die Antwort lautet: B)",
        "La respuesta correcta es la opción B",
        "La bonne réponse est B",
        "B est la bonne réponse.",
        "Jawabannya adalah B",
        "La risposta corretta è la B",
        "答えはBです。",
        "正解：Ｂ",
        "정답은 B입니다.",
        "답: B",
        "Het juiste antwoord is B",
        "Odpowiedź: B",
        "Prawidłowa odpowiedź to B.",
        "A resposta é B",
        "Правильный ответ — Б) Париж",
        "Ответ: Б",
        "Đáp án: B",
        "Đáp án đúng là B",
        "答案是 B",
        "答案：（B）",
        "选项A错误，故选B。",
        "所以选择B",
    ],
)
def test_choice_finds_the_option(choice: AnswerVerifier, response: str) -> None:
    assert say(choice, response, "B") == (1.0, ())
    assert say(choice, response, "C") == (0.0, ())


@pytest.mark.parametrize(
    "response",
    [
        "A dog",
        "Answer: A dog",
        "Respuesta: E hizo frío",
        "A-1",
        "Vitamin B is good for you.",
        "The answer is not A.",
        "A is not the correct answer.",
        "答案不是A。",
        "정답은 A가 아닙니다.",
        "答えはAではない。",
        "Ответ: А-95",
        "B's idea",
        "La respuesta es difícil",
        r"\boxed{A dog}",
        r"\boxed{}",
        "Paris",
        "答案很难说",
    ],
)
def test_choice_takes_no_word_for_an_option(choice: AnswerVerifier, response: str) -> None:
    assert say(choice, response, "A") == (0.0, ("no_answer",))


@pytest.mark.parametrize(
    "response",
    [
        "The answer is A or B.",
        "Answer: A, B",
        "Answer: (A) and (B)",
        "答案是A还是B?",
        "Ответ: А или Б",
        r"\boxed{A, B}",
        "A. London\nB. Paris\nC. Rome",
        "I think (A) seems wrong, (B) seems right",
    ],
)
def test_choice_does_not_pick_for_the_undecided(choice: AnswerVerifier, response: str) -> None:
    for reference in "AB":
        assert say(choice, response, reference) == (0.0, ("ambiguous",))


def test_cyrillic_letters_count_by_looks_or_by_place(choice: AnswerVerifier) -> None:
    """В looks like B, and is the third letter."""
    assert say(choice, "Ответ: В", "B") == (1.0, ())
    assert say(choice, "Ответ: В", "C", question="А) Рим\nБ) Париж\nВ) Осло") == (1.0, ())
    assert say(choice, "Ответ: В", "(В)") == (1.0, ())
    assert say(choice, "Ответ: В", "Б") == (0.0, ())
    assert say(choice, "Это не Б. Ответ: В", "C") == (1.0, ())
    assert say(choice, "Ответ: Г", "D") == (1.0, ())


@pytest.mark.parametrize(
    ("reference", "response"),
    [("1", "B"), ("0", "A"), ("(B)", "B"), ("b", "B"), ("B. Paris", "B"), ("ب", "B"), ("D：巴黎", "D"), ("J", "J")],
)
def test_choice_reads_the_reference_as_letter_or_index(choice: AnswerVerifier, reference: str, response: str) -> None:
    assert say(choice, response, reference) == (1.0, ())


@pytest.mark.parametrize("reference", ["", "Paris", "A dog", "12", "K"])
def test_choice_has_nothing_to_say_of_other_references(choice: AnswerVerifier, reference: str) -> None:
    assert say(choice, "B", reference) == (None, ("unreadable_reference",))


ANY_TEXT = st.text(st.characters(codec=None), max_size=80)
PIECES = st.sampled_from(
    [
        r"\boxed{",
        "}",
        "$",
        "####",
        "answer",
        "is",
        ":",
        "\n",
        "B",
        "(",
        ")",
        "1,234",
        "/0",
        "-",
        "٣",
        "答案",
        "是",
        "%",
        "=",
        *["\ud800", "\x00", "\u202e", "\ufdfa", "e9", "^", "**", "½", "万", "option", "а", "ب", "not", ".", " "],
    ]
)
TEXTS = ANY_TEXT | st.lists(PIECES, max_size=25).map("".join)


@pytest.fixture(scope="module")
def all_verifiers() -> Iterator[list[AnswerVerifier]]:
    made = [make("exact"), make("choice"), make("numeric"), make("format", pattern=r"\s*\w+.*")]
    yield made
    for verifier in made:
        verifier.close()


@settings(max_examples=250, deadline=None)
@given(TEXTS, TEXTS)
def test_any_text_has_a_verdict(all_verifiers: list[AnswerVerifier], response: str, reference: str) -> None:
    for verifier in all_verifiers:
        value, flags = say(verifier, response, reference, question=reference)
        assert value is None or 0.0 <= value <= 1.0
        assert (value is None) <= bool(flags)


LONG = [
    "B " * 50_000,
    "9" * 100_000,
    "1," * 50_000,
    "123 " * 25_000,
    "answer is " * 10_000,
    "答案是" * 33_000,
    r"\boxed{" * 14_000,
    "$1 " * 33_000,
    r"\(" * 50_000,
    "(" * 100_000,
    "\n" * 100_000 + "x",
    "选" * 100_000,
    "\ufdfa" * 30_000,
    "\ud800" * 100_000,
    "\x00" * 100_000,
    "a" + "\u0301\u0316" * 50_000,
    "answer is 1" + "+1" * 50_000,
    "\u202eب " * 30_000,
]


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:12]))
def test_no_text_of_100_kb_holds_a_verifier(all_verifiers: list[AnswerVerifier], text: str) -> None:
    for verifier in all_verifiers:
        start = time.process_time()
        say(verifier, text, "B" if isinstance(verifier, ChoiceVerifier) else "18")
        assert time.process_time() - start < 3.0


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_stops_when_nobody_waits(kind: str) -> None:
    verifier = make(kind, pattern="(B)")
    asked: list[None] = []

    def should_stop() -> bool:
        asked.append(None)
        return len(asked) > 3

    with pytest.raises(ScoringAbandoned):
        verifier.verify([ScoreRequest("1/q/0", "B", "B", "en", "en")] * 100, ["en"] * 100, should_stop)
    assert len(asked) == 4


def test_build_makes_every_kind_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScorerConfig(
        verifiers={
            "number": VerifierConfig(kind="numeric", tolerance=0.01),
            "other_number": VerifierConfig(kind="numeric"),
            "letter": VerifierConfig(kind="choice"),
            "same": VerifierConfig(kind="exact"),
            "form": VerifierConfig(kind="format", pattern=".+", combine="product"),
            "judge": VerifierConfig(kind="judge"),
        },
        judge=JudgeConfig(url="http://127.0.0.1:1/v1", model="m"),
    )
    parts = build_parts(config)
    assert [part.name for part in parts] == list(config.verifiers)
    assert all(part.config is config.verifiers[part.name] for part in parts)
    for part in parts:
        json.dumps(part.verifier.identity())
        part.verifier.close()
    assert "math-verify" in parts[0].verifier.identity() and "model" in parts[-1].verifier.identity()
    monkeypatch.setitem(config.verifiers, "same", VerifierConfig(kind="exact", pattern=r"(?P<a>.)(?P=b)"))
    with pytest.raises(ConfigError, match=r"verifiers\.same\.pattern"):
        build_parts(config)
