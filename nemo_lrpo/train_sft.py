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
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.loader import CONFIG_DIR, load_supervised_config, save_run_config
from nemo_lrpo.config.supervised import SupervisedConfig
from nemo_lrpo.train import exit_readably

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_lrpo.actor.supervised import Example
    from nemo_lrpo.explang.traces import Trace
    from nemo_lrpo.training.stopping import Starts, Stop

_log = logging.getLogger(__name__)


def run(config: SupervisedConfig, tree: DictConfig) -> int:
    """Train; `tree`, which `config` was loaded from, is kept in run_dir.

    Returns the exit code: 0 after the last step, EXIT_REQUEUE where the same command is to go on.
    """
    from nemo_lrpo.training.stopping import EXIT_REQUEUE, Starts, StoppedInSetUp, catch_signals, stop_of_this_job

    stop = stop_of_this_job(config.loop.stop)
    catch_signals(stop)
    starts = Starts(Path(config.run_dir), config.loop.stop.no_progress_limit)
    try:
        with ExitStack() as rooms:
            step, reason = train(config, tree, stop, starts, rooms)
        if reason:
            starts.requeue(step)
            return EXIT_REQUEUE
    except StoppedInSetUp as signalled:
        print(f"{signalled} before the first step of this start; nothing is lost.", flush=True)
        starts.requeue(starts.step)
        return EXIT_REQUEUE
    except BaseException:
        starts.clear()
        raise
    starts.clear()
    return 0


def train(config: SupervisedConfig, tree: DictConfig, stop: Stop, starts: Starts, rooms: ExitStack) -> tuple[int, int]:
    """The steps that are done in the end, and why it stopped before the last one (0: it did not). Every refusal comes
    before the model is loaded."""
    with stop.setting_up():
        from nemo_lrpo.actor.platform import ensure_platform

        ensure_platform()
        from nemo_lrpo.actor.saving import SavedPolicy
        from nemo_lrpo.actor.setup import check_sections, data_parallel_size
        from nemo_lrpo.actor.supervised import build_learner, loaders, open_loop
        from nemo_lrpo.actor.tokenizer import open_tokenizer
        from nemo_lrpo.actor.watchdog import Watchdog
        from nemo_lrpo.explang.traces import languages_of, read_traces
        from nemo_lrpo.training.checkpoint import open_store
        from nemo_lrpo.training.stopping import describe, is_main_process
        from nemo_lrpo.training.supervised import Between, StoppedEarly, check_same_run

        check_sections(config)
        run_dir, loop = Path(config.run_dir), config.loop
        traces = read_traces(str(config.data.train), config.marks)
        held_out = read_traces(config.data.validation, config.marks) if config.data.validation else []
        tokenizer = open_tokenizer(str(config.pretrained_checkpoint.restore_from_path))
        examples = tokenised(tokenizer, traces, config)
        validation = tokenised(tokenizer, held_out, config) if held_out else []
        total_steps = planned_steps(config, len(examples))
        state: dict[str, Any] = {
            "seed": config.seed,
            "data": {"traces_per_step": loop.traces_per_step, "fingerprint": _fingerprint(examples)},
            "router": None,
            "languages": languages_of(traces),
            "layout": {
                "tensor": config.model["tensor_model_parallel_size"],
                "pipeline": config.model["pipeline_model_parallel_size"],
                "data": data_parallel_size(config),
            },
        }
        store = open_store(run_dir, loop)
        checkpoint = store.latest()
        step = 0
        if checkpoint is not None:
            check_same_run(checkpoint, state)
            step = checkpoint.state["step"]
        starts.begin(step, main=is_main_process(os.environ))
        policy = build_learner(
            config, total_steps=total_steps, resume_from=None if checkpoint is None else checkpoint.shards
        )
        rooms.callback(policy.logger.finalize)
        watchdog = rooms.enter_context(
            Watchdog(
                loop.progress_timeout_s, f"The newest checkpoint is in {run_dir / 'checkpoints'}, if there is one."
            )
        )
        actor = SavedPolicy(policy, watchdog.beat)
        starts.count = actor.max_over_ranks(starts.count)
        starts.refuse_if_too_many()
        between = rooms.enter_context(
            closing(
                Between(
                    run_dir,
                    actor=actor,
                    model=policy.model,
                    store=store,
                    stop=stop,
                    log=lambda metrics, at: policy.logger.log_metrics(dict(metrics), at),
                    state=state,
                    step=step,
                    on_progress=watchdog.beat,
                )
            )
        )
        fitting = open_loop(
            policy.model,
            policy.optimizer,
            policy.scheduler,
            loaders(policy.model, examples, validation, step * loop.traces_per_step, config.seed),
            loop,
            recorder=between,
            timer=between,
            save=between.save,
            step=step,
            is_main=actor.is_main,
        )
        if actor.is_main:
            save_run_config(tree, config.run_dir)
            print(
                f"{len(examples)} traces in {', '.join(state['languages'])}; {total_steps} steps"
                + (f", continuing after step {step} from {checkpoint.path}" if checkpoint else ""),
                flush=True,
            )
    try:
        fitting.fit()
        reason = 0
    except StoppedEarly as stopped:
        reason = stopped.reason
    between.save()
    if reason and actor.is_main:
        print(f"Stopped by {describe(reason)} after step {between.step}. The same command goes on.", flush=True)
    if not reason and loop.export_nemo:
        summary = {"step": between.step, "seed": config.seed, "languages": state["languages"]}
        actor.export(run_dir / "model.nemo", {"cold_start.json": json.dumps(summary)})
    return between.step, reason


def tokenised(tokenizer: PreTrainedTokenizerBase, traces: Sequence[Trace], config: SupervisedConfig) -> list[Example]:
    """The traces as token ids, in order: the prompt that training by reward will have, the response, the end token.

    The tag is tokenised by itself, as where it is prefilled. Raises DataError for a trace whose tokens do not read back
    as its text (a mark that is a special token is lost), and for those longer than data.max_tokens, by data.over_long.
    """
    from nemo_lrpo.actor.supervised import Example
    from nemo_lrpo.data.errors import DataError
    from nemo_lrpo.data.prompts import PromptRenderer
    from nemo_lrpo.explang.format import tag
    from nemo_lrpo.types import ORIGIN_FIXED, Prompt, RoutedPrompt

    renderer = PromptRenderer(tokenizer, config.prompt)
    plan = []
    for trace in traces:
        language = trace.question_language
        prompt = Prompt(trace.question_id, trace.question, "", language, language, ())
        plan.append(RoutedPrompt(prompt, -1, 0, language, ORIGIN_FIXED, 1.0))
    examples, longer = [], []
    for trace, prompt in zip(traces, renderer.render_all(plan), strict=True):
        begins = tag(trace.language, config.marks)
        ids = renderer.tokens_of(begins) + renderer.tokens_of(trace.response.removeprefix(begins))
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text != trace.response:
            raise DataError(
                f"trace {trace.question_id!r} in {trace.language!r} does not survive the tokenizer: {text[:80]!r}; a "
                "mark may be one of its special tokens, which decoding drops: give other marks."
            )
        example = Example(prompt.token_ids, (*ids, tokenizer.eos_token_id))
        length = len(example.prompt) + len(example.response)
        (examples if length <= config.data.max_tokens else longer).append(example)
        if length > config.data.max_tokens and config.data.over_long == "reject":
            raise DataError(
                f"trace {trace.question_id!r} in {trace.language!r} has {length} tokens, more than "
                f"data.max_tokens={config.data.max_tokens}. Raise it, or leave such out with data.over_long=drop."
            )
    if longer:
        _log.warning("%d of %d traces are longer than data.max_tokens; left out.", len(longer), len(traces))
    return examples


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
