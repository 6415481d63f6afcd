"""Training over preference pairs: `PairTrainer.step` is the method, top to bottom; the loop around it is LRPO's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nemo_lrpo.algorithms.preference import (
    AnswerSlopes,
    answer_advantages,
    dpo_slopes,
    pair_weights,
    reward_gap_slopes,
)
from nemo_lrpo.config.pairs import DPO, MethodConfig
from nemo_lrpo.config.schema import OfflineConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.pair_answers import AnswerRenderer
from nemo_lrpo.data.pair_file import answers_of, languages_of
from nemo_lrpo.data.pairs import PreferencePair
from nemo_lrpo.data.sampler import PairSampler
from nemo_lrpo.router import from_json
from nemo_lrpo.seeding import derive_seed
from nemo_lrpo.training.checkpoint import Checkpoint, CheckpointError
from nemo_lrpo.training.loop import TrainingLoop, check_seed
from nemo_lrpo.training.protocols import Actor, Logger
from nemo_lrpo.training.runlog import VALIDATION, RunLog, StepRecord
from nemo_lrpo.training.scoring import RowRefused, StepRefused
from nemo_lrpo.training.stopping import Stop
from nemo_lrpo.types import RankFailure, TrainingBatch

_SHOWN = {"loss": ".4f", "accuracy": ".3f"}
_OF_THE_UPDATE = ("grad_norm", "lr", "tokens", "skipped_updates")
"""What the policy's update says of itself that holds for pairs too; its loss is another."""


class LogprobsFailed(StepRefused):
    """The log-probs of a step's answers could not be computed on some rank."""


@dataclass(frozen=True)
class PairRows:
    """The answers of P pairs as rows, R of each pair: chosen, rejected, and where R is 4 the dominant language's two.

    sample_ids: P * R, row by row. tokens: int64 [P * R, S], prompt, answer, padding. prompt_lengths, lengths: int64
    [P * R], `lengths` of both. languages: P codes.
    """

    sample_ids: tuple[str, ...]
    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    languages: tuple[str, ...]

    @property
    def answer_lengths(self) -> torch.Tensor:
        """Tokens of each answer, int64 [P * R]."""
        return self.lengths - self.prompt_lengths

    def by_pair(self, column: torch.Tensor) -> torch.Tensor:
        """[P * R] as [P, R]."""
        return column.view(len(self.languages), -1)


class InitialLogprobs:
    """Log-probs of a set of answers under the policy that training began with: each is computed once, when it is first
    asked for, and saved with the run."""

    def __init__(self, pairs: Sequence[PreferencePair]) -> None:
        answers = {answer.sample_id: answer for pair in pairs for answer in answers_of(pair)}
        self._index = {name: index for index, name in enumerate(sorted(answers))}
        texts = [(name, answers[name].question, answers[name].response) for name in self._index]
        self._digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()
        self._values = np.full(len(answers), np.nan)

    def of(self, actor: Actor, rows: PairRows) -> torch.Tensor:
        """All ranks: float64 [P * R], sums over the tokens of each answer."""
        index = np.array([self._index[name] for name in rows.sample_ids])
        unknown = torch.from_numpy(np.flatnonzero(np.isnan(self._values[index])))
        if len(unknown):
            columns = (rows.tokens[unknown], rows.prompt_lengths[unknown], rows.lengths[unknown])
            self._values[index[unknown.numpy()]] = actor.continuation_logprobs(*columns, initial=True).numpy()
        return torch.from_numpy(self._values[index])

    def state_dict(self) -> dict[str, Any]:
        """What is known so far."""
        known = np.isfinite(self._values)
        return {"digest": self._digest, "known": known.astype(np.uint8), "values": np.where(known, self._values, 0.0)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a run knew of the same answers; of others nothing."""
        if state.get("digest") == self._digest:
            saved = from_json(state)
            self._values = np.where(saved["known"] != 0, saved["values"], np.nan)


class PairTrainer(TrainingLoop):
    """Training over preference pairs, by DPO or by the gap of the dominant language."""

    _config: OfflineConfig
    _sampler: PairSampler

    def __init__(
        self,
        config: OfflineConfig,
        *,
        actor: Actor,
        sampler: PairSampler,
        renderer: AnswerRenderer,
        train: Sequence[PreferencePair],
        validation: Sequence[PreferencePair],
        log: Logger,
        total_steps: int,
        layout: Mapping[str, int],
        stop: Stop,
    ):
        """train: what `sampler` draws from."""
        super().__init__(
            config,
            actor=actor,
            sampler=sampler,
            log=log,
            total_steps=total_steps,
            layout=layout,
            stop=stop,
            intervals={VALIDATION: config.loop.val_check_interval} if validation else {},
        )
        self._renderer = renderer
        self._validation = validation
        self._initial = {"train": InitialLogprobs(train), VALIDATION: InitialLogprobs(validation)}
        self._languages = languages_of([*train, *validation])

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self) -> StepRecord:
        """One step over pairs.

        pairs -> log-probs of their answers, initially and now -> the loss and its slope by every answer -> the policy's
        update with these slopes as advantages, which has the gradient of the loss (nemo_lrpo/algorithms/preference.py).
        """
        time = self._timer
        with time("render"):
            rows = self._rows(self._sampler.next())
        initial, present = self._logprobs("train", rows)
        slopes = pair_slopes(self._config.method, rows, present, initial)
        batch = TrainingBatch(
            tokens=rows.tokens,
            prompt_lengths=rows.prompt_lengths,
            lengths=rows.lengths,
            advantages=answer_advantages(slopes.slopes.flatten(), rows.answer_lengths, slopes.normalised).float(),
            use=torch.ones(len(rows.sample_ids), dtype=torch.bool),
        )
        self._abandon_if_due()
        with time("update"):
            self._actor.reseed(derive_seed("update", self._config.seed, self._step))
            update = self._update_or_pass_over(batch, lambda error: "Its pairs are those of a run without it.")
        self._step += 1
        metrics = means(pair_metrics(self._config.method, rows, present, initial))
        metrics |= {f"policy/{name}": update[name] for name in _OF_THE_UPDATE if name in update}
        return StepRecord({**metrics, "epoch": float(self._sampler.epoch), **self._times()})

    def _rows(self, pairs: Sequence[PreferencePair]) -> PairRows:
        """The pairs' answers; those of the dominant language where the loss reads them."""
        count = self._config.method.rows_per_pair
        answers = [answer for pair in pairs for answer in answers_of(pair)[:count]]
        try:
            rendered = self._renderer.render(answers)
        except DataError as error:
            raise RowRefused(str(error)) from error
        prompt_lengths = torch.tensor([len(row.prompt) for row in rendered])
        lengths = prompt_lengths + torch.tensor([len(row.answer) for row in rendered])
        tokens = torch.full((len(rendered), int(lengths.max())), self._renderer.end_token)
        for number, row in enumerate(rendered):
            tokens[number, : int(lengths[number])] = torch.tensor(row.prompt + row.answer)
        languages = tuple(pair.chosen.language for pair in pairs)
        return PairRows(tuple(row.sample_id for row in rendered), tokens, prompt_lengths, lengths, languages)

    def _logprobs(self, data: str, rows: PairRows) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks: float64 [P * R], under the initial policy and the present one. Where each rank holds a whole model
        and one of them fails, all raise LogprobsFailed."""
        try:
            with self._timer("initial"):
                initial = self._initial[data].of(self._actor, rows)
            with self._timer("logprobs"):
                present = self._actor.continuation_logprobs(rows.tokens, rows.prompt_lengths, rows.lengths)
        except RankFailure as error:
            raise LogprobsFailed(f"no log-probs of these answers: {error}.") from error
        return initial, present

    # -- between steps -------------------------------------------------------------------------------------------

    def measure(self, kind: str) -> Mapping[str, float]:
        """The loss over the validation pairs, without an update."""
        size, sums = self._config.loop.pairs_per_step, {}
        starts = range(0, len(self._validation), size)
        for start in tqdm(starts, desc=kind, unit="batch", delay=2.0, leave=False, disable=not self._actor.is_main):
            self._abandon_if_due()
            rows = self._rows(self._validation[start : start + size])
            initial, present = self._logprobs(VALIDATION, rows)
            for name, value in pair_metrics(self._config.method, rows, present, initial).items():
                sums[name] = sums.get(name, 0.0) + value
        # It is no part of the next step.
        self._timer.take()
        return means(sums)

    def _open_log(self) -> RunLog:
        return RunLog(
            Path(self._config.run_dir) if self._actor.is_main else None,
            total_steps=self._total_steps,
            resume_step=self._step or None,
            repeats=self._still_due(),
            logger=self._log,
            samples=None,
            shown=_SHOWN,
        )

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "router": None,
            "languages": self._languages,
            "method": {"name": self._config.method.name, "loss": self._config.method.loss},
            "initial_logprobs": {name: known.state_dict() for name, known in self._initial.items()},
        }

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        check_pairs_resumable(checkpoint, self._config.seed, self._config.method, self._sampler.state_dict())
        for name, known in self._initial.items():
            known.load_state_dict(checkpoint.state["initial_logprobs"][name])
        super().load_state_dict(checkpoint)

    def export(self, path: Path) -> None:
        """All ranks: write the policy as a .nemo that says how it ended."""
        summary = {
            "step": self._step,
            "seed": self._config.seed,
            "languages": self._languages,
            "method": self._config.method.name,
        }
        self._actor.export(path, {"lrpo_training.json": json.dumps(summary)})


def check_pairs_resumable(checkpoint: Checkpoint, seed: int, method: MethodConfig, data: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the checkpoint is of a run over these pairs, with this seed and loss. data: the
    state of this run's sampler."""
    state = checkpoint.state
    if "method" not in state:
        raise CheckpointError(f"{checkpoint.path}: of a run that was not over pairs; start in another run_dir.")
    if state["data"].get("fingerprint") != data["fingerprint"]:
        raise CheckpointError(
            f"{checkpoint.path}: the pairs to train on are not those that it was saved with "
            f"({state['data'].get('pairs')} then, {data['pairs']} now; what data.validation_share holds out, counts). "
            "Go on with the file and share as they were, or start in another run_dir."
        )
    loss = state["method"]["loss"]
    if loss != method.loss:
        raise CheckpointError(
            f"{checkpoint.path}: saved with method.loss={loss}, this run has {method.loss}; start in another run_dir."
        )
    check_seed(checkpoint, seed)


def pair_slopes(
    method: MethodConfig,
    rows: PairRows,
    present: torch.Tensor,
    initial: torch.Tensor,
    use: torch.Tensor | None = None,
    count: int | None = None,
) -> AnswerSlopes:
    """The method's loss. present, initial: float64 [P * R], sums over tokens. use: bool [P], of the pairs that count;
    None: all. count: pairs that the loss is divided by; None: those."""
    pairs = len(rows.languages)
    use = torch.ones(pairs, dtype=torch.bool) if use is None else use
    weights = pair_weights(use, int(use.sum()) if count is None else count).double()
    if method.loss == DPO:
        columns = (rows.by_pair(present), rows.by_pair(initial))
        return dpo_slopes(*columns, weights, beta=method.beta, label_smoothing=method.label_smoothing)
    columns = (rows.by_pair(present / rows.answer_lengths), rows.by_pair(initial / rows.answer_lengths))
    return reward_gap_slopes(*columns, weights, beta=method.beta, retention=method.retention)


def pair_metrics(
    method: MethodConfig, rows: PairRows, present: torch.Tensor, initial: torch.Tensor
) -> dict[str, float]:
    """Sums over pairs in all and by language, to be added up and divided by `means`: `loss`, `margin`, `accuracy` (see
    PairLoss), `chosen_change` and `rejected_change` (log-prob of the answer, less that under the initial policy),
    `retention` where the loss has it; `pairs` counts them."""
    values: dict[str, float] = {}
    change = rows.by_pair(present - initial)
    for suffix in ("", *(f"/{language}" for language in sorted(set(rows.languages)))):
        use = torch.tensor([suffix in ("", f"/{language}") for language in rows.languages])
        found = pair_slopes(method, rows, present, initial, use, count=1).metrics
        found |= {"chosen_change": change[use, 0].sum(), "rejected_change": change[use, 1].sum()}
        values |= {f"{name}{suffix}": float(value) for name, value in found.items()}
    return values


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """`pair_metrics` of one or several batches, divided by their pairs."""

    def pairs_of(name: str) -> float:
        _, slash, language = name.partition("/")
        return sums[f"pairs{slash}{language}"]

    return {name: value if name.startswith("pairs") else value / pairs_of(name) for name, value in sums.items()}
