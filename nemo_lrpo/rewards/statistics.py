"""Statistics of language pairs under one encoder: what tools/calibrate.py measures and calibrations are built from.

The file is JSON, version 2, a line per pair and kind::

    {"format": "nemo_lrpo pair statistics", "version": 2, "encoder": "sha256:...", "source": {...}, "pairs": [
     {"languages": ["de", "en"],
      "equivalent": {"count": 400, "mean": 0.91, "std": 0.04, "quantiles": [0.71, ..., 0.99]},
      "mismatch": {...},
      "hardest": {...}}, ...]}

Version 1, without quantiles, is read too.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nemo_lrpo.config.checks import ConfigError

FORMAT = "nemo_lrpo pair statistics"
VERSION = 2

KINDS = ("equivalent", "mismatch", "hardest")
"""Two texts that say the same; a text and one of another fact drawn at random; a text and the most similar one of
another fact."""

LEVELS = 33
"""Quantiles kept of a sample: at levels 0, 1/32, ..., 1."""

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
    """A sample of cosines: their number, mean, (population) standard deviation, and quantiles at evenly spaced levels
    from 0, the smallest, to 1, the largest; empty where none were kept."""

    count: int
    mean: float
    std: float
    quantiles: tuple[float, ...] = ()


def moments(cosines: ArrayLike) -> Moments:
    """Of at least one finite cosine, rounding kept within [-1, 1]; six decimals, which is what float32 embeddings
    bear."""
    values = np.clip(np.asarray(cosines, dtype=np.float64), -1.0, 1.0)
    quantiles = np.quantile(values, np.linspace(0.0, 1.0, LEVELS))
    mean, std = round(float(values.mean()), 6), round(float(values.std()), 6)
    return Moments(int(values.size), mean, std, tuple(quantiles.round(6).tolist()))


@dataclass(frozen=True)
class PairStatistics:
    """What tools/calibrate.py measures. encoder: identity of the encoder. equivalent, mismatch, hardest: cosines by
    unordered pair, see KINDS. source: how they were measured, as free key-value pairs."""

    encoder: str
    equivalent: Mapping[Pair, Moments]
    mismatch: Mapping[Pair, Moments] = field(default_factory=dict)
    hardest: Mapping[Pair, Moments] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def kinds(self, pair: Pair) -> dict[str, Moments]:
        """What there is of `pair`, by kind."""
        return {kind: found[pair] for kind in KINDS if pair in (found := getattr(self, kind))}


def weighted_mean(samples: Iterable[Moments]) -> float:
    """Count-weighted mean; over the equivalents of all pairs it is mu_ref."""
    samples = list(samples)
    return math.fsum(m.count * m.mean for m in samples) / sum(m.count for m in samples)


def file_hash(path: str | Path) -> str:
    """`sha256:...` of a file's content."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def write_statistics(path: str | Path, statistics: PairStatistics) -> None:
    """Write JSON that read_statistics takes; `path` appears complete or not at all. Raises ValueError for numbers that
    are not finite."""
    entries = []
    for pair in sorted(statistics.equivalent):
        lines = [f' {{"languages": {_dump(list(pair))}']
        for kind, m in statistics.kinds(pair).items():
            numbers: dict[str, Any] = {"count": m.count, "mean": m.mean, "std": m.std}
            if m.quantiles:
                numbers["quantiles"] = list(m.quantiles)
            lines.append(f'  "{kind}": {_dump(numbers)}')
        entries.append(",\n".join(lines) + "}")
    head = {"format": FORMAT, "version": VERSION, "encoder": statistics.encoder}
    lines = [f' "{name}": {_dump(value)},' for name, value in head.items()]
    source = ",\n".join(f"  {_dump(name)}: {_dump(value)}" for name, value in statistics.source.items())
    lines.append(' "source": {\n' + source + "},")
    text = "{\n" + "\n".join(lines) + '\n "pairs": [\n' + ",\n".join(entries) + "\n]}\n"
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


def read_statistics(path: str | Path) -> PairStatistics:
    """Statistics as write_statistics leaves them. Raises ConfigError naming the file and the offending entry."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{path}: no pair statistics ('format' is not {FORMAT!r}); tools/calibrate.py writes them.")
    version = content.get("version")
    if version not in (1, VERSION) or isinstance(version, bool):
        raise ConfigError(f"{path}: version {version!r} is not known; accepted: 1, {VERSION}.")
    encoder, source = content.get("encoder"), content.get("source", {})
    if not isinstance(encoder, str) or not encoder:
        raise ConfigError(f"{path}: encoder={encoder!r}; expected the identity of the encoder, sha256:....")
    if not isinstance(source, dict):
        raise ConfigError(f"{path}: source={source!r}; expected a mapping.")
    samples = _read_rows(content, str(path)) if version == 1 else _read_pairs(content.get("pairs"), f"{path}: pairs")
    if not samples["equivalent"]:
        raise ConfigError(f"{path}: pairs is empty; measure at least one language pair.")
    return PairStatistics(encoder, **samples, source=source)


def read_released_table(path: str | Path) -> PairStatistics:
    """The CSV table of the released code (lang_a, lang_b, count, mean, std; names in English).

    It names no encoder, and there is no other use for it than comparison: `encoder` is empty. Raises ConfigError.
    """
    pairs: dict[Pair, Moments] = {}
    with Path(path).open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), start=2):
            at = f"{path}: line {number}"
            try:
                languages = [RELEASED_NAMES[row["lang_a"]], RELEASED_NAMES[row["lang_b"]]]
                numbers = {"count": int(row["count"]), "mean": float(row["mean"]), "std": float(row["std"])}
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{at}: {error!r} in {row!r}.") from error
            pairs[_read_languages({"languages": languages}, at, pairs)] = _read_moments(numbers, at)
    return PairStatistics("", pairs)


def _dump(value: object) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _read_rows(content: Mapping[str, Any], path: str) -> dict[str, dict[Pair, Moments]]:
    """Version 1: the equivalents as `pairs`, the other kinds as `extra`, each a list of rows with their own numbers."""
    extra = content.get("extra", {})
    if not isinstance(extra, dict):
        raise ConfigError(f"{path}: extra={extra!r}; expected a mapping of names to lists of pairs.")
    lists = {"equivalent": content.get("pairs"), **{kind: extra.get(kind, []) for kind in KINDS[1:]}}
    samples = {}
    for kind, rows in lists.items():
        where = f"{path}: " + ("pairs" if kind == "equivalent" else f"extra.{kind}")
        found: dict[Pair, Moments] = {}
        for i, row in enumerate(_read_list(rows, where)):
            found[_read_languages(row, f"{where}[{i}]", found)] = _read_moments(row, f"{where}[{i}]")
        samples[kind] = found
    return samples


def _read_pairs(rows: object, where: str) -> dict[str, dict[Pair, Moments]]:
    samples: dict[str, dict[Pair, Moments]] = {kind: {} for kind in KINDS}
    for i, row in enumerate(_read_list(rows, where)):
        at = f"{where}[{i}]"
        pair = _read_languages(row, at, samples["equivalent"])
        if "equivalent" not in row:
            raise ConfigError(f"{at} ({'-'.join(pair)}) has no 'equivalent'.")
        for kind in KINDS:
            if kind in row:
                samples[kind][pair] = _read_moments(row[kind], f"{at}.{kind}")
    return samples


def _read_list(rows: object, where: str) -> list[Any]:
    if not isinstance(rows, list):
        raise ConfigError(f"{where} is not a list.")
    return rows


def _read_languages(row: object, at: str, known: Mapping[Pair, Moments]) -> Pair:
    languages = row.get("languages") if isinstance(row, dict) else None
    if (
        not isinstance(languages, list)
        or len(languages) != 2
        or not all(isinstance(code, str) and code for code in languages)
    ):
        raise ConfigError(f"{at}.languages={languages!r}; expected two language codes.")
    pair = language_pair(*languages)
    if pair in known:
        raise ConfigError(f"{at}: the pair {'-'.join(languages)} is listed twice; pairs are unordered.")
    return pair


def _read_moments(row: object, at: str) -> Moments:
    if not isinstance(row, dict):
        raise ConfigError(f"{at}={row!r}; expected count, mean and std.")
    count = row.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"{at}.count={count!r}; expected a whole number >= 1.")
    for name, low in (("mean", -1.0), ("std", 0.0)):
        if not _is_number(row.get(name), low):
            raise ConfigError(f"{at}.{name}={row.get(name)!r}; expected a number in [{low:g}, 1].")
    quantiles = row.get("quantiles", [])
    if (
        not isinstance(quantiles, list)
        or len(quantiles) == 1
        or not all(_is_number(value, -1.0) for value in quantiles)
        or sorted(quantiles) != quantiles
    ):
        raise ConfigError(f"{at}.quantiles={quantiles!r}; expected two or more numbers in [-1, 1], none descending.")
    return Moments(count, float(row["mean"]), float(row["std"]), tuple(map(float, quantiles)))


def _is_number(value: object, low: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= 1.0
