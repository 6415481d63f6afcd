"""The answers of preference pairs as token ids: what the policy would have read and written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from nemo_lrpo.config.data import PromptConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.pair_file import answers_of
from nemo_lrpo.data.pairs import PreferencePair, RatedAnswer
from nemo_lrpo.data.prompts import PromptRenderer
from nemo_lrpo.types import ORIGIN_FIXED, Prompt, RoutedPrompt

_log = logging.getLogger(__name__)

_SHOWN = 5


@dataclass(frozen=True)
class AnswerTokens:
    """Prompt, language request and chat template included, and answer, end token included."""

    sample_id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class AnswerRenderer:
    """Makes token ids of answers as they were written: text, tokenised anew, and the end token.

    The ids may be others than the policy drew: a text has several tokenisations, and the tokenizer gives one of them.
    """

    def __init__(self, renderer: PromptRenderer, config: PromptConfig, end_token: int, max_answer_tokens: int) -> None:
        self._renderer = renderer
        self._drop = config.over_long == "drop"
        self.end_token = end_token
        """Id of what ends an answer."""
        self._max_answer_tokens = max_answer_tokens
        self.dropped = 0
        """Pairs that `fitting` left out so far."""

    def render(self, answers: Sequence[RatedAnswer]) -> list[AnswerTokens]:
        """In the given order. Raises DataError for a prompt that is too long, which `fitting` has ruled out."""
        prompts = self._renderer.render_all([_routed(answer) for answer in answers])
        return [
            AnswerTokens(answer.sample_id, prompt.token_ids, self._tokens(answer))
            for answer, prompt in zip(answers, prompts, strict=True)
        ]

    def fitting(self, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
        """The pairs whose prompts have at most prompt.max_tokens tokens, and whose answers data.max_answer_tokens.

        Over-long ones raise DataError naming the longest, or are left out and counted, by `prompt.over_long`. Raises
        DataError where nothing is left.
        """
        prompts = {(answer.question, answer.language): _prompt(answer) for pair in pairs for answer in answers_of(pair)}
        fits = {(prompt.question, prompt.language) for prompt in self._renderer.fitting(list(prompts.values()), ())}
        sizes = self._sizes(pairs)
        over = sorted((name for name, size in sizes.items() if size > self._max_answer_tokens), key=lambda n: -sizes[n])
        if over:
            self._refuse_or_tell(over, sizes)
        kept = [
            pair
            for pair in pairs
            if all(
                (answer.question, answer.language) in fits and sizes[answer.sample_id] <= self._max_answer_tokens
                for answer in answers_of(pair)
            )
        ]
        if pairs and not kept:
            raise DataError("prompt.over_long=drop leaves no pair; raise prompt.max_tokens or data.max_answer_tokens.")
        self.dropped += len(pairs) - len(kept)
        return kept

    def _sizes(self, pairs: Sequence[PreferencePair]) -> dict[str, int]:
        """Tokens of every answer, by sample id."""
        answers = {answer.sample_id: answer for pair in pairs for answer in answers_of(pair)}
        bar = tqdm(answers.items(), desc="measuring answers", unit="answer", delay=2.0, leave=False)
        return {name: len(self._tokens(answer)) for name, answer in bar}

    def _refuse_or_tell(self, over: Sequence[str], sizes: dict[str, int]) -> None:
        longest = ", ".join(f"{name!r} ({sizes[name]} tokens)" for name in over[:_SHOWN])
        message = (
            f"{len(over)} of {len(sizes)} answers are longer than data.max_answer_tokens={self._max_answer_tokens}, "
            f"end token included; the longest: {longest}."
        )
        if not self._drop:
            raise DataError(f"{message} Raise it, or leave their pairs out with prompt.over_long=drop.")
        _log.warning("%s Their pairs are left out (prompt.over_long=drop).", message)

    def _tokens(self, answer: RatedAnswer) -> tuple[int, ...]:
        return (*self._renderer.tokens_of(answer.response), self.end_token)


def _prompt(answer: RatedAnswer) -> Prompt:
    """The question, in the language of this answer and in no other."""
    language = answer.language
    return Prompt(answer.question_id, answer.question, "", language, language, (), fixed_language=language)


def _routed(answer: RatedAnswer) -> RoutedPrompt:
    return RoutedPrompt(_prompt(answer), 0, 0, answer.language, ORIGIN_FIXED, 1.0)
