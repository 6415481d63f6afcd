"""`data` and `method` of training over preference pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

from nemo_lrpo.config.checks import ConfigError, check_choice, check_file, check_range

DPO, REWARD_GAP = "dpo", "reward_gap"
LOSSES = (DPO, REWARD_GAP)


@dataclass
class PairDataConfig:
    """Preference pairs, as tools/make_pairs.py writes them."""

    train: Optional[str] = None
    """A .jsonl of pairs."""
    validation: Optional[str] = None
    """Pairs that are measured between training steps and never trained on, in the same format; null: none, or those
    that `validation_share` holds out."""
    validation_share: float = 0.0
    """Share of the questions of `train` whose pairs are held out for validation; which ones, is a function of the seed
    and the question's id."""
    shuffle: bool = True
    """Each epoch in an order of its own, a function of the seed and the epoch; false: in file order."""
    max_answer_tokens: int = 1024
    """Longest answer, its end token included. prompt.over_long says what happens to a pair with a longer one."""

    def check(self, key: str) -> None:
        """Raise ConfigError unless the files are there and the numbers can be used."""
        remedy = "give a .jsonl of pairs (tools/make_pairs.py makes one of a run)"
        check_file(f"{key}.train", self.train, remedy)
        if self.validation is not None:
            check_file(f"{key}.validation", self.validation, remedy)
        check_range(f"{key}.validation_share", self.validation_share, at_least=0.0, below=1.0)
        if self.validation is not None and self.validation_share:
            raise ConfigError(
                f"{key}.validation={self.validation!r} and {key}.validation_share={self.validation_share:g}: pairs for "
                f"validation come from a file or are held out of {key}.train; set one of them."
            )
        check_range(f"{key}.max_answer_tokens", self.max_answer_tokens, at_least=1)


@dataclass
class MethodConfig:
    """`method`: what becomes of a pair; conf/method has a file for each word. The equations are in
    nemo_lrpo/algorithms/preference.py."""

    name: str = "dpo"
    """What checkpoints and the exported model call it."""
    loss: str = DPO
    """dpo; or reward_gap: the gap in a language is drawn to that of the dominant language's pair, which every pair then
    needs."""
    beta: float = 0.1
    """dpo: how much a change of log-probs counts. reward_gap: factor on the gap before it is compared."""
    label_smoothing: float = 0.0
    """dpo: the probability that a pair's label is wrong."""
    retention: float = 0.0
    """reward_gap: weight of the term that holds the dominant language's answers where they were; 0: none."""

    @property
    def rows_per_pair(self) -> int:
        """Answers that the loss of a pair reads: for reward_gap the dominant language's too."""
        return 2 if self.loss == DPO else 4

    def check(self, key: str) -> None:
        """Raise ConfigError for a value that cannot train, or that the loss does not know."""
        check_choice(f"{key}.loss", self.loss, LOSSES)
        check_range(f"{key}.beta", self.beta, above=0.0, below=math.inf)
        check_range(f"{key}.label_smoothing", self.label_smoothing, at_least=0.0, below=0.5)
        check_range(f"{key}.retention", self.retention, at_least=0.0, below=math.inf)
        if self.loss != DPO and self.label_smoothing:
            raise ConfigError(f"{key}.label_smoothing={self.label_smoothing:g} is of loss=dpo; accepted here: 0.")
        if self.loss != REWARD_GAP and self.retention:
            raise ConfigError(f"{key}.retention={self.retention:g} is of loss=reward_gap; accepted here: 0.")
