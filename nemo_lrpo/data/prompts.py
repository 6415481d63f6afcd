"""A question and a language become the token ids that the policy reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.data import PromptConfig
from nemo_lrpo.data.chat_template import trace
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.halves import PromptHalves, TokenIds
from nemo_lrpo.data.languages import language_tag, system_prompt
from nemo_lrpo.types import Prompt, RoutedPrompt, RoutedRows, TaggedPrompt, TaggedPrompts, pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Question halves that are kept: the 20,000 questions of a large data set, at 128 MB.
_CACHED_TOKENS = 1 << 25
# Prompts tokenised in full that are kept, where the halves do not do.
_CACHED_PROMPTS = 1 << 14
_MEASURED_AT_ONCE = 256
_EXAMPLE = ("What is the currency of Japan?", "en")


@dataclass(frozen=True)
class Prefill:
    """The beginning of the responses that are made to think in a language. text: by language; follows: what the policy
    writes next in such a response."""

    text: Callable[[str], str]
    follows: str


class PromptRenderer:
    """Applies the language request, the chat template and the tokenizer.

    Style `tag`: one user turn, the question, a newline, `<|out_lang_xx|>`. Style `system`: a system turn, "answer in
    X" written in X, then the question as user turn (paper, prompt section).

    A question is tokenised once, a language once (nemo_lrpo/data/halves.py); the ids are those of the chat template
    tokenised in full. Where template or tokenizer do not allow it, the latter is what is done.

    A row with a `thinking` language gets the prefill's text for it behind the template, in the tokens with which the
    policy would begin a response so by itself; ConfigError where the tokenizer allows no such seam.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig, prefill: Prefill | None = None
    ) -> None:
        """Raises ConfigError where there is no chat template, or one that does not carry the language request."""
        self._prefill = prefill
        self._tails: dict[str, TokenIds] = {}
        self._tokenizer = tokenizer
        self._config = config
        self._template = _read_template(config.chat_template) if config.chat_template else None
        self._in_full = lru_cache(maxsize=_CACHED_PROMPTS)(self._encode)
        self.dropped = 0
        """Questions that `fitting` left out so far."""
        self._try_template()
        question, language = _EXAMPLE
        formula = trace(tokenizer, self._template, self._messages, (question, self._request(language)))
        self._halves = PromptHalves(tokenizer, formula, self._request, question, _CACHED_TOKENS)

    def text(self, question: str, language: str) -> str:
        """The prompt as text, up to where the answer starts."""
        return self._tokenizer.apply_chat_template(
            self._messages(question, self._request(language)),
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
        )

    def render(self, routed: RoutedPrompt) -> TaggedPrompt:
        """`routed` with its token ids; see `render_all`."""
        return self.render_all([routed])[0]

    def render_all(self, plan: Sequence[RoutedPrompt]) -> TaggedPrompts:
        """The rows of `plan` with their token ids, in order.

        Raises DataError where one exceeds `max_tokens`, which `fitting` has ruled out for the questions it returned.
        """
        if isinstance(plan, RoutedRows):
            questions, languages = plan.asked()
        else:
            questions, languages = [row.prompt.question for row in plan], [row.language for row in plan]
        joined = self._halves.join(questions, languages)
        for row, ids in enumerate(joined):
            if ids is None:
                joined[row] = pack(self._in_full(questions[row], languages[row]))
        prefilled = self._begin_responses(plan, joined) if self._prefill else None
        tagged, limit = TaggedPrompts(plan, joined, prefilled), self._config.max_tokens
        if max(tagged.sizes, default=0) > limit:
            row, size = next((row, size) for row, size in enumerate(tagged.sizes) if size > limit)
            raise DataError(
                f"question {plan[row].prompt.question_id!r} in {languages[row]!r}: {size} tokens with chat template, "
                f"more than prompt.max_tokens={limit}."
            )
        return tagged

    def tokens_of(self, text: str) -> TokenIds:
        """What an answer of `text` is made of, without special tokens."""
        return self._ids(text)

    def response(self, routed: RoutedPrompt, text: str) -> TokenIds:
        """What a response of `text` to `routed` is made of, without special tokens: its ids where it stands behind the
        prompt, and where `routed` has a `thinking` language those that are prefilled for it come first.

        Raises ConfigError where the tokenizer joins its beginning with what stands around it, so that it has others.
        """
        prompt = self.text(routed.prompt.question, routed.language)
        own, whole = self._ids(prompt), self._ids(prompt + text)
        tail: TokenIds = ()
        if routed.thinking is not None:
            tail = self._tail(routed.thinking)
        if whole[: len(own)] != own or whole[len(own) : len(own) + len(tail)] != tail:
            raise ConfigError(
                f"the tokenizer joins the end of the chat template with the response {text[:40]!r}, or the beginning "
                "of the response with what follows it, so that the policy would write it in other tokens. Give another "
                "prompt.chat_template, or other marks."
            )
        return whole[len(own) :]

    def decoded(self, text: str) -> str:
        """`text` as it comes back when it was an answer of the policy: without special tokens."""
        return self._tokenizer.decode(
            list(self.tokens_of(text)), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def fitting(
        self, prompts: Sequence[Prompt], languages: Sequence[str], thinking: Sequence[str] = ()
    ) -> list[Prompt]:
        """The questions whose prompt has at most `max_tokens` tokens in every language that the router may choose:
        their fixed one, else all `languages`; and prefilled with each of the `thinking` languages.

        Over-long ones raise DataError naming the longest, or are left out and counted, by `prompt.over_long`. Raises
        DataError where nothing is left of a data set.
        """
        limit = self._config.max_tokens
        room = max((len(self._tail(language)) for language in thinking), default=0)
        longest = [tokens + room for tokens in self._longest(prompts, languages)]
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
        longest = [0] * len(prompts)
        choices: dict[tuple[str, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            choices.setdefault((prompt.fixed_language,) if prompt.fixed_language else tuple(languages), []).append(i)
        bar = tqdm(total=len(prompts), desc="measuring prompts", unit="question", delay=2.0, leave=False)
        for choice, rows in choices.items():
            for start in range(0, len(rows), _MEASURED_AT_ONCE):
                chunk = rows[start : start + _MEASURED_AT_ONCE]
                questions = [prompts[i].question for i in chunk]
                for i, question, tokens in zip(chunk, questions, self._halves.longest(questions, choice)):
                    longest[i] = tokens or max(len(self._in_full(question, language)) for language in choice)
                bar.update(len(chunk))
        bar.close()
        return longest

    def _begin_responses(self, plan: Sequence[RoutedPrompt], packed: list[bytes | None]) -> list[str]:
        """Put the prefill's tokens behind the rows that are made to think in a language. Returns its text by row, empty
        for the others."""
        assert self._prefill is not None
        texts = [""] * len(packed)
        for row, routed in enumerate(plan):
            if routed.thinking is not None:
                packed[row] += pack(self._tail(routed.thinking))
                texts[row] = self._prefill.text(routed.thinking)
        return texts

    def _tail(self, language: str) -> TokenIds:
        """The prefill's tokens, as they are at the beginning of a response."""
        if language not in self._tails:
            assert self._prefill is not None
            prompt, text = self.text(*_EXAMPLE), self._prefill.text(language)
            own, whole, longer = (self._ids(prompt + response) for response in ("", text, text + self._prefill.follows))
            if whole[: len(own)] != own or longer[: len(whole)] != whole:
                raise ConfigError(
                    f"a response cannot be made to begin with {text!r}: the tokenizer joins its ends with the chat "
                    "template before it or the thinking block after it, so that the policy would begin it with other "
                    "tokens. Give other marks: mode.marks, in the cold start marks."
                )
            self._tails[language] = whole[len(own) :]
        return self._tails[language]

    def _ids(self, text: str) -> TokenIds:
        # The template writes the special tokens itself.
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode(self, question: str, language: str) -> TokenIds:
        return self._ids(self.text(question, language))

    def _request(self, language: str) -> str:
        return language_tag(language) if self._config.style == "tag" else system_prompt(language)

    def _messages(self, question: str, request: str) -> list[dict[str, str]]:
        if self._config.style == "tag":
            return [{"role": "user", "content": question + "\n" + request}]
        return [{"role": "system", "content": request}, {"role": "user", "content": question}]

    def _try_template(self) -> None:
        from jinja2 import TemplateError

        source = self._config.chat_template or "the tokenizer's chat template"
        if self._template is None and not self._tokenizer.chat_template:
            raise ConfigError(
                "prompt.chat_template is not set, and the model's tokenizer has no chat template; give the path of a "
                "Jinja file that writes messages with roles and content."
            )
        question, language = _EXAMPLE
        try:
            text = self.text(question, language)
        except TemplateError as error:
            raise ConfigError(
                f"prompt.chat_template: {source} fails on prompt.style={self._config.style!r}: {error}. Correct it, "
                "give another one, or try the other style (accepted: tag, system)."
            ) from error
        for part in (question, self._request(language)):
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
