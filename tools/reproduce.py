"""The published claim in miniature: GRPO against LRPO and its ablations, in the demo's world, seed by seed.

    python tools/reproduce.py
    python tools/reproduce.py --seeds 10 --readme README.md
    python tools/reproduce.py --arms grpo,published,default --steps 10 --out results/three
    python tools/reproduce.py --table --out results/reproduce --readme README.md

Training asks questions in few languages, as most collections do, and the base model was tuned in these: asked for
another, it often answers in some other one (tools/build_models.py --tuned-in). The model is measured in all 15. Every
arm trains the same base model on the same questions with as many rollouts and steps; what differs is who chooses their
languages (`router=`), and for the two ablations what the reward server that they train with leaves out. Runs go through
nemo_lrpo.train and nemo_lrpo.evaluate with conf/demo.yaml. Each is kept as a line of OUT/results.jsonl as soon as it is
done; the same command goes on after a stop, and more seeds or arms add to what there is. Another number of steps,
another model or other data is refused there.

All arms are judged alike, on questions about facts that no training asks about, several answers each, in the question's
language, drawn as in training. accuracy: the answer is the true sentence in the question's language, word for word,
which the world knows without an encoder; so no arm is favoured by the reward that it was trained with. reward: what the
default server (calibrated, gated) says, whatever server the arm trained with. Both are means of the 15 languages'
means. Intervals: 95 %, Student's t over seeds; differences to GRPO are paired by seed, which shares the order of
questions and the draws of the final answers. For the choice of steps and such use --split validation, never test.

KEY=VALUE arguments override conf/demo.yaml, and conf/demo_evaluate.yaml over it, for all arms alike; on a GPU
`trainer.accelerator=gpu trainer.precision=bf16`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.miniature.arms import ARMS, Arm, Plan, World  # noqa: E402
from tools.miniature.outcomes import (  # noqa: E402
    BASE,
    Knowledge,
    Outcome,
    Results,
    read_measure,
    read_training,
)
from tools.miniature.page import write_all  # noqa: E402
from tools.miniature.processes import EntryPoints, ProcessFailed, RewardServers, environment  # noqa: E402

STEPS, SEEDS = 12, 5
ASKED_IN = "ar,en,ja,zh"
"""As in the published training data, most questions come in a few languages: English's, and those of CARE."""
QUICK_STEPS, QUICK_SEEDS = 2, 2
RESULTS = "results.jsonl"


@dataclass
class Bench:
    """What all runs share. `under_way`: run directories of trainings that go on."""

    plan: Plan
    out: Path
    servers: RewardServers
    start: EntryPoints
    knowledge: Knowledge
    results: Results
    under_way: set[Path] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def base(self, seed: int) -> None:
        """Measure the base model."""
        measure = read_measure(self._evaluate(self.out / "runs" / BASE, seed, None), self.knowledge)
        with self.lock:
            self.results.add(Outcome(BASE, seed, self.plan.common, measure, None))

    def run(self, arm: Arm, seed: int) -> None:
        """Train, measure, keep the outcome."""
        directory = self.out / "runs" / f"{arm.name}_{seed}"
        run_dir = directory / "train"
        self._prepare(directory, self.plan.digests(arm))
        with self.lock:
            self.under_way.add(run_dir)
        try:
            seconds = self._train(arm, seed, run_dir)
            answers = self._evaluate(directory, seed, run_dir)
            training = read_training(run_dir, self.knowledge, seconds)
            measure = read_measure(answers, self.knowledge)
            with self.lock:
                self.results.add(Outcome(arm.name, seed, self.plan.digests(arm), measure, training))
        finally:
            with self.lock:
                self.under_way.discard(run_dir)
        # What is left is text.
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)

    @staticmethod
    def _prepare(directory: Path, digests: dict[str, str]) -> None:
        """What an earlier start left is gone on with where it has a checkpoint of this plan, else removed."""
        settings = directory / "settings.json"
        whole = settings.is_file() and any(directory.glob("train/checkpoints/*"))
        if whole and json.loads(settings.read_text()) == digests:
            return
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        settings.write_text(json.dumps(digests))

    def progress(self) -> tuple[int, str]:
        """Steps that unfinished trainings have done, and their names."""
        with self.lock:
            running = sorted(self.under_way)
        files = [run_dir / "metrics.jsonl" for run_dir in running]
        steps = sum(file.read_bytes().count(b"\n") for file in files if file.exists())
        return steps, ", ".join(run_dir.parent.name for run_dir in running)

    def _train(self, arm: Arm, seed: int, run_dir: Path) -> float:
        world = self.plan.world
        settings = [
            *self.plan.train_settings(arm, seed),
            f"run_dir={run_dir}",
            f"pretrained_checkpoint.restore_from_path={world.policy}",
            f"data.train={world.train}",
            f"reward.endpoint_file={self.servers.endpoint(arm.server)}",
        ]
        return self.start("nemo_lrpo.train", ["--config-name", "demo", *settings], run_dir.parent / "train.log")

    def _evaluate(self, directory: Path, seed: int, run_dir: Path | None) -> Path:
        world = self.plan.world
        settings = [
            *self.plan.evaluate_settings(seed),
            f"pretrained_checkpoint.restore_from_path={world.policy}",
            f"evaluation.checkpoint={run_dir or 'null'}",
            f"evaluation.data={world.questions}",
            f"evaluation.out={directory / 'answers.json'}",
            "evaluation.overwrite=true",
            f"reward.endpoint_file={self.servers.endpoint(())}",
        ]
        self.start("nemo_lrpo.evaluate", ["--config-name", "demo_evaluate", *settings], directory / "evaluate.log")
        return directory / "answers.jsonl"


def build(world: World) -> None:
    """Data, models and calibration, where they are missing or older than what makes them."""
    tools = ROOT / "tools"
    if not world.knowledge.exists():
        _run([tools / "build_data.py", "--out", world.data])
    # Before minutes of training models: it refuses languages that there are no questions in.
    world.choose()
    models = [tools / "build_models.py", "--data", world.data]
    _run([*models, "--out", world.models, *(["--only", "encoder"] if world.asked_in else [])])
    if world.asked_in:
        _run([*models, "--out", world.policies, "--only", "policy", "--tuned-in", ",".join(world.asked_in)])
    statistics = world.calibration
    if not statistics.exists() or world.encoder.stat().st_mtime > statistics.stat().st_mtime:
        parallel, server = world.data / "parallel.parquet", ["--server-config", "demo_rewards"]
        options = ["--split", "calibration", "--check-split", "heldout", *server, f"encoder.path={world.encoder}"]
        _run([tools / "calibrate.py", "--data", parallel, "--out", statistics, *options])


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment(), check=False)
    if done.returncode:
        sys.exit(f"reproduce: {command[0]} ended with exit code {done.returncode}.")


def reproduce(bench: Bench, arms: Sequence[Arm], seeds: Sequence[int], jobs: int) -> list[str]:
    """Run what is not there yet, all arms of a seed before the next seed. Returns what went wrong, a run a line; the
    other runs are done all the same."""
    from tqdm import tqdm

    for arm in arms:
        # Here and not in two threads: Hydra composes one configuration at a time.
        bench.plan.digests(arm)
    open_runs = [(arm, seed) for seed in seeds for arm in arms if bench.results.get(arm.name, seed) is None]
    failures = []
    steps = bench.plan.steps
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(open_runs) * steps, unit="step", smoothing=0.05, desc=f"{len(open_runs)} runs") as bar,
    ):
        pending: dict[Future[None], str] = {}
        if bench.results.get(BASE, seeds[0]) is None:
            pending[pool.submit(bench.base, seeds[0])] = BASE
        for arm, seed in open_runs:
            pending[pool.submit(bench.run, arm, seed)] = f"{arm.name}, seed {seed}"
        done_steps = 0
        try:
            while pending:
                done, _ = wait(pending, timeout=2.0, return_when=FIRST_COMPLETED)
                for future in done:
                    name = pending.pop(future)
                    error = future.exception()
                    if error is not None and not isinstance(error, (ProcessFailed, OSError)):
                        raise error
                    if error is not None:
                        failures.append(f"{name}: {error}")
                        tqdm.write(failures[-1])
                    done_steps += steps * (name != BASE)
                running, names = bench.progress()
                bar.n = min(bar.total, done_steps + running)
                bar.set_postfix_str(names)
        finally:
            # Nothing new begins; what runs is told to end.
            pool.shutdown(wait=False, cancel_futures=True)
            bench.start.stop()
    return failures


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["arms:", *(f"  {arm.name:16} {' '.join(_words(arm))}" for arm in ARMS.values())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of conf/demo.yaml, for all arms")
    parser.add_argument("--arms", help="comma-separated, as named below (all)")
    parser.add_argument("--seeds", type=int, help=f"number of seeds ({SEEDS})")
    parser.add_argument("--first-seed", type=int, default=1, help="the first of them (1; NeMo takes no 0)")
    parser.add_argument("--steps", type=int, help=f"training steps of every run ({STEPS})")
    parser.add_argument("--data", type=Path, default=ROOT / "build/data", help="of tools/build_data.py (build/data)")
    parser.add_argument("--models", type=Path, default=ROOT / "build/models", help="of tools/build_models.py")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="the final questions (test)")
    parser.add_argument(
        "--asked-in",
        default=ASKED_IN,
        help=f"comma-separated: languages of training questions and base model, or all ({ASKED_IN})",
    )
    parser.add_argument("--out", type=Path, help="runs, results and pictures (results/reproduce)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once (one per core)")
    parser.add_argument("--quick", action="store_true", help="two seeds of two steps, to see that it works")
    parser.add_argument("--table", action="store_true", help="run nothing; write table and figure of what there is")
    parser.add_argument("--readme", type=Path, help="a file whose block between the two reproduce marks is rewritten")
    options = parser.parse_args(arguments)
    # As Ctrl-C: what runs is told to end, trainings save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _main(parser, options)


def _words(arm: Arm) -> list[str]:
    return [f"router={arm.router}", *arm.settings, *arm.server]


def _main(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    names = options.arms.split(",") if options.arms else list(ARMS)
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        parser.error(f"--arms: {unknown[0]!r} is not known; accepted: {', '.join(ARMS)}.")
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    if min(steps, seeds, options.first_seed, options.jobs) < 1:
        parser.error("--steps, --seeds, --first-seed and --jobs must be at least 1.")
    out = (options.out or ROOT / ("results/reproduce_quick" if options.quick else "results/reproduce")).resolve()
    started = time.perf_counter()
    failures: list[str] = []
    try:
        results = Results(out / RESULTS)
        if not options.table:
            asked_in = () if options.asked_in == "all" else tuple(sorted(options.asked_in.split(",")))
            chosen_questions = out / "train.parquet" if asked_in else None
            world = World(options.data.resolve(), options.models.resolve(), options.split, asked_in, chosen_questions)
            plan = Plan(world, steps, tuple(options.overrides))
            chosen = [ARMS[name] for name in names]
            chosen_seeds = range(options.first_seed, options.first_seed + seeds)
            failures = _run_all(plan, out, results, chosen, chosen_seeds, options.jobs)
        for line in write_all(results, out, options.readme):
            print(line)
    except (ProcessFailed, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if failures:
        sys.exit(f"reproduce: {len(failures)} runs failed; the same command tries them again:\n" + "\n".join(failures))
    if not options.table:
        print(f"Done in {time.perf_counter() - started:.0f} s.")


def _run_all(
    plan: Plan, out: Path, results: Results, arms: Sequence[Arm], seeds: Sequence[int], jobs: int
) -> list[str]:
    build(plan.world)
    results.check(plan, ARMS.values())
    out.mkdir(parents=True, exist_ok=True)
    world = plan.world
    shared = [f"encoder.path={world.encoder}", f"calibration.path={world.calibration}"]
    with ExitStack() as rooms:
        bench = Bench(
            plan,
            out,
            rooms.enter_context(RewardServers(shared, out / "servers")),
            EntryPoints(),
            json.loads(world.knowledge.read_text()),
            results,
        )
        return reproduce(bench, arms, seeds, jobs)


if __name__ == "__main__":
    main()
