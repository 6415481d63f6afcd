"""Train a policy with LRPO.

    python -m nemo_lrpo.train pretrained_checkpoint.restore_from_path=base.nemo data.train=train.parquet \\
        reward.endpoint_file=reward.json run_dir=results/run

One process per GPU: start it with srun or torchrun, or plainly for a single one. A run_dir that holds a checkpoint is
continued. mode=explang trains a policy that chooses the language it thinks in (nemo_lrpo/config/mode.py). `--help`
prints the whole configuration.

Exit codes: 0 after the last step; 75 where a signal or the job's time limit ended the run early, saved, and the same
command goes on; 79 where that was in vain several times over; 70 where another rank failed or this one made no
progress; 1 for an error, which is named.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import hydra
from omegaconf import DictConfig

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.evaluation import REWARD
from nemo_lrpo.config.loader import CONFIG_DIR, load_train_config, save_run_config
from nemo_lrpo.config.mode import EXPLANG
from nemo_lrpo.config.schema import RunConfig, TrainConfig
from nemo_lrpo.config.training import StepsConfig

if TYPE_CHECKING:
    from nemo_lrpo.actor.actor import MegatronActor
    from nemo_lrpo.actor.setup import Policy
    from nemo_lrpo.data.prompts import PromptRenderer
    from nemo_lrpo.training.checkpoint import Checkpoint
    from nemo_lrpo.training.loop import TrainingLoop
    from nemo_lrpo.training.stopping import Starts, Stop
    from nemo_lrpo.training.trainer import LrpoTrainer
    from nemo_lrpo.types import Prompt

C = TypeVar("C", bound=RunConfig)
SetUp = Callable[[C, "Stop", "Starts", ExitStack], "tuple[TrainingLoop, MegatronActor]"]
"""Puts the rooms together, to be closed by the stack. Every refusal comes before the model is loaded."""


def run(config: C, tree: DictConfig, set_up: SetUp[C]) -> int:
    """Train; `tree`, which `config` was loaded from, is kept in run_dir.

    Returns the exit code: 0 after the last step, EXIT_REQUEUE where the same command is to go on.
    """
    from nemo_lrpo.training.stopping import Starts, catch_signals, counted, stop_of_this_job

    stop = stop_of_this_job(config.loop.stop)
    catch_signals(stop)
    starts = Starts(Path(config.run_dir), config.loop.stop.no_progress_limit)

    def work() -> int | None:
        with ExitStack() as rooms:
            with stop.setting_up():
                trainer, actor = set_up(config, stop, starts, rooms)
                if actor.is_main:
                    save_run_config(tree, config.run_dir)
            if trainer.fit():
                return trainer.steps_done
            if config.loop.export_nemo and trainer.finished:
                trainer.export(Path(config.run_dir) / "model.nemo")
        return None

    return counted(starts, work)


def set_up(config: TrainConfig, stop: Stop, starts: Starts, rooms: ExitStack) -> tuple[LrpoTrainer, MegatronActor]:
    """Training with LRPO."""
    from nemo_lrpo.actor.platform import ensure_platform

    ensure_platform()
    from nemo_lrpo.actor.setup import check_nemo_sections
    from nemo_lrpo.data.reader import contexts, read_prompts
    from nemo_lrpo.data.sampler import PromptSampler
    from nemo_lrpo.evaluate import open_services, open_suite
    from nemo_lrpo.router import build_router
    from nemo_lrpo.serving.client import RewardClient
    from nemo_lrpo.tasks import load_tasks
    from nemo_lrpo.training.checkpoint import open_store
    from nemo_lrpo.training.modes import build_mode
    from nemo_lrpo.training.trainer import LrpoTrainer, check_resumable

    check_nemo_sections(config)
    loop = config.loop
    train = read_prompts(config.data.train, config.data.languages)
    validation = read_prompts(config.data.validation, config.data.languages) if config.data.validation else []
    validation = validation[: loop.val_prompts] if loop.val_prompts else validation
    renderer = open_renderer(config)
    train = fitting(config, renderer, train)
    validation = renderer.fitting(validation, config.data.languages)
    tasks = load_tasks(config.evaluation.tasks) if config.evaluation.interval else []
    sampler = PromptSampler(train, loop.prompts_per_step, config.seed, shuffle=config.data.shuffle)
    topics, regions = contexts(train)
    router = build_router(config.router, config.data.languages, topics, regions, config.seed)
    total_steps = planned_steps(loop, len(train), loop.prompts_per_step)
    mode = build_mode(config.mode, total_steps)

    checkpoint = open_store(config.run_dir, loop).latest()
    if checkpoint is not None:
        check_resumable(checkpoint, config.seed, router.languages, sampler.state_dict(), mode.name)
    rewards = rooms.enter_context(closing(RewardClient(config.reward)))
    asked = {language for task in tasks if task.verifier == REWARD for language in task.languages}
    answered = [*config.data.languages, *sorted(asked - set(config.data.languages))]
    rewards.check_server(answered, config.mode.thought_in)
    mode.check_service(rewards.identity())
    suite = None
    if tasks:
        suite = open_suite(config, tasks, open_services(config.evaluation, tasks, rewards, rooms, config), mode)
        suite.fit(renderer)
    actor, policy = start_actor(config, checkpoint, total_steps, starts, rooms)
    trainer = LrpoTrainer(
        config,
        actor=actor,
        router=router,
        sampler=sampler,
        renderer=renderer,
        rewards=rewards,
        validation=validation,
        log=lambda metrics, step: policy.logger.log_metrics(dict(metrics), step),
        total_steps=total_steps,
        layout=parallel_layout(config),
        stop=stop,
        suite=suite,
        mode=mode,
    )
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint)
    return trainer, actor


def start_actor(
    config: RunConfig, checkpoint: Checkpoint | None, total_steps: int, starts: Starts, rooms: ExitStack
) -> tuple[MegatronActor, Policy]:
    """All ranks: the policy, as of `checkpoint` where there is one, and a watchdog, closed by `rooms`. Raises
    NoProgress."""
    from nemo_lrpo.actor.actor import MegatronActor
    from nemo_lrpo.actor.setup import build_policy
    from nemo_lrpo.actor.watchdog import Watchdog
    from nemo_lrpo.training.stopping import is_main_process

    starts.begin(0 if checkpoint is None else checkpoint.state["step"], main=is_main_process(os.environ))
    policy = build_policy(
        config,
        total_updates=total_steps * config.algorithm.num_updates,
        resume_from=None if checkpoint is None else checkpoint.shards,
    )
    rooms.callback(policy.logger.finalize)
    watchdog = rooms.enter_context(Watchdog(config.loop.progress_timeout_s, afterwards(config)))
    actor = MegatronActor(policy, config, on_progress=watchdog.beat)
    starts.count = actor.max_over_ranks(starts.count)
    starts.refuse_if_too_many()
    return actor, policy


def parallel_layout(config: RunConfig) -> dict[str, int]:
    """Parallel size by axis."""
    from nemo_lrpo.actor.setup import data_parallel_size

    return {
        "tensor": config.model["tensor_model_parallel_size"],
        "pipeline": config.model["pipeline_model_parallel_size"],
        "data": data_parallel_size(config),
    }


def open_renderer(config: TrainConfig) -> PromptRenderer:
    """Prompts for the policy's tokenizer. Raises ConfigError where a mode's responses cannot be written in it."""
    from nemo_lrpo.actor.tokenizer import open_tokenizer
    from nemo_lrpo.data.prompts import PromptRenderer
    from nemo_lrpo.explang.format import check_marks
    from nemo_lrpo.training.modes import prefill_of

    tokenizer = open_tokenizer(str(config.pretrained_checkpoint.restore_from_path))
    renderer = PromptRenderer(tokenizer, config.prompt, prefill_of(config.mode))
    if config.mode.name == EXPLANG:
        check_marks(config.mode.marks, {*config.data.languages, *config.mode.seen}, renderer.decoded)
    return renderer


def fitting(config: TrainConfig, renderer: PromptRenderer, questions: Sequence[Prompt]) -> list[Prompt]:
    """The training questions that can be asked in whatever the run makes of them. Raises DataError."""
    languages = config.data.languages
    return renderer.fitting(questions, languages, languages if config.mode.forced_rollouts else ())


def afterwards(config: RunConfig) -> str:
    """What becomes of a run whose processes were ended."""
    return (
        f"What is saved is the newest checkpoint in {Path(config.run_dir) / 'checkpoints'}, if there is one; starting "
        "the run again repeats the steps after it, with the same results."
    )


def planned_steps(loop: StepsConfig, items: int, per_step: int) -> int:
    """Steps of the whole run, resumed ones counted: `max_epochs` over the items, cut at `max_steps`."""
    steps = math.ceil(loop.max_epochs * items / per_step)
    return steps if loop.max_steps < 0 else min(steps, loop.max_steps)


@contextmanager
def exit_readably() -> Iterator[None]:
    """One readable line for what the user can mend, a traceback for what they cannot."""
    from nemo_lrpo.data.errors import DataError
    from nemo_lrpo.serving.errors import RewardError
    from nemo_lrpo.training.checkpoint import CheckpointError
    from nemo_lrpo.training.stopping import EXIT_NO_PROGRESS, NoProgress
    from nemo_lrpo.types import AgreedError

    try:
        yield
    except NoProgress as error:
        print(f"NoProgress: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_NO_PROGRESS)
    except (ConfigError, DataError, RewardError, CheckpointError, AgreedError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


@hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name="train")
def main(tree: DictConfig) -> None:
    """Entry point."""
    with exit_readably():
        sys.exit(run(load_train_config(tree), tree, set_up))


if __name__ == "__main__":
    main()
