"""The policy: NeMo-Aligner's Megatron GPT actor with the GRPO update in place of its REINFORCE loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs
from nemo_aligner.utils.train_utils import set_sync_funcs

from nemo_lrpo.actor.tokenizer import ArchiveTokenizer

Batch = dict[str, torch.Tensor]
Loss = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(log-probs [b, S-1], micro batch) -> (sum with global weights applied, sums for metrics)."""


class LrpoActorModel(ArchiveTokenizer, MegatronGPTReinforceActorModel):
    """Adds what GRPO over mixed-language groups needs; generation, refit and offloading stay the parent's.

    The policy is softmax(logits / temperature) throughout: what is sampled from is what is trained.
    """

    temperature: float = 1.0
    on_micro_batch: Callable[[], None] = staticmethod(lambda: None)
    """Called before each micro batch goes through the model."""

    def forward_logprobs(self, model: torch.nn.Module, tokens: torch.Tensor, inference_only: bool) -> tuple[Any, Any]:
        """Forward pass and the function that turns its output into log-probs float32 [B, S-1].

        tokens: int64 [B, S]. Log-prob t is that of tokens[:, t + 1]. The causal mask is Megatron's own.
        """
        self.on_micro_batch()
        position_ids = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        output = model(tokens, position_ids, None, labels=None)

        def logprobs(parallel_logits: torch.Tensor) -> torch.Tensor:
            # float32: the ratio of two bf16 log-probs is mostly rounding.
            logits = parallel_logits.float()
            if self.temperature != 1.0:
                logits = logits / self.temperature
            return from_parallel_logits_to_logprobs(
                vocab_parallel_logits=logits, target=tokens, inference_only=inference_only, higher_stability=True
            )

        return output, logprobs

    @torch.no_grad()
    def compute_logprobs(self, tokens: torch.Tensor, micro_batch_size: int) -> torch.Tensor | None:
        """Log-probs float32 [B, S-1] of tokens int64 [B, S] on the last pipeline stage, None on the others.

        B must be a multiple of `micro_batch_size`.
        """
        set_sync_funcs(self, forward_only=True)

        def step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
            output, logprobs = self.forward_logprobs(model, next(batches)["tokens"], inference_only=True)
            return output, lambda logits, non_loss_data=True: logprobs(logits)

        micro_batches = [{"tokens": chunk.cuda(non_blocking=True)} for chunk in tokens.split(micro_batch_size)]
        collected = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=self._make_data_iterator_list(iter(micro_batches)),
            model=self.model,
            num_microbatches=len(micro_batches),
            forward_only=True,
            seq_length=tokens.size(1),
            micro_batch_size=micro_batch_size,
            collect_non_loss_data=True,
        )
        return torch.cat(collected) if collected else None

    def forward_backward(self, micro_batches: Sequence[Batch], loss: Loss) -> list[dict[str, torch.Tensor]]:
        """Accumulate gradients of the loss over this rank's micro batches; metric sums of each, last stage only.

        A micro batch holds tokens int64 [b, S] and whatever else the loss reads. The loss is a sum with global weights
        already applied, while Megatron averages over micro batches and data-parallel ranks: both divisions are undone
        here, so that the gradient does not depend on either.
        """
        set_sync_funcs(self, forward_only=False)
        scale = len(micro_batches) * parallel_state.get_data_parallel_world_size()

        def step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
            batch = {key: value.cuda(non_blocking=True) for key, value in next(batches).items()}
            output, logprobs = self.forward_logprobs(model, batch["tokens"], inference_only=False)

            def loss_func(parallel_logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                value, metrics = loss(logprobs(parallel_logits), batch)
                return value * scale, metrics

            return output, loss_func

        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=self._make_data_iterator_list(iter(micro_batches)),
            model=self.model,
            num_microbatches=len(micro_batches),
            forward_only=False,
            seq_length=micro_batches[0]["tokens"].size(1),
            micro_batch_size=micro_batches[0]["tokens"].size(0),
        )
