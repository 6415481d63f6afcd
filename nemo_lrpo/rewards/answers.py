"""Answers that can be checked against a reference by rule: exact, multiple choice, format. Numbers: numeric.py."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import regex

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import VerifierConfig
from nemo_lrpo.rewards.verifier import FLAG_UNREADABLE_REFERENCE, ShouldStop, Verdict, never
from nemo_lrpo.types import ScoreRequest, ScoringAbandoned

FLAG_NO_ANSWER = "no_answer"
"""The response states no answer that the verifier can read; its value is 0."""
FLAG_AMBIGUOUS = "ambiguous"
"""The response states two different options as its answer; its value is 0."""

PATTERN_TIMEOUT_S = 2.0
"""Of one pattern on one response, in processor time of the whole process, other threads included. A pattern that
backtracks without end would stop the server otherwise; a sound one takes milliseconds."""

# Bidirectional controls, byte order mark, zero-width space, soft hyphen: they surround right-to-left answers, unseen.
_UNSEEN = dict.fromkeys(
    map(ord, "\u200b\u200e\u200f\u061c\ufeff\u00ad\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
)
# Thirty marks on one character are what Unicode calls stream-safe (UAX 15). Normalisation sorts them in quadratic time,
# so that a response of 100 kB of them would hold the server for a minute.
_MARKS = regex.compile(r"(\p{M}{30})\p{M}+")

ANSWER_WORDS = (
    r"(?i:(?<!\w)(?:answer|antwort|ergebnis|lösung|réponse|respuesta|risposta|resposta|antwoord|odpowied[źz]|wynik"
    r"|ответ(?:ом)?|jawaban(?:nya)?|đáp án|đáp số|câu trả lời|trả lời)(?!\w)"
    r"|ال[إا]جابة|الجواب|答案|答え|答(?=[::])|正解|解答|回答|정답|답)"
)
"""What announces a final answer, in the 15 languages. Text is in NFKC."""
LINKS = (
    r"(?i:(?<!\w)(?:is|are|equals|ist|lautet|beträgt|est|es|è|é|jest|to|wynosi|adalah|là|هي|هو|равен|равно)(?!\w)"
    r"|[:=≈—–]|是|为|為|は|が|은|는|이|가)"
)
"""What joins such a word and the answer."""
OPENING = r"[\s*_\"'“”«»‘’「『【(\[]"
"""White space, quotes, brackets and Markdown that may stand before an answer."""


def clean(text: str) -> str:
    """NFKC without unseen characters; any string, lone surrogates included, in time linear in its length."""
    return unicodedata.normalize("NFKC", _MARKS.sub(r"\1", text.translate(_UNSEEN)))


def boxed(text: str) -> Iterator[tuple[int, str]]:
    r"""Position and content of each \boxed{...} with balanced braces, the last one first."""
    end = len(text)
    # A response that was cut off, or plays with braces, costs a few scans at most.
    for _ in range(3):
        start = text.rfind(r"\boxed{", 0, end)
        if start < 0:
            return
        depth = 0
        for brace in re.finditer(r"[{}]", text[start:]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                yield start, text[start + len(r"\boxed{") : start + brace.start()]
                break
        end = start


class AnswerVerifier:
    """What exact, numeric, choice and format share: one answer after another, and the configured pattern.

    `key` is the verifier's configuration key. Raises ConfigError where the pattern cannot be compiled.
    """

    def __init__(self, config: VerifierConfig, key: str):
        self._kind = config.kind
        self._pattern: regex.Pattern[str] | None = None
        if config.pattern is not None:
            try:
                self._pattern = regex.compile(config.pattern, regex.DOTALL if config.kind == "format" else 0)
            except regex.error as error:
                raise ConfigError(f"{key}.pattern={config.pattern!r} is no regular expression: {error}.") from error

    def verify(
        self, requests: Sequence[ScoreRequest], languages: Sequence[str], should_stop: ShouldStop = never
    ) -> list[Verdict]:
        """See Verifier. A pattern that ran out of time gives no value and the flag `<kind>_timeout`."""
        verdicts = []
        for request, language in zip(requests, languages, strict=True):
            if should_stop():
                raise ScoringAbandoned(f"stopped after {len(verdicts)} of {len(requests)} answers")
            try:
                verdicts.append(self._judge(request, language))
            except TimeoutError:
                verdicts.append(Verdict(None, flags=(f"{self._kind}_timeout",)))
        return verdicts

    def identity(self) -> dict[str, object]:
        return {"regex": version("regex")}

    def counts(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass

    def _judge(self, request: ScoreRequest, language: str) -> Verdict:
        answer: str | None = request.response
        if self._pattern is not None:
            answer = None
            for match in self._pattern.finditer(request.response, timeout=PATTERN_TIMEOUT_S):
                answer = match[1] if match[1] is not None else answer
        if answer is None:
            return Verdict(0.0, flags=(FLAG_NO_ANSWER,))
        return self._compare(answer, request, language)

    def _compare(self, answer: str, request: ScoreRequest, language: str) -> Verdict:
        raise NotImplementedError


class ExactVerifier(AnswerVerifier):
    """1 if the answer equals the reference as `plain` writes both, else 0."""

    def _compare(self, answer: str, request: ScoreRequest, language: str) -> Verdict:
        reference = plain(request.reference)
        if not reference:
            return Verdict(None, flags=(FLAG_UNREADABLE_REFERENCE,))
        return Verdict(float(plain(answer) == reference))


def plain(text: str) -> str:
    """NFKC, case folded, white space collapsed, outer punctuation stripped.

    Punctuation: quotes, full stops and their like in all scripts, Markdown's * _ `, and dashes. Kept, because they make
    another answer: the signs % ‰ # & @ / \\, round, square and curly brackets (intervals), and a dash or point
    directly before a digit. A text of punctuation alone is kept as it is.
    """
    # Case folding may leave the normal form.
    folded = " ".join(unicodedata.normalize("NFKC", clean(text).casefold()).split())
    start, end = 0, len(folded)
    while start < end and _is_outer(folded[start], folded[start + 1 : start + 2]):
        start += 1
    while end > start and _is_outer(folded[end - 1], ""):
        end -= 1
    return folded[start:end] or folded


def _is_outer(character: str, following: str) -> bool:
    if character in "%‰#&@/\\()[]{}":
        return False
    if following.isdigit() and (character == "." or unicodedata.category(character) == "Pd"):
        return False
    return character in " `" or unicodedata.category(character).startswith("P")


class FormatVerifier(AnswerVerifier):
    """1 if the whole response matches the pattern (`.` matches line ends too), else 0."""

    def _judge(self, request: ScoreRequest, language: str) -> Verdict:
        assert self._pattern is not None
        match = self._pattern.fullmatch(request.response, timeout=PATTERN_TIMEOUT_S)
        return Verdict(float(match is not None))


_LATIN = "ABCDEFGHIJ"
_CYRILLIC = "АБВГДЕЖЗИК"
_CYRILLIC_AS_LATIN = dict(zip("АВСЕН", "ABCEH"))
_ARABIC = {**dict(zip("أبجدهوزحطي", _LATIN)), "ا": "A", "إ": "A"}
_LETTER = r"A-Za-z0-9_\u00c0-\u024f\u0400-\u04ff\u0620-\u065f'’"
# Chinese, Japanese and Korean words may touch a label, letters of alphabets may not: "B입니다", but not "Box", "D'or".
_LABEL = (
    rf"(?<![{_LETTER}])(?<!\w-)"
    r"(?P<{name}>[A-JАБВГДЕЖЗИКСН]|[اأإبجدهوزحطي]|[a-jабвгд](?=\)|\.?[\s*_]*(?:\n|$)))ـ?"
    rf"(?![{_LETTER}]|-\w)"
)


def _label(name: str) -> str:
    return _LABEL.replace("{name}", name)


_INDENT = r"^[\s>#*_(\[\"'“-]{0,8}"
_CLOSING = r"[\s*_\"'“”«»‘’」』】)\].:,;。،]"
_OPTION_WORDS = (
    r"(?i:(?<!\w)(?:option|choice|letter|choix|lettre|opción|opzione|lettera|opção|letra|optie|opcja|buchstabe|вариант"
    r"|pilihan|opsi|phương án|الخيار)(?!\w)|选项|選項|選択肢|선택지)"
)
_ARTICLE = r"(?i:(?:the|die|der|la|l|le|il|el|a|o|de|het)[\s'’])"
_CHOOSE = r"(?i:(?<!\w)(?:choose|chọn)(?!\w)|[选選](?![项項])[择擇]?)"
_NEGATION = re.compile(
    r"(?i:(?<!\w)(?:not|no|nicht|kein\w*|pas|non|não|nie|niet|geen|не|bukan|không)(?!\w)|n't|不|非|아니|ない|ليس)"
)
# What Korean and Japanese say after the label: "A is not".
_DENIED = re.compile(r"\s?(?:가|이|では|じゃ|が)?\s?(?:아니|아닙|ない|なく|ありません)")
_AND = (
    r"(?:[,/&、،+]|(?i:(?<!\w)(?:and|or|und|oder|et|ou|y|o|e|и|или|en|of|i|lub|dan|atau|và|hoặc|أو|و)(?!\w))"
    r"|和|或|还是|還是|と|또는)"
)
_LOWER_CASE_WORD = re.compile(r"\s[a-zà-ÿ]")

# "Answer: B", "the answer is (B)", "la respuesta es la opción B", "答案是B", "Ответ — Б", "故选B".
_STATED = re.compile(
    rf"(?:{ANSWER_WORDS}(?:(?P<gap>[^\n.!?。]{{0,60}}?)(?P<link>{LINKS}))?|{_CHOOSE})"
    rf"{OPENING}{{0,8}}{_ARTICLE}?(?:{_OPTION_WORDS}{OPENING}{{0,4}})?{_label('label')}"
)
# "B is the correct answer", "B는 정답입니다".
_STATED_BEFORE = re.compile(
    rf"{_label('label')}{_CLOSING}{{0,4}}(?P<link>{LINKS})(?P<gap>[^\n.!?。:]{{0,30}}?){ANSWER_WORDS}"
)
_SECOND = re.compile(rf"{_CLOSING}{{0,4}}{_AND}{OPENING}{{0,4}}(?:{_OPTION_WORDS}\s?)?{_label('second')}")
_LABEL_ONLY = re.compile(rf"{_INDENT}(?:{_OPTION_WORDS}\s?)?{_label('label')}[\s)\].:*_\"'”。]{{0,8}}$", re.M)
_LABEL_LINE = re.compile(rf"{_INDENT}{_label('label')}[*_\s]{{0,4}}[)\].:、][*_]{{0,3}}(?:[^\S\n]|[^\x00-\x7f])", re.M)
_MENTIONED = re.compile(
    rf"{_OPTION_WORDS}{OPENING}{{0,4}}{_label('option')}|\({_label('bracketed')}\)|\*\*\(?{_label('bold')}[).]?\*\*"
)


class ChoiceVerifier(AnswerVerifier):
    r"""1 if the option that the response picks is the reference's, else 0.

    Options are lettered A to J, in Latin letters (full width, circled and mathematical ones included), in Cyrillic
    (А Б В Г Д ...) or in Arabic (أ ب ج د ه ...). The reference begins with such a letter, or is an index from 0. The
    Cyrillic В and Е look like B and E but come third and sixth: they count by their place where the reference is
    Cyrillic or a Б stands alone in question or response, and by their looks otherwise.

    What the response picks, the first rule that finds something:
    1. the last of \boxed{B}, "the answer is B", "B is the answer", in the words of ANSWER_WORDS, not negated;
    2. a last line that holds nothing but the letter;
    3. the lines that begin with a letter and a mark: "B) Paris";
    4. letters in brackets, in bold, or after a word for option: "(B)", "**B**", "option B".
    Two options in the last statement of rule 1, or different ones under rules 3 and 4, are ambiguous. A bare letter
    within a sentence is no answer, nor is the article in "A dog".
    """

    def _compare(self, answer: str, request: ScoreRequest, language: str) -> Verdict:
        reference = clean(request.reference).strip()
        expected = _reference_letter(reference)
        if expected is None:
            return Verdict(None, flags=(FLAG_UNREADABLE_REFERENCE,))
        text = clean(answer)
        by_place = bool(re.match(r"\W?[А-Я]", reference)) or any(
            re.search(r"(?<!\w)Б(?!\w)", written) for written in (text, clean(request.question))
        )
        picked = {_letter(label, by_place) for label in picked_labels(text)}
        if not picked:
            return Verdict(0.0, flags=(FLAG_NO_ANSWER,))
        if len(picked) > 1:
            return Verdict(0.0, flags=(FLAG_AMBIGUOUS,))
        return Verdict(float(picked == {expected}))


def picked_labels(text: str) -> set[str]:
    """The option letters that `text`, as `clean` gives it, picks by the rules of ChoiceVerifier, as written."""
    stated = _last_statement(text)
    if stated is not None:
        return stated
    only = list(_LABEL_ONLY.finditer(text))
    if only and not text[only[-1].end() :].strip():
        return {only[-1]["label"]}
    lines = {match["label"] for match in _LABEL_LINE.finditer(text)} | {match["label"] for match in only}
    return lines or {match[match.lastgroup] for match in _MENTIONED.finditer(text) if match.lastgroup}


def _last_statement(text: str) -> set[str] | None:
    last, found = -1, None
    for start, content in boxed(text):
        if labels := _boxed_labels(content):
            last, found = start, labels
            break
    for pattern in (_STATED, _STATED_BEFORE):
        for match in pattern.finditer(text):
            if match.start("label") < last or _is_article(match) or _is_denied(match):
                continue
            last, found = match.start("label"), {match["label"]}
            if pattern is _STATED and (second := _SECOND.match(text, match.end())):
                found.add(second["second"])
    return found


def _boxed_labels(content: str) -> set[str]:
    """Of a box that holds letters alone, or begins as an option's line does."""
    content = re.sub(r"\\[a-z]+|[{}]", " ", content) + "\n"
    if line := _LABEL_LINE.match(content):
        return {line["label"]}
    alone = re.compile(_label("label"))
    rest = re.sub(_AND, "", alone.sub("", content))
    return set() if re.search(r"\w", rest) else {match["label"] for match in alone.finditer(content)}


def _is_denied(match: re.Match[str]) -> bool:
    return bool(_NEGATION.search(match["gap"] or "") or _DENIED.match(match.string, match.end("label")))


def _is_article(match: re.Match[str]) -> bool:
    """The letter is a word of some language (English a, Spanish e, ...) before another word: "Answer: A dog"."""
    return (
        match["label"] in ("A", "E", "I")
        and match["link"] in (None, ":")
        and _LOWER_CASE_WORD.match(match.string, match.end()) is not None
    )


def _reference_letter(reference: str) -> str | None:
    if re.fullmatch(r"\d", reference):
        return _LATIN[int(reference)]
    match = re.match(rf"[(\[]?{_label('label')}(?:[)\].:、]|\s*$)", reference)
    return _letter(match["label"], by_place=True) if match else None


def _letter(label: str, by_place: bool) -> str:
    upper = label.upper()
    if upper in _ARABIC:
        return _ARABIC[upper]
    if upper in _LATIN:
        return upper
    if not by_place and upper in _CYRILLIC_AS_LATIN:
        return _CYRILLIC_AS_LATIN[upper]
    return _LATIN[_CYRILLIC.index(upper)] if upper in _CYRILLIC else _CYRILLIC_AS_LATIN[upper]
