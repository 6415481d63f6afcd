"""Cold start: teach a base model the format of ExpLang by supervised training on traces, LoRA or full.

    python -m nemo_lrpo.train_sft pretrained_checkpoint.restore_from_path=base.nemo data.train=traces/train.jsonl \\
        data.validation=traces/validation.jsonl run_dir=results/cold_start

Model and loop are NeMo-Aligner's own for supervised training. Prompts are those of training by reward; the loss is on
the response. One process per GPU: start it with srun or torchrun, or plainly for a single one. A run_dir that holds a
checkpoint is continued. After the last step `<run_dir>/model.nemo` has the adapters merged: give it to nemo_lrpo.train.
`--help` prints the whole configuration; exit codes are those of nemo_lrpo.train.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.loader import CONFIG_DIR, load_supervised_config, save_run_config
from nemo_lrpo.config.supervised import SupervisedConfig
from nemo_lrpo.train import exit_readably

if TYPE_CHECKING:
    from nemo_aligner.algorithms.supervised import SupervisedTrainer

    from nemo_lrpo.actor.saving import SavedPolicy
    from nemo_lrpo.training.stopping import Starts, Stop
    from nemo_lrpo.training.supervised import Between
    from nemo_lrpo.types import Example


def run(config: SupervisedConfig, tree: DictConfig) -> int:
    """Train; `tree`, which `config` was loaded from, is kept in run_dir.

    Returns the exit code: 0 after the last step, EXIT_REQUEUE where the same command is to go on.
    """
    from nemo_lrpo.training.stopping import Starts, catch_signals, counted, stop_of_this_job

    stop = stop_of_this_job(config.loop.stop)
    catch_signals(stop)
    starts = Starts(Path(config.run_dir), config.loop.stop.no_progress_limit)
    return counted(starts, partial(_train, config, tree, stop, starts))


def _train(config: SupervisedConfig, tree: DictConfig, stop: Stop, starts: Starts) -> int | None:
    """The step after which it stops early, None after the last one."""
    with ExitStack() as rooms:
        with stop.setting_up():
            learning = set_up(config, tree, stop, starts, rooms)
        if learning.fit():
            return learning.between.step
        if config.loop.export_nemo:
            learning.export(Path(config.run_dir) / "model.nemo")
    return None


@dataclasses.dataclass
class Learning:
    """NeMo-Aligner's loop with what it calls between steps, and the policy that it trains."""

    loop: SupervisedTrainer
    between: Between
    actor: SavedPolicy
    summary: dict[str, Any]

    def fit(self) -> int:
        """Train, and save what is not saved. Returns 0, or why it stopped before the last step."""
        from nemo_lrpo.training.stopping import describe
        from nemo_lrpo.training.supervised import StoppedEarly

        reason = 0
        try:
            self.loop.fit()
        except StoppedEarly as stopped:
            reason = stopped.reason
        self.between.save()
        if reason and self.actor.is_main:
            print(
                f"Stopped by {describe(reason)} after step {self.between.step}. The same command goes on.", flush=True
            )
        return reason

    def export(self, path: Path) -> None:
        """All ranks: write the model, adapters merged, as a .nemo."""
        summary = {**self.summary, "step": self.between.step}
        self.actor.export(path, {"cold_start.json": json.dumps(summary)})


def set_up(config: SupervisedConfig, tree: DictConfig, stop: Stop, starts: Starts, rooms: ExitStack) -> Learning:
    """Put the rooms together, to be closed by `rooms`. Every refusal comes before the model is loaded."""
    from nemo_lrpo.actor.platform import ensure_platform

    ensure_platform()
    from nemo_lrpo.actor.saving import SavedPolicy
    from nemo_lrpo.actor.setup import check_sections, data_parallel_size
    from nemo_lrpo.actor.supervised import build_learner, loaders, open_loop
    from nemo_lrpo.actor.tokenizer import open_tokenizer
    from nemo_lrpo.actor.watchdog import Watchdog
    from nemo_lrpo.data.prompts import PromptRenderer
    from nemo_lrpo.explang.format import prefill
    from nemo_lrpo.explang.traces import examples_of, languages_of, read_traces
    from nemo_lrpo.training.checkpoint import open_store
    from nemo_lrpo.training.stopping import is_main_process
    from nemo_lrpo.training.supervised import Between, check_same_run

    check_sections(config)
    loop, model = config.loop, config.model
    traces = read_traces(str(config.data.train), config.marks)
    held_out = read_traces(config.data.validation, config.marks) if config.data.validation else []
    tokenizer = open_tokenizer(str(config.pretrained_checkpoint.restore_from_path))
    renderer = PromptRenderer(tokenizer, config.prompt, prefill(config.marks))
    examples, validation = (examples_of(some, tokenizer, renderer, config.data) for some in (traces, held_out))
    total_steps = planned_steps(config, len(examples))
    sizes = {"tensor": model["tensor_model_parallel_size"], "pipeline": model["pipeline_model_parallel_size"]}
    state: dict[str, Any] = {
        "seed": config.seed,
        "data": {"traces_per_step": loop.traces_per_step, "fingerprint": _fingerprint(examples)},
        "router": None,
        "languages": languages_of(traces),
        "layout": {**sizes, "data": data_parallel_size(config)},
    }
    store = open_store(config.run_dir, loop)
    checkpoint = store.latest()
    step, shards = 0, None
    if checkpoint is not None:
        check_same_run(checkpoint, state)
        step, shards = checkpoint.state["step"], checkpoint.shards
    starts.begin(step, main=is_main_process(os.environ))
    policy = build_learner(config, total_steps=total_steps, resume_from=shards)
    rooms.callback(policy.logger.finalize)
    watchdog = rooms.enter_context(Watchdog(loop.progress_timeout_s, f"What is saved is in {config.run_dir}."))
    actor = SavedPolicy(policy, watchdog.beat)
    starts.count = actor.max_over_ranks(starts.count)
    starts.refuse_if_too_many()
    between = Between(
        Path(config.run_dir),
        actor=actor,
        model=policy.model,
        store=store,
        stop=stop,
        log=lambda metrics, at: policy.logger.log_metrics(dict(metrics), at),
        state=state,
        step=step,
        on_progress=watchdog.beat,
    )
    rooms.enter_context(closing(between))
    data = loaders(policy.model, examples, validation, step * loop.traces_per_step, config.seed)
    fitting = open_loop(policy, data, loop, between, step, is_main=actor.is_main)
    if actor.is_main:
        save_run_config(tree, config.run_dir)
        going_on = f", continuing after step {step} from {checkpoint.path}" if checkpoint else ""
        languages = ", ".join(state["languages"])
        print(f"{len(examples)} traces that think in {languages}; {total_steps} steps{going_on}", flush=True)
    return Learning(fitting, between, actor, {"seed": config.seed, "languages": state["languages"]})


def planned_steps(config: SupervisedConfig, traces: int) -> int:
    """Steps of the whole run, resumed ones counted."""
    loop = config.loop
    if traces < loop.traces_per_step:
        raise ConfigError(
            f"trainer.sft.traces_per_step={loop.traces_per_step} exceeds the {traces} traces of data.train."
        )
    steps = loop.max_epochs * (traces // loop.traces_per_step)
    return steps if loop.max_steps < 0 else min(steps, loop.max_steps)


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(json.dumps(dataclasses.astuple(example)).encode())
    return digest.hexdigest()


@hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name="train_sft")
def main(tree: DictConfig) -> None:
    """Entry point."""
    with exit_readably():
        sys.exit(run(load_supervised_config(tree), tree))


if __name__ == "__main__":
    main()
