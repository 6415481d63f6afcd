"""`data` and `prompt`: what is asked, and in which form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Optional

from nemo_lrpo.config.checks import check_choice, check_range


def _languages() -> List[str]:
    return "ar de en es fr id it ja ko nl pl pt ru vi zh".split()


@dataclass
class DataConfig:
    train: Optional[str] = None
    validation: Optional[str] = None
    languages: List[str] = field(default_factory=_languages)
    shuffle: bool = True

    def check(self, key: str) -> None:
        pass


@dataclass
class PromptConfig:
    style: str = "tag"
    max_tokens: int = 512
    over_long: str = "reject"
    chat_template: Optional[str] = None

    def check(self, key: str) -> None:
        check_choice(f"{key}.style", self.style, ("tag", "system"))
        check_choice(f"{key}.over_long", self.over_long, ("reject", "drop"))
        check_range(f"{key}.max_tokens", self.max_tokens, at_least=1)
