"""The results of several nodes, brought together through a directory that they share."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_lrpo.checkup.finding import FAIL, Finding


def leave(directory: Path, rank: int, node: str, findings: Sequence[Finding]) -> None:
    """Put the results of task `rank` where `collect` finds them, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{rank}.json"
    partial = path.with_suffix(".partial")
    record = {"node": node, "findings": [dataclasses.asdict(finding) for finding in findings]}
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(path)


def collect(directory: Path, tasks: int, timeout_s: float) -> tuple[list[Finding], list[str]]:
    """Results of all tasks, in their order, and their nodes. A task that leaves none within `timeout_s` is a failure:
    its node hangs, or does not see `directory`."""
    deadline = time.monotonic() + timeout_s
    paths = [directory / f"{rank}.json" for rank in range(tasks)]
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.2)
    findings: list[Finding] = []
    nodes: list[str] = []
    for rank, path in enumerate(paths):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            node = f"task {rank}"
            remedy = "Look at its log; every node must see run_dir, under the same path."
            findings.append(Finding("nodes", FAIL, f"no answer within {timeout_s:.0f} s", remedy, node))
        else:
            node = record["node"]
            findings += [Finding(**finding) for finding in record["findings"]]
        nodes.append(node)
    return findings, list(dict.fromkeys(nodes))
