"""The actor that the training loop talks to: one policy spread over all ranks."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from nemo_aligner.utils import parallel_state as aligner_state
from nemo_aligner.utils.distributed import broadcast_tensor_within_pp
from nemo_aligner.utils.utils import clear_memory, configure_batch_sizes

from nemo_lrpo.actor import collectives
from nemo_lrpo.actor.engine import RolloutEngine
from nemo_lrpo.actor.generation import build_engine
from nemo_lrpo.actor.mismatch import Mismatch
from nemo_lrpo.actor.packing import next_fit
from nemo_lrpo.actor.policy import Batch
from nemo_lrpo.actor.saving import SavedPolicy
from nemo_lrpo.actor.setup import Policy, gradient_norm
from nemo_lrpo.actor.spread import spread_by_length, spread_by_plan
from nemo_lrpo.actor.stop_request import StopRequest
from nemo_lrpo.algorithms.loss import aggregation_weights, grpo_loss
from nemo_lrpo.config.schema import RunConfig
from nemo_lrpo.types import NonFiniteError, Rollouts, Score, TaggedPrompt, TaggedPrompts, TrainingBatch

_log = logging.getLogger(__name__)

_LOSS_SUMS = ("loss", "policy_loss", "kl_loss")
_TOKEN_SUMS = ("kl", "ratio", "clipped_low", "clipped_high", "surprisal", "old_kl")


class MegatronActor(SavedPolicy):
    """Implements nemo_lrpo.training.protocols.Actor on Megatron's tensor, pipeline and data parallel ranks."""

    def __init__(self, policy: Policy, config: RunConfig, on_progress: Callable[[str], None] = lambda _: None):
        """on_progress: called, with a name for what comes next, wherever this rank has got on."""
        super().__init__(policy, on_progress)
        self._model = policy.model
        self._config = config
        self._engine: RolloutEngine = build_engine(policy.model, config.rollout)
        self._tokenizer = policy.model.tokenizer
        self._reference: torch.Tensor | None = None
        self._divergence = True
        self._mismatch = Mismatch(config.rollout.mismatch)
        policy.model.on_micro_batch = partial(on_progress, "passes through the model")

    # -- rollouts ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[TaggedPrompt],
        seeds: Sequence[int],
        on_finished: Callable[[Rollouts], None],
        temperature: float | None = None,
        should_stop: Callable[[], bool] | None = None,
        expected: Sequence[float] | None = None,
    ) -> Rollouts:
        prompts = TaggedPrompts.of(prompts)
        total, budget = len(prompts), self._config.rollout.max_new_tokens
        width = max(prompts.sizes) + budget
        tokens = torch.zeros(total, width, dtype=torch.int64)
        logprobs, has_logprobs = torch.zeros(total, width), False
        facts = torch.zeros(total, 4, dtype=torch.int64)  # length, ended, valid, retried
        seconds = torch.zeros(total, dtype=torch.float64)
        stop = StopRequest(should_stop)
        error = None
        self._engine.prepare()
        try:
            with closing(self._generate_share(prompts, seeds, temperature, stop, expected)) as batches:
                for chunk, batch in batches:
                    tokens[chunk, : batch.tokens.size(1)] = batch.tokens
                    columns = (batch.lengths, batch.ended.long(), batch.valid.long(), batch.retried)
                    facts[chunk] = torch.stack(columns, dim=1)
                    seconds[chunk] = batch.seconds
                    if batch.logprobs is not None:
                        logprobs[chunk, : batch.logprobs.size(1)], has_logprobs = batch.logprobs, True
                    on_finished(batch)
        except Exception as failure:
            if self._shares_model:
                # Its peers wait inside the generation and never come to `agree`: the watchdog tells them.
                raise
            error = failure
        self._engine.release()
        self._on_progress("waiting for the other ranks' generation")
        collectives.agree_alike(error)
        stop.settle()
        self._on_progress("waiting for the scores")
        # Exactly one rank has filled each row, so the sum over ranks is the union.
        tokens, facts = collectives.sum_over_ranks(tokens), collectives.sum_over_ranks(facts)
        lengths, ended, valid = facts[:, 0].clone(), facts[:, 1].bool(), facts[:, 2].bool()
        longest = int(lengths.max())
        tokens = tokens[:, :longest].contiguous()
        tokens[torch.arange(longest) >= lengths.unsqueeze(1)] = self._tokenizer.eos_id
        # A rank without rows does not know.
        has_logprobs = bool(collectives.max_over_ranks(int(has_logprobs)))
        return Rollouts(
            sample_ids=prompts.sample_ids,
            tokens=tokens,
            prompt_lengths=torch.tensor(prompts.sizes),
            lengths=lengths,
            ended=ended,
            valid=valid,
            texts=(),
            seconds=collectives.sum_over_ranks(seconds),
            logprobs=collectives.sum_over_ranks(logprobs)[:, :longest] if has_logprobs else None,
            retried=facts[:, 3].clone(),
        )

    def _generate_share(
        self,
        prompts: TaggedPrompts,
        seeds: Sequence[int],
        temperature: float | None,
        stop: StopRequest,
        expected: Sequence[float] | None,
    ) -> Iterator[tuple[list[int], Rollouts]]:
        """Generate this rank's rows, batch by batch; where this rank answers for them, yields rows and rollouts."""
        with self._engine.layout():
            rank, ranks = aligner_state.get_data_parallel_rank(), aligner_state.get_data_parallel_world_size()
            answers = dist.get_rank() == aligner_state.get_model_parallel_src_rank()
            chunks = self._spread(prompts, expected, ranks)[rank]
            done, rows = 0, sum(map(len, chunks))
            for chunk in chunks:
                if stop.stops():
                    break
                self._on_progress(f"generation, row {done} of {rows}")
                done += len(chunk)
                batch = self._generate_stubbornly(
                    [prompts[row] for row in chunk], [seeds[row] for row in chunk], temperature, decode=answers
                )
                if answers:
                    yield chunk, batch

    def _spread(self, prompts: TaggedPrompts, expected: Sequence[float] | None, ranks: int) -> list[list[list[int]]]:
        """Batches of rows for every data-parallel rank of the generation."""
        rollout, sizes = self._config.rollout, prompts.sizes
        if rollout.spread == "plan":
            return spread_by_plan(sizes, ranks, rollout.micro_batch_size)
        groups = [routed.prompt.question_id for routed in prompts.rows] if rollout.keep_groups else None
        tokens = [float(rollout.max_new_tokens)] * len(prompts) if expected is None else expected
        return spread_by_length(sizes, tokens, ranks, rollout.micro_batch_size, groups)

    @property
    def _shares_model(self) -> bool:
        """Whether this rank holds a part of a model only, and meets others in collectives at every layer."""
        return parallel_state.get_model_parallel_group().size() > 1

    def _generate_stubbornly(
        self, prompts: Sequence[TaggedPrompt], seeds: Sequence[int], temperature: float | None, decode: bool
    ) -> Rollouts:
        """A batch; after an error again, `rollout.retries` times at most, if no other rank takes part in it. The same
        seeds give the same answers."""
        left = 0 if self._shares_model else self._config.rollout.retries
        retried = 0
        while True:
            try:
                batch = self._generate_batch(prompts, seeds, temperature, decode)
                break
            except Exception as error:
                if retried == left:
                    raise
                _log.warning("rank %d generates a batch again: %s: %s", self.rank, type(error).__name__, error)
            retried += 1
            # What a broken generation leaves behind goes first.
            self._engine.release()
            self._engine.prepare()
        return dataclasses.replace(batch, retried=torch.full((len(prompts),), retried))

    def _generate_batch(
        self, prompts: Sequence[TaggedPrompt], seeds: Sequence[int], temperature: float | None, decode: bool
    ) -> Rollouts:
        budget, eos = self._config.rollout.max_new_tokens, self._tokenizer.eos_id
        prompt_lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts])
        padded = torch.full((len(prompts), int(prompt_lengths.max()) + budget), eos)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt.token_ids)] = torch.tensor(prompt.token_ids)
        started = time.perf_counter()
        generated = self._engine.generate(padded, prompt_lengths, seeds, temperature)
        tokens, lengths = generated.tokens.cpu(), generated.lengths.cpu()
        share = (lengths - prompt_lengths).double().clamp(min=1.0)
        _check_answers(prompts, tokens, lengths, budget)
        in_range = (tokens >= 0) & (tokens < self._tokenizer.vocab_size)
        tokens = torch.where(in_range, tokens, eos)
        rollouts = Rollouts(
            sample_ids=tuple(prompt.sample_id for prompt in prompts),
            tokens=tokens,
            prompt_lengths=prompt_lengths,
            lengths=lengths,
            ended=torch.zeros(len(prompts), dtype=torch.bool),
            valid=in_range.all(dim=1),
            texts=(),
            seconds=(time.perf_counter() - started) * share / share.sum(),
            logprobs=None if generated.logprobs is None else generated.logprobs.cpu(),
        )
        last_is_end = tokens.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1) == eos
        rollouts.ended = last_is_end & (lengths > prompt_lengths)
        ends = list(self._config.rollout.end_strings)
        if ends:
            # A string that ends a response may be a special token.
            whole = self._decode(rollouts, range(len(prompts)), special=True)
            rollouts.ended |= torch.tensor([any(text.endswith(end) for end in ends) for text in whole])
        if decode:
            texts = self.decode(rollouts, range(len(prompts)))
            rollouts.texts = tuple(_strip_end(text, ends) for text in texts)
        return rollouts

    def decode(self, rollouts: Rollouts, rows: Sequence[int]) -> list[str]:
        return self._decode(rollouts, rows, special=False)

    def _decode(self, rollouts: Rollouts, rows: Sequence[int], special: bool) -> list[str]:
        responses = [
            rollouts.tokens[row, rollouts.prompt_lengths[row] : rollouts.lengths[row]].tolist() for row in rows
        ]
        # Exactly as generated: the clean-up would close the spaces before punctuation that some languages write.
        return self._tokenizer.tokenizer.batch_decode(
            responses, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )

    # -- log-probs and update ------------------------------------------------------------------------------------

    def continuation_logprobs(
        self, tokens: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor, initial: bool = False
    ) -> torch.Tensor:
        ranks = parallel_state.get_data_parallel_world_size()
        rows = torch.arange(parallel_state.get_data_parallel_rank(), tokens.size(0), ranks)
        totals = torch.zeros(tokens.size(0), dtype=torch.float64)
        self._on_progress(f"the log-probs of {tokens.size(0)} rows")
        error = None
        self._model.prepare_for_inference()
        try:
            if len(rows):
                packed = {"lengths": lengths[rows]} if self._config.actor.sequence_packing else {}
                with self._model.initial_policy() if initial else nullcontext():
                    logprobs = self._logprobs(tokens[rows], **packed)
                # Log-prob t is that of token t + 1.
                position = torch.arange(1, tokens.size(1))
                inside = (position >= prompt_lengths[rows].unsqueeze(1)) & (position < lengths[rows].unsqueeze(1))
                if dist.get_rank() == aligner_state.get_model_parallel_src_rank():
                    totals[rows] = logprobs.double().masked_fill(~inside, 0.0).sum(dim=1)
        except Exception as failure:
            if self._shares_model:
                # As in `generate`.
                raise
            error = failure
        self._model.finish_inference()
        self._on_progress("waiting for the other ranks' log-probs")
        collectives.agree_alike(error)
        return collectives.sum_over_ranks(totals)

    def reference_logprobs(self, batch: TrainingBatch) -> None:
        if self._config.algorithm.kl_coefficient == 0 or not batch.divergence:
            return
        self._on_progress("the reference's log-probs")
        rows = self._share(batch)
        self._model.prepare_for_inference()
        with self._model.initial_policy():
            self._reference = self._logprobs(batch.tokens[rows], **self._lengths(batch, rows))
        self._model.finish_inference()
        self._on_progress("waiting for the scores")

    def update(self, batch: TrainingBatch) -> dict[str, float]:
        algorithm = self._config.algorithm
        self._divergence = batch.divergence
        rows = self._share(batch)
        mask = response_mask(batch)
        share: Batch = {
            "tokens": batch.tokens[rows],
            "mask": mask[rows],
            "advantages": batch.advantages[rows],
            **self._lengths(batch, rows),
            **self._mismatch.columns(batch, rows),
        }
        if self._reference is not None:
            share["ref_logprobs"], self._reference = self._reference, None
        if algorithm.num_updates > 1:
            # One update per step needs no forward pass for the old log-probs: they are the current ones.
            self._model.prepare_for_inference()
            share["old_logprobs"] = self._logprobs(share["tokens"], **self._lengths(batch, rows))
            self._model.finish_inference()
        mismatch = self._compared(share)
        self._mismatch.refuse(mismatch)
        self._model.prepare_for_training()
        totals: dict[str, float] = {}
        per_update = len(rows) // algorithm.num_updates
        global_rows = batch.tokens.size(0) // algorithm.num_updates
        try:
            for index in range(algorithm.num_updates):
                part = {key: value[index * per_update : (index + 1) * per_update] for key, value in share.items()}
                everyone = mask[index * global_rows : (index + 1) * global_rows]
                metrics = self.accumulate(part, everyone)
                self._mismatch.refuse(metrics)
                metrics |= self._optimizer_step(metrics["loss"], index)
                for key, value in metrics.items():
                    totals[key] = totals.get(key, 0.0) + value / algorithm.num_updates
        finally:
            self._model.finish_training()
            clear_memory()
        return {**totals, **mismatch}

    def _compared(self, share: Batch) -> dict[str, float]:
        """How log-probs of generation compare, where they and those of the old policy are there."""
        if not {"sampled_logprobs", "old_logprobs"} <= share.keys():
            return {}
        last = parallel_state.is_pipeline_last_stage()
        return self._mismatch.metrics([self._mismatch.sums(share["old_logprobs"], share)] if last else [])

    def accumulate(self, part: Batch, everyone: torch.Tensor) -> dict[str, float]:
        """Gradients of one update from this rank's rows `part`; returns the loss metrics over all ranks.

        part: tokens [n, S], mask [n, S-1], advantages [n] and, where used, ref_logprobs, old_logprobs and
        sampled_logprobs [n, S-1], the last with language [n].
        everyone: mask [n * ranks, S-1] of the update's rows on all ranks, which gives the global denominator.
        """
        algorithm = self._config.algorithm
        # Without old log-probs they are those of this pass.
        compares = "sampled_logprobs" in part and "old_logprobs" not in part
        weights = aggregation_weights(
            part["mask"],
            algorithm.aggregation,
            global_tokens=int(everyone.sum()),
            global_sequences=int(everyone.any(dim=1).sum()),
        )
        micro_batches = self._split({**part, "weights": weights}, self._model.cfg.micro_batch_size)
        self._configure_batches(len(micro_batches))
        self._policy.optimizer.zero_grad()
        self._model.prepare_for_training_step()
        collected = self._model.forward_backward(micro_batches, self._loss)
        self._model.finish_training_step()
        metrics = self._reduce(collected)
        return metrics | self._mismatch.metrics([one["mismatch"] for one in collected]) if compares else metrics

    def _optimizer_step(self, loss: float, updates_done: int) -> dict[str, float]:
        """Clip and step, unless loss or gradient is not finite: then NonFiniteError, and this update moves nothing."""
        self._on_progress("the optimizer's step")
        grad_norm = self.grad_norm()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteError(loss, grad_norm, updates_done)
        learning_rate = float(self._policy.optimizer.param_groups[0]["lr"])
        self._policy.optimizer.step()
        self._policy.scheduler.step()
        return {"grad_norm": grad_norm, "lr": learning_rate}

    def _loss(self, logprobs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        algorithm = self._config.algorithm
        old = batch.get("old_logprobs", logprobs.detach())
        loss, metrics = grpo_loss(
            logprobs,
            old,
            batch.get("ref_logprobs"),
            batch["advantages"],
            batch["mask"],
            batch["weights"],
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            kl_coefficient=algorithm.kl_coefficient if self._divergence else 0.0,
            kl_estimator=algorithm.kl_estimator,
            importance=self._mismatch.weights(old, batch),
        )
        if "sampled_logprobs" in batch and "old_logprobs" not in batch:
            metrics["mismatch"] = self._mismatch.sums(old, batch)
        return loss, metrics

    def _share(self, batch: TrainingBatch) -> torch.Tensor:
        """Rows of this data-parallel rank, in plan order; within every update each rank has every ranks-th row."""
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        updates = self._config.algorithm.num_updates
        per_update = batch.tokens.size(0) // updates
        starts = torch.arange(updates) * per_update
        return (starts.unsqueeze(1) + torch.arange(rank, per_update, ranks)).flatten()

    def _lengths(self, batch: TrainingBatch, rows: torch.Tensor) -> Batch:
        """What makes rows be packed."""
        return {"lengths": batch.lengths[rows]} if self._config.actor.sequence_packing else {}

    def _split(self, part: Batch, size: int) -> list[Batch]:
        """Rows in micro batches, in their order: of `size` rows, or packed, of as many as have no more tokens."""
        if "lengths" in part:
            runs = next_fit(part["lengths"].tolist(), size * part["tokens"].size(1))
        else:
            part = _pad_rows(part, size, self._tokenizer.eos_id)
            runs = [slice(start, start + size) for start in range(0, part["tokens"].size(0), size)]
        return [{key: value[run] for key, value in part.items()} for run in runs]

    def _logprobs(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probs float32 [n, S-1] of tokens int64 [n, S], packed where there are lengths int64 [n]."""
        size = self._config.actor.logprob_micro_batch_size
        part = {"tokens": tokens} if lengths is None else {"tokens": tokens, "lengths": lengths}
        micro_batches = self._split(part, size)
        self._configure_batches(len(micro_batches), size)
        logprobs = broadcast_tensor_within_pp(self._model.compute_logprobs(micro_batches), torch.float32)
        return logprobs[: tokens.size(0)].cpu()

    def _configure_batches(self, num_micro_batches: int, size: int | None = None) -> None:
        size = size or self._model.cfg.micro_batch_size
        ranks = parallel_state.get_data_parallel_world_size()
        configure_batch_sizes(mbs=size, gbs=num_micro_batches * size * ranks, dp=ranks)

    def grad_norm(self) -> float:
        """Global L2 norm of the reduced gradients, before clipping."""
        return gradient_norm(self._policy.optimizer)

    def _reduce(self, collected: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Metrics of one update over all ranks: losses as they are, per-token sums as means over tokens."""
        totals = torch.zeros(len(_LOSS_SUMS) + len(_TOKEN_SUMS) + 1, dtype=torch.float64)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            # Only the last pipeline stage has collected anything; the other ranks add zero.
            for metrics in collected:
                totals += torch.stack([metrics[name].double() for name in (*_LOSS_SUMS, *_TOKEN_SUMS, "tokens")]).cpu()
        *sums, tokens = collectives.sum_over_ranks(totals).tolist()
        values = dict(zip(_LOSS_SUMS, sums, strict=False))
        for name, total in zip(_TOKEN_SUMS, sums[len(_LOSS_SUMS) :], strict=True):
            values[name] = total / max(tokens, 1.0)
        return {**values, "tokens": tokens}

    # -- agreement -----------------------------------------------------------------------------------------------

    def join_scores(self, sample_ids: Sequence[str], local: Mapping[str, Score]) -> dict[str, Score]:
        self._on_progress("joining the scores of all ranks")
        own = json.dumps([dataclasses.asdict(score) for score in local.values()])
        known: dict[str, Score] = {}
        for block in collectives.gather_bytes(own.encode()):
            for record in json.loads(block):
                known[record["sample_id"]] = Score(**{**record, "flags": tuple(record["flags"])})
        return {sample_id: known[sample_id] for sample_id in sample_ids if sample_id in known}

    def reseed(self, seed: int) -> None:
        # As NeMo seeds it at the start: stages apart by 100, tensor-parallel ranks by Megatron itself.
        stage = parallel_state.get_pipeline_model_parallel_rank()
        tensor_parallel.model_parallel_cuda_manual_seed(seed % 2**31 + 100 * stage)


def response_mask(batch: TrainingBatch) -> torch.Tensor:
    """bool [N, S-1]: True where log-prob t belongs to a response token of a sample in use.

    Log-prob t predicts token t + 1; the end token counts as part of the response.
    """
    position = torch.arange(batch.tokens.size(1) - 1)
    inside = (position >= batch.prompt_lengths.unsqueeze(1) - 1) & (position < batch.lengths.unsqueeze(1) - 1)
    return inside & batch.use.unsqueeze(1)


def _pad_rows(batch: Batch, multiple: int, eos_id: int) -> Batch:
    """Fill up to a multiple of the micro batch with rows of end tokens and weight zero."""
    missing = -batch["tokens"].size(0) % multiple
    if not missing:
        return batch
    return {
        key: torch.cat((value, value.new_full((missing, *value.shape[1:]), eos_id if key == "tokens" else 0)))
        for key, value in batch.items()
    }


def _check_answers(prompts: Sequence[TaggedPrompt], tokens: torch.Tensor, lengths: torch.Tensor, budget: int) -> None:
    """Raise RuntimeError, naming row and sample, for an answer that an engine cannot have given to its prompt."""
    for row, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
        start = len(prompt.token_ids)
        if not start < length <= min(start + budget, tokens.size(1)):
            raise RuntimeError(
                f"row {row}, sample {prompt.sample_id}: the engine says length {length} of {tokens.size(1)} tokens; a "
                f"prompt of {start} and rollout.max_new_tokens={budget} leave {start + 1} to {start + budget}."
            )
        if tokens[row, :start].tolist() != list(prompt.token_ids):
            raise RuntimeError(f"row {row}, sample {prompt.sample_id}: the engine does not give back its prompt.")


def _strip_end(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        if end and text.endswith(end):
            return text[: -len(end)]
    return text
