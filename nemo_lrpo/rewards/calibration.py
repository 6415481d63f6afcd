"""Similarities of different language pairs brought to one scale.

An encoder places equivalent texts of some language pairs closer together than those of others. Mean calibration
(paper, calibration section) subtracts how far a pair's mean lies from that of all pairs:

    s' = clip(s - lambda_n (mu_pair - mu_ref), -1, 1),   lambda_n = n / (n + k)

mu_ref is the count-weighted mean over all pairs, n the pair's number of samples. Pairs are unordered.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import CalibrationConfig

FORMAT = "nemo_lrpo pair statistics"
VERSION = 1

RELEASED_NAMES = {
    "Arabic": "ar",
    "Chinese": "zh",
    "Dutch": "nl",
    "English": "en",
    "French": "fr",
    "German": "de",
    "Indonesian": "id",
    "Italian": "it",
    "Japanese": "ja",
    "Korean": "ko",
    "Polish": "pl",
    "Portuguese": "pt",
    "Russian": "ru",
    "Spanish": "es",
    "Vietnamese": "vi",
}
"""Language names of the released table and their ISO 639-1 codes."""

Pair = tuple[str, str]


def language_pair(a: str, b: str) -> Pair:
    """The unordered pair of two languages."""
    return (a, b) if a <= b else (b, a)


@dataclass(frozen=True)
class Moments:
    """Number of samples, mean and (population) standard deviation of a cosine."""

    count: int
    mean: float
    std: float


@dataclass(frozen=True)
class PairStatistics:
    """What tools/calibrate.py measures. encoder: identity of the encoder. pairs: cosine of equivalent texts by
    unordered pair. extra: further statistics by name and pair (mismatches, hardest negatives), not used here.
    source: how they were measured, as free key-value pairs."""

    encoder: str
    pairs: Mapping[Pair, Moments]
    extra: Mapping[str, Mapping[Pair, Moments]] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def mean(self, pairs: Iterable[Pair] | None = None) -> float:
        """Count-weighted mean over `pairs`, by default over all: mu_ref."""
        moments = [self.pairs[pair] for pair in (self.pairs if pairs is None else pairs)]
        return math.fsum(m.count * m.mean for m in moments) / sum(m.count for m in moments)


class Calibration(Protocol):
    """Brings similarities to one scale."""

    def calibrate(self, similarity: float, reference_language: str, response_language: str) -> float:
        """s' of one comparison, in [-1, 1]."""


class NoCalibration:
    """s' = s."""

    def calibrate(self, similarity: float, reference_language: str, response_language: str) -> float:
        return similarity


class MeanCalibration:
    """The module's equation. unknown_pairs counts the comparisons made in pairs without statistics; what happens to
    those is `unknown_pair`, see CalibrationConfig."""

    def __init__(self, statistics: PairStatistics, shrinkage_k: float = 0.0, unknown_pair: str = "reference"):
        pairs = statistics.pairs
        mu_ref = statistics.mean()
        self._shift = {pair: m.count / (m.count + shrinkage_k) * (m.mean - mu_ref) for pair, m in pairs.items()}
        self._unknown_shift = {True: 0.0, False: 0.0}
        if unknown_pair != "raw":
            for same in (True, False):
                kind = [pair for pair in pairs if (pair[0] == pair[1]) is same]
                if kind:
                    self._unknown_shift[same] = statistics.mean(kind) - mu_ref
        self.mu_ref = mu_ref
        self.unknown_pairs: Counter[Pair] = Counter()

    def calibrate(self, similarity: float, reference_language: str, response_language: str) -> float:
        """s' of one comparison, in [-1, 1]; NaN stays NaN."""
        pair = language_pair(reference_language, response_language)
        shift = self._shift.get(pair)
        if shift is None:
            self.unknown_pairs[pair] += 1
            shift = self._unknown_shift[pair[0] == pair[1]]
        return similarity if math.isnan(similarity) else min(1.0, max(-1.0, similarity - shift))


def build_calibration(config: CalibrationConfig, encoder: str, languages: Sequence[str]) -> Calibration:
    """The calibration that `config` asks for, of the encoder with identity `encoder`.

    Raises ConfigError for statistics of another encoder and, with unknown_pair=error, for pairs of `languages` without
    statistics.
    """
    config.check("calibration")
    if config.method == "none":
        return NoCalibration()
    statistics = read_statistics(str(config.path))
    if statistics.encoder != encoder:
        raise ConfigError(
            f"calibration.path={config.path!r} was measured with encoder {statistics.encoder}, this one is {encoder}; "
            "measure it again with tools/calibrate.py (and the same encoder.max_tokens)."
        )
    if config.unknown_pair == "error":
        missing = [f"{a}-{b}" for a in languages for b in languages if a <= b and (a, b) not in statistics.pairs]
        if missing:
            raise ConfigError(
                f"calibration.path={config.path!r} has no statistics for {', '.join(missing)}, and "
                "calibration.unknown_pair=error asks for all; measure them, or choose reference or raw."
            )
    return MeanCalibration(statistics, config.shrinkage_k, config.unknown_pair)


def file_hash(path: str | Path) -> str:
    """`sha256:...` of a small file."""
    return f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"


def read_statistics(path: str | Path) -> PairStatistics:
    """Statistics as write_statistics leaves them. Raises ConfigError naming the file and the offending entry."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{path}: no pair statistics ('format' is not {FORMAT!r}); tools/calibrate.py writes them.")
    if content.get("version") != VERSION:
        raise ConfigError(f"{path}: version {content.get('version')!r} is not known; accepted: {VERSION}.")
    encoder = content.get("encoder")
    if not isinstance(encoder, str) or not encoder:
        raise ConfigError(f"{path}: encoder={encoder!r}; expected the identity of the encoder, sha256:....")
    extra = content.get("extra", {})
    if not isinstance(extra, dict):
        raise ConfigError(f"{path}: extra={extra!r}; expected a mapping of names to lists of pairs.")
    pairs = _read_pairs(content.get("pairs"), f"{path}: pairs")
    if not pairs:
        raise ConfigError(f"{path}: pairs is empty; measure at least one language pair.")
    return PairStatistics(
        encoder,
        pairs,
        {name: _read_pairs(rows, f"{path}: extra.{name}") for name, rows in extra.items()},
        content.get("source", {}),
    )


def write_statistics(path: str | Path, statistics: PairStatistics) -> None:
    """Write JSON that read_statistics takes; `path` appears complete or not at all."""

    def rows(pairs: Mapping[Pair, Moments]) -> list[dict[str, Any]]:
        return [
            {"languages": list(pair), "count": m.count, "mean": m.mean, "std": m.std}
            for pair, m in sorted(pairs.items())
        ]

    content = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": statistics.encoder,
        "source": dict(statistics.source),
        "pairs": rows(statistics.pairs),
        "extra": {name: rows(pairs) for name, pairs in statistics.extra.items()},
    }
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_released_table(path: str | Path) -> PairStatistics:
    """The CSV table of the released code (lang_a, lang_b, count, mean, std; names in English).

    It does not say which encoder it belongs to: `encoder` is empty, and build_calibration would refuse it. Raises
    ConfigError naming file and row.
    """
    with Path(path).open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        rows = []
        for number, row in enumerate(reader, start=2):
            try:
                languages = [RELEASED_NAMES[row["lang_a"]], RELEASED_NAMES[row["lang_b"]]]
                moments = {"count": int(row["count"]), "mean": float(row["mean"]), "std": float(row["std"])}
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{path}: line {number}: {error!r} in {row!r}.") from error
            rows.append({"languages": languages, **moments})
    return PairStatistics("", _read_pairs(rows, f"{path}: row"))


def _read_pairs(rows: object, where: str) -> dict[Pair, Moments]:
    if not isinstance(rows, list):
        raise ConfigError(f"{where} is not a list.")
    pairs: dict[Pair, Moments] = {}
    for i, row in enumerate(rows):
        at = f"{where}[{i}]"
        try:
            a, b = row["languages"]
            count, mean, std = row["count"], row["mean"], row["std"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{at}={row!r} needs languages (two codes), count, mean and std.") from error
        if not (isinstance(a, str) and isinstance(b, str) and a and b):
            raise ConfigError(f"{at}.languages={[a, b]!r}; expected two language codes.")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"{at}.count={count!r}; expected a whole number >= 1.")
        for name, value, low, high in (("mean", mean, -1.0, 1.0), ("std", std, 0.0, 1.0)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{at}.{name}={value!r}; expected a number in [{low:g}, {high:g}].")
        pair = language_pair(a, b)
        if pair in pairs:
            raise ConfigError(f"{at}: the pair {a}-{b} is listed twice; pairs are unordered.")
        pairs[pair] = Moments(count, float(mean), float(std))
    return pairs
