"""An update looked at closely while it is done: every sample's share in the loss, and where numbers end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_lrpo.actor import collectives
from nemo_lrpo.actor.actor import MegatronActor
from nemo_lrpo.actor.policy import Batch
from nemo_lrpo.types import NonFiniteError, TrainingBatch


@dataclass
class Examination:
    """What was seen of the updates of a step, up to the first that is not finite; the same on every rank.

    updates: loss metrics and `grad_norm` of each. loss, surprisal, finite: float64 [N], by sample: its summands of the
    loss, its mean -log-prob over the tokens that train (NaN where none does), and 1 where the log-probs of all its
    tokens are finite; NaN for a sample that no update has come to. weights, gradients: names of the parameters with
    entries that are not finite, before the step and at the end, in the model's order. module: the first whose output is
    not finite for the first such sample, empty where there is none.
    """

    updates: list[dict[str, float]] = field(default_factory=list)
    loss: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    surprisal: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    finite: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    weights: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    module: str = ""


class ExaminingActor(MegatronActor):
    """Updates as MegatronActor does, and keeps in `examination` what happened."""

    examination: Examination

    def update(self, batch: TrainingBatch) -> dict[str, float]:
        """See Actor; NonFiniteError leaves a complete examination as well."""
        self.examination = Examination(weights=self._not_finite(lambda parameter: parameter))
        self._samples: list[torch.Tensor] = []
        try:
            metrics = super().update(batch)
        except NonFiniteError:
            self._tell(batch)
            raise
        self._tell(batch)
        return metrics

    def _tell(self, batch: TrainingBatch) -> None:
        """Bring together what the ranks have seen."""
        found, table = self.examination, torch.zeros(batch.tokens.size(0), 4, dtype=torch.float64)
        # The last pipeline stage has seen the loss, all of its tensor-parallel ranks the same one.
        if self._samples and parallel_state.get_tensor_model_parallel_rank() == 0:
            table[self._share(batch)[: len(self._samples)]] = torch.stack(self._samples)
        *values, seen = collectives.sum_over_ranks(table).unbind(dim=1)
        found.loss, found.surprisal, found.finite = (value.where(seen > 0, torch.nan) for value in values)
        bad = torch.nonzero(found.finite == 0).flatten().tolist()
        if bad:
            found.module = self._first_module(batch.tokens[bad[0] : bad[0] + 1])

    def accumulate(self, part: Batch, everyone: torch.Tensor) -> dict[str, float]:
        """See MegatronActor."""
        before = len(self._samples)
        metrics = super().accumulate(part, everyone)
        # Without the rows that fill up the last micro batch.
        del self._samples[before + part["tokens"].size(0) :]
        self.examination.updates.append(dict(metrics))
        return metrics

    def grad_norm(self) -> float:
        """See MegatronActor."""
        self.examination.gradients = self._not_finite(lambda parameter: parameter.main_grad)
        norm = super().grad_norm()
        self.examination.updates[-1]["grad_norm"] = norm
        return norm

    def _loss(self, logprobs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad():
            for row in range(logprobs.size(0)):
                one = {key: value[row : row + 1] for key, value in batch.items()}
                loss, sums = super()._loss(logprobs[row : row + 1], one)
                facts = (loss, sums["surprisal"] / sums["tokens"], logprobs[row].isfinite().all())
                self._samples.append(torch.stack([*(fact.double().cpu() for fact in facts), torch.ones(()).double()]))
        return super()._loss(logprobs, batch)

    def _not_finite(self, of: Callable[[Any], torch.Tensor]) -> list[str]:
        return _everywhere(
            [
                name
                for chunk in self._model.model
                for name, parameter in chunk.named_parameters()
                if parameter.requires_grad and not bool(of(parameter).isfinite().all())
            ]
        )

    def _first_module(self, tokens: torch.Tensor) -> str:
        """tokens: int64 [1, S], the same on all ranks."""
        self._model.prepare_for_inference()
        with _outputs_watched(self._model.model) as seen:
            self._logprobs(tokens)
        self._model.finish_inference()
        return next(iter(_everywhere(seen[:1])), "")


@contextmanager
def _outputs_watched(chunks: list[torch.nn.Module]) -> Iterator[list[str]]:
    """Names of this rank's modules whose output is not finite, as they come to an end."""
    seen: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if torch.is_tensor(first) and first.is_floating_point() and not bool(first.isfinite().all()):
                seen.append(name)

        return look

    named = [(name, module) for chunk in chunks for name, module in chunk.named_modules() if name]
    handles = [module.register_forward_hook(watch(name)) for name, module in named]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _everywhere(names: list[str]) -> list[str]:
    """The ranks' names one after the other, said with the rank where there are several."""
    if dist.get_world_size() == 1:
        return names
    blocks = [json.loads(block) for block in collectives.gather_bytes(json.dumps(names).encode())]
    return [f"{name} (rank {rank})" for rank, block in enumerate(blocks) for name in block]
