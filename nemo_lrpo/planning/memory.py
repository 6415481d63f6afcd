"""Bytes on one GPU, by part, at the moments of a step that need most: update, log-probs, generation.

Weights, gradients and optimizer follow Megatron-Core's distributed optimizer: weights of 2 bytes and gradients of 4 on
every rank, and 12 bytes (master weight and two moments) spread over the data-parallel ranks (Rajbhandari et al. 2020,
arXiv 1910.02054, stage 1; Megatron-Core's documentation of its distributed optimizer has the table). Activations count
what the layers keep for the backward pass, after Korthikanti et al. 2022 (arXiv 2205.05198), written out for gated
layers, grouped queries and flash attention. tests/planning holds both against Megatron-Core's own modules.

With LoRA only the adapters have gradients and optimizer, and the base is the reference policy. Its activations are
those of a full update and the adapters' narrow ones, which is an upper bound: what is frozen keeps less.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_lrpo.planning.parameters import adapter_parameters, padded_vocabulary, rank_parameters
from nemo_lrpo.planning.shapes import ModelShape

GIB = 2**30
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Layout:
    """How a model is spread, and how much of it a GPU works on at once."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    micro_batch: int = 1
    """Sequences of one pass of the update."""
    logprob_micro_batch: int = 1
    """Sequences of one pass for log-probs."""
    rollout_batch: int = 16
    """Answers generated at once on one data-parallel rank."""
    recompute: str = "none"
    """Of activations in the backward pass: none; selective, attention's core; full, whole layers."""

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True)
class Workload:
    """What a step has to do, and with what; the fields of the training configuration that memory and time depend on."""

    prompts: int = 256
    rollouts: int = 8
    prompt_tokens: int = 512
    response_tokens: int = 1024
    updates: int = 1
    reference: bool = True
    """Log-probs of the initial policy are needed: its weights wait in host memory."""
    engine: str = "megatron"
    """megatron: generation on the training weights; trt_llm: an engine with a copy of the weights."""
    engine_resident: bool = True
    """The engine stays on the GPU during the update."""
    reshard: bool = False
    """The engine folds pipeline stages into data parallelism."""
    logits_chunk: int = 0
    """Tokens whose logits are in memory at once; 0: all of a micro-batch."""
    offload_optimizer: bool = False
    """The optimizer's states are in host memory but for the update."""
    lora_dim: int = 0
    """Width of LoRA's adapters; 0: the whole model is trained."""
    lora_targets: tuple[str, ...] = ("attention_qkv",)
    """What they adapt, of planning.parameters.ADAPTED."""
    packed: bool = False
    """Updates and log-probs go without padding: in time, as many tokens as there are; in memory, a micro-batch takes
    what a padded one does."""
    mean_response_tokens: int | None = None
    """Tokens of an answer on average, where that is known."""

    @property
    def rows(self) -> int:
        """Sequences of a step."""
        return self.prompts * self.rollouts

    @property
    def reference_copy(self) -> bool:
        """The reference policy has weights of its own."""
        return self.reference and not self.lora_dim

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.response_tokens

    @property
    def passed_length(self) -> int:
        """Tokens that a sequence takes in a pass of updates and log-probs, on average."""
        known = self.packed and self.mean_response_tokens is not None
        return self.prompt_tokens + (self.mean_response_tokens or 0) if known else self.length


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, each the most that any pipeline stage needs.

    `update`, `scoring` (log-probs) and `generation` are the sums of what is there at those moments.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    engine: int
    kv_cache: int
    sampling: int
    """Megatron's generation: logits of one position of each answer, and their distribution."""
    prefill: int
    """Megatron's generation: a layer's tensors for the prompts of all answers, which go through it at once."""
    logprobs: int
    """Of a pass without gradient: one layer's tensors and the logits."""
    update: int
    scoring: int
    generation: int
    host: int
    """Bytes of host memory for this GPU: the reference policy, or the policy while the two are exchanged, the
    optimizer's states where they wait there, and the copy that Megatron writes a checkpoint or an export from."""

    @property
    def peak(self) -> int:
        return max(self.update, self.scoring, self.generation)


def layer_activations(shape: ModelShape, layout: Layout, length: int) -> int:
    """Bytes that one layer keeps for the backward pass of one micro-batch in bfloat16, nothing recomputed.

    For each token: the inputs and outputs of both norms (4h, split where sequence parallel), queries, keys, values and
    attention's output (2q + 2k, split over tensor parallel ranks), gate and up and their product (3f, split), and in
    float32 one number per norm and per head. For each position: cosines and sines, for queries and keys.

    Gemma 2 adds the inputs of two more norms (2h) and the terms of its GELU (7f); keys and values are repeated for
    every head (4q in all), and each head keeps its capped scores and its probabilities, 4 bytes a pair of tokens.
    """
    return _layer(shape, layout, length, layout.recompute == "selective")


def _layer(shape: ModelShape, layout: Layout, length: int, selective: bool) -> int:
    tokens, tensor = length * layout.micro_batch, layout.tensor
    queries, keys = shape.query_width, shape.key_width
    if selective:
        # Recomputing attention's core keeps its arguments, values as a view of the whole projection.
        attention = 3 * (queries + keys)
    else:
        attention = 4 * queries if shape.gemma2 else 2 * (queries + keys)
    split = attention + (10 if shape.gemma2 else 3) * shape.ffn
    whole = (6 if shape.gemma2 else 4) * shape.hidden
    wide = 4 * (4 if shape.gemma2 else 2) * tokens // _spread(layout)
    if not selective:
        wide += _core(shape, layout, length)
    return 2 * tokens * split // tensor + 2 * tokens * whole // _spread(layout) + 8 * length * shape.head_dim + wide


def _core(shape: ModelShape, layout: Layout, length: int) -> int:
    """Bytes that attention's core keeps beyond its arguments and result."""
    pairs = shape.heads * length * layout.micro_batch // layout.tensor
    return 4 * pairs * (length if shape.gemma2 else 1)


def _spread(layout: Layout) -> int:
    """Ranks over which what tensor parallelism leaves whole is spread."""
    return layout.tensor if layout.sequence_parallel else 1


def held_activations(shape: ModelShape, layout: Layout, length: int, stage: int, micro_batches: int) -> int:
    """Bytes that the forward passes leave on one rank of a pipeline stage, logits apart.

    Under the one-forward-one-backward schedule stage i of p holds p - i micro-batches (Narayanan et al. 2021, section
    2.2). Besides its layers a stage holds the table of rotations and, sequence parallel, the buffer that a layer's
    input is gathered into; the first one the token ids; the last one the input and output of the final norm; all of
    Gemma 2's the buffer that scores are computed in, and a mask.
    """
    in_flight = min(layout.pipeline - stage, micro_batches)
    tokens = length * layout.micro_batch
    inputs = 2 * tokens * shape.hidden // _spread(layout)
    one = inputs if layout.recompute == "full" else layer_activations(shape, layout, length)
    held = in_flight * (shape.layers // layout.pipeline) * one + 4 * length * shape.head_dim
    if layout.sequence_parallel:
        held += 2 * tokens * shape.hidden
    if stage == layout.pipeline - 1:
        held += 2 * inputs + 4 * tokens // _spread(layout)
    if stage == 0:
        held += 8 * tokens * in_flight
    if shape.gemma2:
        held += 2 * shape.heads * tokens * length // layout.tensor + length**2
    return held


def recomputed_activations(shape: ModelShape, layout: Layout, length: int) -> int:
    """Bytes that come back while one layer, or its attention, is recomputed."""
    if layout.recompute == "full":
        return _layer(shape, layout, length, selective=False)
    return _core(shape, layout, length) if layout.recompute == "selective" else 0


def logits_bytes(
    shape: ModelShape, tensor: int, sequences: int, length: int, chunk: int = 0, gradient: bool = True
) -> int:
    """Bytes of the logits of one micro-batch at their worst moment.

    Without a chunk, for each token and row of this rank's vocabulary the output layer's bfloat16, and: with a gradient,
    the probability that is kept for it in float32 and NeMo-Aligner's mark of the chosen token, an int64 twice; without,
    three float32 (logits, log-softmax, a copy).

    With a chunk its tokens' bfloat16 and float32. A gradient adds that of all hidden states and, when the float32 are
    gone, the product that goes into the weight's gradient.
    """
    rows, tokens = padded_vocabulary(shape) // tensor, sequences * length
    if not chunk:
        return rows * tokens * (22 if gradient else 14)
    wide = min(chunk, tokens)
    if not gradient:
        return 6 * rows * wide
    return 2 * tokens * shape.hidden + rows * max(6 * wide, 2 * wide + 2 * shape.hidden)


def passing_bytes(shape: ModelShape, tensor: int, sequences: int, length: int) -> int:
    """Bytes at their worst moment while the layers pass `sequences` on without a gradient, logits apart.

    That is in the feed-forward part: for each token gate, up, activation and product (4f, split over tensor parallel
    ranks), and what the layer still holds of its hidden states: the embedding's, both norms' outputs, attention's and
    the sum (5h); for each position the table of rotations. Such passes go without sequence parallelism. Of Gemma 2's
    it is what a layer would keep for a gradient.
    """
    tokens = sequences * length
    if shape.gemma2:
        return _layer(shape, Layout(tensor=tensor, micro_batch=sequences), length, selective=False)
    return 2 * tokens * (5 * shape.hidden + 4 * shape.ffn // tensor) + 4 * length * shape.head_dim


def sampling_bytes(shape: ModelShape, tensor: int, answers: int) -> int:
    """Bytes that drawing one token for each of `answers` takes where Megatron generates.

    For each row of this rank's vocabulary the output layer's bfloat16 and float32; for each row of the whole one three
    float32 and two float64 (logits, log-probs for rollout.mismatch, divided by the temperature, probabilities and their
    sums).
    """
    rows = padded_vocabulary(shape)
    return answers * (6 * rows // tensor + 28 * rows)


def logprob_bytes(shape: ModelShape, layout: Layout, work: Workload, last: bool) -> int:
    """Bytes of a pass without gradient: what one layer makes, or on the last stage the logits."""
    sequences = layout.logprob_micro_batch
    one = passing_bytes(shape, layout.tensor, sequences, work.length)
    logits = logits_bytes(shape, layout.tensor, sequences, work.length, work.logits_chunk, gradient=False)
    return max(one, logits if last else 0)


def kv_cache_bytes(shape: ModelShape, tensor: int, pipeline: int, sequences: int, length: int) -> int:
    """Bytes of keys and values in bfloat16 for `sequences` of `length` tokens on one rank.

    Pope et al. 2022 (arXiv 2211.05102), section 3.3.
    """
    return 4 * (shape.layers // pipeline) * sequences * length * shape.key_width // tensor


def predict_memory(shape: ModelShape, layout: Layout, work: Workload) -> Memory:
    """What a GPU of a layout needs. Bytes of allocator, CUDA and NCCL are not in it."""
    stages = [_stage_memory(shape, layout, work, stage) for stage in {0, layout.pipeline - 1}]
    return Memory(**{field.name: max(getattr(stage, field.name) for stage in stages) for field in fields(Memory)})


def trained_parameters(shape: ModelShape, layout: Layout, work: Workload, stage: int) -> int:
    """Parameters on one rank of a stage that have gradients and an optimizer."""
    if not work.lora_dim:
        return rank_parameters(shape, layout.tensor, layout.pipeline, stage)
    return shape.layers // layout.pipeline * adapter_parameters(shape, layout.tensor, work.lora_targets, work.lora_dim)


def _adapter_activations(shape: ModelShape, layout: Layout, work: Workload) -> int:
    """Bytes of the adapters' narrow tensors on one rank, in bfloat16, of the micro-batches in flight."""
    narrow = 2 * work.length * layout.micro_batch * work.lora_dim * len(work.lora_targets)
    return narrow * shape.layers if work.lora_dim and layout.recompute != "full" else 0


def _stage_memory(shape: ModelShape, layout: Layout, work: Workload, stage: int) -> Memory:
    count = rank_parameters(shape, layout.tensor, layout.pipeline, stage)
    trained = trained_parameters(shape, layout, work, stage)
    weights, gradients, optimizer = 2 * count, 4 * trained, 12 * trained // layout.data
    if work.lora_dim:
        weights += 2 * trained
    micro_batches = -(-work.rows // (work.updates * layout.data * layout.micro_batch))
    activations = held_activations(shape, layout, work.length, stage, micro_batches)
    activations += recomputed_activations(shape, layout, work.length) + _adapter_activations(shape, layout, work)
    last = stage == layout.pipeline - 1
    logits = logits_bytes(shape, layout.tensor, layout.micro_batch, work.length, work.logits_chunk) if last else 0
    if last and work.logits_chunk and layout.sequence_parallel:
        logits += 2 * layout.micro_batch * work.length * shape.hidden  # hidden states of all ranks
    logprobs = logprob_bytes(shape, layout, work, last)

    folded = work.reshard and work.engine == "trt_llm"
    stages = 1 if folded else layout.pipeline
    answers = min(layout.rollout_batch, -(-work.rows // (layout.data * (layout.pipeline if folded else 1))))
    kv_cache = kv_cache_bytes(shape, layout.tensor, stages, answers, work.length)
    engine = sampling = prefill = 0
    if work.engine == "trt_llm":
        engine = 2 * rank_parameters(shape, layout.tensor, stages, min(stage, stages - 1))
        if stages < layout.pipeline:
            engine *= 2  # weights gathered over the stages, on their way into the engine
    else:
        prefill = passing_bytes(shape, layout.tensor, answers, work.prompt_tokens)
        sampling = sampling_bytes(shape, layout.tensor, answers) if last else 0
    resident = engine + kv_cache if work.engine == "trt_llm" and work.engine_resident else 0
    fixed = weights + gradients
    waiting = fixed + (0 if work.offload_optimizer else optimizer)
    written = max(2 * trained + optimizer, weights)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        engine=engine,
        kv_cache=kv_cache,
        sampling=sampling,
        prefill=prefill,
        logprobs=logprobs,
        scoring=waiting + logprobs + resident,
        update=fixed + optimizer + activations + logits + resident,
        generation=waiting + engine + kv_cache + max(sampling, prefill),
        host=(weights if work.reference_copy else 0) + (optimizer if work.offload_optimizer else 0) + written,
    )
