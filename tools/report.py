"""Runs as one HTML page that needs nothing but a browser: what training brought, and what the router learned.

    python tools/report.py results/demo/run --before results/demo/before.json --after results/demo/after.json
    python tools/report.py results/grpo results/lrpo --after grpo.json lrpo.json --before base.json --out compare.html

RUN is a run_dir of nemo_lrpo.train; of several the page sets curves, tables and samples side by side. Read are
metrics.jsonl, rollouts.jsonl, config.yaml and the router's state (newest checkpoint, else model.nemo). What a run does
not have yet the page says. --before and --after are evaluations of the same questions by nemo_lrpo.evaluate (their
result, NAME.json, with the answers beside it, NAME.jsonl): one for each RUN in their order, or one --before for all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.reporting.evaluations import Answers, read_answers  # noqa: E402
from tools.reporting.measures import Evaluated, read_result  # noqa: E402
from tools.reporting.page import render  # noqa: E402
from tools.reporting.runs import ReportError, Run, names_of, read_run  # noqa: E402


def write(
    runs: Sequence[Path],
    out: Path,
    *,
    before: Sequence[Path] = (),
    after: Sequence[Path] = (),
    names: Sequence[str] = (),
    knowledge: Path | None = None,
) -> Path:
    """Write the page; returns its path. Raises ReportError."""
    if names and len(names) != len(runs):
        raise ReportError(f"--names: {len(names)} for {len(runs)} runs; give one for each.")
    found = [read_run(path, name) for path, name in zip(runs, names or names_of(runs))]
    page = render(
        found,
        _evaluations("--before", before, len(runs), shared=True),
        _evaluations("--after", after, len(runs), shared=False),
        None if knowledge is None else read_knowledge(knowledge),
        [*_results("before", before, found), *_results("after", after, found)],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return out


def read_knowledge(path: Path) -> Mapping[str, Sequence[str]]:
    """By topic or region, the languages that know its facts. Raises ReportError."""
    try:
        knowledge = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(knowledge, dict) or not all(isinstance(own, list) for own in knowledge.values()):
        raise ReportError(f"{path}: an object of lists was expected: topic or region -> languages.")
    return knowledge


def _evaluations(option: str, paths: Sequence[Path], runs: int, shared: bool) -> list[Answers | None]:
    if not paths:
        return [None] * runs
    if len(paths) == 1 and shared:
        return [read_answers(paths[0])] * runs
    if len(paths) != runs:
        accepted = f"{runs}, one for each run" + (", or 1" if shared else "")
        raise ReportError(f"{option}: {len(paths)} evaluations for {runs} runs; accepted: {accepted}.")
    return [read_answers(path) for path in paths]


def _results(when: str, paths: Sequence[Path], runs: Sequence[Run]) -> list[Evaluated]:
    shared = len(paths) < len(runs)
    return [
        Evaluated(when if shared or len(runs) == 1 else f"{run.name}, {when}", read_result(path))
        for run, path in zip(runs, paths)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run_dir of nemo_lrpo.train")
    parser.add_argument("--before", type=Path, nargs="+", default=[], metavar="FILE", help="of the base model (JSON)")
    parser.add_argument(
        "--after", type=Path, nargs="+", default=[], metavar="FILE", help="of the trained models (JSON)"
    )
    parser.add_argument(
        "--names", nargs="+", default=[], help="of the runs in the page (default: of their directories)"
    )
    parser.add_argument("--knowledge", type=Path, help="JSON: by topic or region, the languages that know its facts")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first RUN)")
    options = parser.parse_args(arguments)
    out = options.out or options.runs[0] / "report.html"
    try:
        path = write(
            options.runs,
            out,
            before=options.before,
            after=options.after,
            names=options.names,
            knowledge=options.knowledge,
        )
    except ReportError as error:
        sys.exit(f"ReportError: {error}")
    print(path)


if __name__ == "__main__":
    main()
