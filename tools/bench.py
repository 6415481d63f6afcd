"""Where speed is measured: one JSON object a line, with the sizes, the figures and a ratio from the same run.

    python tools/bench.py step [--json] [--router default] [--steps 6] [--rounds 2]
    python tools/bench.py reward [--json]
    python tools/bench.py lid [--json]
    python tools/bench.py routing [--json] [--router default]
    python tools/bench.py checkpoint [--json] [--rounds 5]
    python tools/bench.py spread [--json] [--answers results/demo/run/rollouts.jsonl]

`python tools/bench.py NAME --help` says what is measured and what the ratio is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

BENCHES = ("step", "reward", "lid", "routing", "checkpoint", "spread")
"""Modules of tools/benches. Each has a docstring for --help, `add_arguments(parser)`, `run(options)`, which yields one
JSON-able dict per result, and `table(row)`, lines for a reader."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benches = parser.add_subparsers(dest="name", required=True, metavar="NAME", help=", ".join(BENCHES))
    for name in BENCHES:
        module = importlib.import_module(f"tools.benches.{name}")
        one = benches.add_parser(name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        one.add_argument("--json", action="store_true", help="only one JSON object a line; without it, a table as well")
        module.add_arguments(one)
        one.set_defaults(module=module)
    options = parser.parse_args(arguments)
    for row in options.module.run(options):
        if not options.json:
            for line in options.module.table(row):
                print(line)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
