"""What the training loop asks of the rooms it does not import: the actor and the reward service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nemo_lrpo.types import Rollouts, Score, ScoreRequest, TaggedPrompt, TrainingBatch

if TYPE_CHECKING:
    import torch


class Actor(Protocol):
    """The policy, its reference and the collectives over all ranks.

    Every method is collective: all ranks call it with the same arguments (but for `local`) and get the same result.
    """

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files."""

    def generate(
        self,
        prompts: Sequence[TaggedPrompt],
        seeds: Sequence[int],
        on_finished: Callable[[Rollouts], None],
        temperature: float | None = None,
        should_stop: Callable[[], bool] | None = None,
        expected: Sequence[float] | None = None,
    ) -> Rollouts:
        """Answer every prompt, seeds [N] 64-bit. Returns all N rollouts in prompt order, without texts.

        `on_finished` gets every micro batch as soon as it is decoded, on the one rank that answers for it.
        `temperature` replaces the configured one; 0 is greedy. `expected` [N], response tokens, is what rows are spread
        over the ranks by; the answers do not depend on it. `should_stop` is asked on every rank before each of its
        batches; as soon as it is true on one of them, all give up and raise StepAbandoned. Raises RankFailure on every
        rank where one fails, if each rank holds the whole model; else on that rank its own error, and the watchdog ends
        the others.
        """

    def continuation_logprobs(
        self, tokens: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor, initial: bool = False
    ) -> torch.Tensor:
        """Sum of the policy's log-probs of what follows each prompt, float64 [N]; `initial`: of the policy that
        training began with, where that is kept.

        tokens: int64 [N, S], prompt, continuation, padding. prompt_lengths, lengths: int64 [N] in tokens; `lengths`
        counts both. Raises RankFailure as `generate` does.
        """

    def reference_logprobs(self, batch: TrainingBatch) -> None:
        """Compute and keep the initial policy's log-probs of this rank's share, for the next `update`; nothing where
        the batch's loss has no divergence from it."""

    def update(self, batch: TrainingBatch) -> dict[str, float]:
        """One pass over the batch: loss, backward, finite check, clip, optimizer, schedule. Returns metrics.

        Raises NonFiniteError.
        """

    def join_scores(self, sample_ids: Sequence[str], local: Mapping[str, Score]) -> dict[str, Score]:
        """The union of what the ranks know of `sample_ids`, on every rank."""

    def agree(self, error: BaseException | None) -> None:
        """Raise on every rank if any rank brings an error: the own one where there is one, else RankFailure."""

    def decode(self, rollouts: Rollouts, rows: Sequence[int]) -> list[str]:
        """Responses of the given rows as text, special tokens dropped."""

    def save_shards(self, directory: Path) -> None:
        """Write model and optimizer shards and the learning rate schedule into `directory`, which is there and empty.

        An error of one rank is raised on all.
        """

    def begin_shards(self, directory: Path) -> None:
        """Start to write what `save_shards` writes, and return as soon as training may go on."""

    def end_shards(self, wait: bool) -> bool:
        """True once the shards that were begun are there; without `wait` False while a rank still writes.

        An error of one rank is raised on all.
        """

    def export(self, path: Path, artifacts: Mapping[str, str]) -> None:
        """Write a .nemo that carries `artifacts` (file name -> text)."""

    def max_over_ranks(self, value: int) -> int:
        """The largest of the ranks' numbers (the one argument besides `local` that may differ), on every rank."""

    def reseed(self, seed: int) -> None:
        """Make what the model draws in training (dropout) a function of `seed` and this rank's place in the layout."""

    def barrier(self) -> None:
        """Wait for all ranks."""


class PendingScores(Protocol):
    def result(self) -> dict[str, Score]:
        """Scores by sample id; ids without a valid reply are absent. Raises RewardError past the deadline."""

    def cancel(self) -> None:
        """Nobody waits for the scores any more; never blocks."""


class RewardService(Protocol):
    def submit(self, requests: Sequence[ScoreRequest]) -> PendingScores:
        """Start scoring; returns at once, or, where the server is far behind, as soon as it has caught up."""

    def identity(self) -> dict[str, object]:
        """What the scores depend on, JSON-able."""

    def counters(self) -> Mapping[str, float]:
        """Totals of what went wrong and was mended, by name: retries, replicas lost, records dropped."""


Logger = Callable[[Mapping[str, float], int], None]
"""Takes scalar metrics and the step they belong to."""
