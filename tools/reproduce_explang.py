"""ExpLang against GRPO that thinks in English, on spelled arithmetic, seed by seed.

    bash tools/demo_explang.sh
    python tools/reproduce_explang.py --readme README.md

Every arm starts from the same cold start and trains on the same questions with as many rollouts and steps, through
nemo_lrpo.train with conf/demo_explang.yaml. english: the tag of every rollout is prefilled with English. explang: the
policy chooses, in exploration and then in exploitation. hybrid: the router proposes the language of half the rollouts.
In the end each answers the test questions, greedily, in the way in which it was trained.

Each run is kept as a line of OUT/results.jsonl as soon as it is done; the same command goes on after a stop, and more
seeds or arms add to what there is. After a change of model, data or settings give another --out. Intervals: 95 %,
Student's t over seeds; differences to English are paired by seed.

KEY=VALUE arguments override conf/demo_explang.yaml and conf/demo_explang_evaluate.yaml for all arms alike.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.miniature.processes import EntryPoints, ProcessFailed, RewardServers  # noqa: E402
from tools.miniature.text import write_block, write_whole  # noqa: E402
from tools.miniature.thinking import (  # noqa: E402
    Runs,
    Thinking,
    ThinkingArm,
    chosen_line,
    draw,
    read_run,
    table,
    thinking_arms,
)

CONFIG, EVALUATION, TASK = "demo_explang", "demo_explang_evaluate", "sums"
SERVER = ("thinking.tagged=true", "~verifiers.similarity", "+verifiers.math={kind: numeric}")
SEEDS, ARMS = 3, "english,explang"
COLD_START = ThinkingArm("cold_start", "cold start")
BLOCK = "explang"
"""In the README."""
FIGURE = "thinking.svg"
PICTURE = f"tools/miniature/{FIGURE}"
"""The figure as the README shows it."""


@dataclass
class Bench:
    """What all runs share. `settings`: of every training and evaluation, besides its arm's."""

    model: Path
    settings: tuple[str, ...]
    out: Path
    servers: RewardServers
    start: EntryPoints

    def before(self) -> Thinking:
        """The cold start itself, left to choose."""
        evaluation, seconds = self._evaluate(self.out / "runs" / COLD_START.name, self.model, COLD_START, 1)
        return read_run(COLD_START, 1, evaluation, TASK, None, seconds)

    def run(self, arm: ThinkingArm, seed: int) -> Thinking:
        """Train and measure."""
        directory = self.out / "runs" / f"{arm.name}_{seed}"
        run_dir = directory / "train"
        settings = [
            *(f"trainer.lrpo.{name}" for name in ("val_check_interval=0", "save_interval=0", "keep_checkpoints=1")),
            "data.validation=null",
            f"seed={seed}",
            f"run_dir={run_dir}",
            f"pretrained_checkpoint.restore_from_path={self.model}",
            f"reward.endpoint_file={self.servers.endpoint(())}",
            *arm.settings,
            *self.settings,
        ]
        seconds = self.start("nemo_lrpo.train", ["--config-name", CONFIG, *settings], directory / "train.log")
        evaluation, _ = self._evaluate(directory, run_dir / "model.nemo", arm, seed)
        run = read_run(arm, seed, evaluation, TASK, run_dir, seconds)
        # What is left is text.
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return run

    def _evaluate(self, directory: Path, model: Path, arm: ThinkingArm, seed: int) -> tuple[Path, float]:
        out = directory / "answers.json"
        settings = [
            f"seed={seed}",
            f"pretrained_checkpoint.restore_from_path={model}",
            f"evaluation.out={out}",
            f"evaluation.think_in={arm.think_in or 'null'}",
            "evaluation.overwrite=true",
            *self.settings,
        ]
        log = directory / "evaluate.log"
        return out, self.start("nemo_lrpo.evaluate", ["--config-name", EVALUATION, *settings], log)


def reproduce(bench: Bench, runs: Runs, arms: Sequence[ThinkingArm], seeds: Sequence[int], jobs: int) -> list[str]:
    """Run what is not there yet. Returns what went wrong, a run a line; the others are done all the same."""
    from tqdm import tqdm

    wanted = [(arm, seed) for seed in seeds for arm in arms if runs.get(arm.name, seed) is None]
    failures = []
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(bench.run, arm, seed): f"{arm.name}, seed {seed}" for arm, seed in wanted}
        if runs.get(COLD_START.name, 1) is None:
            pending[pool.submit(bench.before)] = COLD_START.name
        try:
            for future in tqdm(as_completed(pending), total=len(pending), unit="run"):
                try:
                    runs.add(future.result())
                except (ProcessFailed, OSError) as error:
                    failures.append(f"{pending[future]}: {error}")
                    tqdm.write(failures[-1])
        finally:
            # Nothing new begins; what runs is told to end.
            pool.shutdown(wait=False, cancel_futures=True)
            bench.start.stop()
    return failures


def write_all(runs: Runs, arms: Sequence[ThinkingArm], out: Path, readme: Path | None) -> str:
    """Write OUT/results.md and the figure, and the block of `readme`, the figure beside it; returns the text. Raises
    ValueError where no run is done, or `readme` has no such block."""
    done = [arm for arm in arms if runs.of(arm.name)]
    if not done:
        raise ValueError(f"{runs.path}: no run is done yet.")
    some = runs.of(done[0].name)[0]
    seeds = sorted({len(runs.of(arm.name)) for arm in done})
    text = (
        f"{' to '.join(map(str, seeds))} seeds of {some.steps} steps, {some.rollouts:,} rollouts a run; "
        f"{some.questions:,} test questions, answered greedily. Mean over seeds ± half of its 95 % interval; in "
        f"brackets the difference to English, paired by seed:\n\n{table(runs, done, COLD_START.name)}"
    )
    for arm in done:
        if arm.think_in is None:
            text += f"\n\n{arm.label} thinks in: {chosen_line(runs, arm)}."
    out.mkdir(parents=True, exist_ok=True)
    draw(runs, done, out / FIGURE)
    write_whole(out / "results.md", f"{text}\n")
    if readme is not None:
        picture = f"![Accuracy of the rollouts and number of chosen thinking languages, by step]({PICTURE})"
        write_block(readme, BLOCK, f"{text}\n\n{picture}")
        shutil.copyfile(out / FIGURE, readme.parent / PICTURE)
    return text


def check_same(path: Path, runs: Runs, model: Path, settings: Sequence[str]) -> None:
    """Raise ValueError where `path` says that `runs` started from another model, or with other settings; else write
    it."""
    from omegaconf import OmegaConf

    from nemo_lrpo.config.loader import compose

    trees = [
        OmegaConf.to_container(compose(name, own), resolve=False)
        for name, own in ((CONFIG, settings), (EVALUATION, ["evaluation.out=out", *settings]))
    ]
    found = {
        "model": hashlib.sha256(model.read_bytes()).hexdigest()[:16],
        "settings": hashlib.sha256(json.dumps(trees, sort_keys=True).encode()).hexdigest()[:16],
    }
    if runs and path.exists():
        kept = json.loads(path.read_text())
        changed = [name for name, value in found.items() if kept.get(name) != value]
        if changed:
            raise ValueError(f"{path}: the runs there had another {' and '.join(changed)}; give another --out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of conf/demo_explang.yaml, for all arms")
    parser.add_argument("--arms", default=ARMS, help=f"comma-separated: english, explang, hybrid ({ARMS})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"number of seeds ({SEEDS})")
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / "results/demo_explang/cold_start/model.nemo",
        help="the cold start, as tools/demo_explang.sh leaves it (results/demo_explang/cold_start/model.nemo)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/reproduce_explang", help="runs and results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once (one per core)")
    parser.add_argument("--table", action="store_true", help="run nothing; write table and figure of what there is")
    parser.add_argument("--readme", type=Path, help="a file whose block between the two explang marks is rewritten")
    options = parser.parse_args(arguments)
    # As Ctrl-C: what runs is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if min(options.seeds, options.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1.")
    if not options.table and not options.model.is_file():
        parser.error(f"--model {options.model}: no such file; bash tools/demo_explang.sh makes it.")
    _main(parser, options)


def _main(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    from nemo_lrpo.config.loader import compose

    rollouts = int(compose(CONFIG, options.overrides).trainer.lrpo.rollouts_per_prompt)
    known = thinking_arms(rollouts)
    unknown = [name for name in options.arms.split(",") if name not in known]
    if unknown:
        parser.error(f"--arms: {unknown[0]!r} is not known; accepted: {', '.join(known)}.")
    arms = [known[name] for name in options.arms.split(",")]
    out, started = options.out.resolve(), time.perf_counter()
    failures: list[str] = []
    try:
        runs = Runs(out / "results.jsonl")
        if not options.table:
            check_same(out / "settings.json", runs, options.model, options.overrides)
            with ExitStack() as rooms:
                servers = rooms.enter_context(RewardServers(SERVER, out / "servers", "serve_rewards"))
                bench = Bench(options.model.resolve(), tuple(options.overrides), out, servers, EntryPoints())
                failures = reproduce(bench, runs, arms, range(1, options.seeds + 1), options.jobs)
        print(write_all(runs, list(known.values()), out, options.readme))
        print(f"{out / 'results.md'}, {out / FIGURE}")
    except (ProcessFailed, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if failures:
        sys.exit(f"reproduce_explang: {len(failures)} runs failed; the same command tries them again.")
    if not options.table:
        print(f"Done in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
