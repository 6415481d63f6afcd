"""Preference pairs for off-line baselines, from the rollouts that a run wrote.

    python tools/make_pairs.py results/demo/run --kind dpo
    python tools/make_pairs.py results/demo/run --kind mapo --encoder /models/mmBERT-small
    python tools/make_pairs.py results/demo/run --kind mpo --dominant en --out pairs.jsonl

SOURCE is a run directory or its rollouts.jsonl. A run writes trainer.lrpo.log_samples rollouts of a step there; for
pairs set it to all of them, questions of a step times rollouts of a question.

dpo: the best answer to a question in a language against the worst, by reward. mapo: in every language but the dominant
one, answers nearer to the dominant language's against those that lie further away, by the encoder's cosine. mpo: as
dpo, in every language but the dominant one, each with the dominant language's pair as target. nemo_lrpo/data/pairs.py
says where mapo and mpo differ from what was published. Answers that did not end or have no reward are not used,
nor those of mode=explang whose tag was prefilled: the rollouts hold them without it.

OUT, pairs_KIND.jsonl beside the rollouts by default, gets one JSON object a line
(nemo_lrpo/data/pair_file.py), `margin` in reward, or in alignment (mapo). nemo_lrpo.train_offline trains on it.

OUT with .left_out.jsonl in place of .jsonl gets every answer that is in no pair, with the reason. All of it is held in
memory; the files are there whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nemo_lrpo.config.checks import ConfigError  # noqa: E402
from nemo_lrpo.config.scoring import EncoderConfig  # noqa: E402
from nemo_lrpo.data.errors import DataError  # noqa: E402
from nemo_lrpo.data.languages import LANGUAGES  # noqa: E402
from nemo_lrpo.data.pair_file import pair_record  # noqa: E402
from nemo_lrpo.data.pairs import (  # noqa: E402
    REASONS,
    Pairing,
    RatedAnswer,
    alignments_wanted,
    best_and_worst,
    by_alignment,
    read_answers,
    with_dominant_gap,
)

KINDS = ("dpo", "mapo", "mpo")
_COMPARED_AT_ONCE = 512


def make_pairs(options: argparse.Namespace) -> tuple[list[RatedAnswer], Pairing]:
    """The answers of SOURCE and what becomes of them. Raises ConfigError and DataError for what has to be mended."""
    answers = list(tqdm(read_answers(rollouts(options.source)), desc="reading", unit="answer", mininterval=0.5))
    if options.kind == "dpo":
        return answers, best_and_worst(answers, options.min_margin)
    if options.kind == "mpo":
        return answers, with_dominant_gap(answers, options.dominant, options.min_margin)
    near = alignments(alignments_wanted(answers, options.dominant, options.min_reward), options.encoder)
    return answers, by_alignment(answers, options.dominant, near, options.min_reward, options.min_margin)


def rollouts(source: Path) -> Path:
    """The rollouts.jsonl that SOURCE means."""
    path = source / "rollouts.jsonl" if source.is_dir() else source
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; SOURCE is a run directory or its rollouts.jsonl.")
    return path


def alignments(wanted: Sequence[tuple[RatedAnswer, RatedAnswer]], encoder: str | None) -> dict[tuple[str, str], float]:
    """Cosine of each answer and dominant answer, by sample ids; none for an answer without text."""
    if not encoder:
        raise ConfigError("--encoder is not set; --kind mapo needs the directory of a sentence-transformers model.")
    config = EncoderConfig(path=encoder)
    config.check("--encoder")
    # Torch is imported only where it is needed.
    from nemo_lrpo.rewards.similarity import ReferenceSimilarity

    similarity = ReferenceSimilarity(config)
    found: dict[tuple[str, str], float] = {}
    try:
        with tqdm(total=len(wanted), desc="aligning", unit="pair", mininterval=0.5) as bar:
            for start in range(0, len(wanted), _COMPARED_AT_ONCE):
                part = wanted[start : start + _COMPARED_AT_ONCE]
                written = [(answer, anchor) for answer, anchor in part if answer.response.strip()]
                cosines = similarity.compare([a.response for a, _ in written], [b.response for _, b in written]).cosines
                found |= {(a.sample_id, b.sample_id): float(value) for (a, b), value in zip(written, cosines)}
                bar.update(len(part))
    finally:
        similarity.close()
    return found


def counts(answers: Sequence[RatedAnswer], pairing: Pairing) -> str:
    """A table for the reader: pairs by language, answers left out by reason."""
    pairs = Counter(pair.chosen.language for pair in pairing.pairs)
    reasons = Counter(pairing.left_out.values())
    languages = ", ".join(f"{language} {count}" for language, count in sorted(pairs.items()))
    lines = [f"{len(answers)} answers, {len(pairing.pairs)} pairs" + (f": {languages}" if languages else "")]
    return "\n".join([*lines, *(f"  {reason:14}{reasons[reason]:8}" for reason in REASONS if reasons[reason])])


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """The whole file, or the one that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in records)
    partial.replace(path)


def _unit(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 0 to 1")
    return value


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_pairs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="run directory, or a rollouts.jsonl")
    add("--kind", choices=KINDS, required=True)
    add("--out", type=Path, help="ends in .jsonl (default: pairs_KIND.jsonl beside the rollouts)")
    add("--dominant", default="en", choices=sorted(LANGUAGES), metavar="CODE", help="mapo, mpo: ISO 639-1 code (en)")
    add("--min-margin", type=_unit, default=0.0, help="pairs lie further apart than this (0)")
    add("--min-reward", type=_unit, default=0.5, help="mapo: least reward of a preferred answer (0.5)")
    add("--encoder", help="mapo: directory of a sentence-transformers model")
    options = parser.parse_args(arguments)
    if options.out is None:
        folder = options.source if options.source.is_dir() else options.source.parent
        options.out = folder / f"pairs_{options.kind}.jsonl"
    if options.out.suffix != ".jsonl":
        parser.error(f"--out {options.out}: give a name that ends in .jsonl")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        answers, pairing = make_pairs(options)
    except (ConfigError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(counts(answers, pairing))
    if not pairing.pairs:
        sys.exit(
            "No pairs can be made of it and nothing is written; the table says why. Mostly the run's "
            "trainer.lrpo.log_samples was below questions of a step times rollouts of a question."
        )
    left_out = options.out.with_suffix(".left_out.jsonl")
    write_lines(left_out, ({"sample_id": name, "reason": reason} for name, reason in pairing.left_out.items()))
    write_lines(options.out, map(pair_record, pairing.pairs))
    print(f"{options.out}; answers left out with reasons: {left_out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
