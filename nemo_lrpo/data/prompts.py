"""A question and a language become the token ids that the policy reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.data import PromptConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.languages import language_tag, system_prompt
from nemo_lrpo.types import Prompt, RoutedPrompt, TaggedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Several steps' worth; without a bound, all questions in all languages would stay in memory.
_CACHED_PROMPTS = 1 << 14
_MEASURED_AT_ONCE = 256


class PromptRenderer:
    """Applies the language request, the chat template and the tokenizer.

    Style `tag`: one user turn, the question, a newline, `<|out_lang_xx|>`. Style `system`: a system turn, "answer in
    X" written in X, then the question as user turn (paper, prompt section).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        """Raises ConfigError where there is no chat template, or one that does not carry the language request."""
        self._tokenizer = tokenizer
        self._config = config
        self._template = _read_template(config.chat_template) if config.chat_template else None
        self._token_ids = lru_cache(maxsize=_CACHED_PROMPTS)(self._encode)
        self.dropped = 0
        """Questions that `fitting` left out so far."""
        self._try_template()

    def text(self, question: str, language: str) -> str:
        """The prompt as text, up to where the answer starts."""
        if self._config.style == "tag":
            messages = [{"role": "user", "content": f"{question}\n{language_tag(language)}"}]
        else:
            messages = [
                {"role": "system", "content": system_prompt(language)},
                {"role": "user", "content": question},
            ]
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )

    def render(self, routed: RoutedPrompt) -> TaggedPrompt:
        """`routed` with its token ids; equal (question, language) pairs are tokenised once.

        Raises DataError where they exceed `max_tokens`, which `fitting` has ruled out for the questions it returned.
        """
        token_ids = self._token_ids(routed.prompt.question, routed.language)
        if len(token_ids) > self._config.max_tokens:
            raise DataError(
                f"question {routed.prompt.question_id!r} in {routed.language!r}: {len(token_ids)} tokens with chat "
                f"template, more than prompt.max_tokens={self._config.max_tokens}."
            )
        return TaggedPrompt(routed, token_ids)

    def fitting(self, prompts: Sequence[Prompt], languages: Sequence[str]) -> list[Prompt]:
        """The questions whose prompt has at most `max_tokens` tokens in every language that the router may choose:
        their fixed one, else all `languages`.

        Over-long ones raise DataError naming the longest, or are left out and counted, by `prompt.over_long`. Raises
        DataError where nothing is left of a data set.
        """
        limit = self._config.max_tokens
        longest = self._longest(prompts, languages)
        over = sorted((i for i in range(len(prompts)) if longest[i] > limit), key=lambda i: -longest[i])
        if not over:
            return list(prompts)
        first = ", ".join(f"{prompts[i].question_id!r} ({longest[i]} tokens)" for i in over[:5])
        message = (
            f"{len(over)} of {len(prompts)} questions are longer than prompt.max_tokens={limit} in at least one of "
            f"their languages, chat template included; the longest: {first}."
        )
        if self._config.over_long == "reject":
            raise DataError(f"{message} Raise prompt.max_tokens, or leave them out with prompt.over_long=drop.")
        if len(over) == len(prompts):
            raise DataError(f"{message} prompt.over_long=drop leaves no question; raise prompt.max_tokens.")
        self.dropped += len(over)
        _log.warning("%s They are left out (prompt.over_long=drop).", message)
        dropped = set(over)
        return [prompt for i, prompt in enumerate(prompts) if i not in dropped]

    def _longest(self, prompts: Sequence[Prompt], languages: Sequence[str]) -> list[int]:
        """Tokens of each question in the language that makes it longest."""
        longest = []
        bar = tqdm(total=len(prompts), desc="measuring prompts", unit="question", delay=2.0, leave=False)
        for start in range(0, len(prompts), _MEASURED_AT_ONCE):
            chunk = prompts[start : start + _MEASURED_AT_ONCE]
            choices = [(p.fixed_language,) if p.fixed_language else tuple(languages) for p in chunk]
            texts = [self.text(p.question, language) for p, choice in zip(chunk, choices) for language in choice]
            lengths = iter(len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"])
            longest += [max(next(lengths) for _ in choice) for choice in choices]
            bar.update(len(chunk))
        bar.close()
        return longest

    def _encode(self, question: str, language: str) -> tuple[int, ...]:
        # The template writes the special tokens itself.
        return tuple(self._tokenizer(self.text(question, language), add_special_tokens=False)["input_ids"])

    def _try_template(self) -> None:
        from jinja2 import TemplateError

        source = self._config.chat_template or "the tokenizer's chat template"
        if self._template is None and not self._tokenizer.chat_template:
            raise ConfigError(
                "prompt.chat_template is not set, and the model's tokenizer has no chat template; give the path of a "
                "Jinja file that writes messages with roles and content."
            )
        question, language = "What is the currency of Japan?", "en"
        try:
            text = self.text(question, language)
        except TemplateError as error:
            raise ConfigError(
                f"prompt.chat_template: {source} fails on prompt.style={self._config.style!r}: {error}. Correct it, "
                "give another one, or try the other style (accepted: tag, system)."
            ) from error
        request = language_tag(language) if self._config.style == "tag" else system_prompt(language)
        for part in (question, request):
            if part not in text:
                raise ConfigError(
                    f"prompt.chat_template: {source} leaves out {part!r} with prompt.style={self._config.style!r}; "
                    "give a template that writes every message, or try the other style (accepted: tag, system)."
                )


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt.chat_template={path!r} cannot be read as UTF-8 text: {error}.") from error
