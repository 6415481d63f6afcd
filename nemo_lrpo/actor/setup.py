"""NeMo glue: from a checked configuration to a policy on its ranks, as NeMo-Aligner 0.7.0 sets its actors up."""

from __future__ import annotations

import inspect
import io
import math
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import exp_manager
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    disable_data_callbacks,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_peft,
    init_using_ptl,
)
from nemo_aligner.utils.utils import (
    load_and_override_model_config,
    load_checkpoint_model_config,
    load_from_nemo,
)
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.distributed.checkpoint import FileSystemReader

from nemo_lrpo.actor import collectives
from nemo_lrpo.actor.adapters import LAYER, describe_shards
from nemo_lrpo.actor.host_memory import OptimizerStates, ReferenceWeights
from nemo_lrpo.actor.output_layer import check_output_layer
from nemo_lrpo.actor.platform import model_overrides
from nemo_lrpo.actor.policy import LrpoActorModel
from nemo_lrpo.actor.shards import ShardIO
from nemo_lrpo.config.checks import ConfigError, unknown_key_message
from nemo_lrpo.config.schema import RunConfig
from nemo_lrpo.config.supervised import SupervisedConfig

if TYPE_CHECKING:
    from nemo_lrpo.actor.supervised import SupervisedModel

OPTIMIZER = "mcore_distributed_optim"
_BEHIND_WATCHDOG_S = 60.0


@dataclass
class Policy:
    """A model on its ranks, with what trains and saves it; optimizer and scheduler are None where it only answers."""

    model: LrpoActorModel | SupervisedModel
    trainer: Trainer
    optimizer: Any
    scheduler: Any
    logger: CustomLoggerWrapper
    shards: ShardIO


def check_nemo_sections(config: RunConfig) -> None:
    """Refuse misspelt or unsupported keys of the sections that Lightning and NeMo own. Raises ConfigError."""
    base = check_sections(config)
    if config.actor.sequence_packing and base.get("name") == "megatron_gemma2":
        raise ConfigError(
            "actor.sequence_packing=true: NeMo's attention for Gemma 2 takes no packed sequences; accepted: false."
        )
    if config.model.get("peft", {}).get("peft_scheme") == "lora" and config.rollout.backend == "trt_llm":
        raise ConfigError(
            "rollout.backend='trt_llm' with model.peft.peft_scheme='lora': NeMo 2.2 builds and refits the engine from "
            "the base alone; accepted: rollout.backend='megatron'."
        )


def check_sections(config: RunConfig | SupervisedConfig) -> DictConfig:
    """What check_nemo_sections refuses whatever is trained; returns the .nemo's own configuration.

    A key of `model` is known if that or conf/train.yaml has it.
    """
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    for key in config.trainer:
        if key not in known:
            raise ConfigError(unknown_key_message(key, known | {"lrpo", "sft"}, "trainer"))
    path = str(config.pretrained_checkpoint.restore_from_path)
    try:
        base = load_checkpoint_model_config(path)
    except (AssertionError, OSError, tarfile.TarError, KeyError) as error:
        raise ConfigError(
            f"pretrained_checkpoint.restore_from_path={path!r} is not a .nemo ({error}); "
            "tools/hf_to_nemo.py makes one from a Hugging Face directory."
        ) from error
    ours = {"micro_batch_size", "precision", "seed", "peft", "optim", "gradient_as_bucket_view"}
    for key in config.model:
        if key not in base and key not in ours | _MODEL_KEYS:
            raise ConfigError(unknown_key_message(key, set(map(str, base)) | ours | _MODEL_KEYS, "model"))
    scheme = config.model.get("peft", {}).get("peft_scheme", "none")
    if scheme not in ("none", "lora"):
        raise ConfigError(f"model.peft.peft_scheme={scheme!r} is not supported; accepted: 'none', 'lora'.")
    stages = int(config.model.get("pipeline_model_parallel_size", 1))
    if scheme == "lora" and stages > 1 and base.get("share_embeddings_and_output_weights", True):
        raise ConfigError(
            f"model.pipeline_model_parallel_size={stages} with model.peft.peft_scheme='lora': the model's embedding is "
            "its output layer, and Megatron-Core 0.11 sums a gradient over the stages that a frozen one has not; "
            "accepted: 1."
        )
    lora = config.model.get("peft", {}).get("lora_tuning") or {}
    for key, accepted in (("variant", "nemo"), ("weight_tying", False)):
        if scheme == "lora" and lora.get(key, accepted) != accepted:
            raise ConfigError(
                f"model.peft.lora_tuning.{key}={lora[key]!r} cannot be merged into a model; accepted: {accepted!r}."
            )
    name = config.model.get("optim", {}).get("name")
    if name != OPTIMIZER:
        raise ConfigError(f"model.optim.name={name!r} is not supported; accepted: {OPTIMIZER!r}.")
    return base


_READ_WITHOUT_DEFAULT = (
    "activations_checkpoint_granularity",
    "activations_checkpoint_method",
    "activations_checkpoint_num_layers",
    "activations_checkpoint_layers_per_pipeline",
    "num_micro_batches_with_partial_activation_checkpoints",
)
"""Keys that NeMo reads from the model's configuration whether it has them or not."""

_MODEL_KEYS = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
    "megatron_amp_O2",
    *_READ_WITHOUT_DEFAULT,
    "dist_ckpt_format",
    "dist_ckpt_parallel_save",
    "dist_ckpt_parallel_load",
    "dist_ckpt_parallel_dist_opt",
    "hidden_dropout",
    "attention_dropout",
    "ffn_dropout",
    "encoder_seq_length",
}


def build_policy(config: RunConfig, *, total_updates: int, resume_from: Path | None, training: bool = True) -> Policy:
    """Load the base .nemo on the configured layout and, where given, a checkpoint's shards over it.

    total_updates: optimizer steps of the whole run, for the learning rate schedule. resume_from: the directory of
    model and optimizer shards written by `save_shards`. training: False keeps weights alone: no optimizer, no buffers
    of gradients, no reference; of a checkpoint the model's shards are read and no others.
    """
    nemo, trainer, shards = open_trainer(config, _model(config, total_updates), logs=training)
    model = load_from_nemo(
        LrpoActorModel,
        nemo.model,
        trainer,
        strict=True,
        restore_path=config.pretrained_checkpoint.restore_from_path,
    )
    model.temperature, model.logits_chunk = config.rollout.temperature, config.actor.logits_chunk
    if model.logits_chunk:
        check_output_layer(model.model)
    init_peft(model, nemo.model)
    describe_shards(model.get_model_module_list())
    if resume_from is not None:
        _check_adapters(model.use_peft, resume_from)
    new_adapters = nemo.model.peft.peft_scheme != "none" and nemo.model.peft.restore_from_path is None
    if training and config.keeps_initial_policy and not new_adapters:
        model.reference = ReferenceWeights(parameter for parameter in model.parameters() if parameter.requires_grad)
    init_distributed(trainer, model, nemo.model.get("transformer_engine", False))
    collectives.refuse_different("checkpoint to resume from", "" if resume_from is None else resume_from.parent.name)
    # NeMo asks for a data loader only to size its schedules; ours feeds the trainer directly.
    rows = range(max(1, total_updates))
    loader = torch.utils.data.DataLoader(rows, batch_size=1)
    optimizer = scheduler = None
    if training:
        trainer.ckpt_path = None if resume_from is None else str(resume_from)
        init_using_ptl(trainer, model, loader, rows)
        optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
        if config.actor.offload_optimizer:
            model.optimizer_states = OptimizerStates(optimizer.mcore_optimizer, model.parameters())
    else:
        disable_data_callbacks(model, loader, rows)
        _set_up_weights(trainer, model, resume_from)
    return Policy(model, trainer, optimizer, scheduler, CustomLoggerWrapper(trainer.loggers), shards)


def _check_adapters(wanted: bool, shards: Path) -> None:
    """Raise ConfigError where the checkpoint has LoRA's adapters and the configuration has not, or the reverse."""
    names = FileSystemReader(shards).read_metadata().state_dict_metadata
    there = any(f".{LAYER}." in name for name in names)
    if there != wanted:
        scheme, holds = ("none", "LoRA's adapters alone") if there else ("lora", "a whole model")
        raise ConfigError(
            f"model.peft.peft_scheme={scheme!r}: the checkpoint {shards.parent} holds {holds}; give the model.peft of "
            "the run that wrote it (its config.yaml has it)."
        )


def open_trainer(
    config: RunConfig | SupervisedConfig, model: DictConfig, logs: bool = True
) -> tuple[DictConfig, Trainer, ShardIO]:
    """NeMo's whole configuration, with that of the base .nemo under `model`, and Lightning's trainer with our shards.

    logs: run_dir gets NeMo's log files and loggers.
    """
    # NeMo says hundreds of lines about its defaults; its log files in run_dir still say what it warns of.
    nemo_logging.setLevel(nemo_logging.WARNING)
    nemo = OmegaConf.create({"trainer": dict(config.trainer), "exp_manager": _exp_manager(config), "model": model})
    nemo.model = load_and_override_model_config(config.pretrained_checkpoint.restore_from_path, nemo.model)
    trainer = MegatronTrainerBuilder(nemo).create_trainer()
    shards = ShardIO(nemo.model)
    trainer.strategy.checkpoint_io = shards
    # Of all process groups. The watchdog, which can name what is waited for, is to come first.
    trainer.strategy._timeout = timedelta(seconds=config.loop.progress_timeout_s + _BEHIND_WATCHDOG_S)
    if logs:
        exp_manager(trainer, nemo.exp_manager)
    return nemo, trainer, shards


def _set_up_weights(trainer: Trainer, model: LrpoActorModel, resume_from: Path | None) -> None:
    """What NeMo-Aligner's init_using_ptl does for training, without what trains.

    While fitting, the strategy wraps the model for data parallelism, whose buffers hold a gradient for every parameter,
    and builds the optimizer, which holds 12 bytes or more for each; a strategy that validates does neither.
    """
    trainer.state.fn = TrainerFn.VALIDATING
    call._call_setup_hook(trainer)
    call._call_configure_model(trainer)
    trainer.strategy.setup(trainer)
    if resume_from is not None:
        checkpoint = trainer.strategy.load_checkpoint(str(resume_from), load_optimizer_states=False)
        call._call_lightning_module_hook(trainer, "on_load_checkpoint", checkpoint)


def gradient_norm(optimizer: Any) -> float:
    """Global L2 norm of the reduced gradients, before clipping. optimizer: NeMo's, around Megatron's."""
    inner = optimizer.mcore_optimizer
    inner.prepare_grads()
    parts = getattr(inner, "chained_optimizers", [inner])
    return math.sqrt(sum(float(part.get_grad_norm()) ** 2 for part in parts))


def plan_shards(policy: Policy, directory: Path) -> None:
    """All ranks: plan model, optimizer and schedule as one distributed checkpoint in `directory`, which is there.

    `policy.shards` writes it.
    """
    policy.model.onload_adam_states()
    checkpoint = policy.trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    # NeMo derives the directory of a distributed checkpoint by dropping this suffix.
    policy.trainer.strategy.save_checkpoint(checkpoint, f"{directory}.ckpt")


def export_nemo(policy: Policy, path: Path, artifacts: Mapping[str, str], is_main: bool) -> None:
    """All ranks: write a .nemo at `path`, with `artifacts` (file name -> text) readable inside the archive.

    Adapters are merged into the weights: what is written is a model like the base.
    """
    partial = path.with_name(path.name + ".partial")
    with policy.model.merged():
        policy.model.save_to(str(partial))
    torch.distributed.barrier()
    if is_main:
        with tarfile.open(partial, "a:") as archive:
            for name, text in artifacts.items():
                data = text.encode()
                member = tarfile.TarInfo(f"./{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        partial.replace(path)
    torch.distributed.barrier()


def data_parallel_size(config: RunConfig | SupervisedConfig) -> int:
    """Ranks of the job over ranks of one model. Raises ConfigError where they do not divide."""
    ranks = config.trainer["devices"] * config.trainer.get("num_nodes", 1)
    model_parallel = config.model["tensor_model_parallel_size"] * config.model["pipeline_model_parallel_size"]
    if ranks % model_parallel:
        raise ConfigError(
            f"trainer.devices * trainer.num_nodes = {ranks} is not a multiple of "
            f"model.tensor_model_parallel_size * model.pipeline_model_parallel_size = {model_parallel}."
        )
    return ranks // model_parallel


def _exp_manager(config: RunConfig | SupervisedConfig) -> dict[str, Any]:
    """Loggers only: checkpoints and resume are ours, nothing is parsed from a file name."""
    return {
        "exp_dir": None,
        "explicit_log_dir": str((Path(config.run_dir) / "logs").resolve()),
        "create_checkpoint_callback": False,
        "resume_if_exists": False,
        "log_step_timing": False,
        "log_tflops_per_sec_per_gpu": False,
        **config.exp_manager,
    }


def _model(config: RunConfig, total_updates: int) -> DictConfig:
    """`model` with what follows from the other sections filled in, in the names that NeMo-Aligner reads."""
    rollout = config.rollout
    model = OmegaConf.create(dict(config.model))
    with open_dict(model):
        model.merge_with(OmegaConf.create(model_overrides()))
        data_parallel = data_parallel_size(config)
        rows = config.rows_per_update
        if rows % data_parallel:
            raise ConfigError(
                f"{config.ROWS_OF_AN_UPDATE} = {rows} rollouts per update do not divide over {data_parallel} "
                "data-parallel ranks."
            )
        unit = model.micro_batch_size * data_parallel
        model.global_batch_size = -(-rows // unit) * unit
        model.reinforce = {
            "rollout_micro_batch_size": rollout.micro_batch_size,
            "forward_micro_batch_size": config.actor.logprob_micro_batch_size,
            "offload_adam_states": False,
            "length_params": {"max_length": rollout.max_new_tokens, "min_length": rollout.min_new_tokens},
            "sampling_params": {
                "use_greedy": False,
                "temperature": rollout.temperature,
                "top_k": rollout.top_k,
                "top_p": rollout.top_p,
                "repetition_penalty": 1.0,
                "add_BOS": False,
                "all_probs": False,
                "compute_logprob": False,
                "end_strings": list(rollout.end_strings),
            },
            "trt_llm": {
                "enable": rollout.backend == "trt_llm",
                "model_type": rollout.trt_llm.model_type,
                "max_input_len": rollout.trt_llm.max_input_len,
                "unload_engine_train": rollout.trt_llm.unload_engine_train,
                "reshard": rollout.trt_llm.reshard,
                "seed": config.seed,
            },
        }
    return fill_in(model, total_updates)


def fill_in(model: DictConfig, total_updates: int) -> DictConfig:
    """`model` with what NeMo reads without a default, and a schedule of `total_updates` steps where it has one."""
    with open_dict(model):
        for key in _READ_WITHOUT_DEFAULT:
            model.setdefault(key, None)
        model.setdefault("data", {})
        model.data.setdefault("dataloader_type", "single")
        schedule = model.optim.pop("sched", None)
        if schedule is not None:
            # NeMo does not take null for "no schedule", and would size one by a data loader that is not ours.
            model.optim.sched = {"max_steps": total_updates, **schedule}
    return model
