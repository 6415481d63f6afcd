"""What travels between the rooms of one training step.

The carriers of one step, in order, for a question `q7` asked in German with K=3 rollouts::

    Prompt(question_id="q7", question="Was ist die Währung von Japan?", language="de", ...)
      -> 3 x RoutedPrompt(prompt=q7, step=12, slot=0..2, language="de" | "ja" | "en", ...)   router.route (one plan)
      -> 3 x TaggedPrompt(routed=..., token_ids=(...))                                       data.tag
      -> Rollouts(sample_ids=("12/q7/0", "12/q7/1", "12/q7/2"), tokens=[3, S], ...)          actor.generate
      -> 3 x ScoreRequest(sample_id="12/q7/1", response="...", ...)                          to the reward server
      -> 3 x Score(sample_id="12/q7/1", reward=0.93, ...)                                    joined by sample id
      -> TrainingBatch(tokens=[3, S], advantages=[3], ...)                                   actor.update
      -> the 3 rewards, NaN where there is none                                              router.observe

This module imports neither torch nor NumPy, so that configuration, routing and the wire schema stay light.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import torch

ORIGIN_RESERVED = "reserved"
"""The slot belongs to the question's own language (one of the K_on)."""
ORIGIN_FIXED = "fixed"
"""The row or its topic (translation) leaves no choice of language."""
ORIGIN_DRAWN = "drawn"
"""The router drew the language."""


@dataclass(frozen=True)
class Prompt:
    """One question of the data set.

    `language` is the ISO 639-1 code of the question (l_x); `reference` is the reference answer, written in
    `reference_language`; `topics` has at least one entry, `regions` may be empty. `fixed_language`, where given, is
    the language of every rollout of this question.
    """

    question_id: str
    question: str
    reference: str
    language: str
    reference_language: str
    topics: tuple[str, ...]
    regions: tuple[str, ...] = ()
    fixed_language: str | None = None


@dataclass(frozen=True)
class RoutedPrompt:
    """One rollout-to-be: a question, its slot in the group and the language that the router gave it.

    `probability` is that of `language` under the distribution that the slot was filled from (epsilon mixture
    included); 1.0 for reserved and fixed slots. `origin` is one of the ORIGIN_* constants. `thinking`: the language
    that the policy is made to think in (mode explang), None where it chooses, or does not think in blocks.
    """

    prompt: Prompt
    step: int
    slot: int
    language: str
    origin: str
    probability: float
    thinking: str | None = None

    @property
    def sample_id(self) -> str:
        """Unique in a run; rewards are joined by it."""
        return f"{self.step}/{self.prompt.question_id}/{self.slot}"

    @property
    def group_id(self) -> str:
        """All K rollouts of one question in one step share it, whatever their languages."""
        return f"{self.step}/{self.prompt.question_id}"


class RoutedRows(Sequence[RoutedPrompt]):
    """Routed prompts that are kept as columns; row objects are made where somebody asks for one."""

    @property
    @abstractmethod
    def sample_ids(self) -> tuple[str, ...]:
        """Of every row, as RoutedPrompt.sample_id."""

    @abstractmethod
    def asked(self) -> tuple[list[str], list[str]]:
        """Question and language of every row."""


@dataclass(frozen=True)
class TaggedPrompt:
    """A routed prompt as the policy reads it: chat template and language tag applied, tokenised once.

    prefilled: the response's beginning that the last of `token_ids` are made of, where the policy is not left to choose
    it; "" where it writes the response from the start. Being part of the prompt, it is not trained on.
    """

    routed: RoutedPrompt
    token_ids: tuple[int, ...]
    prefilled: str = ""

    @property
    def sample_id(self) -> str:
        return self.routed.sample_id


@dataclass(frozen=True, eq=False)
class TaggedPrompts(Sequence[TaggedPrompt]):
    """The rows of a step as the policy reads them, as columns; row objects are made where somebody asks for one.

    rows: the routed prompts. packed: the token ids of each, int32 in the machine's byte order. prefilled: see
    TaggedPrompt, None where no row has any.
    """

    rows: Sequence[RoutedPrompt]
    packed: Sequence[bytes]
    prefilled: Sequence[str] | None = None

    @staticmethod
    def of(prompts: Sequence[TaggedPrompt]) -> TaggedPrompts:
        """The same rows, as columns."""
        if isinstance(prompts, TaggedPrompts):
            return prompts
        prefilled = [p.prefilled for p in prompts]
        return TaggedPrompts(
            [p.routed for p in prompts], [pack(p.token_ids) for p in prompts], prefilled if any(prefilled) else None
        )

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of every row."""
        return [len(ids) // _TOKEN_BYTES for ids in self.packed]

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Of every row."""
        rows = self.rows
        return rows.sample_ids if isinstance(rows, RoutedRows) else tuple(row.sample_id for row in rows)

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, index: int) -> TaggedPrompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[TaggedPrompt]: ...

    def __getitem__(self, index: int | slice) -> TaggedPrompt | list[TaggedPrompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        prefilled = self.prefilled[index] if self.prefilled else ""
        return TaggedPrompt(self.rows[index], unpack(self.packed[index]), prefilled)

    def __iter__(self) -> Iterator[TaggedPrompt]:
        return map(TaggedPrompt, self.rows, map(unpack, self.packed), self.prefilled or repeat(""))


_TOKEN_BYTES = 4


def pack(token_ids: Sequence[int]) -> bytes:
    """Token ids as int32 in the machine's byte order."""
    return struct.pack(f"={len(token_ids)}i", *token_ids)


def unpack(packed: bytes) -> tuple[int, ...]:
    """The inverse of `pack`."""
    return struct.unpack(f"={len(packed) // _TOKEN_BYTES}i", packed)


@dataclass
class Rollouts:
    """Finished generations, B samples padded to S tokens: one batch of a rank, or all of a step on every rank.

    sample_ids: B ids, in row order. tokens: int64 [B, S], prompt then response then padding (the tokenizer's end
    token). prompt_lengths, lengths: int64 [B], in tokens; `lengths` counts prompt and response, the end token
    included. ended: bool [B], the response stopped by itself within the budget. valid: bool [B], every id lies in
    the tokenizer's range (ids out of range are replaced in `tokens` by the end token). texts: B responses, decoded
    without prompt, end and special tokens; empty where nobody needs the text. seconds: float64 [B], the time of the
    batch that a row was generated in, shared out by response tokens; None where it was not measured. logprobs: float32
    [B, S], of every response token when it was drawn, 0 elsewhere; None where the engine does not say. retried: int64
    [B], how often that batch was generated again after an error; None where nobody counted.
    """

    sample_ids: tuple[str, ...]
    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor
    valid: torch.Tensor
    texts: tuple[str, ...]
    seconds: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    retried: torch.Tensor | None = None


@dataclass
class TrainingBatch:
    """The rollouts of a step as the update sees them: N rows in plan order, the same on every rank.

    tokens: int64 [N, S]. prompt_lengths, lengths: int64 [N]. advantages: float32 [N], 0 where `use` is False.
    use: bool [N], False masks the sample in numerator and denominator alike (no end, invalid ids, no reward).
    sampled_logprobs: float32 [N, S], `Rollouts.logprobs`; languages: the N requested ones, where those are given.
    divergence: whether the loss has the divergence from the initial policy; False: as with algorithm.kl_coefficient=0.
    All tensors on the CPU; the actor moves its own share.
    """

    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    advantages: torch.Tensor
    use: torch.Tensor
    sampled_logprobs: torch.Tensor | None = None
    languages: tuple[str, ...] = ()
    divergence: bool = True


@dataclass(frozen=True)
class Example:
    """A prompt with the response that is to be learned, as token ids; the response's last one is the end token."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True)
class ScoreRequest:
    """One answer to be scored. `language` is the requested language of the response, ISO 639-1; `question` is for
    verifiers that read it (a judge), and may be empty for the others."""

    sample_id: str
    response: str
    reference: str
    reference_language: str
    language: str
    question: str = ""


FLAG_EMPTY = "empty"
"""The response has no text."""
FLAG_ABSTAINED = "abstained"
"""The language of the response cannot be said."""
FLAG_TRUNCATED = "truncated"
"""The response or the reference is longer than the encoder reads; its end was not read."""
FLAG_CHUNKED = "chunked"
"""The response or the reference is longer than the encoder's window and was read in several."""
FLAG_UNKNOWN_PAIR = "unknown_pair"
"""The calibration has no statistics of this pair of languages."""
FLAG_TOO_LONG = "too_long"
"""The response, the reference or the question is longer than the reward server takes; it was not sent."""


@dataclass(frozen=True)
class Score:
    """The reward of one answer with its parts, r = quality * gate (paper, reward section).

    reward: what GRPO sees; None where there is none to be had (the language cannot be said and the gate masks such
    answers, or a verifier has no result): the sample leaves the update and is counted. quality: r_qual in [0, 1], the
    parts combined, None with a part missing. gate: r_lang in [0, 1], None where it masks. language: identified language
    of the response, None where the identifier abstains. confidence: of the identification, in [0, 1]. parts: value of
    each verifier in [0, 1], by its name. measures: what lies behind the parts, by name (similarity and calibrated, both
    about [-1, 1]; language_share). flags: FLAG_* and the verifiers' own, sorted.
    """

    sample_id: str
    reward: float | None
    quality: float | None
    gate: float | None
    language: str | None
    confidence: float
    parts: Mapping[str, float] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    @property
    def masked(self) -> bool:
        """Without a reward by intent: the gate masks answers whose language cannot be said, the client those that are
        longer than the reward server takes."""
        return self.reward is None and (FLAG_ABSTAINED in self.flags or FLAG_TOO_LONG in self.flags)


class ScoringAbandoned(Exception):
    """Nobody waits for the scores any more: the request was cancelled, or its deadline has passed."""


class AgreedError(Exception):
    """All ranks raise it at the same point, so that none waits for another; what they do next, they do together."""


class StepAbandoned(AgreedError):
    """A step or validation was given up on all ranks, because the run is to stop. It has changed nothing."""


class RankFailure(AgreedError, RuntimeError):
    """One or several ranks brought an error to a point where all ranks meet; it says which, and what the errors were.

    `__cause__` is the rank's own error, None on the ranks that had none.
    """


class NonFiniteError(AgreedError, ArithmeticError):
    """Loss or gradient is NaN or infinite; raised before the optimizer moves.

    updates_done: optimizer steps that the same training step had made before.
    """

    def __init__(self, loss: float, grad_norm: float, updates_done: int) -> None:
        super().__init__(f"loss={loss}, grad_norm={grad_norm}: the optimizer did not step.")
        self.loss = loss
        self.grad_norm = grad_norm
        self.updates_done = updates_done


class MismatchError(AgreedError, ArithmeticError):
    """The log-probs of sampled tokens in training and in generation differ by more than the run accepts; raised before
    the optimizer moves."""
