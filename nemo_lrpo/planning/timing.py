"""Seconds of one training step, by part.

A prediction to rank layouts by, from the datasheet of the GPU and shares of it that are assumed (`Hardware`): nothing
here was measured on such a GPU. Put in what your own runs reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_lrpo.planning.memory import Layout, Workload, kv_cache_bytes, trained_parameters
from nemo_lrpo.planning.parameters import forward_flops, rank_parameters, total_parameters
from nemo_lrpo.planning.shapes import ModelShape


@dataclass(frozen=True)
class Hardware:
    """A GPU, its node and network. Rates are NVIDIA's for the H100 SXM 80 GB (datasheet, DGX H100 user guide)."""

    memory: int = 79 * 2**30
    """Bytes that CUDA reports, rounded down."""
    reserve: int = 6 * 2**30
    """Bytes left to CUDA, NCCL's buffers, gradients of activations and the allocator's gaps; assumed."""
    host_memory: int = 2 * 10**12
    """Bytes of a node."""
    gpus_per_node: int = 8
    flops: float = 989e12
    """Dense bfloat16 operations a second."""
    bandwidth: float = 3.35e12
    """Bytes a second from the GPU's memory."""
    nvlink: float = 450e9
    """Bytes a second in one direction between GPUs of a node."""
    network: float = 50e9
    """Bytes a second in one direction between nodes, for each GPU (one 400 Gb/s adapter each)."""
    pcie: float = 50e9
    """Bytes a second between host and GPU."""
    compute_share: float = 0.4
    """Share of `flops` that training reaches; assumed."""
    transfer_share: float = 0.7
    """Share that transfers and generation reach of the rates above; assumed."""
    engine_latency: float = 20e-6
    """Seconds that a layer of one generated token costs TensorRT-LLM at least; assumed."""
    megatron_latency: float = 200e-6
    """The same for Megatron, which launches every kernel by itself; assumed."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part. Rewards are scored while the policy works, and are not in it."""

    prefill: float
    decode: float
    refit: float
    reference: float
    update: float
    communication: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def predict_time(shape: ModelShape, layout: Layout, work: Workload, hardware: Hardware | None = None) -> StepTime:
    """Seconds of a step in which every answer is as long as it may be.

    Where sequences are packed and the mean length of answers is known, that is what updates and log-probs take;
    generation waits for the longest answer all the same.
    """
    hardware = hardware or Hardware()
    prefill, decode = _generation(shape, layout, work, hardware)
    forward = _forward(shape, layout, work, hardware)
    updates = 4 if layout.recompute == "full" else 3
    if work.lora_dim:
        updates -= 1  # no gradients of frozen weights; the adapters' own are left out
    passes = 1 if work.updates > 1 else 0  # old log-probs
    return StepTime(
        prefill=prefill,
        decode=decode,
        refit=_refit(shape, layout, work, hardware),
        reference=_reference(shape, layout, work, hardware, forward),
        update=(updates + passes) * forward + (_logits(shape, layout, work, hardware) if work.logits_chunk else 0.0),
        communication=_communication(shape, layout, work, hardware),
        optimizer=_optimizer(shape, layout, work, hardware),
    )


def _forward(shape: ModelShape, layout: Layout, work: Workload, hardware: Hardware) -> float:
    """Seconds of a forward pass over the rollouts of a step.

    The slowest stage sets the pace, and m micro-batches take m + p - 1 turns (Narayanan et al. 2021, section 2.2.1);
    the last stage has the logits besides its layers.
    """
    # A packed one has the tokens of a padded one.
    tokens = work.rows * work.passed_length
    micro_batches = math.ceil(tokens / (work.length * work.updates * layout.data * layout.micro_batch))
    whole = forward_flops(shape, work.rows, work.passed_length)
    logits = 2.0 * tokens * shape.vocabulary * shape.hidden
    slowest = (whole - logits) / layout.pipeline + logits
    turns = (micro_batches + layout.pipeline - 1) / micro_batches
    return slowest * turns / (layout.data * layout.tensor * hardware.flops * hardware.compute_share)


def _logits(shape: ModelShape, layout: Layout, work: Workload, hardware: Hardware) -> float:
    """Seconds in which the last stage makes the logits of a step's rollouts, once more for the gradient of chunks."""
    flops = 2.0 * work.rows * work.passed_length * shape.vocabulary * shape.hidden
    return flops / (layout.data * layout.tensor * hardware.flops * hardware.compute_share)


def _generation(shape: ModelShape, layout: Layout, work: Workload, hardware: Hardware) -> tuple[float, float]:
    """Prompts at once, then a token at a time: each reads all weights and the cache of its rank, or computes, whichever
    is slower (Pope et al. 2022, section 2), and waits for every layer and its two sums over tensor parallel ranks.
    """
    folded = work.reshard and work.engine == "trt_llm"
    replicas = layout.data * (layout.pipeline if folded else 1)
    answers = math.ceil(work.rows / replicas)
    batch = min(layout.rollout_batch, answers)
    batches = math.ceil(answers / batch)
    rate = layout.tensor * hardware.flops * hardware.compute_share
    prefill = forward_flops(shape, answers, work.prompt_tokens) / rate
    weights = 2 * total_parameters(shape) / layout.tensor
    cache = kv_cache_bytes(shape, layout.tensor, 1, batch, work.prompt_tokens + work.response_tokens // 2)
    reading = (weights + cache) / (hardware.bandwidth * hardware.transfer_share)
    computing = forward_flops(shape, batch, 1) / rate
    sums = 4 * batch * shape.hidden * _ring(layout.tensor) / (hardware.nvlink * hardware.transfer_share)
    latency = hardware.engine_latency if work.engine == "trt_llm" else hardware.megatron_latency
    token = max(reading, computing) + shape.layers * (latency + sums)
    # One batch passes through the stages one after another: while one works, the others wait.
    return prefill, batches * work.response_tokens * token


def _refit(shape: ModelShape, layout: Layout, work: Workload, hardware: Hardware) -> float:
    """The engine's copy of the weights, gathered over pipeline stages where these are folded."""
    if work.engine != "trt_llm":
        return 0.0
    share = 2 * rank_parameters(shape, layout.tensor, layout.pipeline, 0)
    gathered = share * (layout.pipeline - 1) / hardware.network if work.reshard else 0.0
    return (2 * share / hardware.bandwidth + gathered) / hardware.transfer_share


def _reference(shape: ModelShape, layout: Layout, work: Workload, hardware: Hardware, forward: float) -> float:
    """A forward pass, and two weights' worth over PCIe in each direction to exchange the two policies."""
    if not work.reference_copy:
        return forward if work.reference else 0.0
    share = 2 * rank_parameters(shape, layout.tensor, layout.pipeline, 0)
    return forward + 4 * share / (hardware.pcie * hardware.transfer_share)


def _ring(ranks: int) -> float:
    """Bytes that a ring all-reduce sends for each byte: 2 (n - 1) / n."""
    return 2 * (ranks - 1) / ranks


def _communication(shape: ModelShape, layout: Layout, work: Workload, hardware: Hardware) -> float:
    """Sums over tensor parallel ranks (two a layer forward, two backward; Shoeybi et al. 2019, arXiv 1909.08053), and
    gradients in float32 and weights in bfloat16 over data-parallel ranks.
    """
    tokens = work.rows * work.passed_length / layout.data
    passes = 2 + (1 if work.reference else 0) + (1 if layout.recompute == "full" else 0)
    layers = shape.layers / layout.pipeline
    tensor = passes * 2 * layers * 2 * tokens * shape.hidden * _ring(layout.tensor) / hardware.nvlink
    share = trained_parameters(shape, layout, work, 0)
    within = layout.gpus <= hardware.gpus_per_node
    rate = hardware.nvlink if within else hardware.network
    data = work.updates * (4 + 2) * share * (layout.data - 1) / layout.data / rate
    return (tensor + data) / hardware.transfer_share


def _optimizer(shape: ModelShape, layout: Layout, work: Workload, hardware: Hardware) -> float:
    """Master weights and moments read and written, gradients read; once a step their way from the host and back."""
    share = trained_parameters(shape, layout, work, 0) / layout.data
    seconds = work.updates * (2 * 12 + 4) * share / hardware.bandwidth
    if work.offload_optimizer:
        seconds += 2 * 12 * share / hardware.pcie
    return seconds / hardware.transfer_share
