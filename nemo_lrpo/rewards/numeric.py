"""Answers that are numbers or formulas, in the notations of many languages and scripts."""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version

from nemo_lrpo.config.scoring import VerifierConfig
from nemo_lrpo.rewards import formulas
from nemo_lrpo.rewards.answers import (
    ANSWER_WORDS,
    FLAG_NO_ANSWER,
    LINKS,
    OPENING,
    AnswerVerifier,
    boxed,
    clean,
)
from nemo_lrpo.rewards.verifier import FLAG_UNREADABLE_REFERENCE, Verdict
from nemo_lrpo.types import ScoreRequest

FLAG_FORMULA_LIMIT = "formula_limit"
"""The answer's formula could not be compared within the processor time allowed; its value is 0."""
FLAG_FORMULA_LOST = "formula_lost"
"""The comparison was lost, by no fault of the answer; there is no value."""

MAX_ANSWER = 200
"""Characters; what is longer is not read as a number or formula. An answer is short."""
POINT_LANGUAGES = ("en", "ja", "ko", "zh")
"""Languages that write 1,234.5; the others write 1.234,5, or both ways."""


@dataclass(frozen=True)
class Number:
    """A number as written: `readings` are the values it may stand for, before the percent sign that may follow."""

    readings: frozenset[Fraction]
    percent: bool = False

    def equals(self, answer: Number, tolerance: float) -> bool:
        """Some reading of `answer` lies within `tolerance`, relative, of one of this reference. A percent sign on one
        side alone is a hundredth or the unit: 50% equals 50 and 0.5."""
        scales = [Fraction(1)]
        if self.percent != answer.percent:
            scales.append(Fraction(100) if self.percent else Fraction(1, 100))
        return any(
            abs(value * scale - wanted) <= Fraction(tolerance) * abs(wanted)
            for wanted in self.readings
            for value in answer.readings
            for scale in scales
        )


class NumericVerifier(AnswerVerifier):
    r"""1 if the response's final answer equals the reference's as a number or formula, else 0.

    The final answer is the first of: the last \boxed{}; what follows the last ####; the number or formula stated after
    a word of ANSWER_WORDS ("the answer is 18"), the last time; a response that is nothing but a number or formula; the
    last formula between dollars or LaTeX brackets, or the last number, whichever comes later (where the reference is a
    formula, such a formula comes before any number). References are read by the same rules, so that worked solutions
    may be references. Number words ("eighteen", "十八") are not read.

    Numbers are compared exactly, as fractions, so that 0.333 is not 1/3 unless `tolerance` says so:
    - digits of all scripts, the Unicode minus, fractions (3/4, ½, 1 1/2, \frac{3}{4}), 1.5×10^3, 1.5e3, 万 and 亿,
      currencies and units beside them;
    - groups of three after comma, point, apostrophe or space; of several different marks the last is the decimal mark;
    - a single comma or point before exactly three digits says either: where the language writes 1,234.5
      (POINT_LANGUAGES), the comma groups and the point is the decimal mark; elsewhere both readings count, since models
      mix notations there, except that three zeros (5.000) are always a group;
    - a percent sign on one side alone is a hundredth or the unit.

    Formulas, and numbers given as formulas, are compared by math-verify in its own process (formulas.py), decimals to
    6 places.
    """

    def __init__(self, config: VerifierConfig, key: str):
        super().__init__(config, key)
        self._tolerance = config.tolerance
        self._formulas = formulas.FormulaComparer()
        self._identity = {name: version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")}

    def identity(self) -> dict[str, object]:
        return {**super().identity(), **self._identity}

    def close(self) -> None:
        self._formulas.close()

    def _compare(self, answer: str, request: ScoreRequest, language: str) -> Verdict:
        reference = final_answer(normalise(request.reference))
        if reference is None:
            return Verdict(None, flags=(FLAG_UNREADABLE_REFERENCE,))
        wanted = read_number(reference, request.reference_language)
        given = final_answer(normalise(answer), needs_digit=wanted is not None)
        if given is None:
            return Verdict(0.0, flags=(FLAG_NO_ANSWER,))
        value = read_number(given, language)
        if wanted is not None and value is not None:
            return Verdict(float(wanted.equals(value, self._tolerance)))
        found = self._formulas.compare(_latex(reference), _latex(given), self._tolerance)
        if found == formulas.UNREADABLE:
            return Verdict(None, flags=(FLAG_UNREADABLE_REFERENCE,))
        if found == formulas.LIMIT:
            return Verdict(0.0, flags=(FLAG_FORMULA_LIMIT,))
        if found == formulas.LOST:
            return Verdict(None, flags=(FLAG_FORMULA_LOST,))
        return Verdict(float(found == formulas.EQUAL))


_SUPERSCRIPTS = {ord(c): f"^{digit}" for digit, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
_VULGAR = {
    code: f" {numerator}/{denominator}"
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))
    for numerator, denominator in [unicodedata.normalize("NFKC", chr(code)).split("\u2044")]
}
_SIGNS = {
    **dict.fromkeys(map(ord, "−﹣－"), "-"),
    **dict.fromkeys(map(ord, "’٬"), "'"),
    **dict.fromkeys(map(ord, "٪﹪％"), "%"),
    ord("٫"): ".",
    ord("⁄"): "/",
    ord("∕"): "/",
    ord("÷"): "/",
}


def normalise(text: str) -> str:
    """NFKC with ASCII digits, signs and fractions; powers are written with ^."""
    # Before NFKC, which makes 5 m² to 5 m2, and 1½ to 11/2.
    text = clean(text.translate(_SUPERSCRIPTS).translate(_VULGAR)).translate(_SIGNS)
    if text.isascii():
        return text
    # A dash that touches a number is a minus; elsewhere it is a dash.
    text = re.sub(r"[‒–](?=[\d.,])", "-", text)
    return re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text)


_CURRENCY = r"[$€£¥₹₩₽₫]"
_PLAIN = (
    # Groups of three, or India's; the mark of the groups is not the decimal mark.
    r"(?:\d{1,3}(?:(?P<mark>[,.' ])\d{3}(?!\d))(?:(?P=mark)\d{3}(?!\d))*(?:(?!(?P=mark))[.,]\d+)?"
    r"|\d{1,2}(?:,\d\d)+,\d{3}(?:\.\d+)?(?!\d)"
    r"|\d+(?:[.,]\d+)?|[.,]\d+)"
)
_NUMBER = (
    # Not within a word or an exponent: X2, m^2; a minus after a digit or bracket subtracts.
    rf"(?<![A-Za-z\u00c0-\u052f\d^_])(?<!\^\{{)(?P<sign>(?<![\w)\]}}%])[-+])?{_CURRENCY}?\s?(?P<inner>-)?"
    rf"(?P<value>(?:(?P<whole>\d{{1,9}}) (?=\d{{1,9}}/\d))?{_PLAIN})"
    r"(?:\s?/\s?(?P<denominator>\d+)(?![\d.,]*\d))?"
    r"(?:(?:\s?[×x*·]\s?10\s?\^\s?\{?(?P<power>[-+]?\d{1,3})\}?|[eE](?P<e>[-+]?\d{1,3}))(?!\w))?"
    r"(?:\s?(?P<myriads>[万萬만亿億억])(?P<rest>\d{1,8}(?!\d))?)?"
    r"(?P<percent>\s?%)?"
)
_NUMBER_RE = re.compile(_NUMBER)
# A unit is a word or one of the usual letters, with a power or per another; 2x and 2pi have none.
_UNIT_WORD = (
    r"(?!(?:pi|sqrt|sin|cos|tan|log|ln|exp|or|and)(?![^\W\d_]))"
    r"(?:[^\W\d_]{2,}|[mglhstkLWVJNAKCFкмгчс個个人元円원일])(?:\^?[23](?!\d))?"
)
_QUANTITY = re.compile(
    rf"\s*{_NUMBER}\s*{_CURRENCY}?\s*"
    rf"(?:°?{_UNIT_WORD}(?:\s*[/·]\s*{_UNIT_WORD}|[\s,-]+{_UNIT_WORD}){{0,3}})?[°\s.!。]*"
)
_STATED = re.compile(
    rf"{ANSWER_WORDS}(?:[^\n!?。]{{0,60}}?{LINKS})?(?:{OPENING}|[≈~$€£¥]){{0,8}}?"
    rf"(?P<stated>\$[^$\n]{{1,200}}\$|\\\([^\n]{{1,200}}?\\\)|\\[A-Za-z]+|{_NUMBER})"
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)|。")
_BULLET = re.compile(r"^\s*[-+*•]\s+")
# "2 * 9 = 18" is stated as a whole.
_REST = re.compile(r"(?:\s?(?:\*\*|[-+*/×·^=≈])\s?[$€£¥]?\(?\d[\d.,]*\)?)+")
# Pandoc's rule for dollars: no space within them and no digit behind; so "$5 and $7" is no formula.
_FORMULA = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|(?<![\\$])\$(?=\S)(?P<inline>[^$\n]{1,200})(?<=\S)\$(?!\d)"
    r"|\\\((?P<round>.{1,200}?)\\\)|\\\[(?P<square>.{1,200}?)\\\]",
    re.DOTALL,
)
_EQUALITY = re.compile(r"(?<![<>!\\])=|≈|\\approx(?![a-z])")


def final_answer(text: str, needs_digit: bool = False) -> str | None:
    """The number or formula that `text`, as `normalise` gives it, ends in, by the rules of NumericVerifier; None
    where there is none. `needs_digit`: formulas without any digit are passed over."""
    for candidate in _candidates(text, needs_digit):
        candidate = candidate.strip(" \n\t*$.。")
        if needs_digit:
            candidate = _EQUALITY.split(candidate)[-1].strip()
        if 0 < len(candidate) <= MAX_ANSWER and (re.search(r"\d", candidate) or not needs_digit):
            return candidate
    return None


def _candidates(text: str, needs_digit: bool) -> Iterator[str]:
    for _, content in boxed(text):
        yield _head(content)
        break
    start = text.rfind("####")
    if start >= 0:
        yield _head(text[start + 4 :].strip().partition("\n")[0])
    if (stated := _last(_STATED, text)) is not None:
        start = stated.start("stated")
        sentence = _SENTENCE_END.split(text[start : start + MAX_ANSWER], maxsplit=1)[0]
        rest = _REST.match(text, stated.end())
        yield sentence if _is_formula(sentence) else stated["stated"] + (rest[0] if rest else "")
    alone = _BULLET.sub("", text)
    if len(alone) <= MAX_ANSWER and (_is_quantity(alone) or _is_formula(alone)):
        yield alone
    yield from _last_tokens(text, needs_digit)


def _head(text: str) -> str:
    """`text`, or the number that it begins with if words follow: "18 apples for 3 people"."""
    if _is_quantity(text) or _is_formula(text):
        return text
    number = _NUMBER_RE.search(text)
    return number[0] if number else text


def _last_tokens(text: str, needs_digit: bool) -> Iterator[str]:
    spans = [(match.start(), match.end(), match[match.lastgroup or 0]) for match in _FORMULA.finditer(text)]
    spans = [span for span in spans if _is_formula(span[2]) or _is_quantity(span[2])]
    if needs_digit:
        spans = [span for span in spans if re.search(r"\d", span[2])]
    contents = [content for _, _, content in reversed(spans)]
    position = spans[-1][1] if spans and needs_digit else 0
    last = _last(_NUMBER_RE, text, position)
    numbers = [last[0]] if last else []
    yield from (*numbers, *contents) if needs_digit else (*contents, *numbers)


def _last(pattern: re.Pattern[str], text: str, position: int = 0) -> re.Match[str] | None:
    last = collections.deque(pattern.finditer(text, position), maxlen=1)
    return last[0] if last else None


def _is_quantity(text: str) -> bool:
    return len(text) <= MAX_ANSWER and _QUANTITY.fullmatch(_without_latex(text)) is not None


def _is_formula(text: str) -> bool:
    """Mathematics rather than prose: LaTeX commands and function names are its only words."""
    bare = re.sub(
        r"\\text[a-z]*\{[^{}]*\}|\\[A-Za-z]+|(?<![A-Za-z])(?:sqrt|sin|cos|tan|log|ln|exp|pi)(?![A-Za-z])", "", text
    )
    return bool(re.search(r"\S", text)) and not re.search(r"[^\W\d_]{3,}|[^\W\d_]+\s+[^\W\d_]+", bare)


def _without_latex(text: str) -> str:
    """LaTeX's notation of plain numbers in plain notation; other commands stay."""
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;: ]", "", text.replace("{,}", ","))
    text = re.sub(r"\\[dt]?frac\s*\{?(-?\d+)\}?\s*\{(\d+)\}", r" \1/\2", text)
    text = re.sub(r"\\(?:text[a-z]*|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree(?![A-Za-z])", "°", text)
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "×", text)
    return re.sub(r"\\([%$&#])", r"\1", text).replace("~", " ")


def read_number(text: str, language: str) -> Number | None:
    """`text`, a candidate of final_answer, as a plain number with its unit; None for any other formula."""
    text = _without_latex(text).strip()
    if len(text) > MAX_ANSWER:
        return None
    match = _QUANTITY.fullmatch(text) or _QUANTITY.fullmatch(_EQUALITY.split(text)[-1])
    if match is None:
        return None
    factor = Fraction(10) ** int(match["power"] or match["e"] or 0)
    if match["myriads"]:
        factor *= 10**4 if match["myriads"] in "万萬만" else 10**8
    if match["denominator"]:
        if int(match["denominator"]) == 0:
            return None
        factor /= int(match["denominator"])
    whole = int(match["whole"] or 0)
    rest = int(match["rest"] or 0)
    negative = (match["sign"] == "-") != bool(match["inner"])
    plain = match["value"][len(match["whole"]) + 1 :] if match["whole"] else match["value"]
    readings = (whole + value * factor + rest for value in _readings(plain, match["mark"], language))
    return Number(frozenset(-value if negative else value for value in readings), bool(match["percent"]))


def _readings(text: str, mark: str | None, language: str) -> Iterator[Fraction]:
    """The values of digits with marks; `mark` is that of groups of three, where there may be some."""
    if mark in (",", ".") and re.fullmatch(r"\d{1,3}[,.]\d{3}", text):
        decimal, grouped = Fraction(text.replace(",", ".")), Fraction(re.sub(r"[,.]", "", text))
        if text[0] == "0":
            yield decimal
        elif language in POINT_LANGUAGES:
            yield grouped if mark == "," else decimal
        else:
            yield grouped
            if not text.endswith("000"):
                yield decimal
    elif mark is not None:
        yield Fraction(text.replace(mark, "").replace(",", "."))
    elif text.count(",") > 1:
        yield Fraction(text.replace(",", ""))
    else:
        yield Fraction(text.replace(",", "."))


def _latex(text: str) -> str:
    """Without what would end the dollars that formulas.py writes around it."""
    return text.replace(r"\$", "").replace("$", "")
