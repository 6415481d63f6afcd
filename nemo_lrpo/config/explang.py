"""`explang`: the policy chooses the language that it thinks in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from itertools import permutations
from typing import List

from nemo_lrpo.config.checks import ConfigError, check_range


def _seen() -> List[str]:
    return "ar de en es fr it ja ko pt ru th vi zh".split()


@dataclass
class MarksConfig:
    """What sets the parts of an output apart. Plain text, or tokens that decoding keeps: special tokens are dropped."""

    language_open: str = "<lang_select>"
    """Before the code of the thinking language; an output begins with it."""
    language_close: str = "</lang_select>"
    """After the code."""
    thinking_open: str = "<think>"
    """Before the thinking block."""
    thinking_close: str = "</think>"
    """After the thinking block; what follows is the answer."""

    def check(self, key: str) -> None:
        """Raise ConfigError unless each mark can be found, and told from the others."""
        marks = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name, mark in marks.items():
            if not mark or any(map(str.isspace, mark)):
                raise ConfigError(f"{key}.{name}={mark!r} must be a text without white space.")
        for (name, mark), (other, longer) in permutations(marks.items(), 2):
            if mark in longer:
                raise ConfigError(f"{key}.{name}={mark!r} is part of {key}.{other}={longer!r}; give marks that do not.")


@dataclass
class StageConfig:
    """What a stage of the training adds to the reward, and whether it holds the policy to the initial one."""

    diversity: float = 0.0
    """lambda_d, weight of r_d: the languages that few of the group chose pay."""
    pass_at_k: float = 0.0
    """lambda_p, weight of r_p: the languages in which one of the group found the answer pay."""
    kl: bool = True
    """false: algorithm.kl_coefficient counts as 0 in this stage."""

    def check(self, key: str) -> None:
        """Raise ConfigError, naming the field, for a weight that is no weight."""
        check_range(f"{key}.diversity", self.diversity, at_least=0.0, below=math.inf)
        check_range(f"{key}.pass_at_k", self.pass_at_k, at_least=0.0, below=math.inf)


def _exploration() -> StageConfig:
    return StageConfig(diversity=0.2, pass_at_k=0.0, kl=False)


def _exploitation() -> StageConfig:
    return StageConfig(diversity=0.0, pass_at_k=0.5, kl=True)


@dataclass
class ExplangConfig:
    """r = lambda_f r_f + lambda_c r_c + lambda_d r_d + lambda_p r_p + lambda_v r_v; defaults of the published run."""

    marks: MarksConfig = field(default_factory=MarksConfig)
    format_weight: float = 0.2
    """lambda_f, weight of r_f: the output is whole."""
    compliance_weight: float = 0.2
    """lambda_c, weight of r_c: the thinking block is in the language that was chosen."""
    verification_weight: float = 1.0
    """lambda_v, weight of r_v: the answer is right."""
    correct_from: float = 1.0
    """An answer counts as correct, for r_p and the metrics, from this r_v on."""
    diversity_needs_compliance: bool = False
    """r_d times r_c: a rare language pays only if the thinking block is in it, as in the released code."""
    exploration_share: float = 0.25
    """Share of the run's steps, its first ones, that are exploration; the others are exploitation."""
    exploration: StageConfig = field(default_factory=_exploration)
    exploitation: StageConfig = field(default_factory=_exploitation)
    seen: List[str] = field(default_factory=_seen)
    """Languages that the cold start has taught, ISO 639-1 codes; the reward server has to know them, and metrics
    keep the others apart."""

    def check(self, key: str) -> None:
        """Raise ConfigError, naming the field, for a value that cannot train."""
        self.marks.check(f"{key}.marks")
        for name in ("format_weight", "compliance_weight", "verification_weight"):
            check_range(f"{key}.{name}", getattr(self, name), at_least=0.0, below=math.inf)
        check_range(f"{key}.correct_from", self.correct_from, above=0.0, at_most=1.0)
        check_range(f"{key}.exploration_share", self.exploration_share, at_least=0.0, at_most=1.0)
        self.exploration.check(f"{key}.exploration")
        self.exploitation.check(f"{key}.exploitation")
        for language in self.seen:
            if not re.fullmatch("[a-z]{2}", language):
                raise ConfigError(f"{key}.seen: {language!r} is not a language code; accepted: ISO 639-1, such as de.")
        if len(set(self.seen)) != len(self.seen):
            raise ConfigError(f"{key}.seen={list(self.seen)!r} names a language twice.")
