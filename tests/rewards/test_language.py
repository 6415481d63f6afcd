"""The real lid.176 on real text and on what is no text at all."""

from __future__ import annotations

import dataclasses
import os
import random
import struct
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import LanguageIdConfig, ScorerConfig
from nemo_lrpo.rewards import language_helpers
from nemo_lrpo.rewards.language import (
    SAMPLE_CHARS,
    LanguageIdentifier,
    bundled_lid_path,
    count_letters,
    prose,
    prose_lines,
)
from nemo_lrpo.rewards.language_helpers import SMALLEST_SHARE, HelpedIdentifier
from tools.demo_world import build_facts, parallel_texts

ROOT = Path(__file__).resolve().parents[2]
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
NEIGHBOURS = {
    "bg": "Официалната валута на Япония се нарича йена и се използва в цялата страна.",
    "ca": "La moneda oficial del Japó es diu ien i s'utilitza a tot el país.",
    "cs": "Oficiální měna Japonska se jmenuje jen a používá se v celé zemi.",
    "da": "Den officielle valuta i Japan hedder yen og bruges i hele landet.",
    "fa": "واحد پول ژاپن ین است و در سراسر کشور استفاده می‌شود.",
    "hi": "जापान की आधिकारिक मुद्रा येन है और यह पूरे देश में चलती है।",
    "ms": "Mata wang rasmi Jepun ialah yen dan ia digunakan di seluruh negara tersebut oleh semua orang.",
    "no": "Den offisielle valutaen i Japan heter yen og brukes over hele landet.",
    "ro": "Moneda oficială a Japoniei se numește yen și este folosită în toată țara.",
    "sv": "Den japanska valutan heter yen och används i hela landet.",
    "th": "สกุลเงินของประเทศญี่ปุ่นคือเยน",
    "tr": "Japonya'nın resmi para birimi yendir ve tüm ülkede kullanılır.",
    "uk": "Валюта Японії називається єною, і нею користуються по всій країні.",
}
"""Languages that nobody asked for, next to those that are."""


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
        "①②③④⑤⑥",
        "😀😀😀😀😀😀",
        "zxcv bnm qwerty lkjh",
        "hmm hmm hmm hmm",
        "lorem ipsum dolor sit amet",
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
        ("Auf https://example.com/the/words steht es, oder frag admin@example.com danach.", "de"),
        ("请访问https://example.com/，那里有这个国家的全部资料。", "zh"),
        ("12 3 " * 300 + "Das sind alle Zahlen, die wir bis heute kennen." + "12 3 " * 300, "de"),
        # A fence opens a line; within one it is decoration.
        ("네~~~ 한국의 통화는 원입니다. 서울이 수도입니다.", "ko"),
        ("好的~~~中国的首都是北京。", "zh"),
        ("~~~\nprint('hello world, how are you')\n~~~\nDas ist der Rest des Textes.", "de"),
        # Words after a sign of equality.
        ("x = 5, weil die Summe aller Zahlen gleich zehn ist", "de"),
        ("Antwort = Die Währung von Japan ist der Yen", "de"),
        ("E = mc² ist die Formel dafür", "de"),
        # Varieties that share the written form of a language.
        ("اللغة دى بيتكلموها الناس فى مصر كل يوم", "ar"),
    ],
)
def test_reads_the_prose_and_only_the_prose(identifier: LanguageIdentifier, text: str, language: str) -> None:
    assert identifier.identify([text])[0].language == language


@pytest.mark.parametrize("language", NEIGHBOURS)
def test_a_language_that_nobody_asked_for_is_named_as_such(identifier: LanguageIdentifier, language: str) -> None:
    assert identifier.identify([NEIGHBOURS[language]])[0].language == language


def test_mass_split_with_a_neighbour_goes_to_the_candidate(identifier: LanguageIdentifier) -> None:
    # Indonesian that the model itself calls Malay, or cannot tell from it.
    texts = ["dalam 3 hari", "dalam 20 menit", "Anak itu membaca buku di perpustakaan", "Saya akan datang esok hari"]
    others = [language for language in LANGUAGES if language != "id"]
    unasked = LanguageIdentifier(LanguageIdConfig(), others).identify(texts)
    asked = identifier.identify(texts)
    assert [found.language for found in unasked] == ["ms", "ms", None, None]
    assert [found.language for found in asked] == ["id"] * 4
    assert all(found.confidence > 0.6 for found in asked)


# The least share of texts of a kind that come out right and the greatest that come out wrong, over 15 languages.
# Measured: statement 0.9998 right and none wrong, answer 0.9988 and none, list 0.888 and 0.039.
ACCURACY = {"statement": (0.995, 0.001), "answer": (0.995, 0.001), "list": (0.87, 0.05)}


def test_accuracy_on_sentences_and_on_lists_of_names(identifier: LanguageIdentifier) -> None:
    texts = defaultdict(list)
    for text in parallel_texts(build_facts()):
        texts[text.kind].append(text)
    for kind, (least_right, most_wrong) in ACCURACY.items():
        found = identifier.identify([text.text for text in texts[kind]])
        right = sum(f.language == text.language for f, text in zip(found, texts[kind])) / len(found)
        wrong = sum(f.language not in (None, text.language) for f, text in zip(found, texts[kind])) / len(found)
        assert right >= least_right and wrong <= most_wrong, f"{kind}: {right:.4f} right, {wrong:.4f} wrong"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("日本的首都是东京", "zh"),
        ("日本银行是日本的中央银行", "zh"),
        ("东京是日本的首都，日本的货币是日元。", "zh"),
        # The model alone says Japanese of these.
        ("全年高等学校专升本", "zh"),
        ("日本的货币", "zh"),
        # Kana decide, wherever they are; so do they by their absence, but not in short texts: a Japanese date has none.
        ("首都は東京", "ja"),
        ("1984年5月12日土曜日", "ja"),
        ("1984年5月12日星期六", "zh"),
        ("東京都知事選挙のお知らせ", "ja"),
        ("他最喜欢的日本品牌是「カシオ」，每天都带着那块手表去公司上班，从来没有换过别的。", "zh"),
        # What Chinese quotes is not its own.
        ("日本的货币是円（えん），也就是日元。", "zh"),
        ("“谢谢”用日语说是“ありがとう”。", "zh"),
        ("일본의 通貨는 엔이다", "ko"),
        ("The word 日本 is the name of Japan in Japanese and in Chinese.", "en"),
    ],
)
def test_the_script_decides_between_chinese_japanese_and_korean(
    identifier: LanguageIdentifier, text: str, language: str
) -> None:
    assert identifier.identify([text])[0].language == language


def test_a_long_text_is_judged_from_all_its_parts(identifier: LanguageIdentifier) -> None:
    german, english = SENTENCES["de"] + " ", SENTENCES["en"] + " "
    long = german * 40
    assert len(long) > 5 * SAMPLE_CHARS
    assert identifier.identify([long])[0].language == "de"
    # A start in another language is not taken for the whole.
    assert identifier.identify([english * 4 + long])[0].language == "de"


@pytest.mark.parametrize("sample", [True, False])
def test_opening_and_closing_in_a_language_is_not_enough(sample: bool) -> None:
    """Wherever the few sentences stand, a text is in the language of the many."""
    identifier = LanguageIdentifier(LanguageIdConfig(sample=sample), LANGUAGES)
    german, english = SENTENCES["de"] + " ", SENTENCES["en"] + " "
    texts = [
        f"{german}{english * 12}{german}",
        f"{english * 6}{german * 2}{english * 6}",
        f"{german * 2}{english * 12}",
    ]
    # Other texts of the same build have their windows elsewhere.
    texts += [f"{german}{'Yes, ' * n}{english * 12}{german}" for n in range(20)]
    assert {found.language for found in identifier.identify(texts)} == {"en"}


def test_mixed_texts_are_judged_as_a_full_reading_judges_them(identifier: LanguageIdentifier) -> None:
    whole = LanguageIdentifier(LanguageIdConfig(sample=False), LANGUAGES)
    sentences = list(SENTENCES.values())
    draw = random.Random(0)
    texts = []
    for _ in range(200):
        few, many = draw.sample(sentences, 2)
        parts = [few] * 3 + [many] * 12
        draw.shuffle(parts)
        texts.append(" ".join(parts))
    pairs = list(zip(identifier.identify(texts), whole.identify(texts), strict=True))
    # Measured: 0.97.
    assert sum(ours.language == theirs.language for ours, theirs in pairs) >= 0.94 * len(pairs)


def test_a_batch_equals_its_texts_one_by_one(identifier: LanguageIdentifier) -> None:
    texts = ["", *SENTENCES.values(), "12345", "Euro", *NEIGHBOURS.values(), *reversed(SENTENCES.values())]
    assert identifier.identify(texts) == [identifier.identify([text])[0] for text in texts]
    assert identifier.identify([]) == []
    assert identifier.identify(texts) == identifier.identify_prose([prose_lines(text) for text in texts])


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
    certain = LanguageIdentifier(LanguageIdConfig(min_confidence=0.97), LANGUAGES)
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


OWN_WORDS = {"de": "die ist der heißt von", "en": "the is of its and", "ru": "валюта страны столица это и"}


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three languages that is not quantized, as lid.176.bin is not, in fastText's format: one word, one
    vector, the word's language its only direction."""
    words = [(word, code) for code, line in OWN_WORDS.items() for word in line.split()]
    codes, dim, bucket = list(OWN_WORDS), 16, 1
    vectors = np.zeros((len(words) + bucket, dim), np.float32)
    for row, (_, code) in enumerate(words):
        vectors[row, codes.index(code)] = 8.0
    labels = np.eye(len(codes), dim, dtype=np.float32)
    # Magic number, version; dim, ws, epoch, minCount, neg, wordNgrams, loss=softmax, model=supervised, bucket, minn,
    # maxn, lrUpdateRate, t; dictionary: entries, words, labels, tokens, pruned; then the two matrices, not quantized.
    parts = [struct.pack("<2i12id", 793712314, 12, dim, 5, 5, 1, 5, 1, 3, 3, bucket, 0, 0, 100, 1e-4)]
    parts.append(struct.pack("<3i2q", len(words) + len(codes), len(words), len(codes), 1000, -1))
    entries = [(word, 0) for word, _ in words] + [(f"__label__{code}", 1) for code in codes]
    parts += [entry.encode() + struct.pack("<xqb", 10, kind) for entry, kind in entries]
    for matrix in (vectors, labels):
        parts += [struct.pack("<?2q", False, *matrix.shape), matrix.tobytes()]
    path = tmp_path_factory.mktemp("lid") / "own.bin"
    path.write_bytes(b"".join(parts))
    return path


def test_any_fasttext_classifier_by_path(own_model: Path) -> None:
    config = LanguageIdConfig(path=str(own_model))
    identifier = LanguageIdentifier(config, ["de", "en"])
    texts = [SENTENCES["de"], SENTENCES["en"], SENTENCES["ru"], "12345", f"{SENTENCES['ja']} die ist"]
    # The last: a script whose languages the model does not know is left to the model.
    assert [found.language for found in identifier.identify(texts)] == ["de", "en", "ru", None, "de"]
    with pytest.raises(ConfigError, match=r"'fr' cannot be identified by own\.bin; accepted: de, en, ru"):
        LanguageIdentifier(config, ["fr"])


# --- several processes ----------------------------------------------------------------------------------------------

ODD = ["", "\ud83d", "\ude00 \x00\n", "😀", "```\ncode", *SENTENCES.values(), *NEIGHBOURS.values()]


def helpers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "nemo_lrpo.rewards.language_helpers" in child.cmdline()]


@pytest.mark.parametrize("processes", [2, 3])
def test_helper_processes_change_nothing(identifier: LanguageIdentifier, processes: int) -> None:
    helped = HelpedIdentifier(LanguageIdConfig(threads=processes), LANGUAGES)
    mine = helpers_of(psutil.Process())
    assert len(mine) == processes - 1
    try:
        for count in (0, 1, 2 * SMALLEST_SHARE - 1, 2 * SMALLEST_SHARE, 2 * SMALLEST_SHARE + 1, 7 * SMALLEST_SHARE + 3):
            texts = [ODD[i * i % len(ODD)] for i in range(count)]
            assert helped.identify(texts) == identifier.identify(texts)
            lines = [prose_lines(text) for text in texts]
            assert helped.identify_prose(lines) == identifier.identify_prose(lines)
        worked = [sum(helper.cpu_times()[:2]) for helper in mine]
        assert all(worked)
    finally:
        helped.close()
    assert not any(helper.is_running() for helper in mine)
    assert helped.identify(ODD * 2) == identifier.identify(ODD * 2)


def test_a_killed_helper_is_done_without(identifier: LanguageIdentifier) -> None:
    helped = HelpedIdentifier(LanguageIdConfig(threads=2), LANGUAGES)
    texts = ODD * 3
    try:
        assert helped.identify(texts) == identifier.identify(texts)
        helpers_of(psutil.Process())[0].kill()
        for _ in range(3):
            assert helped.identify(texts) == identifier.identify(texts)
    finally:
        helped.close()


def test_a_stopped_helper_is_not_waited_for(identifier: LanguageIdentifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_helpers, "STALL_LIMIT_S", 0.5)
    helped = HelpedIdentifier(LanguageIdConfig(threads=2), LANGUAGES)
    # More than a pipe holds, so that asking blocks too.
    texts = [SENTENCES["ru"] * 20] * 200
    try:
        [helper] = helpers_of(psutil.Process())
        helper.suspend()
        assert helped.identify(texts) == identifier.identify(texts)
        assert not helper.is_running()
    finally:
        helped.close()


def test_an_answer_that_nobody_took_is_never_taken_for_the_next(
    identifier: LanguageIdentifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    helped = HelpedIdentifier(LanguageIdConfig(threads=2), LANGUAGES)

    def fail(self: LanguageIdentifier, texts: list[str]) -> None:
        raise KeyboardInterrupt

    try:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(LanguageIdentifier, "identify", fail)
            helped.identify([SENTENCES["ru"]] * 50)
        texts = [SENTENCES["de"]] * 50
        assert helped.identify(texts) == identifier.identify(texts)
    finally:
        helped.close()


def test_helpers_end_with_the_process_that_started_them() -> None:
    program = (
        "import time\n"
        "from nemo_lrpo.config.scoring import LanguageIdConfig\n"
        "from nemo_lrpo.rewards.language_helpers import HelpedIdentifier\n"
        "helped = HelpedIdentifier(LanguageIdConfig(threads=2), ['de'])\n"
        "helped.identify(['Die Antwort ist einfach.'] * 100)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        orphans = helpers_of(psutil.Process(parent.pid))
        assert len(orphans) == 1
        parent.kill()
    _, alive = psutil.wait_procs(orphans, timeout=10)
    assert not alive


def test_helpers_get_the_configuration(identifier: LanguageIdentifier) -> None:
    config = LanguageIdConfig(
        threads=2, min_letters=1, min_word_letters=1, min_confidence=0.0, max_chars=30, aliases={}
    )
    alone = LanguageIdentifier(dataclasses.replace(config, threads=1), ["de"])
    texts = [*ODD, "Montag.", "اللغة دى بيتكلموها الناس فى مصر كل يوم"] * 2
    helped = HelpedIdentifier(config, ["de"])
    try:
        assert helped.identify(texts) == alone.identify(texts) != identifier.identify(texts)
    finally:
        helped.close()
