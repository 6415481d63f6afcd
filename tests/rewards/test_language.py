"""The real lid.176 on real text and on what is no text at all."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import LanguageIdConfig, ScorerConfig
from nemo_lrpo.rewards.language import LanguageIdentifier, bundled_lid_path, count_letters, prose

LANGUAGES = ScorerConfig().languages
SENTENCES = {
    "ar": "عملة اليابان هي الين، وعاصمتها طوكيو.",
    "de": "Die Währung von Japan ist der Yen.",
    "en": "Japan uses the yen as its currency, and its capital is Tokyo.",
    "es": "La moneda de Japón es el yen.",
    "fr": "La monnaie du Japon est le yen.",
    "id": "Mata uang Jepang adalah yen.",
    "it": "La valuta del Giappone è lo yen.",
    "ja": "日本の通貨は円です。",
    "ko": "일본의 통화는 엔이다.",
    "nl": "De officiële munteenheid van het land is al lang de yen.",
    "pl": "Walutą Japonii jest jen.",
    "pt": "A moeda do Japão é o iene.",
    "ru": "Валюта Японии — иена, столица страны — Токио.",
    "vi": "Tiền tệ của Nhật Bản là yên.",
    "zh": "这个国家使用的货币是日元，首都是东京。",
}


@pytest.fixture(scope="module")
def identifier() -> LanguageIdentifier:
    return LanguageIdentifier(LanguageIdConfig(), LANGUAGES)


def test_every_language_of_the_default_is_recognised_in_one_batch(identifier: LanguageIdentifier) -> None:
    found = identifier.identify(list(SENTENCES.values()))
    assert [f.language for f in found] == list(SENTENCES)
    assert all(0.5 <= f.confidence <= 1.0 for f in found)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t ",
        "\x00",
        "\ud800",
        "12345",
        "٣٤٥ 12.5 %",
        "?!…",
        "да",
        "Euro",
        "Montag.",
        "東京",
        "```python\nprint('hello world, how are you')\n```",
        "```\nDie Währung von Japan ist der Yen.",
        "def f(x):\n    return x + 1",
        "import numpy as np",
        "for i in range(10): print(i)",
        "const total = items.map(item => item.price);",
        "SELECT name FROM users WHERE id = 1",
        "https://example.com/die/waehrung/von/japan",
        "$\\frac{a}{b} = \\sqrt{c}$",
        "\\begin{align} total &= price \\\\ \\end{align}",
    ],
)
def test_abstains_where_there_is_nothing_to_judge(identifier: LanguageIdentifier, text: str) -> None:
    assert identifier.identify([text])[0].language is None


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Hallo,\nwie geht es dir heute,\r\nmein lieber Freund?", "de"),
        (
            "Die Antwort ist einfach:\n```python\nfor key in the_dictionary:\n    print(key)\n```\nDas war es schon.",
            "de",
        ),
        ("La respuesta correcta es $x = 42$, sin ninguna duda.", "es"),
        ("It costs $5 here and that one there is only $10 or more.", "en"),
        ("Das ist\x00 ein ganz \ud800normaler Satz mit Fehlern.", "de"),
        ("Voir https://example.com/the/english/words/of/this/link pour la liste complète des pays.", "fr"),
        ("Les jours de la semaine sont :\nle lundi (premier jour) ;\nle mardi (deuxième jour) ;", "fr"),
        ("안녕하세요", "ko"),
        ("If you like it (a lot of people do), then: buy it and be happy.", "en"),
        # A language that nobody asked for competes as well.
        ("Detta är en helt vanlig mening på svenska.", "sv"),
        # Varieties that share the written form of a language.
        ("اللغة دى بيتكلموها الناس فى مصر كل يوم", "ar"),
    ],
)
def test_reads_the_prose_and_only_the_prose(identifier: LanguageIdentifier, text: str, language: str) -> None:
    assert identifier.identify([text])[0].language == language


def test_a_batch_equals_its_texts_one_by_one(identifier: LanguageIdentifier) -> None:
    texts = ["", *SENTENCES.values(), "12345", "Euro", *reversed(SENTENCES.values())]
    assert identifier.identify(texts) == [identifier.identify([text])[0] for text in texts]
    assert identifier.identify([]) == []


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=60))
def test_any_string_is_accepted(identifier: LanguageIdentifier, text: str) -> None:
    found = identifier.identify([text])[0]
    assert 0.0 <= found.confidence <= 1.0


PATHOLOGICAL = {
    "one word": "a" * 10**6,
    "open formulas": "$a " * 7000,
    "open brackets": "\\[" * 10000,
    "open environments": "\\begin{a}" * 2000,
    "open tags": "<a" * 10000,
    "addresses": "a.a" * 7000,
    "calls": "\n".join("a(" + "()" * 90 + "!" for _ in range(100)),
    "operators": "\n".join("return " + "=a " * 60 + "." for _ in range(100)),
    "lines": "\n" * 10**6,
}


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_time_is_bounded(identifier: LanguageIdentifier, name: str) -> None:
    # A quadratic pattern takes tens of seconds here; measured: below 0.3 s.
    started = time.monotonic()
    identifier.identify([PATHOLOGICAL[name]])
    assert time.monotonic() - started < 5.0


def test_thresholds_come_from_the_configuration() -> None:
    texts = ["Montag.", "De munteenheid van Japan is de yen.", SENTENCES["de"]]
    lenient = LanguageIdentifier(LanguageIdConfig(min_word_letters=1, min_letters=1, min_confidence=0.0), LANGUAGES)
    assert all(found.language for found in lenient.identify(texts))
    strict = LanguageIdentifier(LanguageIdConfig(min_letters=1000), LANGUAGES)
    assert [found.language for found in strict.identify(texts)] == [None] * 3
    certain = LanguageIdentifier(LanguageIdConfig(min_confidence=0.99), LANGUAGES)
    assert [found.language for found in certain.identify(texts)] == [None, None, "de"]
    cut = LanguageIdentifier(LanguageIdConfig(max_chars=4), LANGUAGES)
    assert [found.language for found in cut.identify(texts)] == [None] * 3


def test_letters_and_prose() -> None:
    assert count_letters("ab1 é?") == 3
    assert count_letters("日本カ한") == 12
    assert prose("see `x = 1` and 12 <b>bold</b>\nx = 5\nwords") == "see and bold words"


def test_wrong_models_and_languages_are_refused(tmp_path) -> None:
    broken = tmp_path / "lid.ftz"
    broken.write_bytes(b"not a model" * 100)
    with pytest.raises(ConfigError, match="no fastText classifier"):
        LanguageIdentifier(LanguageIdConfig(path=str(broken)), LANGUAGES)
    with pytest.raises(ConfigError, match="'xx' cannot be identified"):
        LanguageIdentifier(LanguageIdConfig(), ["de", "xx"])
    with pytest.raises(ConfigError, match="on_abstain='maybe'"):
        LanguageIdConfig(on_abstain="maybe").check("language_id")
    with pytest.raises(ConfigError, match=r"language_id\.path='none\.ftz': no such file"):
        LanguageIdConfig(path="none.ftz").check("language_id")
    assert bundled_lid_path().name == "lid.176.ftz"
