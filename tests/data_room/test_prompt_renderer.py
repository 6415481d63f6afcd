"""What the policy reads: language request, chat template and tokenizer, with a real BPE tokenizer."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
from merging_tokenizer import merging_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.data import PromptConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.languages import SYSTEM_PROMPTS
from nemo_lrpo.data.prompts import Prefill, PromptRenderer
from nemo_lrpo.router import LanguagePlan
from nemo_lrpo.types import ORIGIN_DRAWN, Prompt, RoutedPrompt

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LANGUAGES = ("de", "en", "ja")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, which would put <s> before any text of its own accord; the German tag is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|out_lang_de|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    bpe.train_from_iterator(["What is the currency of Japan? Was ist die Währung von Japan?"] * 4, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )


def prompt(question: str = "Was ist die Währung von Japan?", name: str = "q7", fixed: str | None = None) -> Prompt:
    return Prompt(name, question, "Der Yen.", "de", "de", ("General Knowledge",), fixed_language=fixed)


def routed(question: Prompt, language: str, slot: int = 0) -> RoutedPrompt:
    return RoutedPrompt(question, 12, slot, language, ORIGIN_DRAWN, 0.5)


def test_tag_ends_the_only_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    tagged = PromptRenderer(tokenizer, PromptConfig(style="tag")).render(routed(prompt(), "de", slot=2))
    assert tokenizer.decode(tagged.token_ids) == (
        "<|user|>\nWas ist die Währung von Japan?\n<|out_lang_de|>\n<|assistant|>\n"
    )
    assert tagged.sample_id == "12/q7/2"


def test_token_ids_are_those_of_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """No begin token beside what the template writes, as in Hugging Face's own one-step call."""
    renderer = PromptRenderer(tokenizer, PromptConfig())
    messages = [{"role": "user", "content": "Was ist die Währung von Japan?\n<|out_lang_ja|>"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert renderer.render(routed(prompt(), "ja")).token_ids == tuple(expected)
    assert tokenizer.bos_token_id not in expected


@pytest.mark.parametrize("language", SYSTEM_PROMPTS)
def test_system_style_asks_in_the_language_before_the_question(
    tokenizer: PreTrainedTokenizerFast, language: str
) -> None:
    tagged = PromptRenderer(tokenizer, PromptConfig(style="system")).render(routed(prompt(), language))
    assert tokenizer.decode(tagged.token_ids) == (
        f"<|system|>\n{SYSTEM_PROMPTS[language]}\n<|user|>\nWas ist die Währung von Japan?\n<|assistant|>\n"
    )


def test_system_style_refuses_a_language_without_system_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = PromptRenderer(tokenizer, PromptConfig(style="system"))
    with pytest.raises(ConfigError, match=r"no system prompt in 'sv'; accepted languages: ar, de, .* prompt.style=tag"):
        renderer.fitting([prompt()], ("de", "sv"))


def test_rows_come_in_plan_order_and_equal_prompts_have_equal_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = PromptRenderer(tokenizer, PromptConfig())
    plan = [routed(prompt(), language, slot) for slot, language in enumerate("de de ja de".split())]
    tagged = renderer.render_all(plan)
    assert [row.routed for row in tagged] == plan
    assert tagged[0].token_ids == tagged[1].token_ids == tagged[3].token_ids != tagged[2].token_ids
    assert [renderer.render(row) for row in plan] == list(tagged) == tagged[:] == [tagged[i] for i in range(-4, 0)]
    columns = renderer.render_all(LanguagePlan.of(plan, LANGUAGES))
    assert list(columns) == list(tagged) and len(columns) == 4 and columns[-1] == tagged[-1]
    tight = PromptRenderer(tokenizer, PromptConfig(max_tokens=len(tagged[2].token_ids) - 1))
    with pytest.raises(DataError, match="question 'q7' in 'ja'"):
        tight.render_all(LanguagePlan.of(plan, LANGUAGES))


def lengths(tokenizer: PreTrainedTokenizerFast, question: Prompt) -> dict[str, int]:
    renderer = PromptRenderer(tokenizer, PromptConfig())
    return {language: len(renderer.render(routed(question, language)).token_ids) for language in LANGUAGES}


def test_over_long_counts_the_tag_of_every_candidate(tokenizer: PreTrainedTokenizerFast) -> None:
    """German's tag is one token, the others' are many: a question may fit in one language and not in another."""
    size = lengths(tokenizer, prompt())
    assert size["de"] < size["ja"]
    exact = PromptRenderer(tokenizer, PromptConfig(max_tokens=max(size.values())))
    assert exact.fitting([prompt()], LANGUAGES) == [prompt()]
    tight = PromptRenderer(tokenizer, PromptConfig(max_tokens=size["de"]))
    assert tight.fitting([prompt()], ("de",)) == [prompt()]
    assert tight.fitting([prompt(fixed="de")], LANGUAGES) == [prompt(fixed="de")]
    with pytest.raises(DataError, match="1 of 1 questions are longer"):
        tight.fitting([prompt()], LANGUAGES)
    with pytest.raises(DataError, match=r"question 'q7' in 'ja': \d+ tokens"):
        tight.render(routed(prompt(), "ja"))


def test_over_long_is_rejected_or_dropped_by_configuration(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    # More than one measured batch, with the long ones in different batches.
    questions = [prompt("Was?" if i not in (3, 290) else "Warum? " * (i + 50), f"q{i}") for i in range(300)]
    with pytest.raises(DataError) as refused:
        PromptRenderer(tokenizer, PromptConfig(max_tokens=64, over_long="reject")).fitting(questions, LANGUAGES)
    assert "2 of 300 questions are longer than prompt.max_tokens=64" in str(refused.value)
    assert "the longest: 'q290' (" in str(refused.value) and "prompt.over_long=drop" in str(refused.value)

    renderer = PromptRenderer(tokenizer, PromptConfig(max_tokens=64, over_long="drop"))
    with caplog.at_level(logging.WARNING):
        kept = renderer.fitting(questions, LANGUAGES)
    assert [q.question_id for q in kept] == [f"q{i}" for i in range(300) if i not in (3, 290)]
    assert renderer.dropped == 2
    assert "2 of 300 questions" in caplog.text
    with pytest.raises(DataError, match="leaves no question"):
        renderer.fitting([questions[3]], LANGUAGES)


def without_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>")


def test_chat_template_from_a_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bare = without_template(tokenizer)
    with pytest.raises(ConfigError, match=r"prompt\.chat_template is not set, and .* has no chat template; give"):
        PromptRenderer(bare, PromptConfig())
    path = tmp_path / "plain.jinja"
    path.write_text("{% for message in messages %}{{ message['content'] }} => {% endfor %}\n")
    for either in (bare, tokenizer):
        tagged = PromptRenderer(either, PromptConfig(chat_template=str(path))).render(routed(prompt("Was?"), "de"))
        assert either.decode(tagged.token_ids) == "Was?\n<|out_lang_de|> => "


@pytest.mark.parametrize(
    ("template", "style", "message"),
    [
        ("{% for message in messages %}", "tag", "fails on prompt.style='tag'"),
        ("{{ raise_exception('no system role') }}", "system", "fails on prompt.style='system': no system role"),
        ("{{ messages[-1]['content'] }}", "system", "leaves out 'Answer in English.' with prompt.style='system'"),
        ("{{ messages[0]['content'].split('\\n')[0] }}", "tag", "leaves out '<|out_lang_en|>'"),
        ("{{ messages[0]['content'] }}", "system", "leaves out 'What is the currency of Japan?'"),
    ],
)
def test_a_template_that_loses_the_request_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, template: str, style: str, message: str
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    with pytest.raises(ConfigError) as refused:
        PromptRenderer(tokenizer, PromptConfig(style=style, chat_template=str(path)))
    assert str(path) in str(refused.value) and message in str(refused.value)


def test_template_that_is_not_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        PromptRenderer(tokenizer, PromptConfig(chat_template=str(path)))


PREFILL = Prefill(lambda language: f"<lang>{language}</lang>\n", "<think>")


def thinking(question: Prompt, language: str | None) -> RoutedPrompt:
    return dataclasses.replace(routed(question, "de"), thinking=language)


def test_a_forced_language_begins_the_response_in_the_policys_own_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = PromptRenderer(tokenizer, PromptConfig(), PREFILL)
    free, forced = renderer.render_all([thinking(prompt(), None), thinking(prompt(), "ja")])
    assert free.prefilled == "" and forced.prefilled == "<lang>ja</lang>\n"
    assert forced.token_ids[: len(free.token_ids)] == free.token_ids
    written = tokenizer("<lang>ja</lang>\n<think>\nまず", add_special_tokens=False)["input_ids"]
    tail = forced.token_ids[len(free.token_ids) :]
    assert tuple(written[: len(tail)]) == tail and tokenizer.decode(tail) == forced.prefilled
    assert renderer.decoded("<lang>ja</lang>") == "<lang>ja</lang>" and renderer.decoded("a</s>b") == "ab"


def test_room_is_left_for_what_is_prefilled(tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(PromptRenderer(tokenizer, PromptConfig()).render(routed(prompt(), "de")).token_ids)
    tail = len(tokenizer("<lang>ja</lang>\n", add_special_tokens=False)["input_ids"])
    for room, fits in ((tail, True), (tail - 1, False)):
        renderer = PromptRenderer(tokenizer, PromptConfig(max_tokens=size + room), PREFILL)
        question = prompt(fixed="de")
        assert renderer.fitting([question], LANGUAGES) == [question]
        if fits:
            assert renderer.fitting([question], LANGUAGES, ["ja", "en"]) == [question]
            renderer.render(thinking(question, "ja"))
        else:
            with pytest.raises(DataError, match="prompt.max_tokens"):
                renderer.fitting([question], LANGUAGES, ["ja"])


@pytest.mark.parametrize(("text", "holds"), [("<a>{}</a>\n", True), ("<a>{}</a>", False)])
def test_a_prefill_that_joins_what_follows_is_refused(text: str, holds: bool) -> None:
    tokenizer = merging_tokenizer(["<a>x</a>\n<b>\ny"], TEMPLATE)
    renderer = PromptRenderer(tokenizer, PromptConfig(), Prefill(text.format, "\n<b>" if not holds else "<b>"))
    if holds:
        assert renderer.render(thinking(prompt(), "de")).prefilled == "<a>de</a>\n"
    else:
        with pytest.raises(ConfigError, match=r"cannot be made to begin with '<a>de</a>'.*mode\.marks"):
            renderer.render(thinking(prompt(), "de"))
