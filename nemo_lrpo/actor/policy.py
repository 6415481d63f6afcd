"""The policy: NeMo-Aligner's Megatron GPT actor with the GRPO update in place of its REINFORCE loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from nemo.core.classes.mixins.adapter_mixins import AdapterModuleMixin
from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs
from nemo_aligner.utils.train_utils import set_sync_funcs

from nemo_lrpo.actor.adapters import AdapterShards, leave_sequence_parallelism, resume_sequence_parallelism
from nemo_lrpo.actor.host_memory import OptimizerStates, ReferenceWeights
from nemo_lrpo.actor.output_layer import logprobs_for_logits
from nemo_lrpo.actor.packing import arrange
from nemo_lrpo.actor.tokenizer import ArchiveTokenizer

Batch = dict[str, torch.Tensor]
_Step = Callable[[Iterator[tuple[Batch, int]], torch.nn.Module], tuple[Any, Any]]
Loss = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(log-probs [b, S-1], micro batch) -> (sum with global weights applied, sums for metrics)."""


class LrpoActorModel(AdapterShards, ArchiveTokenizer, MegatronGPTReinforceActorModel):
    """Adds what GRPO over mixed-language groups needs; generation, refit and offloading stay the parent's.

    The policy is softmax(logits / temperature) throughout: what is sampled from is what is trained.
    """

    temperature: float = 1.0
    logits_chunk: int = 0
    """Tokens whose logits are in memory at once; 0: those of a whole micro-batch."""
    reference: ReferenceWeights | None = None
    """The initial policy; None where it is the model with new adapters off, or nothing asks for it."""
    optimizer_states: OptimizerStates | None = None
    """Where they leave the GPU between updates."""
    on_micro_batch: Callable[[], None] = staticmethod(lambda: None)
    """Called before each micro batch goes through the model."""
    _split_adapters: Sequence[Any] = ()
    """Adapters that are out of sequence parallelism for now."""

    def forward_logprobs(
        self, model: torch.nn.Module, batch: Batch, width: int, inference_only: bool
    ) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
        """Forward pass and the function that turns its output into log-probs float32 [B, S-1].

        batch: tokens int64 [B, S] and, to be packed, lengths int64 [B]; width: of what the model sees. Log-prob t is
        that of tokens[:, t + 1] among the tokenizer's tokens: rows that pad the embedding have no probability, as in
        generation. What it is at and beyond a row's last token, means nothing. The causal mask is Megatron's own.
        """
        self.on_micro_batch()
        rows = arrange(batch, width, self.tokenizer.eos_id)

        def forward() -> Any:
            return model(rows.tokens, rows.positions, None, labels=None, packed_seq_params=rows.packed)

        if not self.logits_chunk:

            def read(logits: torch.Tensor) -> torch.Tensor:
                return rows.by_row(self._plain_logprobs(logits, rows.tokens, inference_only))[:, :-1]

            return forward(), read
        size = self.tokenizer.vocab_size
        with logprobs_for_logits(model, rows.tokens, size=size, chunk=self.logits_chunk, temperature=self.temperature):
            return forward(), lambda logprobs: rows.by_row(logprobs)[:, :-1]

    def _plain_logprobs(
        self, parallel_logits: torch.Tensor, tokens: torch.Tensor, inference_only: bool
    ) -> torch.Tensor:
        """Log-probs float32 [B, S] from vocabulary-parallel logits [B, S, V / TP], the last of a row 0."""
        # float32: the ratio of two bf16 log-probs is mostly rounding.
        logits, columns = parallel_logits.float(), parallel_logits.size(-1)
        first = parallel_state.get_tensor_model_parallel_rank() * columns
        kept = min(max(self.tokenizer.vocab_size - first, 0), columns)
        if kept < columns:
            logits[..., kept:] = -torch.inf
        if self.temperature != 1.0:
            logits = logits / self.temperature
        logprobs = from_parallel_logits_to_logprobs(
            vocab_parallel_logits=logits, target=tokens, inference_only=inference_only, higher_stability=True
        )
        return torch.nn.functional.pad(logprobs, (0, 1))

    @contextmanager
    def initial_policy(self) -> Iterator[None]:
        """Inside, the model is the policy that training began with: by the weights on the host, or without adapters."""
        if self.reference is not None:
            with self.reference.in_place():
                yield
            return
        # NeMo-Aligner's own function finds no adapter where the model is a list, as with Megatron's optimizer.
        modules = (module for chunk in self.get_model_module_list() for module in chunk.modules())
        adapted = [module for module in modules if isinstance(module, AdapterModuleMixin)]
        adapted = [module for module in adapted if module.is_adapter_available()]
        assert adapted, "neither weights on the host nor adapters"
        try:
            for module in adapted:
                module.set_enabled_adapters(enabled=False)
            yield
        finally:
            for module in adapted:
                module.set_enabled_adapters(enabled=True)

    def offload_adam_states(self) -> None:
        """Called by the parent before generation and passes without gradient; its own knows Apex's optimizer only."""
        if self.optimizer_states is not None:
            self.optimizer_states.leave()

    def onload_adam_states(self) -> None:
        """Called by the parent before updates, and before the optimizer is saved."""
        if self.optimizer_states is not None:
            self.optimizer_states.come_back()

    def _reset_sequence_parallelism_args(self) -> None:
        """Passes without gradient go without sequence parallelism. NeMo 2.2 leaves it on in the embedding's output and
        in adapters."""
        super()._reset_sequence_parallelism_args()
        self._scatter_embeddings(False)
        self._split_adapters = leave_sequence_parallelism(self.get_model_module_list())

    def _restore_sequence_parallelism_args(self) -> None:
        super()._restore_sequence_parallelism_args()
        self._scatter_embeddings(self.cfg.sequence_parallel)
        resume_sequence_parallelism(self.get_model_module_list(), self._split_adapters)

    def _scatter_embeddings(self, scatter: bool) -> None:
        for chunk in self.get_model_module_list():
            embedding = getattr(chunk, "embedding", None)
            if embedding is not None and not embedding.add_position_embedding:
                embedding.reduce_scatter_embeddings = scatter
                embedding.word_embeddings.reduce_scatter_embeddings = scatter

    def _widths(self, micro_batches: Sequence[Batch]) -> list[int]:
        """Tokens of each micro batch's sequences as the model sees them."""
        widths = [
            int(batch["lengths"].sum()) if "lengths" in batch else batch["tokens"].size(1) for batch in micro_batches
        ]
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            # The stages pass on tensors of one shape.
            widths = [max(widths)] * len(widths)
        # Sequence parallelism splits them.
        ranks = parallel_state.get_tensor_model_parallel_world_size() if self.cfg.get("sequence_parallel") else 1
        return [-(-width // ranks) * ranks for width in widths]

    def _run(self, micro_batches: Sequence[Batch], step: _Step, forward_only: bool) -> list[Any]:
        """Take the micro batches through the pipeline; what `step`'s second function gives, on the last stage."""
        set_sync_funcs(self, forward_only=forward_only)
        widths = self._widths(micro_batches)
        rows = 1 if "lengths" in micro_batches[0] else micro_batches[0]["tokens"].size(0)
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=self._make_data_iterator_list(zip(micro_batches, widths, strict=True)),
            model=self.model,
            num_microbatches=len(micro_batches),
            forward_only=forward_only,
            seq_length=max(widths),
            micro_batch_size=rows,
            collect_non_loss_data=forward_only,
        )

    @torch.no_grad()
    def compute_logprobs(self, micro_batches: Sequence[Batch]) -> torch.Tensor | None:
        """Log-probs float32 [B, S-1] of all rows on the last pipeline stage, None on the others.

        A micro batch holds tokens int64 [b, S] and, to be packed, lengths int64 [b].
        """

        def step(batches: Iterator[tuple[Batch, int]], model: torch.nn.Module) -> tuple[Any, Any]:
            batch, width = next(batches)
            output, logprobs = self.forward_logprobs(model, _on_device(batch), width, inference_only=True)
            return output, lambda output, non_loss_data=True: logprobs(output)

        collected = self._run(micro_batches, step, forward_only=True)
        return torch.cat(collected) if collected else None

    def forward_backward(self, micro_batches: Sequence[Batch], loss: Loss) -> list[dict[str, torch.Tensor]]:
        """Accumulate gradients of the loss over this rank's micro batches; metric sums of each, last stage only.

        A micro batch holds tokens int64 [b, S], lengths int64 [b] to be packed, and whatever else the loss reads. The
        loss is a sum with global weights already applied, while Megatron averages over micro batches and data-parallel
        ranks: both divisions are undone here, so that the gradient does not depend on either.
        """
        scale = len(micro_batches) * parallel_state.get_data_parallel_world_size()

        def step(batches: Iterator[tuple[Batch, int]], model: torch.nn.Module) -> tuple[Any, Any]:
            batch, width = next(batches)
            batch = _on_device(batch)
            output, logprobs = self.forward_logprobs(model, batch, width, inference_only=False)

            def loss_func(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                value, metrics = loss(logprobs(output), batch)
                return value * scale, metrics

            return output, loss_func

        return self._run(micro_batches, step, forward_only=False)


def _on_device(batch: Batch) -> Batch:
    return {key: value.cuda(non_blocking=True) for key, value in batch.items()}
