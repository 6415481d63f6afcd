"""Layout and work of a training configuration, and what they need: the arithmetic of preflight and of the recipes."""

from __future__ import annotations

from typing import Any

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.schema import TrainConfig
from nemo_lrpo.planning.layouts import Plan, make_plan
from nemo_lrpo.planning.memory import Layout, Workload
from nemo_lrpo.planning.parameters import ADAPTED
from nemo_lrpo.planning.shapes import ModelShape
from nemo_lrpo.planning.timing import Hardware


def plan_config(
    config: TrainConfig, shape: ModelShape, hardware: Hardware | None = None, mean_response_tokens: int | None = None
) -> Plan:
    """What a training configuration needs on each GPU; `plan.problems` says why it cannot run, if it cannot.

    Raises ConfigError for what the arithmetic does not cover (adapters other than LoRA's, precisions other than bf16).
    """
    return make_plan(shape, layout_of(config), workload_of(config, mean_response_tokens), hardware)


def layout_of(config: TrainConfig) -> Layout:
    """The layout that `trainer`, `model`, `rollout` and `actor` describe. Raises ConfigError where it is none."""
    model = config.model
    _refuse_uncovered(config)
    tensor, pipeline = int(model["tensor_model_parallel_size"]), int(model["pipeline_model_parallel_size"])
    gpus = int(config.trainer["devices"]) * int(config.trainer.get("num_nodes", 1))
    if gpus % (tensor * pipeline):
        raise ConfigError(
            f"trainer.devices * trainer.num_nodes = {gpus} is not a multiple of model.tensor_model_parallel_size * "
            f"model.pipeline_model_parallel_size = {tensor * pipeline}."
        )
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=gpus // (tensor * pipeline),
        sequence_parallel=bool(model.get("sequence_parallel")),
        micro_batch=int(model["micro_batch_size"]),
        logprob_micro_batch=config.actor.logprob_micro_batch_size,
        rollout_batch=config.rollout.micro_batch_size,
        recompute=model.get("activations_checkpoint_granularity") or "none",
    )


def workload_of(config: TrainConfig, mean_response_tokens: int | None = None) -> Workload:
    """The work of a step that a training configuration describes; how long answers are it does not say.

    Raises ConfigError for a mean length that cannot be, or that nothing depends on.
    """
    engine = config.rollout.trt_llm
    longest, packed = config.rollout.max_new_tokens, config.actor.sequence_packing
    if mean_response_tokens is not None and not (packed and 0 < mean_response_tokens <= longest):
        raise ConfigError(
            f"answers of {mean_response_tokens} tokens on average: give 1 to rollout.max_new_tokens={longest}, and "
            "actor.sequence_packing=true; padded ones take as long as the longest."
        )
    dim, targets = _adapters(config)
    return Workload(
        prompts=config.loop.prompts_per_step,
        rollouts=config.loop.rollouts_per_prompt,
        prompt_tokens=config.prompt.max_tokens,
        response_tokens=config.rollout.max_new_tokens,
        updates=config.algorithm.num_updates,
        reference=config.algorithm.kl_coefficient > 0,
        engine=config.rollout.backend,
        engine_resident=not engine.unload_engine_train,
        reshard=engine.reshard,
        logits_chunk=config.actor.logits_chunk,
        offload_optimizer=config.actor.offload_optimizer,
        lora_dim=dim,
        lora_targets=targets,
        packed=packed,
        mean_response_tokens=mean_response_tokens,
    )


_GROUPS = {"attention": ADAPTED[:2], "mlp": ADAPTED[2:], "all": ADAPTED}


def _adapters(config: TrainConfig) -> tuple[int, tuple[str, ...]]:
    """Width of LoRA's adapters, 0 for none, and what they adapt. Raises ConfigError for targets that NeMo has not."""
    peft: Any = config.model.get("peft") or {}
    if peft.get("peft_scheme") != "lora":
        return 0, ()
    given = list(peft["lora_tuning"]["target_modules"])
    unknown = [name for name in given if name not in (*_GROUPS, *ADAPTED)]
    if unknown:
        raise ConfigError(
            f"model.peft.lora_tuning.target_modules: {unknown[0]!r}; accepted: {', '.join((*ADAPTED, *_GROUPS))}."
        )
    chosen = {target for name in given for target in _GROUPS.get(name, (name,))}
    return int(peft["lora_tuning"]["adapter_dim"]), tuple(target for target in ADAPTED if target in chosen)


def _refuse_uncovered(config: TrainConfig) -> None:
    model = config.model
    peft: Any = (model.get("peft") or {}).get("peft_scheme", "none")
    if peft not in (None, "none", "lora"):
        raise ConfigError(f"model.peft.peft_scheme={peft!r} is not covered by the planner; accepted: 'none', 'lora'.")
    if str(config.trainer.get("precision")) not in ("bf16", "bf16-mixed") or not model.get("megatron_amp_O2"):
        raise ConfigError(
            f"trainer.precision={config.trainer.get('precision')!r}, model.megatron_amp_O2="
            f"{model.get('megatron_amp_O2')!r} are not covered by the planner; accepted: bf16, true."
        )
    method, layers = model.get("activations_checkpoint_method"), model.get("activations_checkpoint_num_layers")
    if model.get("activations_checkpoint_granularity") == "full" and (method, layers) != ("uniform", 1):
        raise ConfigError(
            f"model.activations_checkpoint_method={method!r}, num_layers={layers!r} are not covered by the planner; "
            "accepted with granularity full: uniform, 1."
        )
