"""Prompts put together from halves: the ids of full tokenisation, whatever tokenizer, template, language and text."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_lrpo.config.data import PromptConfig
from nemo_lrpo.data.chat_template import QUESTION, REQUEST, Formula, fill, trace
from nemo_lrpo.data.halves import PromptHalves, TokenStore
from nemo_lrpo.data.languages import SYSTEM_PROMPTS, language_tag
from nemo_lrpo.data.prompts import PromptRenderer
from nemo_lrpo.types import ORIGIN_DRAWN, Prompt, RoutedPrompt
from tools.demo_models.tokenizer import train_tokenizer

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_WORDS = QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
CHATML = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""As Qwen 2.5 writes a chat."""
CHATML_THAT_LOOKS = CHATML.replace(
    "{%- if message.role == 'user'",
    "{%- if message.content is string and message.content.startswith('<tool>') and "
    "message.content.endswith('</tool>') %}{{- '<|im_start|>tool\\n' + message.content[6:] }}"
    "{%- elif message.role == 'user'",
)
"""As Qwen 3: another path for tool responses."""
HEADERS = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
"""As Llama 3: the content is trimmed."""
BRACKETS = (
    "{%- for message in messages %}{%- if message.role == 'system' %}{{- '<<SYS>>' ~ message.content ~ '<</SYS>> ' }}"
    "{%- else %}{{- '[INST] ' ~ message.content ~ ' [/INST]' }}{%- endif %}{%- endfor %}"
)
"""As Llama 2: nothing special between request and answer."""
LABELS = "{%- for message in messages %}{{- 'Q: ' + message.content | trim }}{%- endfor %}"
"""Without a question, what follows a label joins it."""
TEMPLATES = {"chatml": CHATML, "looks": CHATML_THAT_LOOKS, "headers": HEADERS, "brackets": BRACKETS, "labels": LABELS}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>"]
LANGUAGES = ("de", "en", "ja", "zh")
TEXTS = [
    "What is the currency of Japan?\nWas ist die Währung von Japan?  \n\n<|out_lang_de|> 日本の通貨は何ですか?",
    " <|a <|b <|c <|d\n<|out_lang_en|>\n<|out_lang_zh|> 12345 'll don't \r\n<|im <tool>x</tool> ## The end.\n<|o ?\n<|",
] * 4


def byte_level(
    words: str | None = QWEN_WORDS, normalizer: normalizers.Normalizer | None = None, prefix_space: bool = False
) -> Tokenizer:
    """Byte-level BPE; `words` None: those of GPT-2."""
    backend = Tokenizer(models.BPE())
    if normalizer:
        backend.normalizer = normalizer
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=words is None)
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), as_bytes]) if words else as_bytes
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def merged_behind_a_space() -> Tokenizer:
    """ "<|" is one token, and another one with the space before it; "<" behind a space is not."""
    backend = byte_level()
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|", "Ġ<|"])}
    backend.model = models.BPE(vocabulary, [("<", "|"), ("Ġ", "<|")])
    backend.add_special_tokens(SPECIAL)
    return backend


def metaspace(scheme: str, model: str = "bpe") -> Tokenizer:
    """As SentencePiece: words begin at spaces, and a line feed is a character like others."""
    backend = Tokenizer(models.BPE(unk_token="<s>", fuse_unk=True) if model == "bpe" else models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=model == "unigram")
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if model == "bpe":
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    else:
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<s>", show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def wordpiece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<s>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    return backend


def with_tokens(backend: Tokenizer, *tokens: AddedToken) -> Tokenizer:
    """`tokens` added as they are."""
    for token in tokens:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return backend


def tags(**how: bool) -> list[AddedToken]:
    return [
        AddedToken(language_tag(language), **{"special": True, "normalized": False, **how}) for language in LANGUAGES
    ]


@cache
def demo() -> Tokenizer:
    return train_tokenizer(TEXTS, LANGUAGES, vocabulary=500, show_progress=False).backend_tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "qwen": lambda: byte_level(normalizer=normalizers.NFC()),
    "qwen, tags added": lambda: with_tokens(byte_level(normalizer=normalizers.NFC()), *tags()),
    "llama": lambda: byte_level(LLAMA_WORDS),
    "llama, a tag added": lambda: with_tokens(byte_level(LLAMA_WORDS), tags()[0]),
    "gpt-2": lambda: byte_level(None),
    "demo": demo,
    "merged behind a space": merged_behind_a_space,
    "prefix space": lambda: byte_level(None, prefix_space=True),
    "unknown words": lambda: byte_level(QWEN_WORDS + r"|\n<\|o"),
    "NFKC": lambda: byte_level(normalizer=normalizers.NFKC()),
    "lower case": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "metaspace": lambda: metaspace("first"),
    "metaspace, tags added": lambda: with_tokens(metaspace("first"), *tags()),
    "metaspace always, tags added": lambda: with_tokens(metaspace("always"), *tags()),
    "unigram, tags added": lambda: with_tokens(metaspace("always", "unigram"), *tags()),
    "wordpiece": wordpiece,
    "wordpiece, tags added": lambda: with_tokens(wordpiece(), *tags()),
    "tags as words": lambda: with_tokens(byte_level(), *tags(special=False, normalized=True)),
    "tags as normalised words": lambda: with_tokens(wordpiece(), *tags(special=False, normalized=True)),
    "tags that take space": lambda: with_tokens(byte_level(), *tags(lstrip=True)),
    "tags that take space behind": lambda: with_tokens(byte_level(), *tags(rstrip=True)),
    "tags alone": lambda: with_tokens(byte_level(), *tags(single_word=True)),
    "overlapped": lambda: with_tokens(byte_level(), *tags(), AddedToken("!\n<|", special=True, normalized=False)),
    "overlapped at the end": lambda: with_tokens(byte_level(), AddedToken("!\n<", special=True, normalized=False)),
    "overlapped words": lambda: with_tokens(
        byte_level(), *tags(special=False, normalized=True), AddedToken("|>", special=True, normalized=False)
    ),
    "ends that take space": lambda: with_tokens(
        byte_level(LLAMA_WORDS), AddedToken("<|eot", special=True, normalized=False, lstrip=True, rstrip=True)
    ),
}


@cache
def backend(name: str) -> Tokenizer:
    return TOKENIZERS[name]()


def wrapped(backend: Tokenizer, template: str = CHATML) -> PreTrainedTokenizerFast:
    # transformers sets it, to false unless told otherwise.
    prefix_space = json.loads(backend.to_str())["pre_tokenizer"].get("add_prefix_space", False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|eot_id|>",
        chat_template=template,
        add_prefix_space=prefix_space,
    )


@cache
def renderer(name: str, template: str, style: str) -> PromptRenderer:
    return PromptRenderer(wrapped(backend(name), TEMPLATES[template]), PromptConfig(style=style, max_tokens=10**6))


FRAGMENTS = [
    *(*SPECIAL, *map(language_tag, LANGUAGES), *" \n\t<|?>…日＜ﬀ\u0338\u3000\u00a0\x85\x00", "\r\n", "\n\n", " \n "),
    *"! ?\n <|o <|im <tool> </tool> don't 123 e\u0301".split(" "),
]
PIECES = st.one_of(st.text(max_size=12), st.sampled_from(FRAGMENTS))
QUESTIONS = st.lists(PIECES, max_size=8).map("".join)


def in_full(model: PreTrainedTokenizerFast, style: str, question: str, language: str) -> tuple[int, ...]:
    """The chat template written and tokenised by the tokenizer's own calls."""
    if style == "tag":
        chat = [{"role": "user", "content": f"{question}\n{language_tag(language)}"}]
    else:
        chat = [{"role": "system", "content": SYSTEM_PROMPTS[language]}, {"role": "user", "content": question}]
    text = model.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tuple(model(text, add_special_tokens=False)["input_ids"])


def asked(question: str, language: str = "de") -> RoutedPrompt:
    prompt = Prompt("q", question, "", language, language, ("Chat",))
    return RoutedPrompt(prompt, 0, 0, language, ORIGIN_DRAWN, 1.0)


@pytest.mark.parametrize("style", ["tag", "system"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_full_tokenisation(name: str, template: str, style: str) -> None:
    made, model = renderer(name, template, style), wrapped(backend(name), TEMPLATES[template])

    @settings(max_examples=12, deadline=None)
    @example(
        ["", " ", "\n", "Go!", "What?\n\n", "<tool>x</tool>", "<tool>x", "?\n", "e\u0301 \u0338", "<|out_lang_de|>"]
    )
    @example(["a  ", "a \n ", "<|im_end|>", "<|im_end|> ", "<|eot_id|>\n", "<|eot", "<|eot ", "\u3000", "n't", "12"])
    @given(st.lists(QUESTIONS, max_size=3))
    def holds(questions: list[str]) -> None:
        rows = [asked(question, language) for question in questions for language in LANGUAGES]
        for row in made.render_all(rows):
            question, language = row.routed.prompt.question, row.routed.language
            assert row.token_ids == in_full(model, style, question, language), (question, language)

    holds()


TAG, LINE_END, IN_FULL = "", "<", None
SEAMS = {
    "qwen": {LINE_END},
    "qwen, tags added": {TAG},
    "llama": {LINE_END},
    "llama, a tag added": {TAG, LINE_END},
    "gpt-2": {LINE_END},
    "demo": {TAG},
    "metaspace, tags added": {TAG},
    "metaspace always, tags added": {TAG},
    "unigram, tags added": {TAG},
    "wordpiece, tags added": {TAG},
    "tags as words": {TAG},
    "tags that take space behind": {TAG},
    "merged behind a space": {LINE_END},
    "ends that take space": {LINE_END},
}
"""Where the halves of style `tag` meet; with the other tokenizers prompts are tokenised in full."""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_halves_are_used_where_they_are_sure_and_nowhere_else(name: str) -> None:
    halves = [renderer(name, "chatml", "tag")._halves.language(language) for language in LANGUAGES]
    assert {half and half.before for half in halves} == SEAMS.get(name, {IN_FULL})


def test_the_system_style_needs_a_special_token_between_request_and_question() -> None:
    def halves(template: str) -> PromptHalves:
        return renderer("qwen", template, "system")._halves

    assert all(halves(template).language("ja") is not None for template in ("chatml", "headers"))
    assert halves("brackets").language("ja") is None


class Meddling(PreTrainedTokenizerFast):
    """A tokenizer that is more than its backend."""

    def _batch_encode_plus(self, texts: list[str], *arguments: object, **named: object) -> object:
        return super()._batch_encode_plus([text.replace("What", "Whom") for text in texts], *arguments, **named)


def test_a_tokenizer_that_is_more_than_its_backend_is_noticed() -> None:
    for name in ("qwen", "qwen, tags added"):
        model = Meddling(tokenizer_object=backend(name), chat_template=CHATML)
        made = PromptRenderer(model, PromptConfig())
        assert made._halves.language("de") is None
        assert made.render(asked("What?")).token_ids == in_full(model, "tag", "Whom?", "de")


class Counted:
    """A tokenizer backend that notes what is tokenised."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def encode_batch_fast(self, texts: list[str], **how: bool) -> object:
        self.texts += texts
        return self._backend.encode_batch_fast(texts, **how)


def counted(name: str, **config: object) -> tuple[PromptRenderer, Counted]:
    made = PromptRenderer(wrapped(backend(name)), PromptConfig(**config))
    made._halves._backend = Counted(made._halves._backend)
    for language in LANGUAGES:
        made._halves.language(language)
    made._halves._backend.texts.clear()
    return made, made._halves._backend


def test_a_question_is_tokenised_once_for_all_languages_and_steps() -> None:
    made, count = counted("qwen")
    prompts = [asked(f"What is {i}?").prompt for i in range(300)]
    assert made.fitting(prompts, LANGUAGES) == prompts
    assert len(count.texts) == 300
    for step in range(2):
        made.render_all([RoutedPrompt(p, step, 0, language, "drawn", 0.5) for p in prompts for language in LANGUAGES])
    assert len(count.texts) == 300


def test_the_longest_prompt_is_found_without_writing_it() -> None:
    for name in ("llama, a tag added", "metaspace"):
        made = renderer(name, "chatml", "tag")
        prompts = [asked("Was?" * (i + 1)).prompt for i in range(5)]
        lengths = [max(len(made.render(asked(p.question, one)).token_ids) for one in LANGUAGES) for p in prompts]
        assert made._longest(prompts, LANGUAGES) == lengths


def test_the_longest_prompt_where_the_template_goes_another_way() -> None:
    made = renderer("qwen", "looks", "system")
    model = wrapped(backend("qwen"), CHATML_THAT_LOOKS)
    prompts = [asked(text).prompt for text in ("<tool>x</tool>", "What?")]
    expected = [max(len(in_full(model, "system", p.question, language)) for language in LANGUAGES) for p in prompts]
    assert made._longest(prompts, LANGUAGES) == expected


def test_the_store_forgets_the_oldest() -> None:
    store = TokenStore(bound=3 * (64 + 10))
    for name in "abcd":
        store.put(name, "", np.arange(10, dtype=np.int32))
    assert store.get("a", "") is None and all(store.get(name, "") is not None for name in "bcd")
    assert store.get("b", "<") is None


def test_more_questions_at_once_than_the_store_holds() -> None:
    made, count = counted("qwen")
    made._halves._questions = TokenStore(bound=100)
    rows = [asked(f"What is {i}?", language) for i in range(20) for language in LANGUAGES]
    for row in made.render_all(rows):
        question, language = row.routed.prompt.question, row.routed.language
        assert row.token_ids == in_full(wrapped(backend("qwen")), "tag", question, language)
    assert len(count.texts) == 20


# --- templates as formulas ----------------------------------------------------------------------------------------


def traced(template: str) -> Formula | None:
    return trace(
        wrapped(backend("qwen")),
        template,
        lambda question, request: [{"role": "user", "content": question + "\n" + request}],
        ("What is x?", "<|de|>"),
    )


def written(template: str, question: str, request: str) -> str:
    chat = [{"role": "user", "content": f"{question}\n{request}"}]
    return wrapped(backend("qwen"), template).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


CONTENT = "messages[0].content"
FORMULAS = {
    "joined": "{{ bos_token ~ messages[0].role + ': ' ~ messages[0].content ~ 1 }}!",
    "trimmed": "[{{ ('  ' + messages[0].content + ' . ') | trim }}] {{ messages[0]['content'].lstrip() }}",
    "macro": "{% macro turn(text) %}<{{ text }}>{% endmacro %}{{ turn(messages[0].content) | trim }}",
    "caller": "{% macro turn() %}({{ caller() }}){% endmacro %}{% call turn() %}{{ messages[0].content }}{% endcall %}",
    "block": "{% set text %} {{ messages[0].content }} {% endset %}{{ text.strip() }}",
    "namespace": "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.content %}{% endfor %}"
    "{{ ns.x }}",
    "generation": "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "roles": "{{ (messages | selectattr('role', 'equalto', 'user') | list | first).content }}",
    "starts": f"{{{{ 'tool' if {CONTENT}.startswith('<tool>') else {CONTENT} }}}}",
    "contains": f"{{% if '\n\n' in {CONTENT} %}}long {{% endif %}}{{{{ {CONTENT} }}}}",
    "length": f"{{{{ {CONTENT} if {CONTENT} | length < 20 else 'too long' }}}}",
    "empty": f"{{% if {CONTENT} %}}{{{{ {CONTENT} }}}}{{% endif %}}",
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_writes_what_the_template_writes_wherever_it_holds(name: str) -> None:
    formula = traced(FORMULAS[name])
    assert formula is not None

    @settings(max_examples=30, deadline=None)
    @given(QUESTIONS, st.sampled_from(["<|de|>", "Antworte."]))
    def same(question: str, request: str) -> None:
        values = {QUESTION: question, REQUEST: request}
        if formula.holds(values):
            assert fill(formula.parts, values) == written(FORMULAS[name], question, request)

    same()
    assert formula.holds({QUESTION: "What is y?", REQUEST: "<|de|>"})


@pytest.mark.parametrize(
    ("name", "question"), [("starts", "<tool>x"), ("contains", "a\n\nb"), ("length", "Why is this longer than that?")]
)
def test_a_formula_does_not_hold_where_the_template_goes_another_way(name: str, question: str) -> None:
    formula = traced(FORMULAS[name])
    values = {QUESTION: question, REQUEST: "<|de|>"}
    assert not formula.holds(values)
    assert fill(formula.parts, values) != written(FORMULAS[name], question, "<|de|>")


@pytest.mark.parametrize(
    "expression",
    [
        f"{CONTENT}[:5]",
        f"{CONTENT}.split('\n')[0]",
        f"{CONTENT} | upper",
        f"{CONTENT} | replace('a', 'b')",
        f"{CONTENT} | tojson",
        "messages | tojson",
        f"{CONTENT} | safe",
        f"{CONTENT} | int",
        f"{CONTENT}.strip('.')",
        f"'%s' % {CONTENT}",
        f"'%s' % ({CONTENT},)",
        f"'{{}}'.format({CONTENT})",
        f"','.join([{CONTENT}])",
        "messages | map(attribute='content') | join",
        f"{{'a': 1}}[{CONTENT}]",
        f"{CONTENT} in {{'a': 1}}",
        f"{CONTENT} * 2",
        f"{CONTENT}.encode()",
        f"{CONTENT} | list | first",
        f"{CONTENT} == messages[0].content + 'x'",
        f"'yes' if 'zebra' in ','.join([{CONTENT}]) else 'no'",
        f"'yes' if 'zebra' in ([{CONTENT}] | join) else 'no'",
        f"'yes' if ({CONTENT} | tojson) == '' else 'no'",
    ],
)
def test_what_a_formula_cannot_say_has_none(expression: str) -> None:
    assert traced(f"{{{{ {expression} }}}}") is None


def test_a_template_without_formula_is_written_for_every_prompt() -> None:
    model = wrapped(backend("qwen, tags added"), "{{ messages[0].content | replace('banana', 'plum') }}")
    made = PromptRenderer(model, PromptConfig())
    assert made._halves.language("de") is None
    assert made.render(asked("One banana")).token_ids == tuple(model("One plum\n<|out_lang_de|>")["input_ids"])


def test_requests_stop_trimming() -> None:
    """What `chat_template.REQUEST` promises."""
    assert all(text and text == text.strip() for text in SYSTEM_PROMPTS.values())
    formula = trace(
        wrapped(backend("qwen")),
        HEADERS,
        lambda question, request: [{"role": "user", "content": question + "\n" + request}],
        ("What is x?", "<|de|>"),
    )
    halves = PromptHalves(wrapped(backend("qwen")), formula, lambda language: f"<|{language}|> ", "What?", 100)
    assert halves.language("de") is None
