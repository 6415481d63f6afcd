"""Seconds of a training step by part, LRPO against monolingual GRPO: the same entry point, model, data and reward
server, only the router differs. The two take turns; `ratio` is LRPO's step over GRPO's (medians over all steps but the
first of each turn), `routing_share` what routing and learning take of LRPO's step.

`added`, as shares of LRPO's step: `routing`, the seconds of routing and learning beyond what GRPO needs for its plan;
`gating` and `calibration`, the processor seconds that identifying the languages of a step's answers and calibrating
their similarities takes, measured here, one after the other, on the answers of the last turn. The reward server does
those two while the policy still generates, so the step pays for them at most where cores are shared. `wait_share`: what
the step waits for rewards after its own work is done.

Uses the models and data that tools/demo.sh builds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRPO = "monolingual"
NEEDED = ("build/data/train.parquet", "build/models/base.nemo", "build/models/calibration.json")


@contextmanager
def reward_server(endpoint: Path, log: Path) -> Iterator[None]:
    """The demo's reward server, for the time of the block."""
    command = [sys.executable, "-m", "nemo_lrpo.serve_rewards", "--config-name", "demo_rewards"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, f"endpoint_file={endpoint}", f"triton_log={log}.triton"],
            cwd=ROOT,
            env=_environment(),
            stdout=output,
            stderr=output,
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}


def train(router: str, steps: int, endpoint: Path, directory: Path) -> list[dict[str, Any]]:
    """Train for `steps` steps; returns the training records but the first, which pays for warming up."""
    overrides = [
        f"router={router}",
        f"run_dir={directory}",
        f"reward.endpoint_file={endpoint}",
        f"trainer.lrpo.max_steps={steps}",
        "trainer.lrpo.val_check_interval=0",
        "trainer.lrpo.save_interval=0",
        "trainer.lrpo.export_nemo=false",
        "trainer.lrpo.log_samples=1000000",
    ]
    command = [sys.executable, "-m", "nemo_lrpo.train", "--config-name", "demo", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench: training with router={router} failed:\n{done.stdout}{done.stderr}")
    return [record for record in read_lines(directory / "metrics.jsonl") if record["kind"] == "train"][1:]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    # Not splitlines: a text may hold other characters that end lines.
    with path.open("rb") as file:
        return [json.loads(line) for line in file]


def scoring_seconds(rollouts: Sequence[dict[str, Any]], repeats: int = 5) -> dict[str, float]:
    """Processor seconds of gating and of calibrating the answers of a step: median over its repeats, by what it is.
    rollouts: records of rollouts.jsonl."""
    from nemo_lrpo.config.loader import compose, to_dataclass
    from nemo_lrpo.config.reward import ServeRewardsConfig
    from nemo_lrpo.rewards.calibration import calibration_from
    from nemo_lrpo.rewards.gate import LanguageGate
    from nemo_lrpo.rewards.statistics import read_statistics

    config = to_dataclass(ServeRewardsConfig, compose("demo_rewards"))
    gate = LanguageGate(config.language_id, config.languages)
    calibration = calibration_from(config.calibration, read_statistics(ROOT / str(config.calibration.path)))
    scored = [record for record in rollouts if record["score"] is not None]
    texts, wanted = [record["response"] for record in scored], [record["language"] for record in scored]
    pairs = [
        (record["score"]["measures"].get("similarity", 0.0), record["question_language"], record["language"])
        for record in scored
    ]

    def seconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    work: dict[str, Callable[[], object]] = {
        "gating": lambda: gate.judge(texts, wanted),
        "calibration": lambda: [calibration.apply(*pair) for pair in pairs],
    }
    try:
        # The first call of each pays for tables that are made once.
        taken = {name: [seconds(one) for _ in range(repeats + 1)][1:] for name, one in work.items()}
    finally:
        gate.close()
    return {name: statistics.median(values) for name, values in taken.items()}


def parts(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median seconds by part."""
    names = sorted({key for record in records for key in record if key.startswith("time/")})
    return {
        name.partition("/")[2]: round(statistics.median(record.get(name, 0.0) for record in records), 4)
        for name in names
    }


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """LRPO's step against GRPO's."""
    if options.router == GRPO:
        sys.exit(f"bench: --router={GRPO} is what LRPO is compared with; give another.")
    if options.steps < 2 or options.rounds < 1:
        sys.exit("bench: --steps must be at least 2 and --rounds at least 1")
    missing = [name for name in NEEDED if not (ROOT / name).exists()]
    if missing:
        sys.exit(f"bench: {', '.join(missing)} not there; run `bash tools/demo.sh` once.")
    records: dict[str, list[dict[str, Any]]] = {options.router: [], GRPO: []}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        endpoint = directory / "reward.json"
        with reward_server(endpoint, directory / "server.log"):
            for turn in range(options.rounds):
                for router in records:
                    print(f"bench: router={router}, round {turn + 1} of {options.rounds}", file=sys.stderr)
                    records[router] += train(router, options.steps, endpoint, directory / f"{router}_{turn}")
        rollouts = read_lines(directory / f"{options.router}_{options.rounds - 1}" / "rollouts.jsonl")
    lrpo, grpo = parts(records[options.router]), parts(records[GRPO])
    last = max(record["step"] for record in rollouts)
    added = scoring_seconds([record for record in rollouts if record["step"] == last])
    added["routing"] = lrpo["route"] + lrpo["observe"] - grpo["route"] - grpo["observe"]
    yield {
        "bench": "step",
        "router": options.router,
        "rollouts": int(records[GRPO][0]["count"]),
        "steps": len(records[GRPO]),
        "response_tokens_lrpo": round(statistics.mean(r["length"] for r in records[options.router]), 2),
        "response_tokens_grpo": round(statistics.mean(r["length"] for r in records[GRPO]), 2),
        "lrpo": lrpo,
        "grpo": grpo,
        "ratio": round(lrpo["step"] / grpo["step"], 4),
        "routing_share": round((lrpo["route"] + lrpo["observe"]) / lrpo["step"], 4),
        "wait_share": round(lrpo["score_wait"] / lrpo["step"], 4),
        "added": {name: round(seconds / lrpo["step"], 5) for name, seconds in sorted(added.items())},
        "added_share": round(sum(added.values()) / lrpo["step"], 5),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench.py step`."""
    parser.add_argument("--router", default="default", help="LRPO's, a file of conf/router (default)")
    parser.add_argument("--steps", type=int, default=6, help="training steps a turn, the first not counted")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")


def table(row: dict[str, Any]) -> Iterator[str]:
    """The two sides, part by part."""
    yield f"{'part':12} {'LRPO s':>9} {'GRPO s':>9}"
    for part in row["lrpo"]:
        yield f"{part:12} {row['lrpo'][part]:9.4f} {row['grpo'].get(part, 0.0):9.4f}"
    shares = ", ".join(f"{name} {share:.2%}" for name, share in row["added"].items())
    yield f"added to the step: {shares}; {row['added_share']:.2%} in all. Waiting for rewards: {row['wait_share']:.2%}"
