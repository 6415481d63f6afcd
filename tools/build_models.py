"""Build the demo's models from its data: tokenizer and base model, encoder, and the base model as a .nemo.

    python tools/build_models.py --data build/data --out build/models

Writes OUT/base (Hugging Face), OUT/encoder (sentence-transformers) and OUT/base.nemo. What is up to date with the
data, the seed and the code stays as it is. --tuned-in makes the base model one of those that were tuned in few
languages: asked for another, it often answers in some other one, and it is less sure of what it knows. --measure
reports what the models know and how the encoder judges.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def main(arguments: list[str] | None = None) -> int:
    """Command line; `--help` describes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "build/data", help="what tools/build_data.py wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "build/models", help="directory of the models")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches (default 0)")
    parser.add_argument("--force", action="store_true", help="build again what is up to date")
    parser.add_argument("--steps", type=int, help="of both trainings; fewer than the default gives weaker models")
    parser.add_argument("--tuned-in", default="", metavar="xx,yy", help="few languages that the base model follows")
    parser.add_argument("--only", choices=("policy", "encoder"), help="build one of the two models")
    parser.add_argument("--measure", action="store_true", help="also print rates per language and AUC")
    options = parser.parse_args(arguments)
    from tools.demo_models.build import ARTIFACTS, BuildError, build

    if options.only and options.measure:
        parser.error("--measure looks at both models; it goes without --only.")
    started = time.perf_counter()
    try:
        tuned_in = [language for language in options.tuned_in.split(",") if language]
        only = [options.only] if options.only else ARTIFACTS
        built = build(options.data, options.out, options.seed, options.force, options.steps, tuned_in, only)
        if options.measure:
            from tools.demo_models.measure import print_measures

            print_measures(options.data, options.out)
    except (BuildError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    state = f"built {', '.join(built)}" if built else "up to date"
    print(f"{options.out}: {state} ({time.perf_counter() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
