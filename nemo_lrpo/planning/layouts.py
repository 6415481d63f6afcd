"""Which layouts a model can have on a number of GPUs, which of them fit, and in what order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.planning.memory import GIB, Layout, Memory, Workload, predict_memory
from nemo_lrpo.planning.shapes import ModelShape
from nemo_lrpo.planning.timing import Hardware, StepTime, predict_time

_TENSOR = (1, 2, 4, 8)
_MICRO_BATCHES = (1, 2, 4, 8)
_ROLLOUT_BATCHES = (256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Plan:
    """A layout with what it needs. `problems` says why it cannot run; empty where it can."""

    layout: Layout
    memory: Memory
    time: StepTime
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems


def make_plan(shape: ModelShape, layout: Layout, work: Workload, hardware: Hardware | None = None) -> Plan:
    """Predict memory and time of one layout, and say what rules it out."""
    hardware = hardware or Hardware()
    memory = predict_memory(shape, layout, work)
    time = predict_time(shape, layout, work, hardware)
    problems = [*_impossible(shape, layout, work, hardware), *_too_large(memory, hardware)]
    return Plan(layout, memory, time, tuple(problems))


def rank_layouts(
    shape: ModelShape,
    gpus: int,
    work: Workload,
    hardware: Hardware | None = None,
    *,
    sequence_parallel: bool = False,
) -> list[Plan]:
    """Plans of all layouts that fit, the quickest step first; of equals the one that leaves more memory.

    For each parallel size the largest batch of answers that fits is taken. Raises ConfigError where `gpus` are not
    whole nodes.
    """
    hardware = hardware or Hardware()
    if gpus < 1 or (gpus > hardware.gpus_per_node and gpus % hardware.gpus_per_node):
        raise ConfigError(f"{gpus} GPUs are not whole nodes of {hardware.gpus_per_node}.")
    plans = []
    for layout in _layouts(shape, gpus, work, hardware, sequence_parallel):
        for batch in _ROLLOUT_BATCHES:
            plan = make_plan(shape, replace(layout, rollout_batch=batch), work, hardware)
            if plan.fits:
                plans.append(plan)
                break
    return sorted(plans, key=lambda plan: (plan.time.total, plan.memory.peak))


def _layouts(
    shape: ModelShape, gpus: int, work: Workload, hardware: Hardware, sequence_parallel: bool
) -> Iterator[Layout]:
    for tensor in _TENSOR:
        for pipeline in (size for size in range(1, gpus // tensor + 1) if shape.layers % size == 0):
            if gpus % (tensor * pipeline):
                continue
            for micro_batch in _MICRO_BATCHES:
                for recompute in ("none", "full"):
                    layout = Layout(
                        tensor=tensor,
                        pipeline=pipeline,
                        data=gpus // (tensor * pipeline),
                        sequence_parallel=sequence_parallel and tensor > 1,
                        micro_batch=micro_batch,
                        logprob_micro_batch=micro_batch,
                        recompute=recompute,
                    )
                    if not _impossible(shape, layout, work, hardware):
                        yield layout


def _impossible(shape: ModelShape, layout: Layout, work: Workload, hardware: Hardware) -> list[str]:
    tensor, pipeline = layout.tensor, layout.pipeline
    found = []
    if tensor > hardware.gpus_per_node:
        found.append(f"tensor parallel over {tensor} GPUs leaves the node of {hardware.gpus_per_node}")
    for name, size in (("heads", shape.heads), ("key-value heads", shape.groups)):
        if size % tensor:
            found.append(f"{size} {name} cannot be split over {tensor} tensor parallel ranks")
    if work.lora_dim % tensor:
        found.append(f"adapters of {work.lora_dim} dimensions cannot be split over {tensor} tensor parallel ranks")
    if shape.layers % pipeline:
        found.append(f"{shape.layers} layers cannot be split into {pipeline} pipeline stages")
    if work.lora_dim and shape.tied and pipeline > 1:
        found.append("adapters on a model with tied embeddings do not go in pipeline stages (Megatron-Core 0.11)")
    if work.packed and shape.gemma2:
        found.append("NeMo's attention for Gemma 2 takes no packed sequences")
    if shape.gemma2 and pipeline > 1:
        found.append("NeMo 2.2 cannot build Gemma 2 in pipeline stages")
    if work.engine == "trt_llm":
        found += _not_exported(shape)
    if work.rows % (work.updates * layout.data):
        found.append(f"{work.rows} rollouts in {work.updates} updates do not divide over {layout.data} replicas")
    return found


def _not_exported(shape: ModelShape) -> list[str]:
    """What NeMo 2.2's export to TensorRT-LLM leaves out (nemo/export/trt_llm/converter): the engine would be another
    model than the one that is trained.
    """
    parts = (
        ("biases of attention (Qwen 2)", shape.qkv_bias),
        ("capped scores and norms after layers (Gemma 2)", shape.gemma2),
        ("stretched rotations (Llama 3.1 and later)", shape.scaled_rope),
    )
    return [f"NeMo 2.2 does not export {name} to TensorRT-LLM" for name, there in parts if there]


def _too_large(memory: Memory, hardware: Hardware) -> list[str]:
    usable = hardware.memory - hardware.reserve
    found = [
        f"{moment} needs {need / GIB:.1f} GiB of a GPU, {usable / GIB:.1f} GiB are there"
        for moment, need in (
            ("the update", memory.update),
            ("a pass for log-probs", memory.scoring),
            ("generation", memory.generation),
        )
        if need > usable
    ]
    host = memory.host * hardware.gpus_per_node
    if host > hardware.host_memory:
        found.append(
            f"a node needs {host / GIB:.0f} GiB of host memory, {hardware.host_memory / GIB:.0f} GiB are there"
        )
    return found
