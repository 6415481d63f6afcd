"""Write the demo's data: true questions and answers in 15 languages, parallel sentences, the base model's corpus.

    python tools/build_data.py --out build/data

The package `demo_world` beside this file describes what is written. Equal arguments give equal bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo_world import build_facts, write_world


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the five files, made where missing")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled phrases and the base corpus (default: 0)")
    parser.add_argument("--facts", type=int, help="how many facts, spread over all kinds (default: all)")
    parser.add_argument("--cross-pairs", type=int, default=10, help="cross-lingual examples a fact (default: 10)")
    parser.add_argument("--wrong-language-rate", type=float, default=0.15, help="answers that ignore the tag (0.15)")
    parser.add_argument("--noise-rate", type=float, default=0.2, help="wrong answers to known facts (0.2)")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out}: is a file; name a directory.")
    try:
        facts = build_facts(options.facts)
        rows = write_world(
            facts,
            options.out,
            options.seed,
            cross_pairs=options.cross_pairs,
            wrong_language_rate=options.wrong_language_rate,
            noise_rate=options.noise_rate,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{len(facts)} facts")
    for name, count in rows.items():
        print(f"{options.out / name}: {count} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
