"""Supervised training on traces with NeMo-Aligner's own model and loop.

What these need, as read in nemo-aligner 0.7.0 and nemo-toolkit 2.2.1:

- GPTSFTModel takes a batch with tokens, labels, position_ids int64 [B, S] and loss_mask [B, S]; the causal mask is
  Megatron's own (get_attention_mask_from_fusion). It reads the batch sizes from data.train_ds and data.validation_ds.
- Its loss is the mean over a micro batch's response tokens, averaged over micro batches and data-parallel ranks: a
  token counts for more in a micro batch with fewer of them. Rows of padding alone would make it 0 / 0.
- SupervisedTrainer makes several passes only with a MegatronPretrainingRandomBatchSampler, asks a timer whether to
  stop, and has a callback save; its own state is the step and the traces consumed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
    MegatronPretrainingBatchSampler,
    MegatronPretrainingRandomBatchSampler,
)
from nemo_aligner.algorithms import supervised as aligner
from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_peft,
    init_using_ptl,
)
from nemo_aligner.utils.utils import load_from_nemo
from omegaconf import OmegaConf, open_dict
from tqdm import tqdm

from nemo_lrpo.actor import collectives
from nemo_lrpo.actor.adapters import AdapterShards, describe_shards
from nemo_lrpo.actor.collation import collate
from nemo_lrpo.actor.platform import model_overrides
from nemo_lrpo.actor.setup import Policy, data_parallel_size, fill_in, gradient_norm, open_trainer
from nemo_lrpo.actor.tokenizer import ArchiveTokenizer
from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.supervised import SupervisedConfig, SupervisedLoopConfig
from nemo_lrpo.seeding import derive_seed
from nemo_lrpo.types import Example, NonFiniteError


class SupervisedModel(AdapterShards, ArchiveTokenizer, GPTSFTModel):
    """NeMo-Aligner's own; a loss or gradient that is not finite stops it before the optimizer moves."""

    gradient_norm = math.nan
    """Of the last step, over all ranks, before clipping."""

    def get_loss_and_metrics(
        self, batch: dict[str, torch.Tensor], forward_only: bool
    ) -> tuple[float, dict[str, float]]:
        """The parent's; raises NonFiniteError on all ranks, which have one loss."""
        loss, metrics = super().get_loss_and_metrics(batch, forward_only)
        if not forward_only and not math.isfinite(loss):
            raise NonFiniteError(loss, math.nan, 0)
        return loss, metrics

    def finish_training_step(self) -> None:
        """The parent's, and `gradient_norm`. Raises NonFiniteError on all ranks."""
        super().finish_training_step()
        self.gradient_norm = gradient_norm(self.optimizers().optimizer)
        if not math.isfinite(self.gradient_norm):
            raise NonFiniteError(math.nan, self.gradient_norm, 0)

    def onload_adam_states(self) -> None:
        """The optimizer's states never leave."""


def build_learner(config: SupervisedConfig, *, total_steps: int, resume_from: Path | None) -> Policy:
    """Load the base .nemo as a model to be trained on traces and, where given, a checkpoint's shards over it.

    total_steps: of the whole run, for the learning rate schedule. resume_from: the shards of a checkpoint.
    """
    nemo, trainer, shards = open_trainer(config, _model(config, total_steps))
    path = config.pretrained_checkpoint.restore_from_path
    model = load_from_nemo(SupervisedModel, nemo.model, trainer, strict=True, restore_path=path)
    init_peft(model, nemo.model)
    describe_shards(model.get_model_module_list())
    init_distributed(trainer, model, nemo.model.get("transformer_engine", False))
    collectives.refuse_different("checkpoint to resume from", "" if resume_from is None else resume_from.parent.name)
    trainer.ckpt_path = None if resume_from is None else str(resume_from)
    # NeMo sizes its schedules by it; our own loaders feed the loop.
    steps = range(total_steps)
    init_using_ptl(trainer, model, torch.utils.data.DataLoader(steps, batch_size=1), steps)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    return Policy(model, trainer, optimizer, scheduler, CustomLoggerWrapper(trainer.loggers), shards)


def _model(config: SupervisedConfig, total_steps: int) -> Any:
    """`model` with what follows from the other sections, in the names that NeMo-Aligner reads."""
    model = OmegaConf.create(dict(config.model))
    size, unit = config.loop.traces_per_step, model.micro_batch_size * data_parallel_size(config)
    if size % unit:
        raise ConfigError(
            f"trainer.sft.traces_per_step={size} is not a multiple of model.micro_batch_size * data-parallel ranks = "
            f"{unit}."
        )
    with open_dict(model):
        model.merge_with(OmegaConf.create(model_overrides()))
        model.global_batch_size = size
        model.setdefault("data", {})
        model.data.train_ds = {"micro_batch_size": model.micro_batch_size, "global_batch_size": size}
        model.data.validation_ds = {"micro_batch_size": model.micro_batch_size, "global_batch_size": unit}
    return fill_in(model, total_steps)


class TraceOrder(MegatronPretrainingRandomBatchSampler):
    """Every epoch in an order of its own, a function of (seed, epoch) whatever the parallel layout. Traces that fill no
    whole step are left out of the epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's rows of the steps that the epoch has left."""
        size = self._global_batch_size
        in_epoch = self.total_samples // size * size
        epoch, position = divmod(self.consumed_samples, in_epoch)
        order = sorted(range(self.total_samples), key=lambda row: derive_seed("traces", self.seed, epoch, row))
        for start in range(position, in_epoch, size):
            self.consumed_samples += size
            yield order[start + self.data_parallel_rank : start + size : self.data_parallel_size]


def loaders(
    model: SupervisedModel, train: Sequence[Example], validation: Sequence[Example], consumed: int, seed: int
) -> tuple[Any, Any]:
    """Data loaders of training, from after `consumed` traces on, and of validation, whose last traces that fill no
    micro batch of all ranks are left out (empty where it has none)."""
    ranks, own = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    split = model.cfg.tensor_model_parallel_size if model.cfg.get("sequence_parallel") else 1
    fit = functools.partial(collate, end=model.tokenizer.eos_id, multiple=split)
    common = {"data_parallel_rank": own, "data_parallel_size": ranks, "drop_last": True}

    def loader(examples: Sequence[Example], sampler: Any) -> Any:
        return torch.utils.data.DataLoader(list(examples), batch_sampler=sampler, collate_fn=fit)

    sizes = model.cfg.data.train_ds
    order = TraceOrder(
        total_samples=len(train),
        consumed_samples=consumed,
        micro_batch_size=sizes.micro_batch_size,
        global_batch_size=sizes.global_batch_size,
        seed=seed,
        **common,
    )
    sizes = model.cfg.data.validation_ds
    if len(validation) < sizes.global_batch_size:
        return loader(train, order), []
    in_turn = MegatronPretrainingBatchSampler(
        total_samples=len(validation),
        consumed_samples=0,
        micro_batch_size=sizes.micro_batch_size,
        global_batch_size=sizes.global_batch_size,
        **common,
    )
    return loader(train, order), loader(validation, in_turn)


class Between(Protocol):
    """What NeMo-Aligner's loop calls between steps."""

    def log_metrics(self, metrics: dict[str, float], step: int, prefix: str = "") -> None:
        """prefix: train/ (steps count from 0) or val/ (from 1)."""

    def finalize(self) -> None:
        """The last epoch is over."""

    def start_time(self) -> None:
        """The first step begins."""

    def is_finished(self) -> bool:
        """Asked after every step: whether to stop."""

    def save(self) -> None:
        """All ranks: a checkpoint is due."""


def open_loop(
    policy: Policy, data: tuple[Any, Any], config: SupervisedLoopConfig, between: Between, step: int, *, is_main: bool
) -> aligner.SupervisedTrainer:
    """NeMo-Aligner's loop over `data`, to go on after `step`."""
    # Upstream's loop draws a bar on every rank.
    aligner.tqdm = functools.partial(tqdm, disable=not is_main)
    settings = {
        "max_epochs": config.max_epochs,
        "max_steps": config.max_steps,
        "limit_train_batches": 1.0,
        "limit_val_batches": 1.0 if config.val_check_interval else 0,
        "val_check_interval": config.val_check_interval,
        "save_interval": config.save_interval,
        # Megatron's optimizer clips.
        "gradient_clip_val": None,
    }
    loop = aligner.SupervisedTrainer(
        cfg=OmegaConf.create(settings),
        model=policy.model,
        optimizer=policy.optimizer,
        scheduler=policy.scheduler,
        train_dataloader=data[0],
        val_dataloader=data[1],
        test_dataloader=None,
        logger=between,
        ckpt_callback=_SaveCall(between.save),
        run_timer=between,
    )
    consumed = step * policy.model.cfg.data.train_ds.global_batch_size
    loop.load_state_dict({"step": step, "consumed_samples": consumed})
    return loop


class _SaveCall:
    """Stands where NeMo's checkpoint callback would."""

    def __init__(self, save: Callable[[], None]) -> None:
        self._save = save

    def custom_save(self, monitor_candidates: dict[str, Any], is_train_end: bool) -> None:
        self._save()
