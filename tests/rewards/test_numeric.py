"""Numbers and formulas in the notations of many languages."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_lrpo.config.scoring import VerifierConfig
from nemo_lrpo.rewards import formulas
from nemo_lrpo.rewards.formulas import DIFFERENT, EQUAL, LOST, FormulaComparer
from nemo_lrpo.rewards.numeric import NumericVerifier
from nemo_lrpo.types import ScoreRequest


@pytest.fixture(scope="module")
def numeric() -> Iterator[NumericVerifier]:
    verifier = NumericVerifier(VerifierConfig(kind="numeric"), "verifiers.number")
    yield verifier
    verifier.close()


def say(
    verifier: NumericVerifier, response: str, reference: str, language: str = "en", reference_language: str = "en"
) -> tuple[float | None, tuple[str, ...]]:
    request = ScoreRequest("1/q/0", response, reference, reference_language, language)
    [verdict] = verifier.verify([request], [language])
    return verdict.value, verdict.flags


RIGHT, WRONG = (1.0, ()), (0.0, ())

# The last sentence of answers to one question of mGSM: what does Janet earn a day? 9 eggs at 2 dollars each.
MGSM = {
    "ar": ["الإجابة هي ١٨ دولارًا.", "تكسب 9 × 2 = 18 دولارًا.", "الجواب: 18"],
    "de": ["Sie verdient täglich 9 * 2 = 18 Dollar.", "Die Antwort ist 18.", "Antwort: **18 $**"],
    "en": ["She makes 9 * 2 = $18 every day at the market.", "#### 18", r"So the answer is $\boxed{18}$ for 9 eggs."],
    "es": ["Gana 9 x 2 = 18 dólares.", "La respuesta es 18.", "Respuesta final: $18"],
    "fr": ["Elle gagne 9 × 2 = 18 dollars.", "La réponse est 18.", "Réponse : 18 $ pour 9 œufs"],
    "id": ["Dia mendapat $18 per hari.", "Jawabannya adalah 18.", "Jawaban: 18 dolar"],
    "it": ["Guadagna 9 * 2 = 18 dollari.", "La risposta è 18.", "Risposta: 18"],
    "ja": ["彼女は毎日9×2＝18ドル稼ぎます。", "答えは18です。", "答え：１８ドル"],
    "ko": ["그녀는 매일 18달러를 법니다.", "정답은 18입니다.", "답: 18달러"],
    "nl": ["Ze verdient 9 * 2 = 18 dollar.", "Het antwoord is 18.", "Antwoord: 18"],
    "pl": ["Zarabia 9 * 2 = 18 dolarów.", "Odpowiedź to 18.", "Odpowiedź: 18 dolarów"],
    "pt": ["Ela ganha 9 * 2 = 18 dólares.", "A resposta é 18.", "Resposta: 18"],
    "ru": ["Она зарабатывает 9 * 2 = 18 долларов.", "Ответ — 18.", "Ответ: 18 долларов за 9 яиц"],
    "vi": ["Cô ấy kiếm được 9 * 2 = 18 đô la.", "Câu trả lời là 18.", "Đáp số: 18 đô la"],
    "zh": ["她每天赚9×2＝18美元。", "答案是18。", "答案：18美元（9个鸡蛋）"],
}


@pytest.mark.parametrize("language", sorted(MGSM))
def test_word_problems_in_fifteen_languages(numeric: NumericVerifier, language: str) -> None:
    for response in MGSM[language]:
        assert say(numeric, f"16 - 3 - 4 = 9\n\n{response}", "18", language) == RIGHT, response
        assert say(numeric, f"16 - 3 - 4 = 9\n\n{response}", "9", language) == WRONG, response


@pytest.mark.parametrize("response", ["", "I do not know.", "eighteen", "十八", "$x$", "9" * 5000])
def test_a_response_without_a_number_has_no_answer(numeric: NumericVerifier, response: str) -> None:
    assert say(numeric, response, "18") == (0.0, ("no_answer",))


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        (r"First \boxed{3}, no: \boxed{18}. I checked 3 times.", "18"),
        (r"\boxed{18\text{ dollars}}", "18"),
        (r"\boxed{x = 18}", "18"),
        (r"\boxed{18 apples for 3 people}", "18"),
        (r"\boxed{\$18{,}000}", "18000"),
        (r"\boxed{18} then it broke off: \boxed{2", "18"),
        ("#### 18 apples for 3 people", "18"),
        ("**Answer:**\n\n18 apples for 3 people", "18"),
        ("The answer is 2 * 9 = 18", "18"),
        ("The answer is 18. She had 3 left.", "18"),
        ("It costs $5 and $18", "18"),
        ("so $x = 18$ as there were 3 of them for $y$", "3"),
        (r"The answer is $\frac{36}{2}$ for 3 eggs.", "18"),
        ("there were 3, so $x = 18$.", "18"),
        ("- 18 apples", "18"),
        ("It is 20-2", "2"),
        ("18", "She has 9 * 2 = 18\n#### 18"),
        ("18", "Er verdient 18 Dollar."),
        ("-5", "−5"),
        ("–5 °C", "-5"),
        ("-$5", "-5"),
        ("3/4", "0.75"),
        (r"$\frac{3}{4}$", "0.75"),
        (r"\boxed{1\frac{1}{2}}", "1.5"),
        ("1½", "1.5"),
        ("5 m²", "5"),
        ("60 km/h", "60"),
        ("018.0", "18"),
        ("1.5×10^3", "1500"),
        (r"$1.5 \times 10^{3}$", "1500"),
        ("1.5e3", "1500"),
        ("1万2000円", "12000"),
        ("3.5만 원", "35000"),
        ("1亿", "100,000,000"),
        ("۱۲٬۳۴۵٫۵", "12345.5"),
        ("１２３", "123"),
        ("१८", "18"),
    ],
)
def test_notations_of_the_final_answer(numeric: NumericVerifier, response: str, reference: str) -> None:
    assert say(numeric, response, reference) == RIGHT


@pytest.mark.parametrize(
    ("response", "reference"),
    [("-5", "5"), ("5", "-5"), ("3/4", "4/3"), (r"\boxed{2x}", "2"), ("2pi", "2"), ("18 - 3", "18"), ("0.333", "1/3")],
)
def test_near_misses_are_wrong(numeric: NumericVerifier, response: str, reference: str) -> None:
    assert say(numeric, response, reference) == WRONG


@pytest.mark.parametrize(
    ("response", "language", "right", "wrong"),
    [
        ("1,234", "en", "1234", "1.234"),
        ("1.234", "en", "1.234", "1234"),
        ("5,000", "en", "5000", "5"),
        ("5.000", "de", "5000", "5"),
        ("5,000", "de", "5000", "5"),
        ("1.234,5", "de", "1234.5", "1.2345"),
        ("1,234.5", "de", "1234.5", "1.2345"),
        ("1.234.567", "es", "1234567", "1.234567"),
        ("1 234 567,5", "fr", "1234567.5", "567.5"),
        ("1\u202f234", "fr", "1234", "234"),
        ("1'234.50", "it", "1234.5", "234.5"),
        ("1’234", "de", "1234", "234"),
        ("12,34,567", "en", "1234567", "567"),
        ("3,5", "pl", "3.5", "35"),
        ("3,50", "en", "3.5", "350"),
        ("0,125", "ru", "0.125", "125"),
        ("0,125", "en", "0.125", "125"),
        ("12.3456", "de", "12.3456", "123456"),
        ("١٬٢٣٤", "ar", "1234", "1.234"),
        ("٣٫٥", "ar", "3.5", "35"),
    ],
)
def test_separators_are_read_by_their_groups_and_the_language(
    numeric: NumericVerifier, response: str, language: str, right: str, wrong: str
) -> None:
    assert say(numeric, response, right, language) == RIGHT
    assert say(numeric, response, wrong, language) == WRONG


@pytest.mark.parametrize("response", ["1.234", "1,234"])
def test_an_ambiguous_number_has_both_readings_where_the_language_leaves_them(
    numeric: NumericVerifier, response: str
) -> None:
    for reference in ("1234", "1.234"):
        assert say(numeric, response, reference, "de") == RIGHT
        assert say(numeric, reference, response, "en", reference_language="de") == RIGHT


def test_a_percent_sign_on_one_side_is_a_hundredth_or_the_unit(numeric: NumericVerifier) -> None:
    for response, reference in [("50%", "0.5"), ("50 %", "50"), ("50\\%", "50%"), ("50٪", "50"), ("0.5", "50%")]:
        assert say(numeric, response, reference) == RIGHT
    for response, reference in [("0.5%", "50%"), ("5%", "0.5"), ("50%", "5000")]:
        assert say(numeric, response, reference) == WRONG


def test_tolerance_is_relative_to_the_reference() -> None:
    verifier = NumericVerifier(VerifierConfig(kind="numeric", tolerance=0.01), "verifiers.number")
    assert say(verifier, "101", "100") == RIGHT
    assert say(verifier, "99", "-100") == WRONG
    assert say(verifier, "101.01", "100") == WRONG
    assert say(verifier, "100", "101.01") == RIGHT
    assert say(verifier, "0.00001", "0") == WRONG
    assert say(verifier, "3.15", r"\pi") == RIGHT
    assert say(verifier, "3.2", r"\pi") == WRONG
    verifier.close()


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        (r"The side is $\sqrt{324}$.", "18"),
        ("The answer is 2 + 16", "18"),
        (r"The area is $2\pi$ for 3 circles.", r"2\pi"),
        (r"The answer is 2\pi. It has 3 parts.", r"2\pi"),
        (r"The answer is \sqrt{2}", r"\sqrt{2}"),
        ("$x + 1$", "1+x"),
        (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt 3}{2}"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        ("2^10", "1024"),
        (r"\boxed{- 5}", "-5"),
    ],
)
def test_formulas_are_compared_by_value(numeric: NumericVerifier, response: str, reference: str) -> None:
    assert say(numeric, response, reference) == RIGHT
    assert say(numeric, response, "19") == WRONG


def test_a_reference_without_number_or_formula_leaves_no_value(numeric: NumericVerifier) -> None:
    assert say(numeric, "18", "It depends on the weather.") == (None, ("unreadable_reference",))


@given(
    st.integers(-(10**12), 10**12), st.sampled_from(["", ",", ".", " ", "'", "\u202f"]), st.sampled_from(sorted(MGSM))
)
def test_grouped_integers_are_read_in_every_language(
    numeric: NumericVerifier, number: int, mark: str, language: str
) -> None:
    text = f"{number:,}".replace(",", mark)
    if mark == "." and language in ("en", "ja", "ko", "zh") and text.count(".") == 1:
        return  # A decimal there.
    assert say(numeric, text, str(number), language) == RIGHT
    assert say(numeric, text, str(number + 1), language) == WRONG


@given(st.fractions(max_denominator=999, min_value=-999, max_value=999))
def test_fractions_are_exact(numeric: NumericVerifier, number: Fraction) -> None:
    assert say(numeric, f"{number.numerator}/{number.denominator}", str(number)) == RIGHT
    assert say(numeric, f"\\frac{{{number.numerator}}}{{{number.denominator}}}", str(number + 1)) == WRONG


HOSTILE = ["9^{9^{9^{9}}}", r"\sum_{n=1}^{\infty} \sin(n^{n})^{n}", "(((10^{99})!)!)!", r"\frac{1}{0}", "((((" * 40]


def test_hostile_formulas_neither_hang_nor_end_the_verifier_in_a_thread() -> None:
    """signal.alarm, which math-verify relies on, is not to be had outside the main thread."""
    verifier = NumericVerifier(VerifierConfig(kind="numeric"), "verifiers.number")
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        found = [pool.submit(say, verifier, rf"\boxed{{{text}}}", "18").result() for text in HOSTILE]
        assert found[0] == (0.0, ("formula_limit",))
        assert {value for value, _ in found} == {0.0}
        assert pool.submit(say, verifier, r"\boxed{\sqrt{324}}", "18").result() == RIGHT
    assert time.monotonic() - start < len(HOSTILE) * (formulas.TIME_LIMIT_S + 10.0)
    start = time.monotonic()
    assert say(verifier, rf"\boxed{{{HOSTILE[0]}}}", "18") == (0.0, ("formula_limit",))
    assert time.monotonic() - start < 0.5, "remembered"
    verifier.close()


def test_threads_share_one_process_and_get_their_own_results() -> None:
    before = children()
    comparer = FormulaComparer()
    cases = [(f"{a}+{b}", str(c)) for a in range(6) for b in range(6) for c in (a + b, a + b + 1)]
    random.Random(0).shuffle(cases)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda case: comparer.compare(case[1], case[0], 0.0), cases))
    assert found == [EQUAL if eval(left) == int(right) else DIFFERENT for left, right in cases]
    assert len(children() - before) == 1
    comparer.close()
    assert not children() - before


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_a_killed_process_costs_one_comparison() -> None:
    before = children()
    comparer = FormulaComparer()
    assert comparer.compare("18", "9+9", 0.0) == EQUAL
    [child] = children() - before
    os.kill(child, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (child, signal.SIGKILL)).start()
    assert comparer.compare("18", "9+8", 0.0) == LOST
    assert comparer.compare("18", "8+10", 0.0) == EQUAL
    # Nothing was learned of it, so nothing is remembered.
    assert comparer.compare("18", "9+8", 0.0) == DIFFERENT
    comparer.close()
    comparer.close()


def test_a_busy_machine_does_not_make_an_answer_wrong() -> None:
    """The limit counts the processor time of the comparison: a process that waits does not exceed it."""
    before = children()
    comparer = FormulaComparer(time_limit_s=0.5)
    comparer.compare("18", "9+9", 0.0)
    [child] = children() - before
    os.kill(child, signal.SIGSTOP)
    threading.Timer(1.0, os.kill, (child, signal.SIGCONT)).start()
    assert comparer.compare("18", "10+8", 0.0) == EQUAL
    comparer.close()


@pytest.mark.parametrize("busy", [False, True])
def test_the_process_ends_with_its_parent(busy: bool) -> None:
    """Killed, a server cleans nothing up: idle, the child sees its input end; at work, its time runs out."""
    work = f"threading.Thread(target=comparer.compare, args=('18', {HOSTILE[0]!r}, 0.0)).start(); time.sleep(0.3)"
    script = (
        "import os, signal, threading, time; from nemo_lrpo.rewards.formulas import FormulaComparer\n"
        "comparer = FormulaComparer(); comparer.compare('18', '9+9', 0.0)\n"
        f"{work if busy else ''}\nprint(comparer._child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = {"PYTHONPATH": str(Path(formulas.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, **path}, check=False
    )
    child = int(done.stdout)
    deadline = time.monotonic() + formulas.TIME_LIMIT_S + 10.0
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_cannot_start_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="math-verify"):
        FormulaComparer().compare("18", "9+9", 0.0)
