"""The demo's tokenizer: any text survives it, tags are single ids, and no language pays for its script."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_lrpo.config.data import PromptConfig
from nemo_lrpo.data.languages import language_tag
from nemo_lrpo.data.prompts import PromptRenderer
from tools.demo_models.tokenizer import ASSISTANT, EOS, USER, train_tokenizer
from tools.demo_world import LANGUAGES, build_facts


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [text for fact in build_facts() for name in LANGUAGES for text in (fact.question(name), fact.answer(name))]
    return train_tokenizer(texts, LANGUAGES, show_progress=False)


# Special tokens are recognised in text, by design; all of them start with "<".
ORDINARY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"))


@settings(deadline=None)  # the first example trains the tokenizer
@given(ORDINARY)
def test_text_survives(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False)
    assert tokenizer().decode(ids) == text
    assert all(0 <= index < len(tokenizer()) for index in ids)


@pytest.mark.parametrize("token", [EOS, USER, ASSISTANT, *map(language_tag, LANGUAGES)])
def test_a_special_token_is_one_id(token: str) -> None:
    ids = tokenizer().encode(f"a {token} b", add_special_tokens=False)
    assert ids.count(tokenizer().convert_tokens_to_ids(token)) == 1
    assert token not in tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_short_in_every_language(language: str) -> None:
    lengths = [len(tokenizer().encode(fact.answer(language), add_special_tokens=False)) for fact in build_facts()]
    assert sum(lengths) / len(lengths) <= 25


def test_the_template_marks_turns_and_ends_answers() -> None:
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    text = tokenizer().apply_chat_template(chat, tokenize=False)
    assert text == f"{USER}\nQ\n{ASSISTANT}\nA{EOS}\n"
    prompt = tokenizer().apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)


def test_it_is_the_same_after_saving_and_after_training_again(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    tokenizer.cache_clear()
    question = "日本の通貨は何ですか?"
    texts = [PromptRenderer(tok, PromptConfig()).text(question, "vi") for tok in (loaded, tokenizer())]
    assert texts[0] == texts[1] == f"{USER}\n{question}\n{language_tag('vi')}\n{ASSISTANT}\n"
    assert loaded.get_vocab() == tokenizer().get_vocab()
    assert len(loaded) == 4096 and loaded.eos_token == EOS
