"""Build the world of spelled arithmetic, on which the demo of ExpLang trains: data, a base model, a teacher's replies.

    python tools/build_arithmetic.py --out build/arithmetic

Writes to OUT: train.parquet, validation.parquet and test.parquet (questions in verl's layout, answers in digits),
replies.jsonl (what a teacher said, right and wrong, for tools/make_traces.py --replies), base (Hugging Face) and
base.nemo. The package `demo_arithmetic` beside this file describes the world. Nothing is built that is there from the
same arguments and code; data are byte-identical for equal arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nemo_lrpo.config.explang import MarksConfig  # noqa: E402
from tools.demo_arithmetic import (  # noqa: E402
    LANGUAGES,
    Problem,
    base_rows,
    problems,
    tokenizer_texts,
    write_questions,
    write_replies,
)

SLIPS = 0.1
"""Share of wrong steps in the last phase of the base model's training, even where it knows better."""
VOCABULARY = 1536
STEPS = 1200
_SOURCES = ("build_arithmetic.py", "demo_arithmetic", "demo_models/base_model.py", "demo_models/tokenizer.py")


def build_base(train: tuple[Problem, ...], out: Path, seed: int, steps: int) -> None:
    """The base model as `out`/base and `out`/base.nemo; both are there whole or not at all."""
    from tools.demo_models.base_model import BaseModelRecipe, new_model
    from tools.demo_models.base_model import train as train_model
    from tools.demo_models.tokenizer import train_tokenizer
    from tools.hf_to_nemo import convert

    marks = MarksConfig()
    tokenizer = train_tokenizer(tokenizer_texts(train, marks), LANGUAGES, VOCABULARY, show_progress=False)
    recipe = BaseModelRecipe(steps=steps)
    model = new_model(tokenizer, recipe, seed)
    train_model(
        model,
        tokenizer,
        lambda epoch, noisy: base_rows(train, marks, seed, 2 * epoch + noisy, SLIPS if noisy else 0.0),
        recipe,
        seed,
    )
    model.generation_config.do_sample = True
    with tempfile.TemporaryDirectory(dir=out, prefix=".base.") as scratch:
        fresh = Path(scratch) / "base"
        model.save_pretrained(fresh, safe_serialization=True)
        tokenizer.save_pretrained(fresh)
        convert(fresh, Path(scratch) / "base.nemo", precision="32")
        shutil.rmtree(out / "base", ignore_errors=True)
        fresh.replace(out / "base")
        (Path(scratch) / "base.nemo").replace(out / "base.nemo")


def fingerprint(*arguments: object) -> str:
    """Of the arguments and of all code that decides what comes out."""
    digest = hashlib.sha256(repr(arguments).encode())
    for source in (ROOT / "tools" / name for name in _SOURCES):
        for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Command line; `--help` describes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build/arithmetic", help="directory of the results")
    parser.add_argument("--seed", type=int, default=0, help="of problems, weights and replies (0)")
    parser.add_argument("--taught", type=int, default=150, help="easy problems that the teacher replies to (150)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the base model's training; 0: none ({STEPS})")
    parser.add_argument("--force", action="store_true", help="build again what is there")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out}: is a file; name a directory.")
    started = time.perf_counter()
    stamp, wanted = options.out / ".fingerprint", fingerprint(options.seed, options.taught, options.steps)
    if not options.force and stamp.is_file() and stamp.read_text() == wanted:
        print(f"{options.out}: up to date")
        return 0
    stamp.unlink(missing_ok=True)
    every = problems(options.seed)
    train = tuple(problem for problem in every if problem.split == "train")
    easy = [problem for problem in train if not any(step.crosses_ten for step in problem.steps)]
    if not 1 <= options.taught <= len(easy):
        parser.error(f"--taught {options.taught}: there are {len(easy)} easy training problems.")
    counts = write_questions(every, options.out)
    counts["replies.jsonl"] = write_replies(
        easy[: options.taught], options.out / "replies.jsonl", MarksConfig(), options.seed
    )
    for name, count in counts.items():
        print(f"{options.out / name}: {count} rows")
    if options.steps:
        build_base(train, options.out, options.seed, options.steps)
        print(f"{options.out / 'base.nemo'} ({time.perf_counter() - started:.0f} s)")
    stamp.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
