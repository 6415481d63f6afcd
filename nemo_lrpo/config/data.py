"""`data` and `prompt`: what is asked, and in which form."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from nemo_lrpo.config.checks import ConfigError, check_choice, check_file, check_range


def _languages() -> List[str]:
    return "ar de en es fr id it ja ko nl pl pt ru vi zh".split()


@dataclass
class DataConfig:
    """Questions with reference answers; nemo_lrpo/data/reader.py describes a row."""

    train: Optional[str] = None
    """Training questions: a .parquet or .jsonl file, or a directory of .parquet files."""
    validation: Optional[str] = None
    """Questions answered between training steps, in the same formats; null: none."""
    languages: List[str] = field(default_factory=_languages)
    """Candidate languages of the rollouts, ISO 639-1 codes; every question is written in one of them."""
    shuffle: bool = True
    """Each epoch in an order of its own, a function of the seed and the epoch; false: in file order."""

    def check(self, key: str) -> None:
        """Raise ConfigError unless paths exist and the languages are distinct two-letter codes."""
        _check_source(f"{key}.train", self.train)
        if self.validation is not None:
            _check_source(f"{key}.validation", self.validation)
        for language in self.languages:
            if not re.fullmatch("[a-z]{2}", language):
                raise ConfigError(
                    f"{key}.languages: {language!r} is not a language code; accepted: ISO 639-1 codes such as de, en."
                )
        repeated = sorted({language for language in self.languages if self.languages.count(language) > 1})
        if repeated or not self.languages:
            raise ConfigError(
                f"{key}.languages={list(self.languages)!r} must name at least one language, each once"
                + (f"; named twice: {', '.join(repeated)}." if repeated else ".")
            )


@dataclass
class PromptConfig:
    """How a question becomes the policy's prompt."""

    style: str = "tag"
    """tag: one user turn, the question, a newline and `<|out_lang_xx|>`; system: the question as user turn after a
    system turn that asks for the language in that language."""
    max_tokens: int = 512
    """Longest prompt in tokens, chat template and language tag included."""
    over_long: str = "reject"
    """A question that is longer in any language it may be routed to: reject stops the run before it starts, naming
    the question; drop leaves such questions out and says how many."""
    chat_template: Optional[str] = None
    """Path of a Jinja chat template used instead of the tokenizer's own; needed where the tokenizer has none."""

    def check(self, key: str) -> None:
        """Raise ConfigError unless the values can be used; the template is tried out once the tokenizer is known."""
        check_choice(f"{key}.style", self.style, ("tag", "system"))
        check_choice(f"{key}.over_long", self.over_long, ("reject", "drop"))
        check_range(f"{key}.max_tokens", self.max_tokens, at_least=1)
        if self.chat_template is not None:
            check_file(f"{key}.chat_template", self.chat_template, "give the path of a Jinja file, or null")


def _check_source(key: str, value: Optional[str]) -> None:
    remedy = "give a .parquet or .jsonl file, or a directory of .parquet files"
    if not value:
        raise ConfigError(f"{key} is not set; {remedy}.")
    if not Path(value).exists():
        raise ConfigError(f"{key}={value!r}: no such file or directory; {remedy}.")
