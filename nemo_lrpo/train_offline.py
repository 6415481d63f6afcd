"""Train a policy over preference pairs: the off-line baselines, on the update and loss code of LRPO.

    python tools/make_pairs.py results/run --kind dpo
    python -m nemo_lrpo.train_offline method=dpo data.train=results/run/pairs_dpo.jsonl \\
        pretrained_checkpoint.restore_from_path=base.nemo run_dir=results/dpo

method=dpo, mapo (DPO on pairs ranked by alignment) or mpo (the gap of the dominant language) goes with the pairs of
tools/make_pairs.py of that kind. One process per GPU, as nemo_lrpo.train; a run_dir that holds a checkpoint is
continued, and the exit codes are the same. `--help` prints the whole configuration.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from nemo_lrpo.config.loader import CONFIG_DIR, load_offline_config
from nemo_lrpo.config.pairs import REWARD_GAP
from nemo_lrpo.config.schema import OfflineConfig
from nemo_lrpo.train import exit_readably, parallel_layout, planned_steps, run, start_actor

if TYPE_CHECKING:
    from nemo_lrpo.actor.actor import MegatronActor
    from nemo_lrpo.data.pairs import PreferencePair
    from nemo_lrpo.training.offline import PairTrainer
    from nemo_lrpo.training.stopping import Starts, Stop


def set_up(config: OfflineConfig, stop: Stop, starts: Starts, rooms: ExitStack) -> tuple[PairTrainer, MegatronActor]:
    """Training over pairs."""
    from nemo_lrpo.actor.platform import ensure_platform

    ensure_platform()
    from nemo_lrpo.actor.setup import check_nemo_sections
    from nemo_lrpo.actor.tokenizer import open_tokenizer
    from nemo_lrpo.data.pair_answers import AnswerRenderer
    from nemo_lrpo.data.prompts import PromptRenderer
    from nemo_lrpo.data.sampler import PairSampler
    from nemo_lrpo.training.checkpoint import open_store
    from nemo_lrpo.training.offline import PairTrainer, check_pairs_resumable

    check_nemo_sections(config)
    loop = config.loop
    train, validation = read_both(config)
    tokenizer = open_tokenizer(config.pretrained_checkpoint.restore_from_path)
    prompts = PromptRenderer(tokenizer, config.prompt)
    renderer = AnswerRenderer(prompts, config.prompt, tokenizer.eos_token_id, config.data.max_answer_tokens)
    train, validation = renderer.fitting(train), renderer.fitting(validation)
    sampler = PairSampler(train, loop.pairs_per_step, config.seed, shuffle=config.data.shuffle)
    total_steps = planned_steps(loop, len(train), loop.pairs_per_step)

    checkpoint = open_store(config.run_dir, loop).latest()
    if checkpoint is not None:
        check_pairs_resumable(checkpoint, config.seed, config.method, sampler.state_dict())
    actor, policy = start_actor(config, checkpoint, total_steps, starts, rooms)
    trainer = PairTrainer(
        config,
        actor=actor,
        sampler=sampler,
        renderer=renderer,
        train=train,
        validation=validation,
        log=lambda metrics, step: policy.logger.log_metrics(dict(metrics), step),
        total_steps=total_steps,
        layout=parallel_layout(config),
        stop=stop,
    )
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint)
    if actor.is_main:
        print(f"{len(train)} pairs to train on, {len(validation)} for validation; {total_steps} steps.", flush=True)
    return trainer, actor


def read_both(config: OfflineConfig) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Pairs to train on, and those for validation. Raises DataError, also for a pair that is in both files."""
    from nemo_lrpo.data.errors import DataError
    from nemo_lrpo.data.pair_file import hold_out, read_pairs

    data, needs_dominant = config.data, config.method.loss == REWARD_GAP
    train = read_pairs(Path(str(data.train)), needs_dominant)
    if data.validation is None:
        train, validation = hold_out(train, data.validation_share, config.seed)
        if not train or (data.validation_share and not validation):
            side = "train on" if not train else "validate on"
            raise DataError(
                f"data.validation_share={data.validation_share:g} leaves no pair to {side}: whole questions are held "
                "out. Change it, or give data.validation."
            )
        return train, validation
    validation = read_pairs(Path(data.validation), needs_dominant)
    both = {pair.pair_id for pair in train} & {pair.pair_id for pair in validation}
    if both:
        raise DataError(f"{data.validation}: {len(both)} pairs are in data.train too, {min(both)} among them.")
    return train, validation


@hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name="train_offline")
def main(tree: DictConfig) -> None:
    """Entry point."""
    with exit_readably():
        sys.exit(run(load_offline_config(tree), tree, set_up))


if __name__ == "__main__":
    main()
