"""Measure how similar equivalent texts of each language pair are under an encoder, for calibration.path.

    python tools/calibrate.py --data parallel.parquet --encoder DIR --out statistics.json [--split train]

The data, parquet or JSONL, has a row per text: `fact_id` (or `id`), `language`, `text`; all texts of one id mean the
same. For each unordered pair of languages up to --pairs-per-language-pair facts are drawn, and three cosines measured:

    equivalent   the fact in both languages: what mean calibration reads
    mismatch     the fact in one language, another fact drawn at random in the other (extra.mismatch)
    hardest      the most similar other fact in the other language, among the encoded ones (extra.hardest)

A pair of one language takes two wordings of a fact. Where the data has a single wording per language, the text itself
stands for the second: similarity 1, the upper end that a response in the reference's own language can reach. Without
such pairs a repeated reference would keep its raw 1 while other languages are judged around mu_ref. The file lists
these languages under source.identical; --no-identical leaves the pairs out.

Measure on other facts than those evaluated, if the data marks them: --split keeps the rows whose column `split` has
that value. The result is a function of the arguments and files alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nemo_lrpo.config.checks import ConfigError, check_file, check_range  # noqa: E402
from nemo_lrpo.config.scoring import EncoderConfig  # noqa: E402
from nemo_lrpo.rewards.calibration import (  # noqa: E402
    Moments,
    Pair,
    PairStatistics,
    file_hash,
    language_pair,
    write_statistics,
)
from nemo_lrpo.seeding import derive_seed  # noqa: E402

Facts = dict[str, dict[str, list[str]]]
"""Language -> fact id -> its distinct texts, all in sorted order."""
Comparison = tuple[str, str, str, str]
"""Text in language a, equivalent in b, text of another fact in b ("" where there is none), fact id."""


def read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a parquet or JSONL file with their numbers, the first being 1. Raises ConfigError."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                columns = [n for n in ("fact_id", "id", "language", "text", "split") if n in names]
                yield from enumerate((row for b in file.iter_batches(columns=columns) for row in b.to_pylist()), 1)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--data {path}: cannot be read as parquet: {error}.") from error
    elif path.suffix in (".jsonl", ".json"):
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ConfigError(f"--data {path}: row {number} is not JSON: {error}.") from error
                if not isinstance(row, dict):
                    raise ConfigError(f"--data {path}: row {number} is not a JSON object.")
                yield number, row
    else:
        raise ConfigError(f"--data {path}: {path.suffix!r} is not known; accepted: .parquet, .jsonl.")


def read_facts(path: Path, split: str | None) -> Facts:
    """The texts of `path` by language and fact; only those of `split` where given. Raises ConfigError by row."""
    facts: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    splits: set[str] = set()
    for number, row in read_rows(path):
        if split is not None:
            if row.get("split") is None:
                raise ConfigError(f"--data {path}: row {number} has no 'split'; leave --split out or mark every row.")
            splits.add(str(row["split"]))
            if row["split"] != split:
                continue
        fact = row.get("fact_id", row.get("id"))
        if fact is None or isinstance(fact, (list, dict)) or fact == "":
            raise ConfigError(f"--data {path}: row {number}: fact_id={fact!r}; expected an id ('fact_id' or 'id').")
        for name in ("language", "text"):
            value = row.get(name)
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(f"--data {path}: row {number}: {name}={value!r}; expected text.")
        facts[row["language"]][str(fact)].add(row["text"])
    if not facts:
        known = f"; it has {', '.join(map(repr, sorted(splits)))}" if splits else ""
        raise ConfigError(f"--data {path} has no rows" + (f" with split={split!r}{known}." if split else "."))
    return {
        language: {fact: sorted(texts) for fact, texts in sorted(by_fact.items())}
        for language, by_fact in sorted(facts.items())
    }


def draw(facts: Facts, pair: Pair, limit: int, seed: int, identical: bool) -> list[Comparison]:
    """At most `limit` comparisons of one language pair, at most one a fact."""
    a, b = pair
    rng = np.random.default_rng(derive_seed(seed, "calibrate", a, b))
    common = [fact for fact in facts[a] if fact in facts[b]]
    if a == b:
        worded_twice = [fact for fact in common if len(facts[a][fact]) > 1]
        identical = identical and not worded_twice
        common = common if identical else worded_twice
    others = list(facts[b])
    comparisons = []
    for index in rng.permutation(len(common))[:limit]:
        fact = common[index]
        if a != b:
            left, right = (texts[rng.integers(len(texts))] for texts in (facts[a][fact], facts[b][fact]))
        elif identical:
            left = right = facts[a][fact][rng.integers(len(facts[a][fact]))]
        else:
            left, right = (facts[a][fact][i] for i in rng.choice(len(facts[a][fact]), 2, replace=False))
        comparisons.append((left, right, _other_text(facts[b], others, fact, rng), fact))
    return comparisons


def _other_text(by_fact: Mapping[str, list[str]], facts: Sequence[str], fact: str, rng: np.random.Generator) -> str:
    """A text of another fact that this one is not worded as; "" where a few draws find none."""
    for _ in range(16):
        texts = by_fact[facts[rng.integers(len(facts))]]
        text = texts[rng.integers(len(texts))]
        if text not in by_fact[fact]:
            return text
    return ""


def moments(cosines: Sequence[float] | NDArray[np.float64]) -> Moments:
    """Count, mean and population standard deviation, rounding kept within [-1, 1]."""
    values = np.clip(np.asarray(cosines, dtype=np.float64), -1.0, 1.0)
    return Moments(len(values), float(values.mean()), float(values.std()))


def measure(
    facts: Facts,
    encode: Callable[[Sequence[str]], NDArray[np.float32]],
    limit: int,
    seed: int,
    identical: bool = True,
) -> tuple[dict[Pair, Moments], dict[str, dict[Pair, Moments]], list[str]]:
    """Statistics of equivalent texts by pair, the further ones by name and pair, and the languages whose own pair
    compares texts with themselves.

    `encode` gives one row of length 1 per text and is called once, with distinct texts. Raises ConfigError where no
    two languages share a fact.
    """
    pairs = [language_pair(a, b) for a, b in combinations_with_replacement(facts, 2)]
    drawn = {pair: draw(facts, pair, limit, seed, identical) for pair in pairs}
    drawn = {pair: comparisons for pair, comparisons in drawn.items() if comparisons}
    if not any(a != b for a, b in drawn):
        raise ConfigError(
            f"--data: no fact is there in two languages (languages: {', '.join(facts)}); the texts of one fact_id "
            "must be translations of each other."
        )
    used: dict[str, set[str]] = {language: set() for language in facts}
    meaning: dict[str, dict[str, set[str]]] = {language: defaultdict(set) for language in facts}
    for language, by_fact in facts.items():
        for fact, texts in by_fact.items():
            for text in texts:
                meaning[language][text].add(fact)
    for (a, b), comparisons in drawn.items():
        for left, right, other, _ in comparisons:
            used[a].add(left)
            used[b] |= {right, other} - {""}
    pool = {language: sorted(texts) for language, texts in used.items()}
    texts = list(dict.fromkeys(text for language in pool for text in pool[language]))
    row_of = {text: i for i, text in enumerate(texts)}
    vectors = encode(texts)

    equivalent: dict[Pair, Moments] = {}
    mismatch: dict[Pair, Moments] = {}
    hardest: dict[Pair, Moments] = {}
    for (a, b), comparisons in drawn.items():
        left = vectors[[row_of[c[0]] for c in comparisons]].astype(np.float64)
        right = vectors[[row_of[c[1]] for c in comparisons]].astype(np.float64)
        equivalent[a, b] = moments(np.einsum("nd,nd->n", left, right))
        apart = [i for i, c in enumerate(comparisons) if c[2]]
        if apart:
            other = vectors[[row_of[comparisons[i][2]] for i in apart]].astype(np.float64)
            mismatch[a, b] = moments(np.einsum("nd,nd->n", left[apart], other))
        cosines = left @ vectors[[row_of[text] for text in pool[b]]].astype(np.float64).T
        for i, (_, _, _, fact) in enumerate(comparisons):
            own = [j for j, text in enumerate(pool[b]) if fact in meaning[b][text]]
            cosines[i, own] = -np.inf
        best = cosines.max(axis=1)
        if np.isfinite(best).any():
            hardest[a, b] = moments(best[np.isfinite(best)])
    themselves = [a for (a, b), comparisons in drawn.items() if a == b and comparisons[0][0] == comparisons[0][1]]
    return equivalent, {"mismatch": mismatch, "hardest": hardest}, themselves


def table(statistics: PairStatistics) -> str:
    """Mean cosines per language: over its pairs with other languages, and with itself."""
    lines = [f"{'language':<10}{'own':>8}{'others':>8}{'mismatch':>10}{'hardest':>9}{'samples':>9}"]

    def mean(pairs: Mapping[Pair, Moments], keys: Sequence[Pair]) -> str:
        known = [pairs[key] for key in keys if key in pairs]
        total = sum(m.count for m in known)
        return f"{sum(m.count * m.mean for m in known) / total:.3f}" if total else "-"

    for language in sorted({language for pair in statistics.pairs for language in pair}):
        own = [(language, language)]
        others = [pair for pair in statistics.pairs if language in pair and pair[0] != pair[1]]
        samples = sum(statistics.pairs[pair].count for pair in others)
        lines.append(
            f"{language:<10}{mean(statistics.pairs, own):>8}{mean(statistics.pairs, others):>8}"
            f"{mean(statistics.extra['mismatch'], others):>10}{mean(statistics.extra['hardest'], others):>9}"
            f"{samples:>9}"
        )
    lines.append(f"{len(statistics.pairs)} pairs, mu_ref {statistics.mean():.4f}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="parquet or JSONL with fact_id, language, text")
    parser.add_argument("--encoder", required=True, help="directory of the sentence-transformers model")
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--pairs-per-language-pair", type=int, default=200, help="samples per pair (default 200)")
    parser.add_argument("--split", help="only rows with this value in the column 'split'")
    parser.add_argument("--no-identical", action="store_true", help="no pairs of a text with itself")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index> (default auto)")
    parser.add_argument("--batch-size", type=int, default=64, help="texts per forward pass (default 64)")
    parser.add_argument("--max-tokens", type=int, help="as encoder.max_tokens of the reward server")
    return parser.parse_args(arguments)


def calibrate(options: argparse.Namespace) -> PairStatistics:
    """Measure and write. Raises ConfigError before the encoder loads for what can be seen by then."""
    data, out = check_file("--data", options.data), Path(options.out)
    check_range("--pairs-per-language-pair", options.pairs_per_language_pair, at_least=2)
    config = EncoderConfig(
        path=options.encoder,
        device=options.device,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        cache_size=0,
    )
    config.check("--encoder")
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {str(out)!r} cannot be written; give a file in an existing, writable directory.")
    facts = read_facts(data, options.split)
    from nemo_lrpo.rewards.similarity import SentenceEncoder

    encoder = SentenceEncoder(config)
    equivalent, extra, identical = measure(
        facts,
        lambda texts: encoder.encode(texts, progress=True),
        options.pairs_per_language_pair,
        options.seed,
        not options.no_identical,
    )
    source = {
        "data": file_hash(data),
        "split": options.split,
        "pairs_per_language_pair": options.pairs_per_language_pair,
        "seed": options.seed,
        "identical": identical,
    }
    statistics = PairStatistics(encoder.identity, equivalent, extra, source)
    write_statistics(out, statistics)
    return statistics


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 2 with one line on standard error for what the user can mend."""
    options = parse(arguments)
    try:
        statistics = calibrate(options)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    print(table(statistics))
    identical = statistics.source["identical"]
    if identical:
        print(f"one wording per fact, compared with itself: {', '.join(identical)}")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
