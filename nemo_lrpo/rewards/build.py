"""From `verifiers` in the configuration to the objects behind it."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_lrpo.config.scoring import ScorerConfig, VerifierConfig
from nemo_lrpo.rewards.answers import ChoiceVerifier, ExactVerifier, FormatVerifier
from nemo_lrpo.rewards.judge import JudgeVerifier
from nemo_lrpo.rewards.numeric import NumericVerifier
from nemo_lrpo.rewards.similarity import SimilarityVerifier
from nemo_lrpo.rewards.verifier import Verifier

_BY_RULE = {
    "exact": ExactVerifier,
    "numeric": NumericVerifier,
    "choice": ChoiceVerifier,
    "format": FormatVerifier,
}


@dataclass(frozen=True)
class Part:
    """A verifier and how it enters r_qual: see VerifierConfig."""

    name: str
    verifier: Verifier
    config: VerifierConfig


def build_parts(config: ScorerConfig) -> list[Part]:
    """The verifiers of `config`, in its order. Loads models; raises ConfigError where they do not fit together."""
    return [Part(name, _build(name, verifier, config), verifier) for name, verifier in config.verifiers.items()]


def _build(name: str, verifier: VerifierConfig, config: ScorerConfig) -> Verifier:
    if verifier.kind == "similarity":
        return SimilarityVerifier(config)
    if verifier.kind == "judge":
        return JudgeVerifier(config.judge)
    return _BY_RULE[verifier.kind](verifier, f"verifiers.{name}")
