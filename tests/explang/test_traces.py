"""Traces as token ids, with a tokenizer in which the tag's end and the line's end are one token."""

from __future__ import annotations

import logging

import pytest
from merging_tokenizer import merging_tokenizer
from transformers import PreTrainedTokenizerFast

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.data import PromptConfig
from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.config.supervised import TraceDataConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.prompts import PromptRenderer
from nemo_lrpo.explang.format import prefill, render
from nemo_lrpo.explang.traces import Trace, examples_of
from nemo_lrpo.types import ORIGIN_FIXED, Example, Prompt, RoutedPrompt

MARKS = MarksConfig()
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def trace(language: str, thinking: str = "Zwei.") -> Trace:
    return Trace(f"q-{language}", "How much?", "en", language, render(language, thinking, "2", MARKS))


TRACES = [trace("de"), trace("ja", "Zwei. " * 40)]
TOKENIZER = merging_tokenizer([*(one.response for one in TRACES), "|><"], TEMPLATE)


def examples(template: str = TEMPLATE, **config: object) -> list[Example]:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="</s>", chat_template=template
    )
    renderer = PromptRenderer(tokenizer, PromptConfig(), prefill(MARKS))
    return examples_of(TRACES, tokenizer, renderer, TraceDataConfig(**config))


def test_a_trace_begins_with_the_tokens_that_are_prefilled() -> None:
    """They are others than those of the tag and of the rest, tokenised apart."""
    renderer = PromptRenderer(TOKENIZER, PromptConfig(), prefill(MARKS))
    for one, example in zip(TRACES, examples(), strict=True):
        prompt = Prompt(one.question_id, one.question, "", "en", "en", ())
        routed = RoutedPrompt(prompt, -1, 0, "en", ORIGIN_FIXED, 1.0, thinking=one.language)
        forced = renderer.render(routed).token_ids
        whole = example.prompt + example.response
        assert whole[: len(forced)] == forced and len(forced) > len(example.prompt)
        assert TOKENIZER.decode(whole) == renderer.text(one.question, "en") + one.response + "</s>"
        tag, line_end = one.response.partition("\n")[0], "\n"
        assert forced[len(example.prompt) :] != renderer.tokens_of(tag) + renderer.tokens_of(line_end)


def test_a_template_whose_end_joins_the_tag_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be made to begin with .*, in the cold start marks"):
        examples(template=TEMPLATE.replace("<|assistant|>\n", "<|assistant|>"))


def test_over_long_traces_are_rejected_by_name_or_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    short, long = (len(one.prompt) + len(one.response) for one in examples())
    assert examples(max_tokens=long) == examples()
    with pytest.raises(DataError, match=f"trace 'q-ja' in 'ja' has {long} tokens.*data.max_tokens={long - 1}.*=drop"):
        examples(max_tokens=long - 1)
    with caplog.at_level(logging.WARNING):
        (kept,) = examples(max_tokens=short, over_long="drop")
    assert kept == examples()[0] and kept.response[-1] == TOKENIZER.eos_token_id
    assert "1 of 2 traces are too long" in caplog.text
