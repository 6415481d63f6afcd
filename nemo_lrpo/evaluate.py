"""Measure a policy: questions are answered, scored, and averaged by language, with 95 % intervals.

    python -m nemo_lrpo.evaluate pretrained_checkpoint.restore_from_path=model.nemo evaluation.out=results/test.json \\
        evaluation.data=test.parquet reward.endpoint_file=reward.json
    python -m nemo_lrpo.evaluate evaluation.checkpoint=results/run evaluation.out=results/step.json \\
        '+evaluation.tasks.mgsm={kind: mgsm, path: mgsm}' '+evaluation.tasks.mmlu={kind: global_mmlu, path: mmlu}'

Each question is answered in its own language, once, or `evaluation.samples` times; then pass@k is measured too.
`evaluation.data` is scored by the reward server; tasks in their public layouts are scored here
(nemo_lrpo/config/evaluation.py). Answers are kept as they come: the same command goes on after a stop, and with more
samples it adds to them. `--help` prints the whole configuration.

Exit codes are those of nemo_lrpo.train: 0 when all is measured; 75 where a signal or the job's time limit came
first, and the same command goes on; 79 where that was in vain several times over; 70 where another rank failed; 1 for
an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.evaluation import OWN, REWARD, TEST, TasksConfig
from nemo_lrpo.config.loader import CONFIG_DIR, config_of_run, load_evaluate_config
from nemo_lrpo.config.mode import EXPLANG, LRPO
from nemo_lrpo.config.schema import EvaluateConfig, TrainConfig
from nemo_lrpo.config.scoring import ScorerConfig, ThinkingConfig, VerifierConfig
from nemo_lrpo.train import exit_readably, open_renderer

if TYPE_CHECKING:
    from nemo_lrpo.actor.actor import MegatronActor
    from nemo_lrpo.data.prompts import PromptRenderer
    from nemo_lrpo.serving.client import RewardClient
    from nemo_lrpo.tasks import Task
    from nemo_lrpo.training.answer_file import AnswerFile
    from nemo_lrpo.training.checkpoint import Checkpoint
    from nemo_lrpo.training.evaluation import Answer, AnswerKey, Suite
    from nemo_lrpo.training.modes import Mode
    from nemo_lrpo.training.protocols import RewardService
    from nemo_lrpo.training.stopping import Starts, Stop


def run(config: EvaluateConfig) -> int:
    """Evaluate; writes `evaluation.out` and the answers beside it.

    Returns the exit code: 0, or EXIT_REQUEUE where the same command is to go on.
    """
    from nemo_lrpo.training.stopping import Starts, catch_signals, counted, stop_of_this_job

    stop = stop_of_this_job(config.loop.stop)
    # What is answered is on the disk: no time is needed for a save.
    stop.took("save", 0.0)
    catch_signals(stop)
    out = Path(config.evaluation.out)
    starts = Starts(
        out.parent,
        config.loop.stop.no_progress_limit,
        file=f"{out.stem}.starts.json",
        lacking="added to the {} answers that are kept; a batch has evaluation.batch_size questions",
    )
    return counted(starts, partial(_evaluate, config, stop, starts))


def _evaluate(config: EvaluateConfig, stop: Stop, starts: Starts) -> int | None:
    """All ranks: answers and metrics; the number of answers where it stops early, None at the end.

    Every refusal comes before the model is loaded, and where all answers are there it is not loaded at all.
    """
    from nemo_lrpo.actor.platform import ensure_platform

    ensure_platform()
    from nemo_lrpo.actor.setup import check_nemo_sections
    from nemo_lrpo.tasks import load_tasks
    from nemo_lrpo.training.answer_file import AnswerFile
    from nemo_lrpo.training.evaluation import Answer
    from nemo_lrpo.training.modes import build_mode
    from nemo_lrpo.training.stopping import is_main_process

    with ExitStack() as rooms:
        with stop.setting_up():
            check_nemo_sections(config)
            settings = config.evaluation
            checkpoint = None if settings.checkpoint is None else find_checkpoint(Path(settings.checkpoint))
            tasks = [_at_most(task, settings.limit) for task in load_tasks(settings.all_tasks())]
            renderer = open_renderer(config)
            mode = build_mode(config.mode, total_steps=0, think_in=settings.think_in)
            rewards = open_rewards(config, tasks, rooms)
            if rewards is not None:
                mode.check_service(rewards.identity())
            services = open_services(settings, tasks, rewards, rooms, config)
            suite = open_suite(config, tasks, services, mode)
            suite.fit(renderer)
            items = {(task.name, item.prompt.question_id): item for task in suite.tasks for item in task.items}

            def understand(record: Mapping[str, Any]) -> Answer:
                question = record["sample_id"].partition("/")[2].rpartition("/")[0]
                return Answer.of(items[record["task"], question], record)

            file = rooms.enter_context(
                closing(
                    AnswerFile(
                        Path(settings.out),
                        _dependencies(config, checkpoint, suite, services),
                        understand,
                        overwrite=settings.overwrite,
                        writes=is_main_process(os.environ),
                        samples=settings.samples,
                    )
                )
            )
        answers = dict(file.kept)
        wanted = sum(len(suite.draws(task)) for task in suite.tasks)
        if len(answers) < wanted:
            # Told here too, since what follows may take hours.
            _tell_what_differs(config)
            starts.begin(len(answers), main=is_main_process(os.environ))
            if reason := _answer_the_rest(config, checkpoint, renderer, suite, file, answers, stop, starts):
                if is_main_process(os.environ):
                    print(_stopped_by(reason, len(answers), wanted), flush=True)
                return len(answers)
        _write_result(config, checkpoint, suite, file, answers)
    return None


def _answer_the_rest(
    config: EvaluateConfig,
    checkpoint: Checkpoint | None,
    renderer: PromptRenderer,
    suite: Suite,
    file: AnswerFile,
    answers: dict[AnswerKey, Answer],
    stop: Stop,
    starts: Starts,
) -> int:
    """All ranks: add to `answers`, and to `file` batch by batch, what is not there yet; why it stops early, or 0."""
    from tqdm import tqdm

    from nemo_lrpo.actor import collectives
    from nemo_lrpo.actor.actor import MegatronActor
    from nemo_lrpo.actor.setup import build_policy
    from nemo_lrpo.actor.watchdog import Watchdog

    with stop.setting_up():
        policy = build_policy(
            config, total_updates=1, resume_from=None if checkpoint is None else checkpoint.shards, training=False
        )
    collectives.refuse_different("answers kept beside evaluation.out", _digest(sorted(answers)))
    with Watchdog(config.loop.progress_timeout_s, "The answers so far are kept; the same command goes on.") as watchdog:
        actor = MegatronActor(policy, config, on_progress=watchdog.beat)
        starts.count = actor.max_over_ranks(starts.count)
        starts.refuse_if_too_many()
        for task in suite.tasks:
            wanted = suite.draws(task)
            left = [draw for draw in wanted if draw.key(task.name) not in answers]
            bar = tqdm(
                desc=task.name,
                total=len(wanted),
                initial=len(wanted) - len(left),
                unit="answer",
                disable=not actor.is_main,
            )
            with closing(bar):
                for draws in suite.batches(left):
                    batch, reason = _batch_in_time(
                        actor, stop, partial(suite.answer, actor, renderer, task, draws, stop)
                    )
                    if reason:
                        return reason
                    file.append(task.name, batch)
                    answers.update((answer.draw.key(task.name), answer) for answer in batch)
                    bar.update(len(batch))
        actor.barrier()
    return 0


def _batch_in_time(actor: MegatronActor, stop: Stop, answer: Callable[[], list[Answer]]) -> tuple[list[Answer], int]:
    """All ranks: a batch and 0; or none and why this start ends, where a batch does not fit into its time any more.

    What fails while the start is to end counts as given up: what it asks for may be ending too.
    """
    from nemo_lrpo.training.scoring import StepRefused
    from nemo_lrpo.types import StepAbandoned

    if reason := actor.max_over_ranks(stop.reason("batch")):
        return [], reason
    try:
        with stop.timed("batch"):
            return answer(), 0
    except (StepAbandoned, StepRefused):
        if reason := actor.max_over_ranks(stop.reason("batch")):
            return [], reason
        raise


def _stopped_by(reason: int, kept: int, wanted: int) -> str:
    from nemo_lrpo.training.stopping import describe

    return f"Stopped by {describe(reason)}: {kept} of {wanted} answers are kept, and the same command goes on."


def _write_result(
    config: EvaluateConfig,
    checkpoint: Checkpoint | None,
    suite: Suite,
    file: AnswerFile,
    answers: Mapping[AnswerKey, Answer],
) -> None:
    """The main rank writes and prints the metrics."""
    from nemo_lrpo.training.answer_file import write_whole
    from nemo_lrpo.training.stopping import is_main_process

    results = [suite.result(task, [answers[draw.key(task.name)] for draw in suite.draws(task)]) for task in suite.tasks]
    flat: dict[str, float] = {}
    for result in results:
        # Of the file that is given by evaluation.data, with the names that a step's metrics have.
        flat |= result.metrics if result.task.name == TEST else result.flat()
    _tell_what_differs(config)
    if is_main_process(os.environ):
        tree = {
            "model": config.pretrained_checkpoint.restore_from_path,
            "checkpoint": None if checkpoint is None else str(checkpoint.path),
            "data": config.evaluation.data,
            "metrics": flat,
            "tasks": {result.task.name: result.tree() for result in results},
        }
        out = Path(config.evaluation.out)
        write_whole(out, json.dumps(_finite(tree), ensure_ascii=False, indent=1))
        for result in results:
            print(result.line(), flush=True)
        print(f"{out} (the answers: {file.path})", flush=True)


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest of a run_dir; verified. Raises ConfigError, CheckpointError."""
    from nemo_lrpo.config.training import LoopConfig
    from nemo_lrpo.training.checkpoint import MANIFEST_FILE, load, open_store

    if (path / MANIFEST_FILE).is_file():
        return load(path)
    found = open_store(path, LoopConfig()).latest()
    if found is None:
        raise ConfigError(
            f"evaluation.checkpoint={str(path)!r}: no checkpoint there; give run_dir/checkpoints/step_N, or a run_dir."
        )
    return found


def open_rewards(config: EvaluateConfig, tasks: Sequence[Task], rooms: ExitStack) -> RewardClient | None:
    """The reward server, where a task needs it and it serves the task's languages; closed with `rooms`."""
    from nemo_lrpo.serving.client import RewardClient

    asked = [task for task in tasks if task.verifier == REWARD]
    if not asked:
        return None
    rewards = rooms.enter_context(closing(RewardClient(config.reward)))
    answered = {language for task in asked for language in task.languages}
    chosen = config.mode.thought_in if config.evaluation.think_in is None else []
    rewards.check_server(sorted(answered | _forced(config)), chosen)
    return rewards


def open_services(
    settings: TasksConfig,
    tasks: Sequence[Task],
    rewards: RewardService | None,
    rooms: ExitStack,
    config: TrainConfig | None = None,
) -> dict[str, RewardService]:
    """What scores each task that is answered in writing: the reward server, or a scorer here, closed with `rooms`.
    config: of whose mode the answers are; None: of LRPO's."""
    from nemo_lrpo.rewards.local import LocalRewards
    from nemo_lrpo.tasks.task import GENERATE

    services: dict[str, RewardService] = {}
    for task in tasks:
        if task.method != GENERATE:
            continue
        if task.verifier == REWARD:
            assert rewards is not None
            services[task.name] = rewards
            continue
        thinks = config is not None and config.mode.name == EXPLANG
        scorer = ScorerConfig(
            languages=sorted({*task.languages, *_thinking_languages(config)}) if thinks else task.languages,
            verifiers={task.verifier: VerifierConfig(kind=task.verifier)},
            judge=settings.judge,
            language_id=settings.language_id,
            thinking=ThinkingConfig(tagged=True, marks=config.mode.marks) if thinks else ThinkingConfig(),
        )
        services[task.name] = rooms.enter_context(closing(LocalRewards(scorer)))
    return services


def _thinking_languages(config: TrainConfig) -> set[str]:
    """In which responses may think."""
    return {*config.data.languages, *config.mode.seen} | _forced(config)


def _forced(config: TrainConfig) -> set[str]:
    """The language that evaluation.think_in names."""
    named = getattr(config.evaluation, "think_in", None)
    return set() if named in (None, OWN) else {named}


def open_suite(
    config: TrainConfig, tasks: Sequence[Task], services: Mapping[str, RewardService], mode: Mode | None = None
) -> Suite:
    """The tasks with what scores them. mode: None for LRPO."""
    from nemo_lrpo.training.evaluation import Suite

    return Suite(
        tasks,
        services,
        config.evaluation,
        languages=config.data.languages,
        seed=config.seed,
        max_missing_share=config.reward.max_missing_share,
        mode=mode,
    )


def _at_most(task: Task, limit: int) -> Task:
    return replace(task, items=task.items[:limit]) if limit and task.name == TEST else task


def _dependencies(
    config: EvaluateConfig, checkpoint: Checkpoint | None, suite: Suite, services: Mapping[str, RewardService]
) -> dict[str, object]:
    """What answers and scores depend on, by name."""
    from nemo_lrpo.training.answer_file import fingerprint
    from nemo_lrpo.training.evaluation import task_digest

    base = Path(str(config.pretrained_checkpoint.restore_from_path))
    rollout = asdict(config.rollout)
    for name in ("micro_batch_size", "trt_llm"):
        rollout.pop(name)
    own: dict[str, object] = {
        "model": fingerprint(base),
        "checkpoint": None if checkpoint is None else fingerprint(checkpoint.shards),
        "seed": config.seed,
        "evaluation.temperature": config.evaluation.temperature,
        "rollout": rollout,
        "prompt": asdict(config.prompt),
    }
    if config.mode.name == EXPLANG:
        own |= {"mode": asdict(config.mode), "evaluation.think_in": config.evaluation.think_in}
    for task in suite.tasks:
        name = "evaluation.data" if task.name == TEST else f"evaluation.tasks.{task.name}"
        own[name] = task_digest(task)
        if task.name in services:
            own[f"the scorer of {name}"] = _digest(services[task.name].identity())
    return own


def _tell_what_differs(config: EvaluateConfig) -> None:
    """The main rank prints how this differs from the run of its checkpoint."""
    from nemo_lrpo.training.stopping import is_main_process

    if is_main_process(os.environ):
        for name, trained, here in _unlike_the_run(config):
            print(f"Note: {name} was {trained!r} in the run of this checkpoint; here it is {here!r}.", flush=True)


def _unlike_the_run(config: EvaluateConfig) -> list[tuple[str, object, object]]:
    """(key, in the run, here) of what should hardly differ between training and evaluation of a checkpoint."""
    run = None if config.evaluation.checkpoint is None else config_of_run(Path(config.evaluation.checkpoint))
    if run is None:
        return []
    own = {
        "mode.name": config.mode.name,
        "prompt.style": config.prompt.style,
        "prompt.chat_template": config.prompt.chat_template,
        "data.languages": list(config.data.languages),
    }
    trained = {name: OmegaConf.select(run, name) for name in own}
    # A run over pairs has no candidate languages, and runs of earlier releases have no mode.
    trained["data.languages"] = list(trained["data.languages"] or own["data.languages"])
    trained["mode.name"] = trained["mode.name"] or LRPO
    return [(name, trained[name], here) for name, here in own.items() if trained[name] != here]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _finite(tree: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    return None if isinstance(tree, float) and tree != tree else tree


@hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name="evaluate")
def main(tree: DictConfig) -> None:
    """Entry point."""
    with exit_readably():
        sys.exit(run(load_evaluate_config(tree)))


if __name__ == "__main__":
    main()
